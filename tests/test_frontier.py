"""Thresholds on p(think): worked out by hand on a few items, with an oracle's and a random order as controls."""

from dataclasses import replace

import numpy as np
import pytest

from siesta.data.errors import UserError
from siesta.rl.frontier import (
    area,
    areas,
    best_order,
    check_keep,
    check_thresholds,
    highest_keeping,
    path,
    points,
    routed,
    thinks,
    thresholds_by_share,
)
from siesta.rl.policies import Measurement, interval, resampled_means, summarise
from siesta.rl.resampling import Estimate, estimate, over_runs, resample_weights, weighted_mean

ONCE = np.ones((1, 4))


def measurement(p: np.ndarray, gain: np.ndarray, cost: np.ndarray | None = None) -> Measurement:
    """Items that are wrong at once with one token; thinking gains and costs what it says."""
    items = len(p)
    zeros, ones = np.zeros(items), np.ones(items)
    scores = np.stack([np.where(gain < 0, -gain, 0.0), np.where(gain < 0, 0.0, gain)], axis=1)
    tokens = np.stack([ones, 1 + (ones if cost is None else cost)], axis=1)
    return Measurement(
        modes=["short", "think"],
        levels=zeros,
        mode_probs=np.stack([1 - p, p], axis=1),
        mass=ones,
        greedy_scores=scores,
        greedy_tokens=tokens,
        sampled_scores=scores,
        sampled_tokens=tokens,
        sampled_rewards=scores,
        truncated=np.zeros((items, 2)),
    )


# Items 1 and 2 gain 1 by thinking, 3 and 4 nothing. Random: the line from 0 to 1/2, area 1/4 (of gain a step of 1/4).
# In the right order accuracy is 1/4, 1/2, 1/2, 1/2 after each quarter: (1/8 + 3/8 + 1/2 + 1/2) / 4 = 3/8, so 1/8 more.
@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.9, 0.8, 0.2, 0.1], 1 / 8),
        ([0.1, 0.2, 0.8, 0.9], -1 / 8),
        ([0.5, 0.5, 0.5, 0.5], 0.0),  # ties: the mean over all orders
        ([0.9, 0.1, 0.9, 0.1], 0.0),
        ([0.9, 0.5, 0.5, 0.1], 3 / 32),  # accuracy 1/4, then a line to 1/2 over two quarters, then 1/2
    ],
)
def test_area_by_hand(p: list[float], expected: float) -> None:
    gain = np.array([1.0, 1.0, 0.0, 0.0])
    assert area(np.array(p), gain, np.ones(4), ONCE) == pytest.approx([expected])
    assert area(np.array(p), gain, np.full(4, 7.0), ONCE) == pytest.approx([expected])  # the unit of cost drops out


def test_area_with_unequal_costs_by_hand() -> None:
    """Gains of 1 for 1 token and for 3: cheap first is (0.5 * 1 + 1.5 * 3) / 4 = 1.25, dear first 0.75; random 1."""
    gain, cost, once = np.ones(2), np.array([1.0, 3.0]), np.ones((1, 2))
    assert area(np.array([0.9, 0.1]), gain, cost, once) == pytest.approx([0.125])
    assert area(np.array([0.1, 0.9]), gain, cost, once) == pytest.approx([-0.125])
    assert np.isnan(area(gain, gain, -cost, once)).all()


def test_random_p_has_no_area_and_nobody_beats_the_oracle() -> None:
    rng = np.random.default_rng(0)
    gain, cost = rng.choice([-0.5, 0.0, 0.25, 1.0], size=60), rng.uniform(1, 9, size=60)
    once = np.ones((1, 60))
    found = np.array([area(rng.random(60), gain, cost, once)[0] for _ in range(500)])
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(500)
    assert found.max() < area(best_order(gain, cost), gain, cost, once)[0]


