"""The mode plan: how many rollouts each mode gets, with what probability, and that the importance weight is exact.

Counts of forced modes are exact and checked as such. What is drawn is checked against its probability over many seeded
groups, five standard deviations wide.
"""

import math
from functools import partial

import pytest
import torch

from siesta.rl.rollout import ModePlan, annealed_floor, draw_modes, forced_per_mode

GROUPS = 20_000
assert_same = partial(torch.testing.assert_close, rtol=0.0, atol=1e-12)


def draw(
    policy: list[float], groups: int, group: int, sampling: str, floor: int = 0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Modes and q of `groups` groups that share one policy, (P, G) each."""
    torch.manual_seed(seed)
    mode_probs = torch.tensor(policy, dtype=torch.float64).repeat(groups * group, 1)
    places = torch.arange(groups * group) % group
    modes, sampled = draw_modes(mode_probs, places, group=group, sampling=sampling, floor=floor)
    return modes.view(groups, group), sampled.view(groups, group)


def counts_of(modes: torch.Tensor, num_modes: int) -> torch.Tensor:
    """Rollouts per mode in each group, (P, M)."""
    return torch.stack([(modes == m).sum(1) for m in range(num_modes)], dim=1)


# ---- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "num_modes"), [(8, 2), (6, 3), (2, 2)])
def test_stratified_groups_hold_equal_shares(group: int, num_modes: int) -> None:
    """Exactly, even for a policy that has all but given up on a mode; q is 1 / M."""
    policy = [1 - 1e-9 * (num_modes - 1)] + [1e-9] * (num_modes - 1)
    modes, sampled = draw(policy, 50, group, "stratified")
    assert (counts_of(modes, num_modes) == group // num_modes).all()
    assert_same(sampled, torch.full_like(sampled, 1 / num_modes))


def test_stratified_remainder_is_drawn_uniformly() -> None:
    """G = 7, M = 3: two of each and one more of any, each a third of the time; q is 1/3, not the policy's share."""
    modes, sampled = draw([0.9, 0.09, 0.01], GROUPS, 7, "stratified")
    counts = counts_of(modes, 3)
    assert (counts.sum(1) == 7).all()
    assert (counts >= 2).all()
    assert_same(sampled, torch.full_like(sampled, 1 / 3))
    extra = (counts == 3).double().mean(0)
    assert (extra - 1 / 3).abs().max() < 5 * math.sqrt(1 / 3 * 2 / 3 / GROUPS)


@pytest.mark.parametrize(("group", "floor"), [(8, 1), (8, 3), (8, 4), (5, 2)])
def test_floor_guarantees_k_of_each_mode(group: int, floor: int) -> None:
    modes, sampled = draw([1.0, 0.0], 50, group, "floor", floor)
    counts = counts_of(modes, 2)
    assert (counts[:, 1] == floor).all()  # the policy never draws it: the floor is all there is
    assert (counts[:, 0] == group - floor).all()
    shares = torch.tensor([(group - floor) / group, floor / group], dtype=torch.float64)
    assert_same(sampled, shares[modes])


def test_floor_draws_the_rest_from_the_policy() -> None:
    modes, _ = draw([0.7, 0.2, 0.1], GROUPS, 8, "floor", 1)
    counts = counts_of(modes, 3)
    assert (counts >= 1).all()
    expected = 1 + 5 * torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    assert (counts.double().mean(0) - expected).abs().max() < 5 * math.sqrt(5 * 0.25 / GROUPS)


def test_free_draws_from_the_policy_and_weighs_nothing() -> None:
    policy = [0.7, 0.2, 0.1]
    modes, sampled = draw(policy, GROUPS, 4, "free")
    shares = counts_of(modes, 3).double().sum(0) / (4 * GROUPS)
    chosen = torch.tensor(policy, dtype=torch.float64)
    assert (shares - chosen).abs().max() < 5 * math.sqrt(0.25 / (4 * GROUPS))
    assert_same(sampled, chosen[modes])


def test_each_row_has_its_own_policy() -> None:
    """Rows of one batch are prompts with different policies."""
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(3, 1)
    modes, sampled = draw_modes(certain, torch.arange(6), group=6, sampling="free")
    assert modes.tolist() == [0, 1] * 3
    assert sampled.tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("sampling", "group", "num_modes", "floor", "forced"),
    [("free", 8, 2, 3, 0), ("stratified", 8, 2, 0, 4), ("stratified", 7, 3, 0, 2), ("floor", 8, 2, 3, 3)],
)
def test_forced_per_mode(sampling: str, group: int, num_modes: int, floor: int, forced: int) -> None:
    assert forced_per_mode(sampling, group, num_modes, floor) == forced


# ---- q and the importance weight ---------------------------------------------------------------------------------

