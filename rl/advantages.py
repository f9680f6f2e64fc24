"""What each token is credited with, and how much it weighs: mode values, advantages, mode targets, weights.

Pure functions on a generation batch: P prompts, G rollouts each, M modes; B = P * G rollouts in group order, T tokens.
An unscorable rollout has reward NaN: it enters no mean, weighs nothing and is not counted in N.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from siesta.rl.config import DeGRPOConfig


@dataclass(frozen=True)
class Rollouts:
    """Outcomes of one generation batch over all ranks, in group order; every tensor is (B,) but `mode_probs` (B, M).

    Args:
        group: G.
        rewards, scores: NaN where the verifier failed.
        lengths: Response tokens.
        truncated: 1 where the mode's cap cut the response.
        modes: Long.
        importance: rho_i = pi_old(m_i given x_i) / q(m_i given x_i).
        mass: Probability on control tokens at the first position.
        mode_probs: pi_old(m given x_i).
    """

    group: int
    rewards: torch.Tensor
    scores: torch.Tensor
    lengths: torch.Tensor
    truncated: torch.Tensor
    modes: torch.Tensor
    importance: torch.Tensor
    mass: torch.Tensor
    mode_probs: torch.Tensor

    @classmethod
    def from_columns(cls, columns: torch.Tensor, group: int) -> "Rollouts":
        """From one gathered tensor (B, 7 + M) whose columns stand in the order of the fields."""
        rewards, scores, lengths, truncated, modes, importance, mass = columns[:, :7].unbind(1)
        return cls(group, rewards, scores, lengths, truncated, modes.long(), importance, mass, columns[:, 7:])

    @property
    def scorable(self) -> torch.Tensor:
        return ~self.rewards.isnan()


@dataclass(frozen=True)
class Credit:
    """What each rollout's tokens are credited with, (B,) each; `targets` (B, M) only for mode targets."""

    mode_advantages: torch.Tensor
    response_advantages: torch.Tensor
    targets: torch.Tensor | None
    target_known: torch.Tensor


def assign_credit(rollouts: Rollouts, method: "DeGRPOConfig", *, prior: list[float], tau: float) -> Credit:
    """Advantages and mode targets of a generation batch under a method's settings."""
    grid = (-1, rollouts.group)
    rewards, modes = rollouts.rewards.view(grid), rollouts.modes.view(grid)
    values, counts = mode_values(rewards, modes, len(prior))
    if method.advantage == "group":
        mode_advantages = response_advantages = group_advantages(rewards, scale=method.scale_rewards)
    elif method.advantage == "reference":
        mode_advantages = response_advantages = reference_advantages(rewards, values)
    else:
        mode_probs = rollouts.mode_probs[:: rollouts.group]
        mode_advantages, response_advantages = per_mode_advantages(rewards, modes, values, mode_probs)
    targets, known = None, torch.zeros(len(values), dtype=torch.bool)
    if method.mode_objective == "target":
        if method.value_shrinkage > 0:
            values = shrink_values(values, counts, method.value_shrinkage)
        targets, known = mode_targets(values, torch.tensor(prior), tau)
        targets = targets.repeat_interleave(rollouts.group, dim=0)
    return Credit(
        mode_advantages.flatten(), response_advantages.flatten(), targets, known.repeat_interleave(rollouts.group)
    )


