"""The numbers that docs/loss.md works out by hand are those of the code. (Its example runs in test_docs_commands.)"""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks.mode_gradient import TAU, draw, pulls
from siesta.rl.advantages import group_advantages, mode_targets
from siesta.rl.loss import kl_loss, mass_loss, policy_loss

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "loss.md").read_text(encoding="utf-8")


def row(title: str) -> list[float]:
    """Numbers of the table row that begins so."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {title}")]
    return [float(cell) for cell in line.split("|")[2:-1]]


def test_the_pulls_of_the_table_are_those_of_the_two_losses() -> None:
    shares = row("P(think), where")
    found = [pulls(math.log(p / (1 - p))) for p in shares]
    assert row("pull of the policy gradient") == pytest.approx([first for first, _ in found], abs=1e-6)
    assert row("pull of the target") == pytest.approx([second for _, second in found], abs=5e-4)


@pytest.mark.parametrize("p", [0.2, 0.9, 0.999])
def test_pulls_are_what_the_page_says_they_are(p: float) -> None:
    """p (1 - p) times the difference of values, and p less the target."""
    target = 1 / (1 + math.exp(0.5 / TAU))
    assert pulls(math.log(p / (1 - p))) == pytest.approx((p * (1 - p) * 0.5, p - target), rel=1e-9)


def test_targets_at_each_tau() -> None:
    values = torch.tensor([[0.0, 0.5]])
    for tau, share in zip(row("tau"), row("pi\\*(think)"), strict=True):
        targets, _ = mode_targets(values, torch.ones(2), tau)
        assert float(targets[0, 1]) == pytest.approx(share, abs=5e-4)


def test_group_advantages_of_the_example() -> None:
    rewards = torch.tensor([[-1.0, 1.0, 0.5, 0.5]])
    assert group_advantages(rewards).tolist() == [[-1.25, 0.75, 0.25, 0.25]]
    assert "here -1.25, +0.75, +0.25, +0.25" in PAGE


def test_clipping_kl_and_mass_by_hand() -> None:
    one = torch.ones(1, 1)
    ratio = torch.full((1, 1), math.log(1.35))
    clipped = policy_loss(ratio, torch.zeros(1, 1), one, one, epsilon_low=0.2, epsilon_high=0.2)
    assert float(clipped) == pytest.approx(-1.2)
    assert float(kl_loss(torch.zeros(1, 1), torch.full((1, 1), 0.1), one)) == pytest.approx(0.00517, abs=5e-6)
    assert float(mass_loss(torch.tensor([0.95]).log(), torch.ones(1))) == pytest.approx(0.0513, abs=5e-5)
    for said in ("min(1.35, 1.2) = 1.2", "it is 0.00517", "-log 0.95 = 0.0513"):
        assert said in PAGE


def test_a_group_without_one_mode() -> None:
    found = re.search(r"in (\d+) of 100 cases at p = 0.99", PAGE)
    assert found
    assert int(found[1]) == round(100 * 0.99**8)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
