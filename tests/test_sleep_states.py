"""What a state is worth, by hand: intervals over contexts, costs, differences, and who reads which notes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from siesta.rl import embedded
from siesta.rl.modes import grow_embeddings
from siesta.rl.policies import Measurement, interval, resampled_means, table
from siesta.rl.sleep.states import States, against_none, break_even, evaluation, query_costs, states_of
from tests.test_notes import TOKENS, hop, sleeper

BOOTSTRAP: Any = {"resamples": 300, "seed": 0}


def measured(scores: list[float], tokens: list[float], think: list[bool]) -> Measurement:
    """Short takes 2 tokens and think `tokens`; the likelier mode is think where `think` says so and has the score."""
    items = len(scores)
    probs = np.where(np.array(think)[:, None], [[0.1, 0.9]], [[0.9, 0.1]])
    columns = np.array(scores)[:, None].repeat(2, axis=1)
    lengths = np.stack([np.full(items, 2.0), np.array(tokens)], axis=1)
    return Measurement(
        modes=["short", "think"],
        levels=np.ones(items, dtype=int),
        mode_probs=probs,
        mass=np.ones(items),
        greedy_scores=columns,
        greedy_tokens=lengths,
        sampled_scores=columns,
        sampled_tokens=lengths,
        sampled_rewards=columns,
        truncated=np.zeros((items, 2)),
    )


def states(contexts: list[int], tokens: list[int]) -> States:
    count = np.array(contexts)
    return States({}, count, np.array(tokens), np.full(len(count), 8), np.ones(len(count)))


# ---- intervals -----------------------------------------------------------------------------------------------------


def test_an_interval_over_contexts_is_wider_where_their_queries_agree() -> None:
    contexts = np.repeat(np.arange(10), 8)
    values = np.repeat(np.arange(10) % 2, 8).astype(float)
    low, high = interval(values, resamples=2000, seed=0, clusters=contexts)
    alone_low, alone_high = interval(values, resamples=2000, seed=0)  # the negative control: 80 independent items
    # Half of 10 contexts are right: standard deviations of the mean are 0.5 / sqrt(10) and 0.5 / sqrt(80).
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10**0.5, rel=0.15)
    assert alone_high - alone_low == pytest.approx(2 * 1.96 * 0.5 / 80**0.5, rel=0.15)


def test_one_item_a_context_changes_nothing() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert interval(values, **BOOTSTRAP) == pytest.approx(interval(values, **BOOTSTRAP, clusters=np.arange(50)))


def test_the_same_seed_draws_the_same_contexts_for_every_column() -> None:
    contexts = np.array([0, 0, 1, 2, 2, 2])
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    double = resampled_means(2 * values, contexts, **BOOTSTRAP)
    np.testing.assert_allclose(double, 2 * resampled_means(values, contexts, **BOOTSTRAP))


def test_values_that_are_not_known_count_for_nothing() -> None:
    values, contexts = np.array([1.0, np.nan, 1.0, np.nan]), np.array([0, 0, 1, 1])
    assert (resampled_means(values, contexts, **BOOTSTRAP) == 1.0).all()


def test_a_table_resamples_contexts_where_there_are_some() -> None:
    own = measured([1.0, 1.0, 0.0, 0.0], [6.0] * 4, [False] * 4)
    assert own.contexts is None
    narrow = table(own, **BOOTSTRAP)["greedy"]["free"]
    wide = table(replace(own, contexts=np.array([0, 0, 1, 1])), **BOOTSTRAP)["greedy"]["free"]
    assert wide["accuracy"] == narrow["accuracy"] == 0.5
    assert wide["interval"]["accuracy"] == (0.0, 1.0)


# ---- costs ---------------------------------------------------------------------------------------------------------


def test_costs_by_hand() -> None:
    """Answers of 2 tokens from notes of 40, of 6 without them: at a tenth sleep costs 4, which a query saves."""
    wake, without, sleep = np.full(8, 2.0), np.full(8, 6.0), np.full(8, 40)
    costs = query_costs(wake, without, sleep, np.repeat([0, 1], 4), **BOOTSTRAP)
    assert [costs["0.1"][str(m)][0] for m in (1, 2, 4, 8)] == [6.0, 4.0, 3.0, 2.5]
    assert [costs["1.0"][str(m)][0] for m in (1, 2, 4, 8)] == [42.0, 22.0, 12.0, 7.0]
    assert costs["0.1"]["break_even"] == [1.0, 1.0, 1.0]
    assert costs["1.0"]["break_even"] == [10.0, 10.0, 10.0]


def test_a_state_that_saves_nothing_never_pays() -> None:
    costs = query_costs(np.full(4, 6.0), np.full(4, 6.0), np.full(4, 40), np.arange(4), **BOOTSTRAP)
    assert costs["0.1"]["break_even"] == [np.inf] * 3
    assert break_even(0.1, np.array([10.0]), np.array([-1.0])).tolist() == [np.inf]


def test_differences_are_taken_item_by_item() -> None:
    without = measured([1.0, 1.0, 0.0, 1.0], [6.0, 7.0, 6.0, 7.0], [True] * 4)
    own = measured([1.0, 1.0, 1.0, 0.0], [6.0, 7.0, 6.0, 7.0], [False, False, False, True])
    found = against_none({"none": without, "own": own}, states([0, 0, 1, 1], [40] * 4), **BOOTSTRAP)["own"]
    assert found["accuracy"][0] == 0.0
    assert found["tokens"][0] == (2 + 2 + 2 + 7 - 26) / 4
    assert found["last_mode"][0] == -0.75
    result = evaluation({"none": without, "own": own}, states([0, 0, 1, 1], [40] * 4), **BOOTSTRAP)
    assert set(result["states"]) == {"own"}
    assert result["greedy"]["free"]["tokens"] == 6.5
    assert result["sleep"]["without"][0] == 6.5
    assert result["sleep"]["note_tokens"][0] == 40


# ---- who reads what ------------------------------------------------------------------------------------------------


def test_states_of_examples() -> None:
    sleep = sleeper(max_tokens=8)
    model = embedded.build_model(sleep.tokenizer, seed=0, layers=1, hidden_size=16, heads=2, init=0.2)
    grow_embeddings(model, sleep.tokenizer, [*TOKENS, "<sleep>"])
    examples = hop(12)
    found = states_of(sleep, model, examples)
    assert found.contexts.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.examples["none"] == examples
    texts = [found.examples["own"][i].context for i in (0, 4, 8)]
    assert [x.context for x in found.examples["own"]] == [text for text in texts for _ in range(4)]
    assert [x.context for x in found.examples["shuffled"]] == [texts[i] for i in (1, 2, 0) for _ in range(4)]
    assert {x.context for x in found.examples["zeroed"]} == {""}
    for state in found.examples.values():
        assert [(x.query, x.answer) for x in state] == [(x.query, x.answer) for x in examples]
    assert found.tokens.max() <= 7
    assert found.rows_right.shape == found.kept.shape == (12,)
