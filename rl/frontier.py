"""The whole trade of accuracy against cost from one model: think where p(think) exceeds a threshold.

A threshold changes who writes an answer, not the answer, so every point of the frontier is arithmetic on the same
forced rollouts. At threshold 0 every item thinks, at 1 none does. *Thinking* is the recipe's last mode; an item that
does not think takes the likeliest of the others. I items, R resamples; pure numpy.

The area says what the order of the items by p(think) is worth: accuracy gained over random routing at the same cost,
averaged over all budgets from always-short to always-think. Over tokens, an order also has to put cheap gains first,
which a policy that was not priced by tokens has no reason to learn; over the share of items that think, all items cost
the same, and the area is the Qini coefficient of uplift modelling.
"""

from collections.abc import Sequence

import numpy as np

from siesta.data.errors import UserError
from siesta.rl.policies import Measurement, one_hot, summarise
from siesta.rl.resampling import Estimate, estimate

STEPS = 10  # of the think share between two thresholds of the table


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Raises UserError unless all lie in [0, 1]."""
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise UserError(f"--thresholds: {threshold:g} is no probability; a threshold on p(think) lies in 0 to 1")


def check_keep(share: float | None) -> None:
    """Raises UserError unless it is a share above 0, or None."""
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--keep: {share:g} is no share; 0.98 keeps 98 % of the accuracy of always thinking")


def thinks(p: np.ndarray, threshold: float) -> np.ndarray:
    """Which items think, (I,) bool: p above the threshold; at 0 all, even one whose p was rounded to 0."""
    return (p > threshold) | (threshold == 0)


def thresholds_by_share(p: np.ndarray, steps: int = STEPS) -> list[float]:
    """Thresholds at which 0, 1/steps, ..., all of the items think, from 1 down to 0, each once; ties think together or
    not, so there may be fewer. Each lies halfway to the next larger p: computed in bf16, p comes in steps, and another
    engine's rounding must not move the items of one over a threshold.
    """
    values, ordered = np.unique(p), np.sort(p)[::-1]
    halfway = dict(zip(values, (values + np.r_[values[1:], 1.0]) / 2, strict=True))
    inner = [float(halfway[ordered[round(step * len(p) / steps)]]) for step in range(1, steps)]
    return list(dict.fromkeys([1.0, *inner, 0.0]))


def routed(measured: Measurement, threshold: float) -> np.ndarray:
    """The policy of a threshold as a distribution over modes per item, (I, M)."""
    others = measured.mode_probs[:, :-1].argmax(1)
    last = measured.mode_probs.shape[1] - 1
    return one_hot(np.where(thinks(measured.mode_probs[:, -1], threshold), last, others), last + 1)


def area_under(order: np.ndarray, rise: np.ndarray, run: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the path that takes items from the highest `order` down, each one `run` to the right and `rise` up.

    Items of equal order are taken together, in a straight line: the mean over all their orders.

    Args:
        order, rise, run: (I,) each.
        weights: (R, I).

    Returns:
        (R,).
    """
    places = np.argsort(-order, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(order[places]) != 0])
    ups, overs = (np.add.reduceat((weights * values)[:, places], starts, axis=1) for values in (rise, run))
    return (overs * (np.cumsum(ups, axis=1) - ups / 2)).sum(1)


def area(p: np.ndarray, gain: np.ndarray, cost: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean accuracy over random routing, over budgets spread evenly from no item thinking to all, (R,).

    Args:
        p: What orders the items, (I,).
        gain: Accuracy of thinking less that of not thinking, (I,).
        cost: The same of tokens, (I,); NaN comes out where thinking costs no more in sum.
        weights: (R, I).
    """
    total = weights @ cost
    with np.errstate(divide="ignore", invalid="ignore"):
        under = np.where(total > 0, area_under(p, gain, cost, weights) / total, np.nan)
    return (under - weights @ gain / 2) / weights.sum(1)


def best_order(gain: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """An oracle's p, (I,): no order has a larger area, as long as no item both gains and saves nothing by thinking.

    Where thinking costs tokens this is the order by gain per token.
    """
    return np.arctan2(gain, cost)


def differences(measured: Measurement, *, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and tokens of thinking less those of not thinking, (I,) each."""
    think, rest = routed(measured, 0.0), routed(measured, 1.0)
    scores = measured.greedy_scores if greedy else measured.sampled_scores
    tokens = measured.greedy_tokens if greedy else measured.sampled_tokens
    return ((think - rest) * scores).sum(1), ((think - rest) * tokens).sum(1)


def areas(measured: Measurement, weights: np.ndarray, *, greedy: bool) -> dict[str, Estimate]:
    """`area` of the model's p(think) over tokens and `area_by_share`; `oracle_...`, the largest there is.

    The oracle knows the very rollouts that it is measured on and profits from their luck: an upper bound.
    """
    gain, cost = differences(measured, greedy=greedy)
    found = {}
    for name, spent in (("area", cost), ("area_by_share", np.ones_like(cost))):
        for whose, order in (("", measured.mode_probs[:, -1]), ("oracle_", best_order(gain, spent))):
            own = estimate(lambda w, order=order, spent=spent: area(order, gain, spent, w), weights)
            found[f"{whose}{name}"] = own
    return found


def points(
    measured: Measurement, thresholds: Sequence[float], *, greedy: bool, resamples: int, seed: int
) -> list[dict]:
    """A row for each threshold, as those of the policies, with its `threshold`."""
    bootstrap = {"resamples": resamples, "seed": seed}
    return [
        {"threshold": float(t)} | summarise(measured, routed(measured, t), greedy=greedy, **bootstrap)
        for t in thresholds
    ]


def highest_keeping(measured: Measurement, share: float, *, greedy: bool) -> float:
    """The highest threshold at which accuracy is at least `share` of always thinking's: the fewest that think.

    It lies halfway between two values of p(think), as those of `thresholds_by_share` do; 1 if none need think.
    """
    p = measured.mode_probs[:, -1]
    _, accuracy = path(measured, p, greedy=greedy)
    values = np.unique(p)[::-1]  # a cut above each of them, the last behind all
    halfway = np.r_[1.0, (values[:-1] + values[1:]) / 2, 0.0]
    return float(halfway[np.argmax(accuracy >= share * accuracy[-1] - 1e-12)])


def path(measured: Measurement, order: np.ndarray, *, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and accuracy of every cut of an order, from no item thinking to all, (I + 1,) each."""
    rest = routed(measured, 1.0)
    gain, cost = differences(measured, greedy=greedy)
    scores = measured.greedy_scores if greedy else measured.sampled_scores
    tokens = measured.greedy_tokens if greedy else measured.sampled_tokens
    places = np.argsort(-order, kind="stable")
    ends = np.r_[np.diff(order[places]) != 0, True]  # a cut cannot tell equals apart
    cuts = np.r_[True, ends]
    across = np.r_[0.0, np.cumsum(cost[places])] + (rest * tokens).sum()
    up = np.r_[0.0, np.cumsum(gain[places])] + (rest * scores).sum()
    return across[cuts] / len(order), up[cuts] / len(order)
