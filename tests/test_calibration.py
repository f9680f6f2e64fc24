"""Calibration of p(think), by hand, with a random and an oracle's p as controls."""

import numpy as np
import pytest

from siesta.rl.calibration import (
    agreement,
    auroc,
    bins_of,
    calibration,
    calibration_error,
    chance_agreement,
    kappa,
    reliability,
    thinking_pays,
)
from siesta.rl.resampling import resample_weights
from tests.test_frontier import measurement

ONCE = np.ones((1, 4))


# Positives at 0.9 and 0.4, others at 0.6 and 0.1: three of four pairs are in order.
@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.9, 0.4, 0.6, 0.1], 0.75),
        ([0.9, 0.8, 0.2, 0.1], 1.0),
        ([0.1, 0.2, 0.8, 0.9], 0.0),
        ([0.5, 0.5, 0.5, 0.5], 0.5),
        ([0.9, 0.5, 0.5, 0.1], 0.875),  # a tie counts half
    ],
)
def test_auroc_by_hand(p: list[float], expected: float) -> None:
    positive = np.array([True, True, False, False])
    assert auroc(np.array(p), positive, ONCE) == pytest.approx([expected])


def test_auroc_of_random_p_is_a_half() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(80) < 0.3
    found = np.array([auroc(rng.random(80), positive, np.ones((1, 80)))[0] for _ in range(400)])
    assert abs(found.mean() - 0.5) < 4 * found.std() / 20
    assert np.isnan(auroc(rng.random(80), np.ones(80, dtype=bool), np.ones((1, 80)))).all()


def test_a_weight_is_an_item_that_stands_so_often() -> None:
    rng = np.random.default_rng(1)
    p, positive = rng.random(12).round(1), rng.random(12) < 0.5
    weights = rng.integers(0, 4, size=12)
    again = np.repeat(np.arange(12), weights)
    once, own = np.ones((1, len(again))), weights[None].astype(float)
    assert auroc(p, positive, own) == pytest.approx(auroc(p[again], positive[again], once))
    found = calibration_error(p, positive, own)
    assert found == pytest.approx(calibration_error(p[again], positive[again], once))


def test_agreement_and_chance_by_hand() -> None:
    """Chosen think, think, think, short; better think, think, short, short: 3/4, by chance 3/4 1/2 + 1/4 1/2 = 1/2."""
    chosen, best = np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0])
    assert agreement(chosen, best, ONCE) == pytest.approx([0.75])
    assert chance_agreement(chosen, best, ONCE) == pytest.approx([0.5])
    assert kappa(chosen, best, ONCE) == pytest.approx([0.5])


def test_always_one_mode_agrees_by_chance_only() -> None:
    best = np.array([1, 1, 1, 0])
    assert agreement(np.ones(4, dtype=int), best, ONCE) == chance_agreement(np.ones(4, dtype=int), best, ONCE) == 0.75
    assert kappa(np.ones(4, dtype=int), best, ONCE) == pytest.approx([0.0])
    assert np.isnan(kappa(np.ones(4, dtype=int), np.ones(4, dtype=int), ONCE)).all()


def test_bins_and_their_error_by_hand() -> None:
    p, pays = np.array([0.05, 0.05, 1.0, 0.95]), np.array([False, True, True, True])
    assert bins_of(p).tolist() == [0, 0, 9, 9]
    low, high = reliability(p, pays, np.array([0.0, 0.5, 1.0, 1.0]), ONCE)
    assert (low["items"], low["p"], low["pays"]["value"], low["benefit"]["value"]) == (2, 0.05, 0.5, 0.25)
    assert (high["low"], high["high"], high["p"], high["pays"]["value"]) == (0.9, 1.0, 0.975, 1.0)
    assert calibration_error(p, pays, ONCE) == pytest.approx([(0.45 + 0.025) / 2])


def test_an_oracle_and_a_coin() -> None:
    rng = np.random.default_rng(2)
    gain = rng.choice([0.0, 1.0], size=200)
    weights = resample_weights(np.arange(200), resamples=200, seed=0)
    oracle = calibration(measurement(gain, gain), weights)
    assert thinking_pays(measurement(gain, gain)).tolist() == (gain > 0).tolist()
    for name, expected in {"auroc": 1, "hybrid_accuracy": 1, "hybrid_kappa": 1, "calibration_error": 0}.items():
        assert oracle[name].numbers() == {"value": pytest.approx(expected), "interval": pytest.approx([expected] * 2)}
    coin = calibration(measurement(rng.random(200), gain), weights)
    for name, expected in {"auroc": 0.5, "hybrid_kappa": 0.0}.items():
        assert abs(coin[name].value - expected) < 4 * coin[name].draws.std()
        assert coin[name].numbers()["interval"][1] < oracle[name].value - 0.3
