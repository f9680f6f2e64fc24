"""Does p(think) know where thinking pays? AUROC, reliability by bins, and agreement with the better mode.

The benefit of thinking on an item is what its forced rollouts came to: accuracy of the last mode less accuracy of the
likeliest other. *Thinking pays* where the mean reward of the last mode is the higher one, so a benefit that is not
worth its price does not count. Both are means over K samples and noisy: with few samples no p can reach an AUROC of 1.
I items, M modes, R resamples; pure numpy.
"""

import numpy as np

from siesta.rl.frontier import area_under, differences, routed
from siesta.rl.policies import Measurement, choices
from siesta.rl.resampling import Estimate, estimate, weighted_mean

BINS = 10


def auroc(p: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Chance that an item of the positive ones has the higher p than one of the others, ties half, (R,).

    Args:
        p: (I,).
        positive: (I,) bool; NaN comes out where all items are alike.
        weights: (R, I).
    """
    rise, run = positive.astype(float), 1.0 - positive
    pairs = (weights @ rise) * (weights @ run)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs > 0, area_under(p, rise, run, weights) / pairs, np.nan)


def agreement(chosen: np.ndarray, best: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of items whose chosen mode is the better one, (R,): "hybrid accuracy" (arXiv 2505.14631).

    Args:
        chosen, best: Columns of modes, (I,).
    """
    return weighted_mean((chosen == best).astype(float), weights)


def chance_agreement(chosen: np.ndarray, best: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Agreement to expect of choices with the same shares that ignore the item, (R,): sum over modes of the share
    chosen times the share that is best.
    """
    columns = np.union1d(chosen, best)
    shares = [[weighted_mean((own == m).astype(float), weights) for m in columns] for own in (chosen, best)]
    return (np.array(shares[0]) * np.array(shares[1])).sum(0)


def kappa(chosen: np.ndarray, best: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cohen's kappa, (R,): agreement beyond chance, 1 at most; NaN where chance already agrees always."""
    chance = chance_agreement(chosen, best, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1, (agreement(chosen, best, weights) - chance) / (1 - chance), np.nan)


def bins_of(p: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Number of each item's bin of equal width, (I,); 1 falls into the last."""
    return np.minimum((p * bins).astype(int), bins - 1)


def reliability(
    p: np.ndarray, pays: np.ndarray, benefit: np.ndarray, weights: np.ndarray, bins: int = BINS
) -> list[dict]:
    """A row for each bin that holds items: its borders, `items`, mean `p`, share that `pays`, mean `benefit`."""
    rows = []
    for number in np.unique(bins_of(p, bins)).tolist():
        at = bins_of(p, bins) == number
        row = {"low": number / bins, "high": (number + 1) / bins, "items": int(at.sum()), "p": float(p[at].mean())}
        for name, values in (("pays", pays.astype(float)), ("benefit", benefit)):
            mean = values[at].mean()
            with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have no item of the bin
                row[name] = Estimate(float(mean), weighted_mean(values[at], weights[:, at])).numbers()
        rows.append(row)
    return rows


def calibration_error(p: np.ndarray, pays: np.ndarray, weights: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Expected calibration error, (R,): |mean p - share that pays| of each bin, by its items."""
    codes = bins_of(p, bins)
    gaps = [np.abs((weights * (p - pays))[:, codes == number].sum(1)) for number in range(bins)]
    return np.sum(gaps, axis=0) / weights.sum(1)


def calibration(measured: Measurement, weights: np.ndarray) -> dict[str, Estimate]:
    """The numbers of calibration. `auroc` is against "thinking pays", `auroc_accuracy` against a benefit above 0."""
    p = measured.mode_probs[:, -1]
    pays, benefit = thinking_pays(measured), differences(measured, greedy=False)[0]
    chosen = measured.mode_probs.argmax(1)
    best = choices(measured, greedy=True)["oracle"].argmax(1)
    always = np.bincount(best, minlength=len(measured.modes)).argmax()
    return {
        "auroc": estimate(lambda w: auroc(p, pays, w), weights),
        "auroc_accuracy": estimate(lambda w: auroc(p, benefit > 0, w), weights),
        "calibration_error": estimate(lambda w: calibration_error(p, pays, w), weights),
        "hybrid_accuracy": estimate(lambda w: agreement(chosen, best, w), weights),
        "hybrid_chance": estimate(lambda w: chance_agreement(chosen, best, w), weights),
        "hybrid_one_mode": estimate(lambda w: agreement(np.full_like(best, always), best, w), weights),
        "hybrid_kappa": estimate(lambda w: kappa(chosen, best, w), weights),
    }


def thinking_pays(measured: Measurement) -> np.ndarray:
    """Whether the last mode's mean reward is above that of the likeliest other, (I,) bool."""
    rest = (routed(measured, 1.0) * measured.sampled_rewards).sum(1)
    return measured.sampled_rewards[:, -1] > rest


def bins_table(measured: Measurement, weights: np.ndarray) -> list[dict]:
    """`reliability` of a measurement."""
    benefit = differences(measured, greedy=False)[0]
    return reliability(measured.mode_probs[:, -1], thinking_pays(measured), benefit, weights)
