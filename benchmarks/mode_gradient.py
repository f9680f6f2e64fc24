"""How hard each objective pulls a mode policy back from the wrong mode: the figure of docs/loss.md.

    python -m benchmarks.mode_gradient

One prompt on which `short` earns 1 and `think` 0.5, a stratified group, and a policy that thinks with probability p.
The pull is the derivative of the loss by the logit of `think`, taken by differentiating the functions of `rl/loss.py`
at alpha = 1: what gradient descent subtracts.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from siesta.rl.advantages import mode_targets, mode_values, per_mode_advantages
from siesta.rl.loss import mode_target_loss, policy_loss

REWARDS, MODES = torch.tensor([[1.0, 0.5]]), torch.tensor([[0, 1]])  # (P, G): a rollout in each mode
TAU = 0.1


def pulls(odds: float, tau: float = TAU) -> tuple[float, float]:
    """Derivatives of the policy gradient's loss and of the mode target's, by the logit of `think`.

    Args:
        odds: log(p / (1 - p)).
    """
    logit = torch.tensor(odds, dtype=torch.float64, requires_grad=True)
    logps = torch.stack([torch.zeros_like(logit), logit]).log_softmax(0)  # (M,)
    policy = logps.detach().exp()[None]
    values, _ = mode_values(REWARDS.double(), MODES, 2)
    advantages, _ = per_mode_advantages(REWARDS.double(), MODES, values, policy)
    importance = policy[0, MODES[0]] / 0.5
    control = logps[MODES[0]][:, None]  # (B, 1): rollouts that are their control token alone
    weights = importance[:, None] / len(importance)
    by_gradient = policy_loss(control, control.detach(), advantages.T, weights, epsilon_low=0.2, epsilon_high=0.2)
    targets, _ = mode_targets(values, torch.ones(2, dtype=torch.float64), tau)
    by_target = mode_target_loss(logps[None], targets, torch.ones(1))
    first, second = (torch.autograd.grad(loss, logit, retain_graph=True)[0] for loss in (by_gradient, by_target))
    return float(first), float(second)


def draw(file: Path) -> None:
    """The figure, over log-odds from undecided to P(think) = 0.9999."""
    odds = torch.linspace(0, 9.2, 93).tolist()
    gradient, target = zip(*map(pulls, odds), strict=True)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        panel = figure.subplots()
        panel.semilogy(odds, target, color="C0", label="mode target")
        panel.semilogy(odds, gradient, color="C3", label="policy gradient")
        shown = [0.5, 0.9, 0.99, 0.999, 0.9999]
        panel.set_xticks(torch.tensor(shown).logit().tolist(), [f"{p:g}" for p in shown])
        panel.set_xlabel("P(think), where short earns 0.5 more (axis in log-odds)")
        panel.set_ylabel("pull towards short")
        panel.legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw how hard each objective pulls a mode policy back.")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/mode_gradient.png"))
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
