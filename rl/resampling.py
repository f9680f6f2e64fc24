"""Bootstrap by weights: a statistic of weighted items, its value and its interval, over items and over runs.

A resample is a row of counts, how often each item was drawn; items of one context are drawn together. Every number of
an evaluation is a function of such weights, so all of them are resampled in the same way, and a difference of two is
resampled as a difference. R resamples, I items; pure numpy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]  # weights (R, I) -> values (R,)


def resample_weights(clusters: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """How often each item stands in each bootstrap sample of whole clusters, (R, I).

    The same draws as those of `siesta.rl.policies.resampled_means`.

    Args:
        clusters: Number of each item's cluster, (I,).
    """
    _, codes = np.unique(clusters, return_inverse=True)
    size = int(codes.max()) + 1
    drawn = np.random.default_rng(seed).integers(0, size, size=(resamples, size))
    counts = np.zeros((resamples, size))
    np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1.0)
    return counts[:, codes]


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over items, (I,) and (R, I) -> (R,); NaN items count for nothing."""
    known = ~np.isnan(values)
    return weights @ np.where(known, values, 0.0) / (weights @ known)


@dataclass(frozen=True)
class Estimate:
    """A statistic of the items as they are, and of their bootstrap samples, (R,)."""

    value: float
    draws: np.ndarray

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference, resampled as such: both must come from the same weights."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    def numbers(self) -> dict:
        """`value` and the 95 % percentile `interval`; None where there is none, which JSON can hold."""
        if np.isnan(self.value):
            return {"value": None, "interval": None}
        low, high = np.nanpercentile(self.draws, [2.5, 97.5])
        return {"value": float(self.value), "interval": [float(low), float(high)]}


def estimate(statistic: Statistic, weights: np.ndarray) -> Estimate:
    """A statistic with its bootstrap distribution."""
    return Estimate(float(statistic(np.ones((1, weights.shape[1])))[0]), statistic(weights))


def over_runs(estimates: Sequence[Estimate], *, seed: int) -> Estimate:
    """Mean over S runs that were measured on the same items; its draws resample runs and items.

    Resample r has the same items in every run, since runs on the same items are crossed with them, not nested. With a
    few runs the interval is too narrow: three of them hold little of how runs differ.

    Args:
        estimates: Of the same statistic and from the same weights, one a run.
    """
    draws = np.stack([each.draws for each in estimates])  # (S, R)
    runs, resamples = draws.shape
    chosen = np.random.default_rng(seed).integers(0, runs, size=(runs, resamples))
    return Estimate(
        float(np.mean([each.value for each in estimates])), np.take_along_axis(draws, chosen, axis=0).mean(0)
    )
