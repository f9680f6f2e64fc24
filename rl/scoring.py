"""Log-probabilities of completions in one forward pass: response tokens, and the mode policy at the last prompt token.

The probability of the control token is taken over the control tokens alone. That is the policy that acts: rollouts,
evaluation and serving all choose among the control tokens, and mass that leaks to other tokens is measured apart.
"""

from dataclasses import dataclass

import torch

from siesta.rl.generation import positions
from siesta.rl.modes import Modes


@dataclass(frozen=True)
class TokenScores:
    """Scores of B completions of T tokens.

    Args:
        per_token_logps: Shape (B, T). Column 0 is log pi(m_i given x_i) over the control tokens.
        entropies: Of the full distribution at each token, shape (B, T), without gradient.
        mode_logps: log pi(m given x_i), shape (B, M).
    """

    per_token_logps: torch.Tensor
    entropies: torch.Tensor
    mode_logps: torch.Tensor


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
    response_logps = all_logps.gather(-1, completion_ids[..., None]).squeeze(-1)
    mode_logps = modes.log_policy(logits[:, 0])
    control_logps = mode_logps.gather(1, modes.of(completion_ids)[:, None])
    with torch.no_grad():
        entropies = -(all_logps.exp() * all_logps).sum(-1)
    return TokenScores(torch.cat([control_logps, response_logps[:, 1:]], dim=1), entropies, mode_logps)
