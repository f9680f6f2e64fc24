"""Credit and weights against hand numbers, and the identity that makes `per_mode` worth having.

The identity: with modes forced in shares q and the exact weight rho = pi / q, the expected gradient of the control
token's term is the gradient of sum_m pi(m) Q(m) over all modes at once. It is checked by enumerating what a plan can
draw, with no sampling.
"""

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from siesta.rl.advantages import (
    Credit,
    Rollouts,
    assign_credit,
    control_factors,
    group_advantages,
    kl_weights,
    mode_targets,
    mode_values,
    per_mode_advantages,
    reference_advantages,
    shrink_values,
    token_weights,
)
from siesta.rl.config import DeGRPOConfig
from siesta.rl.loss import policy_loss

NAN = math.nan
assert_same = partial(torch.testing.assert_close, rtol=0.0, atol=1e-10, equal_nan=True)


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- mode values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "modes", "values", "counts"),
    [
        ([1, 0, 0.5, -1], [0, 0, 1, 1], [0.5, -0.25], [2, 2]),
        ([1, 0, 0.5, -1], [1, 0, 0, 1], [0.25, 0.0], [2, 2]),
        ([1, 0, 0.5, -1], [1, 1, 1, 1], [NAN, 0.125], [0, 4]),  # no rollout of mode 0: its value is not known
        ([1, NAN, 0.5, -1], [0, 0, 1, 1], [1.0, -0.25], [1, 2]),  # the unscorable one enters no mean
        ([NAN, NAN, 0.5, -1], [0, 0, 1, 1], [NAN, -0.25], [0, 2]),
        ([NAN] * 4, [0, 0, 1, 1], [NAN, NAN], [0, 0]),
    ],
)
def test_mode_values_by_hand(rewards: list, modes: list, values: list, counts: list) -> None:
    found = mode_values(tensor([rewards]), torch.tensor([modes]), 2)
    assert_same(found[0], tensor([values]))
    assert_same(found[1], tensor([counts]))


def test_mode_values_keep_groups_and_modes_apart() -> None:
    values, counts = mode_values(
        tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[0, 1, 2, 2], [2, 0, 0, 0]]), num_modes=3
    )
    assert_same(values, tensor([[1, 2, 3.5], [7, NAN, 5]]))
    assert_same(counts, tensor([[1, 1, 2], [3, 0, 1]]))


# ---- advantages --------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand() -> None:
    rewards = tensor([[1, 0, 0, 1], [NAN, 1, 0.5, 0], [NAN, NAN, NAN, 7], [NAN] * 4])
    expected = tensor([[0.5, -0.5, -0.5, 0.5], [0, 0.5, 0, -0.5], [0] * 4, [0] * 4])
    assert_same(group_advantages(rewards), expected)


def test_scaled_group_advantages_divide_by_the_sample_deviation() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 8))
    rewards[0, 3] = rewards[1, :4] = NAN
    found = group_advantages(torch.tensor(rewards), scale="group").numpy()
    for row, group in zip(found, rewards, strict=True):
        real = ~np.isnan(group)
        expected = (group[real] - group[real].mean()) / (group[real].std(ddof=1) + 1e-4)
        np.testing.assert_allclose(row[real], expected, rtol=0, atol=1e-10)
        assert (row[~real] == 0).all()


@pytest.mark.parametrize("group", [[1.0] * 4, [NAN, NAN, NAN, 7.0], [NAN] * 4])
def test_scaling_a_group_without_spread_gives_zero(group: list) -> None:
    assert (group_advantages(tensor([group]), scale="group") == 0).all()


def test_batch_scaled_advantages_divide_by_one_deviation_for_all_groups() -> None:
    # Differences 0.5 and -0.5 four times, 0.75 and -0.25 three times: squares 1 + 0.75, seven degrees of freedom.
    rewards = tensor([[1, 0, 0, 1], [1, 0, 0, 0], [NAN] * 4])
    expected = tensor([[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0] * 4]) / (math.sqrt(1.75 / 7) + 1e-4)
    assert_same(group_advantages(rewards, scale="batch"), expected)
    # Negative control: group by group, the lone success would count for more.
    by_group = group_advantages(rewards, scale="group")
    assert by_group[1, 0] / by_group[0, 0] > 1.6
    assert expected[1, 0] / expected[0, 0] == pytest.approx(1.5)


