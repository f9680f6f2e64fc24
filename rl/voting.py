"""Compute baselines from the same samples: several answers in one mode in the place of a choice between modes.

N samples of an item can be put to a majority vote, which needs nothing else, or the best one taken, which needs a
perfect verifier and is pass@N. Given the same tokens a query as the model's own choice, what do they reach? Spread
evenly (N for every item) or allotted by difficulty in the manner of Snell et al. (arXiv 2408.03314): in each bin of
difficulty the N is chosen on one half of the items and measured on the other. I items, K samples, O options (a mode
and an N each), S bins, R resamples; pure numpy.
"""

from dataclasses import dataclass

import numpy as np

from siesta.data.formats import boxed
from siesta.rl.policies import Measurement, choices, per_item
from siesta.rl.resampling import Estimate

SHUFFLES = 64  # orders of the samples that a vote is averaged over
BINS = 5  # of difficulty, where items have no levels
NO_ANSWER = -1


def ballot(solution: str) -> str:
    r"""What a vote counts as the same answer: the last \boxed{...} if there is one, else all, white space folded."""
    held = boxed(solution)
    return " ".join((solution if held is None else held).split())


def ballot_number(solution: str, known: dict[str, int]) -> int:
    """Number of an answer to an item, the same for equal ones; `NO_ANSWER` if there is none.

    Args:
        known: Ballots of the item and their numbers; is written to.
    """
    text = ballot(solution)
    return known.setdefault(text, len(known)) if text else NO_ANSWER


def pass_at(right: np.ndarray, drawn: np.ndarray, k: int) -> np.ndarray:
    """Chance that k of n samples drawn without replacement hold a right one, 1 - C(n - c, k) / C(n, k): unbiased.

    Args:
        right, drawn: c and n of each item, (I,).

    Returns:
        (I,); NaN where n < k.
    """
    missed = np.ones(len(right))
    for i in range(k):
        missed *= np.clip(drawn - right - i, 0, None) / np.maximum(drawn - i, 1)
    return np.where(drawn >= k, 1 - missed, np.nan)


def majority(answers: np.ndarray, scores: np.ndarray, *, seed: int, shuffles: int = SHUFFLES) -> np.ndarray:
    """Score of the answer that most of N samples give, for N = 1 to K, (I, K); ties go to the answer given first.

    Means over random orders of the samples; that of N = 1 is exact. A sample without an answer or without a score
    does not vote. Where nobody votes the score is 0, and NaN where no sample has a score.

    Args:
        answers: Numbers of answers, (I, K).
        scores: In [0, 1], NaN where the verifier failed, (I, K).
    """
    items, size = answers.shape
    rng = np.random.default_rng(seed)
    rows = np.arange(items)
    total = np.zeros((items, size))
    for _ in range(shuffles):
        order = rng.permuted(np.tile(np.arange(size), (items, 1)), axis=1)
        given, found = (np.take_along_axis(values, order, axis=1) for values in (answers, scores))
        votes = (given != NO_ANSWER) & ~np.isnan(found)
        counts = np.zeros((items, size))
        for n in range(size):
            same = votes & votes[:, n : n + 1] & (given == given[:, n : n + 1])
            counts[:, : n + 1] += same[:, : n + 1]
            counts[:, n] = (same[:, : n + 1]).sum(1)
            first = counts[:, : n + 1].argmax(1)
            total[:, n] += np.where(counts[rows, first] > 0, np.nan_to_num(found[rows, first]), 0.0)
    means = total / shuffles
    means[:, 0] = np.nansum(scores, axis=1) / np.maximum((~np.isnan(scores)).sum(1), 1)
    means[np.isnan(scores).all(1)] = np.nan
    return means


@dataclass(frozen=True)
class Options:
    """Ways to spend compute on an item.

    Args:
        names: Mode and N of each.
        scores: What each comes to on each item, (I, O).
        tokens: What it costs, (I, O).
    """

    names: list[tuple[str, int]]
    scores: np.ndarray
    tokens: np.ndarray

    def of(self, mode: str) -> "Options":
        """Those of one mode."""
        columns = [o for o, (name, _) in enumerate(self.names) if name == mode]
        return Options([self.names[o] for o in columns], self.scores[:, columns], self.tokens[:, columns])


