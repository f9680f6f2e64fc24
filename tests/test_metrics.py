"""What a step is told by, on a hand-made batch: three groups of four, two modes, unscorable rollouts among them."""

import math

import pytest
import torch

from siesta.rl.advantages import Credit, Rollouts
from siesta.rl.metrics import entropy, rollout_metrics

NAN = math.nan
NAMES = ["short", "think"]


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_rollouts(**changes) -> Rollouts:
    """Group 1 has spread, group 2 has none (its unscorable rollout aside), group 3 is unscorable as a whole."""
    columns = {
        "rewards": tensor([1, -1, 0.5, 0.5, -1, -1, -1, NAN, NAN, NAN, NAN, NAN]),
        "scores": tensor([1, 0, 1, 1, 0, 0, 0, NAN, NAN, NAN, NAN, NAN]),
        "lengths": tensor([1, 2, 10, 12, 1, 1, 12, 8, 2, 2, 12, 3]),
        "truncated": tensor([0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0]),
        "modes": torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]),
        "importance": tensor([1.0] * 12),
        "mass": tensor([0.9] * 6 + [0.7] * 6),
        "mode_probs": tensor([[0.5, 0.5]] * 4 + [[1.0, 0.0]] * 4 + [[0.25, 0.75]] * 4),
    }
    return Rollouts(group=4, **{**columns, **changes})


def make_credit() -> Credit:
    """Credit of the unscorable rollouts is absurd on purpose: it must not be read."""
    mode = tensor([0.25, 0.25, 0.5, 0.5, 0, 0, -0.1, 99, 99, 99, 99, 99])
    response = tensor([1, -1, 0.5, -0.5, 0.2, -0.2, 0, 99, 99, 99, 99, 99])
    return Credit(mode, response, None, torch.zeros(12).bool())


@pytest.fixture
def found() -> dict[str, float]:
    return rollout_metrics(NAMES, make_rollouts(), make_credit())


def test_numbers_of_the_whole_batch(found: dict[str, float]) -> None:
    assert found["rollout/reward"] == pytest.approx((1 - 1 + 0.5 + 0.5 - 3) / 7)
    assert found["rollout/accuracy"] == pytest.approx(3 / 7)
    assert found["rollout/tokens"] == pytest.approx(66 / 12)
    assert found["rollout/truncated"] == pytest.approx(4 / 12)
    assert found["rollout/unscorable"] == 5
    assert found["mode/mass"] == pytest.approx(0.8)


def test_numbers_per_mode(found: dict[str, float]) -> None:
    """Means over scorable rollouts for what a verifier says, over all for lengths."""
    assert found["mode/short/share"] == pytest.approx(0.5)
    assert found["mode/short/accuracy"] == pytest.approx(1 / 4)
    assert found["mode/short/reward"] == pytest.approx((1 - 1 - 1 - 1) / 4)
    assert found["mode/short/advantage"] == pytest.approx(0.125)
    assert found["mode/short/response_advantage_abs"] == pytest.approx(2.4 / 4)
    assert found["mode/short/tokens"] == pytest.approx(9 / 6)
    assert found["mode/short/truncated"] == pytest.approx(1 / 6)
    assert found["mode/short/unscorable"] == 2
    assert found["mode/think/accuracy"] == pytest.approx(2 / 3)
    assert found["mode/think/reward"] == pytest.approx(0.0)
    assert found["mode/think/advantage"] == pytest.approx(0.3)
    assert found["mode/think/response_advantage_abs"] == pytest.approx(1 / 3)
    assert found["mode/think/tokens"] == pytest.approx(57 / 6)
    assert found["mode/think/truncated"] == pytest.approx(3 / 6)
    assert found["mode/think/unscorable"] == 3


def test_policy_and_entropies_in_nats(found: dict[str, float]) -> None:
    # Mean policy (0.5 + 1 + 0.25) / 3 = 7/12. Entropies: ln 2, 0, and that of (1/4, 3/4).
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    mean = 7 / 12 * math.log(12 / 7) + 5 / 12 * math.log(12 / 5)
    assert found["mode/short/prob"] == pytest.approx(7 / 12)
    assert found["mode/think/prob"] == pytest.approx(5 / 12)
    assert found["mode/entropy"] == pytest.approx((math.log(2) + quarter) / 3)
    assert found["mode/entropy_mean_policy"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("probs", "nats"),
    [([0.5, 0.5], math.log(2)), ([1.0, 0.0], 0.0), ([0.25] * 4, math.log(4)), ([0.0, 0.5, 0.5], math.log(2))],
)
def test_entropy(probs: list, nats: float) -> None:
    assert entropy(tensor(probs)).item() == pytest.approx(nats)
    assert entropy(tensor([probs, probs])).shape == (2,)


def test_groups_without_signal(found: dict[str, float]) -> None:
    """Equal rewards, or nothing to compare: two of the three groups."""
    assert found["rollout/groups_without_signal"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("group", "signal"),
    [
        ([1, 1, 1, 1], False),
        ([1, 1, 1, 1 - 1e-6], True),
        ([NAN, NAN, NAN, 1], False),
        ([NAN, NAN, -1, 1], True),
        ([NAN] * 4, False),
    ],
)
def test_signal_of_a_group(group: list, signal: bool) -> None:
    rollouts = make_rollouts(rewards=tensor([*group, 1, 0, 0, 0, 0, 1, 0, 0]))
    found = rollout_metrics(NAMES, rollouts, make_credit())
    assert found["rollout/groups_without_signal"] == pytest.approx(0.0 if signal else 1 / 3)


def test_a_mode_without_rollouts_has_no_accuracy() -> None:
    """Its share is 0 and its probability known; what needs a rollout is absent, not NaN."""
    found = rollout_metrics(NAMES, make_rollouts(modes=torch.zeros(12).long()), make_credit())
    assert found["mode/think/share"] == 0.0
    assert found["mode/think/prob"] == pytest.approx(5 / 12)
    assert found["mode/think/unscorable"] == 0
    absent = {"accuracy", "reward", "advantage", "response_advantage_abs", "tokens", "truncated"}
    assert not absent & {name.removeprefix("mode/think/") for name in found}
    assert absent <= {name.removeprefix("mode/short/") for name in found}
    assert not any(math.isnan(value) for value in found.values())


def test_a_mode_without_a_scorable_rollout_has_lengths_only() -> None:
    rewards = torch.where(make_rollouts().modes == 1, NAN, make_rollouts().rewards)
    found = rollout_metrics(NAMES, make_rollouts(rewards=rewards), make_credit())
    assert found["mode/think/unscorable"] == 6
    assert "mode/think/accuracy" not in found
    assert "mode/think/advantage" not in found
    assert found["mode/think/tokens"] == pytest.approx(57 / 6)


def test_names_are_in_groups(found: dict[str, float]) -> None:
    assert {name.split("/")[0] for name in found} == {"mode", "rollout"}
    assert all(isinstance(value, float | int) for value in found.values())