def test_reference_advantages_by_hand() -> None:
    # Thinking is right half the time: 0.5 is the bar. Answering at once pays a bonus of 0.05 on top of 1 or 0.
    rewards = tensor([[1.05, 0.05, 1, 0], [NAN, 1.05, NAN, 0.0], [1.05, 0.05, NAN, NAN]])
    modes = torch.tensor([[0, 0, 1, 1]] * 3)
    values, _ = mode_values(rewards, modes, 2)
    expected = tensor([[0.55, -0.45, 0.5, -0.5], [0, 1.05, 0, 0], [0] * 4])  # no bar in the last group, no credit
    assert_same(reference_advantages(rewards, values), expected)
    # Negative control: where thinking is always right, a right short answer is worth the bonus and no more.
    always = tensor([[1.05, 0.05, 1, 1]])
    assert_same(reference_advantages(always, mode_values(always, modes[:1], 2)[0]), tensor([[0.05, -0.95, 0, 0]]))


def test_per_mode_advantages_by_hand() -> None:
    # Q = ((1 + 0) / 2, (0.5 + 0.5) / 2) = (0.5, 0.5); V = 0.5: no mode is better, the answers within mode 0 differ.
    # Q = (-1, 0.5), pi = (0.8, 0.2): V = -0.8 + 0.1 = -0.7; mode advantage -0.3 and 1.2.
    rewards, modes = tensor([[1, 0, 0.5, 0.5], [-1, 0.5, -1, 0.5]]), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    values, _ = mode_values(rewards, modes, 2)
    mode, response = per_mode_advantages(rewards, modes, values, tensor([[0.3, 0.7], [0.8, 0.2]]))
    assert_same(mode, tensor([[0, 0, 0, 0], [-0.3, 1.2, -0.3, 1.2]]))
    assert_same(response, tensor([[0.5, -0.5, 0, 0], [0, 0, 0, 0]]))


def test_per_mode_advantages_renormalise_over_known_modes() -> None:
    # pi = (0.5, 0.25, 0.25), mode 2 is missing: pi over the known is (2/3, 1/3). Q = (1, -1): V = 1/3.
    rewards, modes = tensor([[1, 1, -1, -1]]), torch.tensor([[0, 0, 1, 1]])
    values, _ = mode_values(rewards, modes, 3)
    mode, response = per_mode_advantages(rewards, modes, values, tensor([[0.5, 0.25, 0.25]]))
    assert_same(mode, tensor([[2 / 3, 2 / 3, -4 / 3, -4 / 3]]))
    assert (response == 0).all()


def test_a_single_known_mode_has_nothing_to_be_better_than() -> None:
    rewards, modes = tensor([[1, -1, 1, 1]]), torch.tensor([[1, 1, 1, 1]])
    values, _ = mode_values(rewards, modes, 2)
    mode, response = per_mode_advantages(rewards, modes, values, tensor([[0.9, 0.1]]))
    assert_same(mode, torch.zeros(1, 4, dtype=torch.float64))
    assert_same(response, tensor([[0.5, -1.5, 0.5, 0.5]]))


def test_unscorable_rollouts_get_no_response_credit_and_change_no_value() -> None:
    # Q = (1, -0.25) from the scorable three, pi = (0.5, 0.5): V = 0.375.
    rewards, modes = tensor([[1, NAN, 0.5, -1], [NAN] * 4]), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    values, _ = mode_values(rewards, modes, 2)
    mode, response = per_mode_advantages(rewards, modes, values, tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert_same(mode[0, [0, 2, 3]], tensor([0.625, -0.625, -0.625]))
    assert_same(response, tensor([[0, 0, 0.75, -0.75], [0] * 4]))
    assert mode.isfinite().all()
    assert (mode[1] == 0).all()


def test_mode_advantages_average_to_zero_under_the_policy() -> None:
    random = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 9, generator=random, dtype=torch.float64)
    modes = (torch.arange(9) % 3).repeat(6, 1)
    policy = torch.softmax(torch.randn(6, 3, generator=random, dtype=torch.float64), 1)
    values, _ = mode_values(rewards, modes, 3)
    mode, response = per_mode_advantages(rewards, modes, values, policy)
    assert_same((policy * mode[:, :3]).sum(1), torch.zeros(6, dtype=torch.float64))
    assert_same(mode_values(response, modes, 3)[0], torch.zeros(6, 3, dtype=torch.float64))


