"""The table of policies on four items worked out by hand, and the bootstrap interval.

Items 1 and 2 are of level 1, items 3 and 4 of level 2. Greedy, the model chooses short, short, think, think; the
oracle chooses by reward: short, think, think, think.
"""

from dataclasses import replace

import numpy as np
import pytest

from siesta.data.errors import DataError
from siesta.rl.policies import Measurement, choices, interval, one_hot, per_item, summarise, table

BOOTSTRAP = {"resamples": 500, "seed": 0}
POLICIES = ["always-short", "always-think", "random", "free", "oracle"]


@pytest.fixture
def measured() -> Measurement:
    return Measurement(
        modes=["short", "think"],
        levels=np.array([1, 1, 2, 2]),
        mode_probs=np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.3, 0.7]]),
        mass=np.array([1.0, 0.9, 0.8, 0.9]),
        greedy_scores=np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]),
        greedy_tokens=np.array([[1.0, 10.0], [1.0, 10.0], [1.0, 20.0], [1.0, 20.0]]),
        sampled_scores=np.array([[1.0, 1.0], [0.5, 1.0], [0.0, 1.0], [0.25, 0.5]]),
        sampled_tokens=np.array([[1.0, 8.0], [1.0, 12.0], [1.0, 20.0], [1.0, 24.0]]),
        sampled_rewards=np.array([[1.0, 0.5], [0.0, 0.5], [-1.0, 0.5], [-0.5, -0.25]]),
        truncated=np.array([[0.0, 0.5], [0.0, 0.0], [0.0, 0.25], [0.0, 0.25]]),
        unscorable=3,
    )


# Rewards are Q in both decodings. The oracle earns (1 + 0.5 + 0.5 - 0.25) / 4 = 0.4375; regret is what is missing.
# Sampled, free: accuracy (1 + 0.6 + 0.8 + 0.425) / 4, tokens (1.7 + 3.2 + 16.2 + 17.1) / 4,
# reward (0.95 + 0.1 + 0.2 - 0.325) / 4, share of short (0.9 + 0.8 + 0.2 + 0.3) / 4 = 0.55.
# Random mixes the two `always` rows by the shares of `free`: 0.5 greedy, 0.55 sampled.
HAND = {
    #                            accuracy  tokens  reward   regret   share of short
    ("greedy", "always-short"): (0.5, 1.0, -0.125, 0.5625, 1.0),
    ("greedy", "always-think"): (0.75, 15.0, 0.3125, 0.125, 0.0),
    ("greedy", "random"): (0.625, 8.0, 0.09375, 0.34375, 0.5),
    ("greedy", "free"): (0.75, 10.5, 0.3125, 0.125, 0.5),
    ("greedy", "oracle"): (0.75, 12.75, 0.4375, 0.0, 0.25),
    ("sampled", "always-short"): (0.4375, 1.0, -0.125, 0.5625, 1.0),
    ("sampled", "always-think"): (0.875, 16.0, 0.3125, 0.125, 0.0),
    ("sampled", "random"): (0.634375, 7.75, 0.071875, 0.365625, 0.55),
    ("sampled", "free"): (0.70625, 9.55, 0.23125, 0.20625, 0.55),
    ("sampled", "oracle"): (0.875, 14.25, 0.4375, 0.0, 0.25),
}

# Per level: accuracy, tokens, reward, regret, share of short.
HAND_LEVELS = {
    ("greedy", "free", 1): (1.0, 1.0, 0.5, 0.25, 1.0),
    ("greedy", "free", 2): (0.5, 20.0, 0.125, 0.0, 0.0),
    ("greedy", "random", 1): (1.0, 5.5, 0.5, 0.25, 0.5),
    ("greedy", "random", 2): (0.25, 10.5, -0.3125, 0.4375, 0.5),
    ("greedy", "oracle", 1): (1.0, 5.5, 0.75, 0.0, 0.5),
    ("sampled", "free", 1): (0.8, 2.45, 0.525, 0.225, 0.85),
    ("sampled", "free", 2): (0.6125, 16.65, -0.0625, 0.1875, 0.25),
    ("sampled", "always-short", 2): (0.125, 1.0, -0.75, 0.875, 1.0),
}


def numbers(row: dict) -> tuple[float, ...]:
    return (*(row[name] for name in ("accuracy", "tokens", "reward", "regret")), row["shares"]["short"])


def test_every_policy_by_hand(measured: Measurement) -> None:
    found = table(measured, **BOOTSTRAP)
    assert list(found["greedy"]) == list(found["sampled"]) == POLICIES
    for (decoding, policy), expected in HAND.items():
        row = found[decoding][policy]
        assert numbers(row) == pytest.approx(expected, abs=1e-12), (decoding, policy)
        assert sum(row["shares"].values()) == pytest.approx(1.0)


def test_levels_by_hand(measured: Measurement) -> None:
    found = table(measured, **BOOTSTRAP)
    for (decoding, policy, level), expected in HAND_LEVELS.items():
        row = found[decoding][policy]["levels"][level]
        assert numbers(row) == pytest.approx(expected, abs=1e-12), (decoding, policy, level)
        assert row["items"] == 2


def test_totals_of_the_table(measured: Measurement) -> None:
    found = table(measured, **BOOTSTRAP)
    assert found["items"] == 4
    assert found["dropped_items"] == 0
    assert found["mode_mass"] == pytest.approx(0.9)
    assert found["truncated"] == {"short": 0.0, "think": 0.25}
    assert found["unscorable"] == 3


