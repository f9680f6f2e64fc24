"""The loss: one weighted sum over tokens, as pure functions of tensors.

    loss = - sum_{i,t} w_{i,t} min(ratio_{i,t} A_{i,t}, clip(ratio_{i,t}) A_{i,t})  +  beta sum_{i,t} v_{i,t} KL_{i,t}
           + sum_i u_i CE(pi*(. given x_i), pi_theta(. given x_i))  -  sum_i z_i log mass_theta(x_i)

DeGRPO of Thinkless (arXiv 2505.13379) is the case w_{i,0} = alpha / N, w_{i,t} = 1 / (N T_i), u = z = 0. All
denominators sit in the weights, which `advantages.py` makes from counts over the whole optimizer step. So the sum can
be cut into micro-batches, ranks or packed sequences anywhere and still adds up to the same number; the published code
takes means inside each micro-batch, which ties the step to how the batch was split.
"""

import torch

# exp of more overflows float32, and the gradient of a clipped infinite ratio is 0 * inf.
MAX_LOG_RATIO = 20.0


def policy_loss(
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
) -> torch.Tensor:
    """Clipped surrogate of PPO, weighted and summed; the negative of J without its KL term.

    Args:
        per_token_logps: log pi_theta of each completion token, control token first, shape (B, T).
        old_per_token_logps: The same under the policy that wrote the rollouts, shape (B, T); carries no gradient.
        advantages: A_{i,t}, shape (B, T): the mode advantage at t = 0, the response advantage beyond.
        weights: w_{i,t} >= 0, shape (B, T). A token of weight 0 takes no part, whatever its log-probability.
        epsilon_low, epsilon_high: The ratio is clipped to [1 - epsilon_low, 1 + epsilon_high].

    Returns:
        Scalar. Zero with zero gradient if every weight is 0.
    """
    ratio = token_ratio(per_token_logps, old_per_token_logps, weights)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)
    return -(weights * surrogate).sum()


def token_ratio(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """pi_theta / pi_old per token, (B, T); 1 where the weight is 0, so that padding can hold anything."""
    log_ratio = torch.where(weights > 0, per_token_logps - old_per_token_logps, 0.0)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def kl_loss(per_token_logps: torch.Tensor, ref_per_token_logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the k3 estimator of KL(pi_theta, pi_ref) per token: exp(d) - d - 1 with d = log ref - log pi.

    Args:
        per_token_logps, ref_per_token_logps: Shape (B, T).
        weights: v_{i,t}, shape (B, T).
    """
    difference = torch.where(weights > 0, ref_per_token_logps - per_token_logps, 0.0)
    return (weights * (difference.exp() - difference - 1)).sum()


def mode_target_loss(mode_logps: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy from the mode targets to the mode policy, weighted and summed.

    Its gradient on the mode logits is weight * (pi_theta - pi*): unlike a policy gradient it does not carry the factor
    pi_theta(m), so it does not vanish when the policy has collapsed onto one mode.

    Args:
        mode_logps: log pi_theta(m given x_i), shape (B, M).
        targets: pi*(m given x_i), shape (B, M); rows of weight 0 may hold anything, in `mode_logps` too.
        weights: u_i, shape (B,).
    """
    counted = (weights[:, None] > 0) & (targets > 0)
    cross_entropy = -(torch.where(counted, targets, 0.0) * torch.where(counted, mode_logps, 0.0)).sum(dim=1)
    return (weights * cross_entropy).sum()


def mass_loss(log_mass: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """- weighted sum of the log mass on control tokens.

    Nothing else holds that mass: rollouts never leave the control tokens. Without this term it leaks to other tokens,
    and a server that does not restrict the first token would answer in no mode.

    Args:
        log_mass: Shape (B,).
        weights: z_i, shape (B,).
    """
    return -(weights * torch.where(weights > 0, log_mass, 0.0)).sum()