POLICY = [0.75, 0.2, 0.05]
PLANS = [("free", 8, 0), ("stratified", 6, 0), ("stratified", 7, 0), ("floor", 8, 1), ("floor", 7, 2), ("floor", 6, 2)]


@pytest.mark.parametrize(("sampling", "group", "floor"), PLANS)
def test_q_is_the_share_that_a_mode_gets(sampling: str, group: int, floor: int) -> None:
    modes, sampled = draw(POLICY, GROUPS, group, sampling, floor)
    for mode in range(3):
        members = modes == mode
        q = sampled[members]
        assert (q == q[0]).all()  # one number per mode, forced or drawn
        deviation = math.sqrt(q[0].item() * (1 - q[0].item()) / members.numel())
        assert abs(members.double().mean() - q[0]) < 5 * deviation + 1e-12


@pytest.mark.parametrize(("sampling", "group", "floor"), PLANS)
def test_importance_weights_make_the_group_unbiased_for_the_policy(sampling: str, group: int, floor: int) -> None:
    """E[sum_i rho_i f(m_i)] / G = sum_m pi(m) f(m), for any f."""
    policy, f = torch.tensor(POLICY, dtype=torch.float64), torch.tensor([0.3, -1.0, 5.0], dtype=torch.float64)
    modes, sampled = draw(POLICY, GROUPS, group, sampling, floor, seed=1)
    plan = ModePlan(modes.flatten(), policy.repeat(modes.numel(), 1), sampled.flatten(), torch.ones(modes.numel()))
    estimates = (plan.importance.view_as(sampled) * f[modes]).mean(1)
    exact = (policy * f).sum()
    deviation = estimates.std() / math.sqrt(GROUPS)
    assert (estimates.mean() - exact).abs() < 5 * deviation + 1e-12
    if sampling == "stratified" and group % 3 == 0:
        assert_same(estimates, exact.expand(GROUPS))
    if sampling == "free":
        assert_same(plan.importance, torch.ones_like(plan.importance))
    else:  # negative control: without the weight the forced modes bias the group
        plain = f[modes].mean(1)
        assert (plain.mean() - exact).abs() > 20 * plain.std() / math.sqrt(GROUPS)


def test_importance_by_hand() -> None:
    plan = ModePlan(
        modes=torch.tensor([0, 1, 1]),
        mode_probs=torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.25, 0.75]]),
        sampled_probs=torch.tensor([0.5, 0.5, 0.5]),
        mass=torch.ones(3),
    )
    assert plan.importance.tolist() == pytest.approx([1.8, 0.2, 1.5])


# ---- groups over ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_rank", [4, 3, 2, 1])
@pytest.mark.parametrize(("sampling", "floor"), [("stratified", 0), ("floor", 2)])
def test_a_group_spread_over_ranks_gets_the_same_forced_modes(rows_per_rank: int, sampling: str, floor: int) -> None:
    """Two groups of 6 on ranks of a few rows, each with its own generator; the ranks know their places only."""
    group, rows = 6, 12
    policy = torch.tensor([[0.99, 0.01]], dtype=torch.float64)
    parts = []
    for rank, first in enumerate(range(0, rows, rows_per_rank)):
        torch.manual_seed(100 + rank)
        places = (torch.arange(rows_per_rank) + first) % group
        modes, sampled = draw_modes(
            policy.repeat(rows_per_rank, 1), places, group=group, sampling=sampling, floor=floor
        )
        parts.append((modes, sampled))
    spread = torch.cat([modes for modes, _ in parts]).view(2, group)
    whole, sampled = draw([0.99, 0.01], 2, group, sampling, floor, seed=7)
    forced = 2 * forced_per_mode(sampling, group, 2, floor)
    assert spread[:, :forced].tolist() == whole[:, :forced].tolist() == [[0, 1] * (forced // 2)] * 2
    q = dict(zip(whole.flatten().tolist(), sampled.flatten().tolist(), strict=True))
    for modes, shares in parts:
        assert [q[mode] for mode in modes.tolist()] == shares.tolist()


# ---- annealing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("floor", "step", "steps", "expected"),
    [
        (4, 0, 100, 4),
        (4, 50, 100, 2),
        (4, 100, 100, 0),
        (4, 1000, 100, 0),
        (3, 0, 0, 3),  # steps = 0: no anneal
        (3, 500, 0, 3),
        (0, 10, 100, 0),
    ],
)
def test_annealed_floor(floor: int, step: int, steps: int, expected: int) -> None:
    assert annealed_floor(floor, step, steps) == expected


def test_annealed_floor_never_rises() -> None:
    floors = [annealed_floor(4, step, 37) for step in range(50)]
    assert floors == sorted(floors, reverse=True)
    assert set(floors) == {4, 3, 2, 1, 0}
    assert all(isinstance(floor, int) for floor in floors)