def test_items_that_cannot_be_priced_are_left_out_and_counted(measured: Measurement) -> None:
    """Without a score in some mode an item has no oracle; one NaN must not reach the mean of any policy."""
    greedy_scores, rewards = measured.greedy_scores.copy(), measured.sampled_rewards.copy()
    greedy_scores[3, 0] = rewards[1, 1] = np.nan
    found = table(replace(measured, greedy_scores=greedy_scores, sampled_rewards=rewards), **BOOTSTRAP)
    kept = {name: value[[0, 2]] for name, value in vars(measured).items() if isinstance(value, np.ndarray)}
    assert found == {**table(replace(measured, **kept), **BOOTSTRAP), "dropped_items": 2}
    assert found["items"] == 2
    assert numbers(found["greedy"]["free"]) == pytest.approx((1.0, 10.5, 0.75, 0.0, 0.5))


def test_a_table_of_no_items_is_refused(measured: Measurement) -> None:
    nothing = np.full((4, 2), np.nan)
    with pytest.raises(DataError, match="verifier failed on every item"):
        table(replace(measured, sampled_rewards=nothing), **BOOTSTRAP)


def test_levels_average_to_the_whole(measured: Measurement) -> None:
    uneven = replace(measured, levels=np.array([3, 1, 3, 3]))
    row = summarise(uneven, uneven.mode_probs, greedy=False, **BOOTSTRAP)
    assert list(row["levels"]) == [1, 3]
    assert [part["items"] for part in row["levels"].values()] == [1, 3]
    for name in ("accuracy", "tokens", "reward", "regret"):
        mean = sum(part["items"] * part[name] for part in row["levels"].values()) / 4
        assert mean == pytest.approx(row[name])


# ---- properties on random measurements ---------------------------------------------------------------------------


def random_measurement(seed: int, items: int = 40, num_modes: int = 3) -> Measurement:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(num_modes), size=items)
    shape = (items, num_modes)
    return Measurement(
        modes=[f"mode{m}" for m in range(num_modes)],
        levels=rng.integers(1, 4, size=items),
        mode_probs=probs,
        mass=rng.random(items),
        greedy_scores=rng.integers(0, 2, size=shape).astype(float),
        greedy_tokens=rng.integers(1, 50, size=shape).astype(float),
        sampled_scores=rng.random(shape),
        sampled_tokens=50 * rng.random(shape),
        sampled_rewards=rng.normal(size=shape),
        truncated=rng.random(shape),
    )


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_has_no_regret_and_nobody_has_less(seed: int, greedy: bool) -> None:
    measured = random_measurement(seed)
    for name, choice in choices(measured, greedy=greedy).items():
        regret = per_item(measured, choice, greedy=greedy)["regret"]
        assert (regret == 0).all() if name == "oracle" else (regret >= -1e-12).all()
        np.testing.assert_allclose(choice.sum(1), 1.0)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_random_is_the_mixture_of_always_with_the_shares_of_free(seed: int, greedy: bool) -> None:
    """Per item, hence per level and in the mean: random knows how often to think, not when."""
    measured = random_measurement(seed)
    policies = choices(measured, greedy=greedy)
    shares = policies["free"].mean(0)
    np.testing.assert_allclose(policies["random"], np.tile(shares, (40, 1)))
    found = per_item(measured, policies["random"], greedy=greedy)
    always = [per_item(measured, policies[f"always-{mode}"], greedy=greedy) for mode in measured.modes]
    for name, values in found.items():
        mixture = sum(share * row[name] for share, row in zip(shares, always, strict=True))
        np.testing.assert_allclose(values, mixture, atol=1e-12)


def test_one_hot() -> None:
    assert one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


# ---- the interval ------------------------------------------------------------------------------------------------


def test_interval_covers_the_mean_and_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.5, size=400)
    low, high = interval(values, resamples=4000, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(400), rel=0.1)


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [interval(rng.normal(0.5, 1.0, size=100), resamples=300, seed=i) for i in range(200)]
    covered = sum(low <= 0.5 <= high for low, high in intervals)
    assert 200 * 0.95 - 5 * np.sqrt(200 * 0.95 * 0.05) < covered <= 200


def test_interval_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(1).random(30)
    assert interval(values, resamples=200, seed=5) == interval(values, resamples=200, seed=5)
    assert interval(values, resamples=200, seed=5) != interval(values, resamples=200, seed=6)


@pytest.mark.parametrize("values", [np.full(25, 0.5), np.array([3.0])])
def test_interval_of_equal_values_has_no_width(values: np.ndarray) -> None:
    assert interval(values, resamples=100, seed=0) == (values[0], values[0])


def test_interval_of_another_statistic() -> None:
    values = np.array([0.0, 0.0, 0.0, 0.0, 100.0])
    low, high = interval(values, resamples=500, seed=0, statistic=lambda drawn: np.median(drawn, axis=-1))
    assert (low, high) == (0.0, 100.0)


def test_rows_carry_intervals_that_hold_their_means(measured: Measurement) -> None:
    found = table(measured, **BOOTSTRAP)
    assert found == table(measured, **BOOTSTRAP)
    for decoding in ("greedy", "sampled"):
        for row in found[decoding].values():
            assert set(row["interval"]) == {"accuracy", "tokens", "regret"}
            for name, (low, high) in row["interval"].items():
                assert low <= row[name] <= high
        assert found[decoding]["oracle"]["interval"]["regret"] == (0.0, 0.0)