def mode_values(rewards: torch.Tensor, modes: torch.Tensor, num_modes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Q(x, m), the mean reward of a group's scorable rollouts in mode m.

    Args:
        rewards: Shape (P, G); NaN for unscorable.
        modes: Mode of each rollout, shape (P, G), long.

    Returns:
        Q of shape (P, M), NaN where a group holds no scorable rollout of the mode, and the counts behind it, (P, M).
    """
    scorable = ~rewards.isnan()
    member = (modes[..., None] == torch.arange(num_modes, device=modes.device)) & scorable[..., None]  # (P, G, M)
    counts = member.sum(dim=1).to(rewards.dtype)
    totals = (member * rewards.nan_to_num(0.0)[..., None]).sum(dim=1)
    return totals / counts, counts  # 0 / 0 is NaN: the value is not known


def group_advantages(rewards: torch.Tensor, *, scale: str = "none") -> torch.Tensor:
    """r_i - mean of the group, Thinkless' A for every token. (P, G) -> (P, G); 0 for unscorable rollouts.

    `scale` divides by a standard deviation: of the `group`, as GRPO first did, or of the whole `batch` of differences,
    as DLER does (arXiv 2510.15110), so that a group with one success does not count for more than one with many.
    """
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale != "none":
        over = {"group": (1,), "batch": (0, 1)}[scale]
        degrees = ((~rewards.isnan()).sum(dim=over, keepdim=True) - 1).clamp(min=1)
        centred = centred / ((centred.nan_to_num(0.0) ** 2).sum(dim=over, keepdim=True) / degrees).sqrt().add(1e-4)
    return centred.nan_to_num(0.0)


def reference_advantages(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """r_i - Q(x, last mode): better or worse than always answering in the reference mode, the last of the recipe.

    The accuracy constraint of AdaptThink (arXiv 2505.13417), whose bonus delta for not thinking is in the reward
    table here. There the reference was measured once, on the model before RL; here it is the group's own rollouts in
    that mode, so the bar rises as thinking improves. (P, G), (P, M) -> (P, G); 0 where the bar is not known.
    """
    return (rewards - values[:, -1:]).nan_to_num(0.0)


def per_mode_advantages(
    rewards: torch.Tensor, modes: torch.Tensor, values: torch.Tensor, mode_probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Credit taken apart: which mode was right, and how good the answer was for its mode.

    Args:
        rewards, modes: Shape (P, G).
        values: Q(x, m), shape (P, M), NaN where unknown.
        mode_probs: pi_old(m given x), shape (P, M).

    Returns:
        Mode advantage Q(x, m_i) - sum_m pi(m) Q(x, m) and response advantage r_i - Q(x, m_i), each (P, G). The sum
        runs over the modes whose value is known, pi renormalised over them.
    """
    known = ~values.isnan()
    probs = torch.where(known, mode_probs, 0.0)
    probs = probs / probs.sum(dim=1, keepdim=True)
    baseline = (probs * values.nan_to_num(0.0)).sum(dim=1, keepdim=True)  # (P, 1)
    own = values.gather(1, modes)
    return (own - baseline).nan_to_num(0.0), (rewards - own).nan_to_num(0.0)


def shrink_values(values: torch.Tensor, counts: torch.Tensor, strength: float) -> torch.Tensor:
    """Q pulled towards its mode's mean over the batch, as if `strength` more rollouts had shown that mean. (P, M).

    Q of a few rollouts is noisy, and a cold target turns noise into certainty (the winner's curse).
    """
    shared = values.nanmean(dim=0, keepdim=True)
    return (counts * values.nan_to_num(0.0) + strength * shared) / (counts + strength)


def mode_targets(values: torch.Tensor, prior: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """pi*(m given x) proportional to prior(m) exp(Q(x, m) / tau), the best mode policy at a price tau on KL to prior.

    Args:
        values: Q(x, m), shape (P, M).
        prior: Shape (M,), positive.
        tau: Price of certainty, in reward units.

    Returns:
        Targets (P, M), and which prompts have one, (P,): a prompt needs the value of every mode.
    """
    known = ~values.isnan().any(dim=1)
    return torch.softmax(prior.log() + values / tau, dim=1), known


def control_factors(importance: torch.Tensor, method: "DeGRPOConfig") -> torch.Tensor:
    """What the control token's weight is multiplied by, (B,) from rho_i (B,): alpha * rho_i; for plain GRPO rho_i, so
    that alpha plays no part; 0 under mode targets, whose term is another.
    """
    if method.mode_objective == "target":
        return torch.zeros_like(importance)
    return (method.alpha if method.decoupled else 1.0) * importance


def token_weights(
    completion_mask: torch.Tensor,
    scorable: torch.Tensor,
    num_rollouts: float,
    *,
    control: torch.Tensor,
    decoupled: bool,
) -> torch.Tensor:
    """w_{i,t} of the policy loss.

    Args:
        completion_mask: 1 on completion tokens, control token first, shape (B, T).
        scorable: Rollouts that count, shape (B,), bool.
        num_rollouts: N, scorable rollouts of the whole optimizer step over all ranks.
        control: Factor of each control token, shape (B,); see `control_factors`.
        decoupled: True: the control token weighs control / N and each response token 1 / (N T_i). False is plain GRPO:
            every one of the T_i + 1 tokens weighs 1 / (N (T_i + 1)), times `control` at the first.
    """
    mask = completion_mask.to(control.dtype) * scorable[:, None]
    weights = mask.clone()
    if decoupled:
        weights[:, 1:] /= mask[:, 1:].sum(dim=1, keepdim=True).clamp(min=1)
    else:
        weights /= mask.sum(dim=1, keepdim=True).clamp(min=1)
    weights[:, 0] *= control
    return weights / max(num_rollouts, 1.0)


def kl_weights(completion_mask: torch.Tensor, scorable: torch.Tensor, num_rollouts: float) -> torch.Tensor:
    """v_{i,t} of the KL term, 1 / (N (T_i + 1)): a mean over each rollout's tokens, then over rollouts. (B, T)."""
    mask = completion_mask.to(torch.float32) * scorable[:, None]
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / max(num_rollouts, 1.0)