def test_oracle_is_the_best_of_all_orders() -> None:
    rng = np.random.default_rng(1)
    gain, cost, once = rng.normal(size=6), rng.uniform(1, 4, size=6), np.ones((1, 6))
    best = area(best_order(gain, cost), gain, cost, once)[0]
    others = [area(rng.permutation(6).astype(float), gain, cost, once)[0] for _ in range(720)]
    assert max(others) <= best + 1e-12


def test_the_ends_are_always_short_and_always_think() -> None:
    """Also where p was rounded to 0 or 1."""
    p = np.array([0.0, 0.3, 1.0, 1.0])
    assert thinks(p, 0.0).all()
    assert not thinks(p, 1.0).any()
    assert thinks(p, 0.3).tolist() == [False, False, True, True]
    own = measurement(p, np.array([1.0, 1.0, 0.0, 0.0]))
    assert routed(own, 1.0)[:, 0].all()
    assert routed(own, 0.0)[:, 1].all()


def test_an_item_that_does_not_think_takes_the_likeliest_other_mode() -> None:
    own = replace(
        measurement(np.array([0.2]), np.array([1.0])),
        modes=["short", "wide", "think"],
        mode_probs=np.array([[0.3, 0.5, 0.2]]),
    )
    assert routed(own, 0.5).tolist() == [[0, 1, 0]]
    assert routed(own, 0.1).tolist() == [[0, 0, 1]]


def test_thresholds_meet_every_tenth_of_the_share() -> None:
    p = np.random.default_rng(2).random(200)
    found = thresholds_by_share(p)
    assert len(found) == 11
    assert [thinks(p, t).mean() for t in found] == pytest.approx(np.arange(11) / 10)


def test_a_threshold_lies_halfway_to_the_next_p_and_stands_once() -> None:
    """Two values of p, as rounding leaves them: a row between them, and one above both, where no item thinks."""
    p = np.repeat([0.2, 0.6], 5)
    found = thresholds_by_share(p)
    assert found == pytest.approx([1.0, 0.8, 0.4, 0.0])
    assert [thinks(p, t).mean() for t in found] == [0.0, 0.0, 0.5, 1.0]
    for t in found[1:-1]:
        assert (thinks(p + 0.05, t) == thinks(p, t)).all(), "another engine rounds otherwise"
        assert (thinks(p - 0.05, t) == thinks(p, t)).all()
    assert thinks(p + 0.05, 0.2).all(), "negative control: at a value of p itself"
    assert not thinks(p, 0.2).all()
    assert thresholds_by_share(np.full(5, 0.4)) == pytest.approx([1.0, 0.7, 0.0])


def test_the_highest_threshold_that_keeps_a_share_of_the_accuracy() -> None:
    """Short is never right; thinking on 4 of 5 items, the first two of which share a p: 0, 2, 2, 3, 4 right."""
    p = np.array([0.9, 0.9, 0.7, 0.5, 0.2])
    own = measurement(p, np.array([1.0, 1.0, 0.0, 1.0, 1.0]))
    for share, threshold in ((0.25, 0.8), (0.5, 0.8), (0.51, 0.35), (0.75, 0.35), (0.76, 0.0), (1.0, 0.0)):
        assert highest_keeping(own, share, greedy=True) == pytest.approx(threshold), share
    kept = highest_keeping(own, 0.75, greedy=True)
    right = summarise(own, routed(own, kept), greedy=True, resamples=2, seed=0)["accuracy"]
    assert right == pytest.approx(0.6), "3 of 5, of 4"
    higher = summarise(own, routed(own, kept + 0.2), greedy=True, resamples=2, seed=0)
    assert higher["accuracy"] < 0.6, "negative control"


def test_where_short_is_as_good_no_item_need_think() -> None:
    own = measurement(np.array([0.9, 0.3]), np.zeros(2))
    assert highest_keeping(own, 1.0, greedy=True) == 1.0


