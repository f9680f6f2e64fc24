"""Policies over modes, judged on the same rollouts: accuracy, tokens, mode shares, regret, bootstrap intervals.

Every item is answered in every mode. A completion does not depend on who chose its mode, so one set of forced rollouts
prices every policy: always one mode, random, the model's own choice, an oracle. Differences between rows are then
differences between policies, not between samples. Pure numpy; I items, M modes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np

from siesta.data.errors import DataError


@dataclass(frozen=True)
class Measurement:
    """Forced rollouts of one model on one set of items. Arrays over samples are already means.

    Args:
        modes: Mode names, in column order.
        levels: Difficulty of each item, (I,).
        mode_probs: pi(m given x), (I, M).
        mass: Probability on control tokens at the first position, (I,).
        greedy_scores, greedy_tokens: Score in [0, 1] and response tokens of the greedy completion, (I, M).
        sampled_scores, sampled_tokens, sampled_rewards: Means over K samples, (I, M). The rewards are Q(x, m).
        truncated: Share of samples that hit the mode's cap, (I, M).
        unscorable: Rollouts whose verifier failed; they are left out of the means.
        contexts: Number of each item's context, (I,), where items share them; intervals then resample contexts.
        sleep_right: How right sleep is, in [0, 1]: the share of the taught notes' rows that the model's have as well,
            or the accuracy of answers from states that are tensors; NaN where nothing sleeps.
        hacks: Mode -> flag of `siesta.rewards.hacking` -> share of the mode's samples that raise it.
        drawn_scores, drawn_answers: Of each single sample, (I, M, K), where a vote or pass@k needs them: score, NaN
            if the verifier failed, and number of its answer (`siesta.rl.voting.ballot_number`).
    """

    modes: list[str]
    levels: np.ndarray
    mode_probs: np.ndarray
    mass: np.ndarray
    greedy_scores: np.ndarray
    greedy_tokens: np.ndarray
    sampled_scores: np.ndarray
    sampled_tokens: np.ndarray
    sampled_rewards: np.ndarray
    truncated: np.ndarray
    contexts: np.ndarray | None = None
    unscorable: int = 0
    sleep_right: float = float("nan")
    hacks: dict[str, dict[str, float]] = field(default_factory=dict)
    drawn_scores: np.ndarray | None = None
    drawn_answers: np.ndarray | None = None


def one_hot(columns: np.ndarray, num_modes: int) -> np.ndarray:
    """(I,) -> (I, M)."""
    return np.eye(num_modes)[columns]


def choices(measured: Measurement, *, greedy: bool) -> dict[str, np.ndarray]:
    """The policies of the table, each as a distribution over modes per item, (I, M).

    `free` is the model's own choice: its most likely mode if greedy, its distribution if sampled. `random` ignores the
    item but has the shares of `free`. `oracle` takes the mode of the highest Q(x, m); with K samples it profits from
    luck, so it is an upper bound, and regret against it is never too low.
    """
    items, num_modes = measured.mode_probs.shape
    free = one_hot(measured.mode_probs.argmax(1), num_modes) if greedy else measured.mode_probs
    table = {f"always-{mode}": np.tile(np.eye(num_modes)[m], (items, 1)) for m, mode in enumerate(measured.modes)}
    table["random"] = np.tile(free.mean(0), (items, 1))
    table["free"] = free
    table["oracle"] = one_hot(measured.sampled_rewards.argmax(1), num_modes)
    return table


def per_item(measured: Measurement, choice: np.ndarray, *, greedy: bool) -> dict[str, np.ndarray]:
    """Expected accuracy, tokens, reward and regret of a policy on each item, (I,) each.

    Reward and regret are taken from Q(x, m) in both tables: the outcome of a single greedy completion says little
    about the better mode of an item.
    """
    scores = measured.greedy_scores if greedy else measured.sampled_scores
    tokens = measured.greedy_tokens if greedy else measured.sampled_tokens
    reward = (choice * measured.sampled_rewards).sum(1)
    return {
        "accuracy": (choice * scores).sum(1),
        "tokens": (choice * tokens).sum(1),
        "reward": reward,
        "regret": measured.sampled_rewards.max(1) - reward,
    }


def resampled_means(values: np.ndarray, clusters: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Mean over items in bootstrap samples of whole clusters, (R,). The same seed draws the same clusters again.

    Args:
        values: (I,); NaN counts for nothing.
        clusters: Number of each item's cluster, (I,).
    """
    _, codes = np.unique(clusters, return_inverse=True)
    known = ~np.isnan(values)
    sums, counts = np.bincount(codes, np.where(known, values, 0.0)), np.bincount(codes, known)
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def interval(
    values: np.ndarray,
    *,
    resamples: int,
    seed: int,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    clusters: np.ndarray | None = None,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over items.

    Args:
        values: (I,).
        resamples: Number of bootstrap samples.
        statistic: Of the resampled values (R, I) along the last axis; the mean by default.
        clusters: Items that depend on each other share a number, (I,), and are resampled together; None: all are
            independent. Of the mean only.
    """
    if clusters is not None:
        low, high = np.percentile(resampled_means(values, clusters, resamples=resamples, seed=seed), [2.5, 97.5])
        return float(low), float(high)
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(0, len(values), size=(resamples, len(values)))]
    means = drawn.mean(-1) if statistic is None else statistic(drawn)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(measured: Measurement, choice: np.ndarray, *, greedy: bool, resamples: int, seed: int) -> dict:
    """One row of the table: means, intervals, mode shares, and the same per level."""
    values = per_item(measured, choice, greedy=greedy)
    row: dict = {name: float(column.mean()) for name, column in values.items()}
    row["interval"] = {
        name: interval(column, resamples=resamples, seed=seed, clusters=measured.contexts)
        for name, column in values.items()
        if name != "reward"
    }
    row["shares"] = dict(zip(measured.modes, choice.mean(0).tolist(), strict=True))
    row["levels"] = {}
    for level in np.unique(measured.levels):
        at = measured.levels == level
        row["levels"][int(level)] = {
            "items": int(at.sum()),
            "shares": dict(zip(measured.modes, choice[at].mean(0).tolist(), strict=True)),
            **{name: float(column[at].mean()) for name, column in values.items()},
        }
    return row


def scorable_items(measured: Measurement) -> Measurement:
    """Without the items that have no scorable rollout in some mode: no policy can be priced on them."""
    usable = ~(np.isnan(measured.greedy_scores) | np.isnan(measured.sampled_rewards)).any(axis=1)
    arrays = {f.name: getattr(measured, f.name) for f in fields(measured)}
    return replace(measured, **{k: v[usable] for k, v in arrays.items() if isinstance(v, np.ndarray)})


def hack_line(hacks: dict[str, dict[str, float]]) -> str:
    """One line on the flags that were raised, or that none was."""
    raised = [
        f"{flag} {100 * share:.1f} % of {mode}" for mode, own in hacks.items() for flag, share in own.items() if share
    ]
    return f"Suspicious responses: {', '.join(raised) or 'none'}."


def table(measured: Measurement, *, resamples: int, seed: int) -> dict:
    """Every policy, decoded greedily and sampled. `dropped_items` had no scorable rollout in some mode.

    Raises:
        DataError: No item is left.
    """
    asked = len(measured.levels)
    measured = scorable_items(measured)
    if not len(measured.levels):
        raise DataError("evaluation: the verifier failed on every item; see the reasons it gives for one of them")
    result: dict = {"items": len(measured.levels), "dropped_items": asked - len(measured.levels)}
    result["mode_mass"] = float(measured.mass.mean())
    result["truncated"] = dict(zip(measured.modes, measured.truncated.mean(0).tolist(), strict=True))
    result["unscorable"] = measured.unscorable
    result["hacks"] = measured.hacks
    for decoding in ("greedy", "sampled"):
        greedy = decoding == "greedy"
        result[decoding] = {
            name: summarise(measured, choice, greedy=greedy, resamples=resamples, seed=seed)
            for name, choice in choices(measured, greedy=greedy).items()
        }
    return result
