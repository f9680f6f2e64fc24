"""Votes, pass@k and their allotment, by hand and against brute force."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from siesta.rl.resampling import resample_weights
from siesta.rl.voting import (
    NO_ANSWER,
    Options,
    allotments,
    allotted,
    at_budget,
    ballot,
    ballot_number,
    curves,
    difficulty,
    equal_tokens,
    folds_of,
    majority,
    pass_at,
    uniform,
    upgrades,
)
from tests.test_frontier import measurement


def test_ballots() -> None:
    known: dict[str, int] = {}
    found = [ballot_number(text, known) for text in ("so \\boxed{1 2}", "1  2", "3", "", "\\boxed{3}")]
    assert found == [0, 0, 1, NO_ANSWER, 1]
    assert ballot("a \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_draws(k: int) -> None:
    for right in range(6):
        samples = [1] * right + [0] * (5 - right)
        expected = np.mean([max(draw) for draw in combinations(samples, k)])
        assert pass_at(np.array([right]), np.array([5]), k) == pytest.approx([expected])


def test_pass_at_more_than_there_are_is_unknown() -> None:
    assert np.isnan(pass_at(np.array([1]), np.array([2]), 3)).all()
    naive = 1 - (1 - 2 / 5) ** 3  # with replacement: the biased estimate
    assert pass_at(np.array([2]), np.array([5]), 3)[0] == pytest.approx(0.9)
    assert naive != pytest.approx(0.9)


def test_majority_by_hand() -> None:
    answers = np.array([[0, 0, 1], [0, 1, 2], [0, NO_ANSWER, NO_ANSWER], [NO_ANSWER] * 3])
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = majority(answers, scores, seed=0, shuffles=4000)
    np.testing.assert_allclose(found[:, 0], [2 / 3, 1 / 3, 1 / 3, 0])  # one sample: its own mean
    assert found[0, 2] == 1.0  # two against one
    assert found[1, 2] == pytest.approx(1 / 3, abs=0.03)  # a tie of three
    assert found[0, 1] == pytest.approx(2 / 3, abs=0.03)  # two votes cannot outvote each other
    assert found[2, 2] == 1.0  # who has no answer does not vote
    assert (found[3] == 0).all()


def test_majority_does_not_count_what_could_not_be_scored() -> None:
    found = majority(np.array([[0, 1, 1], [0, 0, 0]]), np.array([[1.0, np.nan, np.nan], [np.nan] * 3]), seed=0)
    assert found[0, 2] == 1.0
    assert np.isnan(found[1]).all()


def test_uniform_mixes_neighbours_to_meet_the_budget() -> None:
    assert at_budget(np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.4, 0.5]), 2.5) == pytest.approx(0.45)
    assert at_budget(np.array([1.0, 2.0]), np.array([0.2, 0.4]), 9.0) == 0.4
    assert np.isnan(at_budget(np.array([1.0, 2.0]), np.array([0.2, 0.4]), 0.5))
    ways = Options(
        [("short", 1), ("short", 2)], np.array([[0.0, 1.0], [1.0, 1.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])
    )
    assert uniform(ways, np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([1.5, 1.5])) == pytest.approx([0.75, 0.5])


def test_upgrades_follow_the_hull() -> None:
    """From 1 token straight to 3: the option at 2 lies under the line, the one at 4 gains nothing."""
    found = upgrades(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.1, 0.8, 0.8]))
    assert found == [(np.inf, 0), (pytest.approx(0.4), 2)]


def test_allotments_spend_where_a_token_gains_most() -> None:
    tokens = np.array([[1.0, 2.0], [1.0, 2.0]])
    scores = np.array([[0.9, 1.0], [0.1, 0.7]])
    assert allotments(tokens, scores, np.ones(2)).tolist() == [[0, 0], [0, 1], [1, 1]]
    assert allotments(tokens, scores, np.array([1.0, 0.0])).tolist() == [[0, 0], [1, 0]]


def test_allotted_beats_uniform_where_items_differ_and_not_where_bins_say_nothing() -> None:
    """Half of the items gain by a second sample. At 1.5 tokens known bins get it all, bins that say nothing half."""
    gains = np.arange(400) % 2 == 1
    scores = np.stack([np.zeros(400), gains.astype(float)], axis=1)
    ways = Options([("short", 1), ("short", 2)], scores, np.tile([1.0, 2.0], (400, 1)))
    once, budget = np.ones((1, 400)), np.array([1.5])
    folds = folds_of(np.arange(400), seed=0)
    assert uniform(ways, once, budget) == pytest.approx([0.25])
    assert allotted(ways, gains.astype(int), folds, once, budget) == pytest.approx([0.5], abs=0.02)
    blind = np.random.default_rng(0).integers(0, 5, size=400)
    assert allotted(ways, blind, folds, once, budget) == pytest.approx([0.25], abs=0.04)


def test_folds_keep_contexts_whole() -> None:
    clusters = np.arange(40) // 4
    folds = folds_of(clusters, seed=3).reshape(10, 4)
    assert (folds == folds[:, :1]).all()
    assert folds[:, 0].sum() == 5


def test_difficulty_is_the_level_or_a_fifth_by_p() -> None:
    own = measurement(np.linspace(0, 1, 50), np.zeros(50))
    assert np.bincount(difficulty(own)).tolist() == [10] * 5
    assert difficulty(replace(own, levels=np.arange(50) // 25 + 3)).tolist() == [0] * 25 + [1] * 25


def test_free_is_compared_at_its_own_tokens() -> None:
    """Four samples a mode of one token; p chooses think (2 tokens) on the half of the items that gain by it."""
    gain = np.tile([0.0, 1.0], 200)
    own = measurement(gain, gain)
    own = replace(
        own,
        drawn_scores=np.repeat(own.sampled_scores[:, :, None], 4, axis=2),
        drawn_answers=np.zeros((400, 2, 4)),
        levels=gain.astype(int),
    )
    rows = curves(own, seed=0)
    assert [row["tokens"] for row in rows["think"]] == [2, 4, 6, 8]
    assert [row["pass"] for row in rows["think"]] == [row["majority"] for row in rows["think"]] == [0.5] * 4
    weights = resample_weights(np.arange(400), resamples=5, seed=0)
    for kind in ("majority", "best_of_n"):
        found = equal_tokens(own, np.arange(400), weights, seed=0)[kind]
        assert found["uniform short"].value == found["allotted short"].value == 0
        assert np.isnan(found["uniform think"].value)  # 1.5 tokens do not pay for one thought each
        assert found["allotted any"].value == pytest.approx(0.5, abs=0.06)