# ---- mode targets ------------------------------------------------------------------------------------------------


def test_mode_targets_closed_form() -> None:
    """tau 0.3: P(think) = 1 / (1 + exp(0.5 / 0.3)) where short is right too, 1 / (1 + exp(-1.5 / 0.3)) where not."""
    targets, known = mode_targets(tensor([[1, 0.5], [-1, 0.5]]), tensor([1, 1]), 0.3)
    assert targets[:, 1].tolist() == pytest.approx([1 / (1 + math.exp(5 / 3)), 1 / (1 + math.exp(-5))], abs=1e-10)
    assert [round(p, 2) for p in targets[:, 1].tolist()] == [0.16, 0.99]
    assert_same(targets.sum(1), tensor([1, 1]))
    assert known.all()


def test_mode_targets_start_from_the_prior() -> None:
    # Equal values leave the prior; Q = (0, ln 2) at tau 1 doubles the second: (1/4, 3/4) -> (1, 6) / 7.
    targets, _ = mode_targets(tensor([[0.3, 0.3], [0, math.log(2)]]), tensor([1, 3]), 1.0)
    assert_same(targets, tensor([[0.25, 0.75], [1 / 7, 6 / 7]]))


@pytest.mark.parametrize(("tau", "expected"), [(1e-3, [0, 0, 1]), (1e9, [1 / 3, 1 / 3, 1 / 3])])
def test_mode_targets_between_certainty_and_the_prior(tau: float, expected: list) -> None:
    targets, _ = mode_targets(tensor([[0.1, -1, 0.5]]), tensor([1, 1, 1]), tau)
    torch.testing.assert_close(targets, tensor([expected]), rtol=0, atol=1e-8)


def test_mode_targets_see_differences_only() -> None:
    values, prior = tensor([[1, 0.5, -1]]), tensor([1, 2, 0.5])
    assert_same(mode_targets(values + 7, prior, 0.1)[0], mode_targets(values, prior, 0.1)[0])
    assert_same(mode_targets(values, 5 * prior, 0.1)[0], mode_targets(values, prior, 0.1)[0])


def test_a_prompt_needs_every_value_for_a_target() -> None:
    targets, known = mode_targets(tensor([[1, 0], [NAN, 0], [NAN, NAN]]), tensor([1, 1]), 0.3)
    assert known.tolist() == [True, False, False]
    assert targets[0].isfinite().all()


def test_shrunk_values_by_hand() -> None:
    # Means over prompts: 0.5 and 0.5. strength 2: (2*1 + 2*0.5)/4, (0 + 1)/2; (2*0 + 1)/4, (1*0.5 + 1)/3.
    shrunk = shrink_values(tensor([[1, NAN], [0, 0.5]]), tensor([[2, 0], [2, 1]]), 2.0)
    assert_same(shrunk, tensor([[0.75, 0.5], [0.25, 0.5]]))


def test_shrinking_limits() -> None:
    values, counts = tensor([[1, -1], [0, 0.5]]), tensor([[2, 2], [2, 2]])
    assert_same(shrink_values(values, counts, 0.0), values)
    torch.testing.assert_close(shrink_values(values, counts, 1e9), tensor([[0.5, -0.25]] * 2), rtol=0, atol=1e-8)
    nobody = shrink_values(tensor([[1, NAN], [0, NAN]]), tensor([[2, 0], [2, 0]]), 2.0)
    assert nobody[:, 1].isnan().all()  # no prompt has shown the mode: nothing to borrow


# ---- weights -----------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])  # T = 3, 1, 0, 2
SCORABLE = torch.tensor([True, True, True, False])


def test_token_weights_by_hand() -> None:
    # N = 3. Control: alpha rho / 3. Responses: 1 / (3 * 3), 1 / (3 * 1), none, and nothing for the unscorable row.
    weights = token_weights(MASK, SCORABLE, 3, control=tensor([0.3, 0.6, 0.9, 1.2]), decoupled=True)
    expected = [[0.1, 1 / 9, 1 / 9, 1 / 9], [0.2, 1 / 3, 0, 0], [0.3, 0, 0, 0], [0, 0, 0, 0]]
    assert_same(weights, tensor(expected))


