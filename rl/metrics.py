"""What a training step is told by: numbers per mode, named `group/name`. Every name is made here.

A mode without a rollout has no accuracy or length in that step, so the key is absent; a NaN in the log always means
that something was computed and is not a number.
"""

import torch

from siesta.rewards.hacking import FLAGS
from siesta.rl.advantages import Credit, Rollouts


def rollout_metrics(names: list[str], rollouts: Rollouts, credit: Credit) -> dict[str, float]:
    """Numbers of one generation batch over all ranks; `names` are the modes in column order."""
    rewards, scores, modes, lengths = rollouts.rewards, rollouts.scores, rollouts.modes, rollouts.lengths
    scorable, truncated = rollouts.scorable, rollouts.truncated
    grouped = rewards.view(-1, rollouts.group)
    spread = grouped.nan_to_num(-torch.inf).amax(1) - grouped.nan_to_num(torch.inf).amin(1)
    mean_policy = rollouts.mode_probs.mean(0)
    result = {
        "mode/mass": rollouts.mass.mean().item(),
        "mode/entropy": entropy(rollouts.mode_probs).mean().item(),
        "mode/entropy_mean_policy": entropy(mean_policy).item(),
        "rollout/reward": rewards[scorable].mean().item(),
        "rollout/accuracy": scores[scorable].mean().item(),
        "rollout/tokens": lengths.mean().item(),
        "rollout/truncated": truncated.mean().item(),
        "rollout/unscorable": (~scorable).sum().item(),
        "rollout/groups_without_signal": (spread <= 0).float().mean().item(),
    }
    for column, name in enumerate(names):
        members = modes == column
        result[f"mode/{name}/share"] = members.float().mean().item()
        result[f"mode/{name}/prob"] = mean_policy[column].item()
        result[f"mode/{name}/unscorable"] = (members & ~scorable).sum().item()
        if (members & scorable).any():
            judged = members & scorable
            result[f"mode/{name}/accuracy"] = scores[judged].mean().item()
            result[f"mode/{name}/reward"] = rewards[judged].mean().item()
            result[f"mode/{name}/advantage"] = credit.mode_advantages[judged].mean().item()
            result[f"mode/{name}/response_advantage_abs"] = credit.response_advantages[judged].abs().mean().item()
        if members.any():
            result[f"mode/{name}/tokens"] = lengths[members].mean().item()
            result[f"mode/{name}/truncated"] = truncated[members].mean().item()
    return result


def sleep_metrics(
    names: list[str],
    rollouts: Rollouts,
    state: torch.Tensor,
    *,
    kinds: list[str],
    tokens: torch.Tensor,
    advantages: torch.Tensor,
) -> dict[str, float]:
    """Numbers of one generation batch over all ranks by the state its queries came with: `sleep/<kind>/...`.

    Args:
        state: Place in `kinds` of each rollout's state, (B,).
        tokens: Written for each notes, (S, J).
        advantages: Of the notes, (S, J), NaN where no answer was scorable.
    """
    result = {}
    for place, kind in enumerate(kinds):
        own = state == place
        if own.any():
            result[f"sleep/{kind}/share"] = own.float().mean().item()
            result[f"sleep/{kind}/tokens"] = rollouts.lengths[own].mean().item()
            for column, name in enumerate(names):
                result[f"sleep/{kind}/prob/{name}"] = rollouts.mode_probs[own, column].mean().item()
                judged = own & (rollouts.modes == column) & rollouts.scorable
                if judged.any():
                    result[f"sleep/{kind}/accuracy/{name}"] = rollouts.scores[judged].mean().item()
    known = ~advantages.isnan()
    if known.any():
        result["sleep/note_tokens"] = tokens.mean().item()
        # Without a spread between the J notes of a context the writer has nothing to learn from.
        result["sleep/write_advantage_abs"] = advantages[known].abs().mean().item()
        flat = advantages.nan_to_num(0.0).abs().amax(1) == 0
        result["sleep/contexts_without_signal"] = flat.float().mean().item()
    return result


def hack_metrics(names: list[str], modes: torch.Tensor, flags: torch.Tensor) -> dict[str, float]:
    """Share of each mode's rollouts with a flag: `hack/<flag>/<mode>`.

    Args:
        modes: Shape (B,).
        flags: Shape (B, F), 1 where a flag of `siesta.rewards.hacking.FLAGS` was raised.
    """
    return {
        f"hack/{flag}/{name}": flags[modes == column, place].mean().item()
        for column, name in enumerate(names)
        for place, flag in enumerate(FLAGS)
        if (modes == column).any()
    }


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats along the last axis."""
    return -torch.xlogy(probs, probs).sum(-1)