@pytest.mark.parametrize("share", [0.0, -1.0, 98.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    check_keep(None)
    check_keep(1.0)
    with pytest.raises(UserError, match=r"--keep: .* is no share; 0\.98 keeps 98 %"):
        check_keep(share)


def test_points_are_rows_of_the_policy_table() -> None:
    rng = np.random.default_rng(3)
    own = measurement(rng.random(30), rng.choice([0.0, 1.0], size=30))
    settings = {"greedy": False, "resamples": 50, "seed": 0}
    short, half, think = points(own, [1.0, 0.5, 0.0], **settings)
    assert short == {"threshold": 1.0} | summarise(own, np.tile([1.0, 0.0], (30, 1)), **settings)
    assert think == {"threshold": 0.0} | summarise(own, np.tile([0.0, 1.0], (30, 1)), **settings)
    chosen = np.eye(2)[(own.mode_probs[:, 1] > 0.5).astype(int)]
    assert half == {"threshold": 0.5} | summarise(own, chosen, **settings)


def test_path_goes_through_the_points_and_its_area_is_the_area() -> None:
    rng = np.random.default_rng(4)
    own = measurement(rng.random(30).round(1), rng.choice([0.0, 1.0], size=30), rng.uniform(1, 5, size=30))
    tokens, accuracy = path(own, own.mode_probs[:, 1], greedy=True)
    for threshold in (1.0, 0.5, 0.0):
        row = summarise(own, routed(own, threshold), greedy=True, resamples=2, seed=0)
        assert np.isclose(tokens, row["tokens"]).any()
        assert np.isclose(accuracy[np.isclose(tokens, row["tokens"])], row["accuracy"]).all()
    under = np.trapezoid(accuracy, tokens) / (tokens[-1] - tokens[0]) - (accuracy[0] + accuracy[-1]) / 2
    found = areas(own, np.ones((1, 30)), greedy=True)
    assert found["area"].value == pytest.approx(under)
    assert found["oracle_area"].value >= found["area"].value


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    check_thresholds([0.0, 0.5, 1.0])
    with pytest.raises(UserError, match=r"--thresholds: .* lies in 0 to 1"):
        check_thresholds([0.5, threshold])


# ---- the bootstrap by weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [np.arange(20), np.arange(20) // 4])
def test_weights_draw_what_the_table_draws(clusters: np.ndarray) -> None:
    values = np.random.default_rng(5).random(20)
    weights = resample_weights(clusters, resamples=100, seed=7)
    expected = resampled_means(values, clusters, resamples=100, seed=7)
    np.testing.assert_allclose(weighted_mean(values, weights), expected)
    found = estimate(lambda w: weighted_mean(values, w), weights).numbers()
    assert found["value"] == pytest.approx(values.mean())
    assert found["interval"] == pytest.approx(interval(values, resamples=100, seed=7, clusters=clusters))
    assert (weights.reshape(100, -1, 20 // len(np.unique(clusters))).std(-1) == 0).all()  # a context is drawn whole


def test_a_difference_is_resampled_as_one() -> None:
    own = Estimate(2.0, np.array([1.0, 3.0]))
    assert (own - own).numbers() == {"value": 0.0, "interval": [0.0, 0.0]}
    assert Estimate(float("nan"), np.array([np.nan])).numbers() == {"value": None, "interval": None}


def test_over_runs() -> None:
    """Runs that agree have the interval of their items; runs that differ a wider one."""
    draws = np.random.default_rng(6).normal(size=2000)
    alike = over_runs([Estimate(0.0, draws)] * 3, seed=0).numbers()
    assert alike["interval"] == pytest.approx(np.percentile(draws, [2.5, 97.5]))
    apart = over_runs([Estimate(m, draws + m) for m in (-3.0, 0.0, 3.0)], seed=0).numbers()
    assert apart["value"] == 0
    assert apart["interval"][1] - apart["interval"][0] > 1.3 * (alike["interval"][1] - alike["interval"][0])
