"""Log-probabilities of completions in one forward pass: response tokens, the mode policy, the mass on control tokens.

Rollouts choose among the control tokens only. So the acting policy at position 0 is their distribution renormalised
over themselves, and its logarithm is what stands in column 0: only that is an unbiased policy gradient. What the
renormalised policy cannot see is how much probability the control tokens hold together; that is the mass, and it has
a loss term of its own.
"""

from dataclasses import dataclass

import torch

from siesta.rl.generation import positions
from siesta.rl.modes import Modes


@dataclass(frozen=True)
class TokenScores:
    """Scores of B completions of T tokens.

    Args:
        per_token_logps: Shape (B, T); column 0 is log pi(m_i given x_i), the others are over the vocabulary.
        entropies: Of the full distribution at each token, shape (B, T), without gradient.
        mode_logps: log pi(m given x_i), shape (B, M).
        log_mass: Log-probability that position 0 holds a control token, shape (B,).
    """

    per_token_logps: torch.Tensor
    entropies: torch.Tensor
    mode_logps: torch.Tensor
    log_mass: torch.Tensor


def score_completions(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    modes: Modes,
    temperature: float,
) -> TokenScores:
    """Score the last `completion_length` tokens of each row at the rollouts' temperature.

    Args:
        input_ids, attention_mask: Shape (B, P + T), prompts padded on the left, completions on the right.
    """
    completion_ids = input_ids[:, -completion_length:]
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        logits_to_keep=completion_length + 1,
        use_cache=False,
    )
    logits = output.logits[:, :-1].float() / temperature  # the last position predicts nothing we hold
    all_logps = torch.log_softmax(logits, dim=-1)
    response_logps = all_logps[:, 1:].gather(-1, completion_ids[:, 1:, None]).squeeze(-1)
    log_mass = torch.logsumexp(all_logps[:, 0, modes.token_ids], dim=-1)
    mode_logps = modes.log_policy(logits[:, 0])
    chosen = mode_logps.gather(1, modes.of(completion_ids)[:, None])
    with torch.no_grad():
        entropies = -(all_logps.exp() * all_logps).sum(-1)
    return TokenScores(torch.cat([chosen, response_logps], dim=1), entropies, mode_logps, log_mass)
