"""Log-probabilities of completions in one forward pass: every completion token, and all control tokens at position 0.

All of them are over the whole vocabulary. Rollouts choose among the control tokens only, so what counts for the choice
is their distribution renormalised over themselves (`Modes.log_policy`); but a loss on the renormalised distribution
alone lets probability leak to other tokens (measured: mass 0.998 to 0.62 in 50 steps), and then a server that does not
restrict the first token answers in no mode at all.
"""

from dataclasses import dataclass

import torch

from siesta.rl.generation import positions
from siesta.rl.modes import Modes


@dataclass(frozen=True)
class TokenScores:
    """Scores of B completions of T tokens.

    Args:
        per_token_logps: Log-probability of each completion token, control token first, shape (B, T).
        entropies: Of the full distribution at each token, shape (B, T), without gradient.
        control_logps: Log-probability of every mode's control token at position 0, shape (B, M).
    """

    per_token_logps: torch.Tensor
    entropies: torch.Tensor
    control_logps: torch.Tensor


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
    per_token_logps = all_logps.gather(-1, completion_ids[..., None]).squeeze(-1)
    with torch.no_grad():
        entropies = -(all_logps.exp() * all_logps).sum(-1)
    return TokenScores(per_token_logps, entropies, all_logps[:, 0, modes.token_ids])