def options(measured: Measurement, *, vote: bool, seed: int) -> Options:
    """N = 1 to K samples in every mode, by vote or with a perfect verifier; items whose K are not all scored have none
    with a perfect verifier (NaN) beyond those that are.
    """
    assert measured.drawn_scores is not None
    assert measured.drawn_answers is not None
    names, scores, tokens = [], [], []
    for column, mode in enumerate(measured.modes):
        drawn = measured.drawn_scores[:, column]
        size = drawn.shape[1]
        if vote:
            found = majority(measured.drawn_answers[:, column], drawn, seed=seed)
        else:
            right, known = (drawn == 1).sum(1), (~np.isnan(drawn)).sum(1)
            found = np.stack([pass_at(right, known, k) for k in range(1, size + 1)], axis=1)
        names += [(mode, n) for n in range(1, size + 1)]
        scores.append(found)
        tokens.append(measured.sampled_tokens[:, column, None] * np.arange(1, size + 1))
    return Options(names, np.concatenate(scores, axis=1), np.concatenate(tokens, axis=1))


def binned(values: np.ndarray, bins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means in each bin, (I, O) -> (S, O); 0 in a bin without weight.

    Args:
        bins: Number of each item's bin, (I,).
        weights: (I,).
    """
    members = np.eye(int(bins.max()) + 1)[bins] * weights[:, None]  # (I, S)
    known = ~np.isnan(values)
    counts = members.T @ known
    return np.divide(members.T @ np.where(known, values, 0.0), counts, out=np.zeros_like(counts), where=counts > 0)


def upgrades(tokens: np.ndarray, scores: np.ndarray) -> list[tuple[float, int]]:
    """From the cheapest option of one bin along the upper hull: slope of each step, and the option it leads to.

    Args:
        tokens, scores: (O,).
    """
    at = int(np.lexsort((-scores, tokens))[0])
    steps = [(np.inf, at)]
    while True:
        dearer = np.flatnonzero((tokens > tokens[at]) & (scores > scores[at]))
        if not len(dearer):
            return steps
        slopes = (scores[dearer] - scores[at]) / (tokens[dearer] - tokens[at])
        at = int(dearer[slopes.argmax()])
        steps.append((float(slopes.max()), at))


def allotments(tokens: np.ndarray, scores: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which option each bin gets as the budget rises, (steps, S): always the upgrade that gains most a token.

    Args:
        tokens, scores: Means in each bin, (S, O).
        sizes: Items of each bin, (S,); one without items stays with its cheapest.
    """
    own = [upgrades(t, s if size else np.zeros_like(s)) for t, s, size in zip(tokens, scores, sizes, strict=True)]
    now = np.array([steps[0][1] for steps in own])
    result = [now]
    # Slopes fall along a hull, so that this order leaves out no step of a bin.
    for _, place, number in sorted((-step[0], i, s) for s, steps in enumerate(own) for i, step in enumerate(steps)):
        if place:
            now = now.copy()
            now[number] = own[number][place][1]
            result.append(now)
    return np.array(result)


def at_budget(tokens: np.ndarray, scores: np.ndarray, budget: float) -> float:
    """Score at a budget: a mix of the two neighbours along rising tokens. NaN below the cheapest; what the dearest
    leaves over is not spent.
    """
    if budget < tokens[0]:
        return float("nan")
    return float(np.interp(budget, np.maximum.accumulate(tokens), scores))


def uniform(ways: Options, weights: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Score of the same N for every item, mixed with N + 1 to meet each budget, (R,)."""
    found, costs = means(ways, weights)
    return np.array([at_budget(t, s, b) for t, s, b in zip(costs, found, budgets, strict=True)])


def means(ways: Options, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean score and tokens of each option, (R, O) each."""
    known = ~np.isnan(ways.scores)
    scores = weights @ np.where(known, ways.scores, 0.0) / np.maximum(weights @ known, 1e-12)
    return scores, weights @ ways.tokens / weights.sum(1, keepdims=True)


def allotted(
    ways: Options, bins: np.ndarray, folds: np.ndarray, weights: np.ndarray, budgets: np.ndarray
) -> np.ndarray:
    """Score of an option for each bin, chosen on one fold and measured on the other, mean over both, (R,).

    Args:
        bins: Of difficulty, (I,).
        folds: 0 or 1 for each item, (I,).
        weights: (R, I).
        budgets: Tokens a query, (R,).
    """
    found = np.zeros(len(weights))
    for row, (own, budget) in enumerate(zip(weights, budgets, strict=True)):
        sides = [own * (folds == fold) for fold in (0, 1)]
        cells = [(binned(ways.tokens, bins, w), binned(ways.scores, bins, w)) for w in sides]
        sizes = [np.bincount(bins, w, minlength=int(bins.max()) + 1) for w in sides]
        for chosen, judged in ((0, 1), (1, 0)):
            plan = allotments(*cells[chosen], sizes[chosen])
            share = sizes[judged] / sizes[judged].sum()
            tokens, scores = ((cell[np.arange(len(share)), plan] * share).sum(1) for cell in cells[judged])
            found[row] += at_budget(tokens, scores, budget) * sizes[judged].sum() / own.sum()
    return found


def difficulty(measured: Measurement) -> np.ndarray:
    """Bin of each item, (I,): its level if there are several, else its fifth by p(think), which knows no answer."""
    levels, codes = np.unique(measured.levels, return_inverse=True)
    if len(levels) > 1:
        return codes
    p = measured.mode_probs[:, -1]
    return np.searchsorted(np.quantile(p, np.arange(1, BINS) / BINS), p, side="right")


def folds_of(clusters: np.ndarray, seed: int) -> np.ndarray:
    """0 or 1 for each item, half of the clusters each, (I,)."""
    _, codes = np.unique(clusters, return_inverse=True)
    count = int(codes.max()) + 1
    return (np.random.default_rng(seed).permutation(count) % 2)[codes]


def curves(measured: Measurement, *, seed: int) -> dict[str, list[dict]]:
    """Mode -> for each N: `tokens`, `majority` and `pass`, means over items."""
    once = np.ones((1, len(measured.levels)))
    votes, best = options(measured, vote=True, seed=seed), options(measured, vote=False, seed=seed)
    (voted, tokens), (passed, _) = means(votes, once), means(best, once)
    rows: dict[str, list[dict]] = {mode: [] for mode in measured.modes}
    for o, (mode, n) in enumerate(votes.names):
        row = {"n": n, "tokens": tokens[0, o], "majority": voted[0, o], "pass": passed[0, o]}
        rows[mode].append({name: float(value) if name != "n" else value for name, value in row.items()})
    return rows


def equal_tokens(
    measured: Measurement, clusters: np.ndarray, weights: np.ndarray, *, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Baselines at the tokens of `free`, sampled: way to choose an answer -> baseline -> accuracy.

    Baselines are `uniform <mode>`, `allotted <mode>`, and `allotted any`, where a bin may also have another mode:
    a choice between modes by known difficulty.
    """
    once = np.ones((1, weights.shape[1]))
    tokens = per_item(measured, choices(measured, greedy=False)["free"], greedy=False)["tokens"]
    bins, folds = difficulty(measured), folds_of(clusters, seed)
    result: dict[str, dict[str, Estimate]] = {}
    for kind in ("majority", "best_of_n"):
        ways = options(measured, vote=kind == "majority", seed=seed)
        rows = result.setdefault(kind, {})
        for mode in [*measured.modes, "any"]:
            own = ways if mode == "any" else ways.of(mode)
            spent = [w @ tokens / w.sum(1) for w in (once, weights)]
            if mode != "any":
                value, draws = (uniform(own, w, b) for w, b in zip((once, weights), spent, strict=True))
                rows[f"uniform {mode}"] = Estimate(float(value[0]), draws)
            value, draws = (allotted(own, bins, folds, w, b) for w, b in zip((once, weights), spent, strict=True))
            rows[f"allotted {mode}"] = Estimate(float(value[0]), draws)
    return result