def test_token_weights_sums() -> None:
    """Control tokens sum to alpha sum rho / N, each rollout's response to 1 / N, whatever its length."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (20,), generator=random)
    mask = (torch.arange(9) <= lengths[:, None]).long()
    scorable = torch.rand(20, generator=random) > 0.3
    rho, alpha, number = torch.rand(20, generator=random, dtype=torch.float64), 0.25, 17
    weights = token_weights(mask, scorable, number, control=alpha * rho, decoupled=True)
    assert_same(weights[:, 0].sum(), alpha * rho[scorable].sum() / number)
    assert_same(weights[:, 1:].sum(1), scorable.double() / number)
    assert (weights[mask == 0] == 0).all()


def test_plain_weights_treat_every_token_alike() -> None:
    weights = token_weights(MASK, SCORABLE, 3, control=tensor([1.0] * 4), decoupled=False)
    expected = [[1 / 12] * 4, [1 / 6, 1 / 6, 0, 0], [1 / 3, 0, 0, 0], [0] * 4]
    assert_same(weights, tensor(expected))
    forced = token_weights(MASK, SCORABLE, 3, control=tensor([0.5, 2, 1, 9]), decoupled=False)
    assert_same(forced[:, 0], tensor([1 / 24, 1 / 3, 1 / 3, 0]))
    assert_same(forced[:, 1:], weights[:, 1:])
    assert_same(kl_weights(MASK, SCORABLE, 3).double(), tensor(expected), atol=1e-7)


def test_weights_of_nobody_are_zero() -> None:
    nobody = torch.zeros(4).bool()
    for decoupled in (True, False):
        assert (token_weights(MASK, nobody, 0, control=tensor([1.0] * 4), decoupled=decoupled) == 0).all()
    assert (kl_weights(MASK, nobody, 0) == 0).all()


@pytest.mark.parametrize("decoupled", [True, False])
def test_weights_read_the_mask_and_leave_it_alone(decoupled: bool) -> None:
    """A float mask is not written into, and its type decides nothing."""
    before = MASK.double()
    mask = before.clone()
    weights = token_weights(mask, SCORABLE, 3, control=tensor([1.0] * 4), decoupled=decoupled)
    assert_same(mask, before)
    assert_same(weights, token_weights(MASK, SCORABLE, 3, control=tensor([1.0] * 4), decoupled=decoupled))


# ---- all of it under a method's settings -------------------------------------------------------------------------


def method(folder: Path, **settings) -> DeGRPOConfig:
    return DeGRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], **settings)


def test_control_factors_by_hand(tmp_path: Path) -> None:
    """alpha rho_i; in plain GRPO alpha plays no part; mode targets leave the control token without a policy term."""
    importance = tensor([1.0, 0.4, 1.6])
    policy = {"mode_objective": "policy_gradient", "alpha": 55.0}
    assert_same(control_factors(importance, method(tmp_path, **policy)), 55 * importance)
    assert_same(control_factors(importance, method(tmp_path, **policy, decoupled=False)), importance)
    assert_same(control_factors(importance, method(tmp_path, mode_objective="target", alpha=55.0)), 0 * importance)


@pytest.fixture
def rollouts() -> Rollouts:
    """Three groups of four: one with an unscorable rollout, one without a scorable rollout of mode 1."""
    rewards = tensor([1, 0, 0.5, 0.5, -1, NAN, 0.5, -1, 1, -1, NAN, NAN])
    policy = tensor([[0.3, 0.7]] * 4 + [[0.8, 0.2]] * 4 + [[0.5, 0.5]] * 4)
    plain = torch.ones(12, dtype=torch.float64)
    modes = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1])
    return Rollouts(4, rewards, rewards, plain, plain, modes, plain, plain, policy)


def test_rollouts_from_gathered_columns() -> None:
    names = ("rewards", "scores", "lengths", "truncated", "modes", "importance", "mass")
    columns = torch.arange(18.0, dtype=torch.float64).view(2, 9)
    columns[0, 0] = NAN
    found = Rollouts.from_columns(columns, 2)
    for place, name in enumerate(names):
        assert_same(getattr(found, name).double(), columns[:, place])
    assert found.modes.dtype == torch.long
    assert_same(found.mode_probs, columns[:, 7:])
    assert found.scorable.tolist() == [False, True]
    assert found.group == 2


GROUP = [0.5, -0.5, 0, 0, -0.5, 0, 1.0, -0.5, 1, -1, 0, 0]
# Q: (0.5, 0.5), V 0.5; (-1, -0.25), V -0.85; (0, unknown).
PER_MODE = [0, 0, 0, 0, -0.15, None, 0.6, 0.6, 0, 0, None, None]  # None: unscorable, its weight is 0
RESPONSE = [0.5, -0.5, 0, 0, 0, 0, 0.75, -0.75, 1, -1, 0, 0]
REFERENCE = [0.5, -0.5, 0, 0, -0.75, 0, 0.75, -0.75, 0, 0, 0, 0]


def assert_advantages(given: Credit, mode: list, response: list) -> None:
    judged = [i for i, value in enumerate(mode) if value is not None]
    assert_same(given.mode_advantages[judged], tensor([mode[i] for i in judged]))
    assert_same(given.response_advantages, tensor(response))
    assert given.mode_advantages.isfinite().all()


@pytest.mark.parametrize("objective", ["policy_gradient", "target"])
@pytest.mark.parametrize(
    ("advantage", "mode", "response"),
    [("group", GROUP, GROUP), ("per_mode", PER_MODE, RESPONSE), ("reference", REFERENCE, REFERENCE)],
)
def test_credit_of_each_combination(
    rollouts: Rollouts, tmp_path: Path, objective: str, advantage: str, mode: list, response: list
) -> None:
    settings = method(tmp_path, mode_objective=objective, advantage=advantage)
    given = assign_credit(rollouts, settings, prior=[1.0, 1.0], tau=0.3)
    assert_advantages(given, mode, response)
    if objective == "policy_gradient":
        assert given.targets is None
        assert not given.target_known.any()
        return
    assert given.targets is not None
    assert given.targets.shape == (12, 2)
    assert given.target_known.tolist() == [True] * 8 + [False] * 4
    expected = tensor([[0.5, 0.5]] * 4 + [[1 / (1 + math.exp(2.5)), 1 / (1 + math.exp(-2.5))]] * 4)
    torch.testing.assert_close(given.targets[:8], expected, rtol=0, atol=1e-7)  # the prior comes as float32


@pytest.mark.parametrize("objective", ["policy_gradient", "target"])
def test_credit_scaled_by_the_group(rollouts: Rollouts, tmp_path: Path, objective: str) -> None:
    settings = method(tmp_path, advantage="group", scale_rewards="group", mode_objective=objective)
    given = assign_credit(rollouts, settings, prior=[1.0, 1.0], tau=0.3)
    expected = group_advantages(rollouts.rewards.view(3, 4), scale="group").flatten()
    assert_advantages(given, expected.tolist(), expected.tolist())
    assert given.mode_advantages[0].item() == pytest.approx(0.5 / (np.std([1, 0, 0.5, 0.5], ddof=1) + 1e-4))


def test_credit_with_shrunk_values(rollouts: Rollouts, tmp_path: Path) -> None:
    """Shrinkage moves the targets, and gives one where a mode was not seen; the advantages stay."""
    # Batch means: (0.5 - 1 + 0) / 3 = -1/6 and (0.5 - 0.25) / 2 = 0.125. Third group at strength 2, two rollouts of
    # mode 0: (2 * 0 + 2 * -1/6) / 4 = -1/12, and 0.125 for mode 1. Difference 5/24.
    settings = method(tmp_path, advantage="per_mode", mode_objective="target", value_shrinkage=2.0)
    given = assign_credit(rollouts, settings, prior=[1.0, 3.0], tau=0.5)
    assert_advantages(given, PER_MODE, RESPONSE)
    assert given.targets is not None
    assert given.target_known.all()
    share = 3 * math.exp(5 / 24 / 0.5)
    third = tensor([[1 / (1 + share), share / (1 + share)]] * 4)
    torch.testing.assert_close(given.targets[8:], third, rtol=0, atol=1e-6)


# ---- the all-action identity -------------------------------------------------------------------------------------

VOCABULARY, LOGIT_OF_MODE = 6, [1, 3, 4]


def plans(policy: torch.Tensor, sampling: str, group: int, floor: int) -> list[tuple[list[int], float]]:
    """Every outcome of a mode plan for one prompt and its probability: forced modes, then independent draws."""
    num_modes = len(policy)
    forced = {"free": 0, "stratified": group // num_modes, "floor": floor}[sampling]
    rest = torch.full_like(policy, 1 / num_modes) if sampling == "stratified" else policy
    start = list(range(num_modes)) * forced
    free = group - len(start)
    draws = itertools.product(range(num_modes), repeat=free)
    return [(start + list(drawn), math.prod(rest[m].item() for m in drawn)) for drawn in draws]


def expected_gradient(
    logits: torch.Tensor, values: torch.Tensor, sampling: str, group: int, *, floor: int, exact: bool, advantage: str
) -> torch.Tensor:
    """Of the control-token term of one prompt, enumerated over everything that its plan can draw."""
    columns = LOGIT_OF_MODE[: len(values)]
    policy = torch.softmax(logits[columns].detach(), 0)
    outcomes = plans(policy, sampling, group, floor)
    shares = torch.zeros_like(policy)  # q, as the expected share
    for drawn, chance in outcomes:
        shares += chance * torch.bincount(torch.tensor(drawn), minlength=len(values)).double() / group
    total = torch.zeros_like(logits)
    for drawn, chance in outcomes:
        modes = torch.tensor([drawn])
        rewards = values[modes]
        if advantage == "per_mode":
            found, _ = mode_values(rewards, modes, len(values))
            given, _ = per_mode_advantages(rewards, modes, found, policy[None])
        else:
            given = group_advantages(rewards)
        rho = policy[modes[0]] / shares[modes[0]] if exact else torch.ones(group, dtype=torch.float64)
        weights = token_weights(torch.ones(group, 1), torch.ones(group).bool(), group, control=rho, decoupled=True)
        new = torch.log_softmax(logits, 0)[columns][modes[0]][:, None]
        loss = policy_loss(new, new.detach(), given.view(-1, 1), weights, epsilon_low=0.2, epsilon_high=0.2)
        total = total + chance * torch.autograd.grad(-loss, logits)[0]
    return total


def all_action_gradient(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of sum_m pi(m) Q(m) on the logits of the whole vocabulary; pi is renormalised over the control tokens."""
    policy = torch.softmax(logits[LOGIT_OF_MODE[: len(values)]], 0)
    return torch.autograd.grad((policy * values).sum(), logits)[0]


