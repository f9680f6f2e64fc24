"""Credit of notes by hand, which contexts are asked without them, and blocks of queries."""

import pytest
import torch

from siesta.rl.sleep.credit import (
    NONE,
    OWN,
    SHUFFLED,
    query_blocks,
    sleep_rewards,
    sources,
    state_kinds,
    write_advantages,
)

NAN = float("nan")

# One context, m = 2 queries, J = 2 sleeps, G = 2 answers: rewards[c][q][j][g].
REWARDS = torch.tensor([[[[1.0, 0.5], [-1.0, -1.0]], [[1.0, -1.0], [1.0, 0.5]]]])


def test_rewards_and_advantages_of_notes_by_hand() -> None:
    # R_1 = (1 + 0.5 + 1 - 1) / 4, R_2 = (-1 - 1 + 1 + 0.5) / 4; their mean is 0.125.
    rewards = sleep_rewards(REWARDS, torch.tensor([[10.0, 20.0]]), 0.0)
    torch.testing.assert_close(rewards, torch.tensor([[0.375, -0.125]]))
    torch.testing.assert_close(write_advantages(rewards), torch.tensor([[0.25, -0.25]]))


def test_the_price_is_shared_by_the_queries() -> None:
    # 0.01 * 10 / 2 = 0.05 and 0.01 * 20 / 2 = 0.1; half of their difference moves from one advantage to the other.
    rewards = sleep_rewards(REWARDS, torch.tensor([[10.0, 20.0]]), 0.01)
    torch.testing.assert_close(rewards, torch.tensor([[0.325, -0.225]]))
    torch.testing.assert_close(write_advantages(rewards), torch.tensor([[0.275, -0.275]]))


def test_unscorable_answers_enter_no_mean() -> None:
    rewards = REWARDS.clone()
    rewards[0, 0, 0, 1] = NAN
    torch.testing.assert_close(sleep_rewards(rewards, torch.zeros(1, 2), 0.0), torch.tensor([[1 / 3, -0.125]]))
    rewards[0, :, 1] = NAN
    assert sleep_rewards(rewards, torch.zeros(1, 2), 0.0)[0, 1].isnan()
    advantages = write_advantages(sleep_rewards(rewards, torch.zeros(1, 2), 0.0))
    assert advantages[0, 0] == 0
    assert advantages[0, 1].isnan()


def test_advantages_of_a_context_add_up_to_nothing_whatever_the_others_earn() -> None:
    rewards = torch.randn(3, 4, dtype=torch.float64)
    advantages = write_advantages(rewards)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(3, dtype=torch.float64))
    other = rewards.clone()
    other[1:] += 5
    torch.testing.assert_close(write_advantages(other), advantages)
    # The negative control: a mean over the batch would credit notes for an easy context.
    assert not torch.allclose(other - other.mean(), rewards - rewards.mean())


def test_the_share_without_a_state_is_exact_and_spread() -> None:
    kinds = [kind for first in range(0, 20, 4) for kind in state_kinds(4, 0.25, first=first, keep_context=False)]
    assert kinds == [OWN, OWN, OWN, NONE] * 5
    assert state_kinds(3, 0.0, first=7, keep_context=True) == [OWN] * 3
    assert state_kinds(3, 1.0, first=0, keep_context=False) == [NONE] * 3
    for share in (0.1, 0.3, 0.7):
        drawn = state_kinds(100, share, first=0, keep_context=False)
        assert drawn.count(NONE) == round(100 * share)


def test_readers_who_keep_the_context_get_another_ones_notes_every_second_time() -> None:
    kinds = state_kinds(8, 0.5, first=0, keep_context=True)
    assert kinds == [OWN, NONE, OWN, SHUFFLED, OWN, NONE, OWN, SHUFFLED]
    assert sources(kinds) == [0, None, 2, 4, 4, None, 6, 0]
    assert state_kinds(2, 1.0, first=0, keep_context=True) == [NONE, NONE], "nobody has written any notes"


def test_blocks_are_queries_of_one_context_that_follow_each_other() -> None:
    contexts = ["a", "a", "a", "b", "b", "c", "c", "c", "c"]
    assert query_blocks(contexts, 2) == [[0, 1], [3, 4], [5, 6], [7, 8]]
    assert query_blocks(contexts, 3) == [[0, 1, 2], [5, 6, 7]]
    assert query_blocks(contexts, 1) == [[i] for i in range(9)]
    assert query_blocks(contexts, 5) == []
    assert query_blocks([], 1) == []


@pytest.mark.parametrize("kinds", [[NONE], [NONE, NONE], []])
def test_who_has_no_state_reads_nobodys(kinds: list[str]) -> None:
    assert sources(kinds) == [None] * len(kinds)