def random_logits(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, generator=random, dtype=torch.float64).mul(1.5).requires_grad_()


PLANS = [("stratified", 4, 2, 0), ("stratified", 5, 2, 0), ("stratified", 5, 3, 0), ("floor", 5, 2, 1)]


@pytest.mark.parametrize(("sampling", "group", "num_modes", "floor"), [*PLANS, ("floor", 6, 3, 2), ("floor", 5, 3, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_expected_control_gradient_is_the_all_action_gradient(
    sampling: str, group: int, num_modes: int, floor: int, seed: int
) -> None:
    """Also on the logits of the other tokens, where it is 0: credit over modes does not push mass about."""
    logits, values = random_logits(seed), tensor([1.0, -0.4, 0.3][:num_modes])
    found = expected_gradient(logits, values, sampling, group, floor=floor, exact=True, advantage="per_mode")
    exact = all_action_gradient(logits, values)
    assert exact.abs().max() > 1e-2
    assert_same(found, exact)


@pytest.mark.parametrize(("sampling", "group", "num_modes", "floor"), PLANS)
def test_without_the_importance_weight_the_gradient_is_another(
    sampling: str, group: int, num_modes: int, floor: int
) -> None:
    """Negative control: forced modes with rho = 1."""
    logits, values = random_logits(0), tensor([1.0, -0.4, 0.3][:num_modes])
    found = expected_gradient(logits, values, sampling, group, floor=floor, exact=False, advantage="per_mode")
    assert (found - all_action_gradient(logits, values)).abs().max() > 1e-2


def test_the_group_advantage_moves_the_mass_of_the_control_tokens() -> None:
    """Negative control: its baseline is not the policy's mean, so tokens that open no mode get a gradient."""
    logits, values = random_logits(1), tensor([1.0, -0.4])
    found = expected_gradient(logits, values, "stratified", 4, floor=0, exact=True, advantage="group")
    others = [token for token in range(VOCABULARY) if token not in LOGIT_OF_MODE[:2]]
    assert found[others].abs().max() > 1e-3
    assert all_action_gradient(logits, values)[others].abs().max() == 0
