"""Log-probabilities of completions in one forward pass: response tokens, the mode policy, the mass on control tokens.

Rollouts choose among the control tokens only. So the acting policy at position 0 is their distribution renormalised
over themselves, and its logarithm is what stands in column 0: only that is an unbiased policy gradient. What the
renormalised policy cannot see is how much probability the control tokens hold together; that is the mass, and it has
a loss term of its own.

TRL's fused head projects tile by tile and never holds the logits. A hook behind the backbone hands it nothing but the
hidden states that predict a completion token; those that predict a control token once for every control token.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from siesta.rl.attention import Backend, packed_row
from siesta.rl.modes import Modes
from siesta.rl.packing import Pack, lay_out


@dataclass(frozen=True)
class TokenScores:
    """Scores of B completions of T tokens.

    Args:
        per_token_logps: Shape (B, T), 0 in the padding; column 0 is log pi(m_i given x_i), or 0 where no control
            token opens the completion; the others are over the vocabulary.
        entropies: Of the full distribution at each token, shape (B, T), 0 in the padding, without gradient; None if
            the model's head was not asked for them.
        mode_logps: log pi(m given x_i), shape (B, M).
        log_mass: Log-probability that position 0 holds a control token, shape (B,).
    """

    per_token_logps: torch.Tensor
    entropies: torch.Tensor | None
    mode_logps: torch.Tensor
    log_mass: torch.Tensor


class Scorer:
    """Scores packs with models that have TRL's fused head (`trl.trainer.utils.add_fused_lm_head`).

    Args:
        modes: Their control tokens.
        backend: How attention is computed, and with it how rows are laid out.
        share: Whether rows with the same prompt share it.
    """

    def __init__(self, modes: Modes, backend: Backend, *, share: bool = False):
        self.modes = modes
        self.backend = backend
        self.share = share
        self._chosen: torch.Tensor | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Make `model` (without adapters) usable here: its attention, and the hook behind its backbone."""
        model.set_attn_implementation(self.backend.implementation)
        model.base_model.register_forward_hook(self._choose)

    def _choose(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the backbone: keeps the chosen hidden states, (1, K, H)."""
        if self._chosen is not None:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[self._chosen][None]
        return output

    @contextmanager
    def _choosing(self, places: torch.Tensor) -> Iterator[None]:
        self._chosen = places
        try:
            yield
        finally:
            self._chosen = None

    def lay_out(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> Pack:
        """Rows as the back end takes them; see `siesta.rl.packing.lay_out`."""
        packed = self.backend.packed
        return lay_out(input_ids, attention_mask, completion_length, packed=packed, shared=self.share)

    @torch.no_grad()
    def disagreement(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
    ) -> float:
        """Mean difference of log-probabilities, in nats, between the back end's layout and padded rows."""
        found = self.score(model, self.lay_out(input_ids, attention_mask, completion_length))
        padded = self.score(model, lay_out(input_ids, attention_mask, completion_length, packed=False))
        difference = (found.per_token_logps - padded.per_token_logps).abs()
        return difference.sum().item() / attention_mask[:, -completion_length:].sum().item()

    def score(self, model: torch.nn.Module, pack: Pack) -> TokenScores:
        """Score the completions of a pack at the temperature of the model's fused head."""
        rows, num_modes = len(pack.first), len(self.modes)
        control = torch.tensor(self.modes.token_ids, device=pack.targets.device)
        places = torch.cat([pack.first.repeat_interleave(num_modes), pack.predicts])
        targets = torch.cat([control.repeat(rows), pack.targets])
        arguments = self.backend.arguments(pack) if pack.packed or pack.shared else {}
        with self._choosing(places), packed_row() if pack.packed else nullcontext():
            output = model(**pack.inputs, **arguments, shift_labels=targets[None], fused_lm_head=True)
        logps = output.log_probs[0].float()
        control_logps = logps[: rows * num_modes].view(rows, num_modes)
        log_mass = torch.logsumexp(control_logps, dim=1)
        mode_logps = control_logps - log_mass[:, None]
        column = self.modes.of(pack.control_ids[:, None])[:, None]
        # What sleep writes opens with a token of its own, which is forced: no mode was chosen.
        chosen = torch.where(column < 0, 0.0, mode_logps.gather(1, column.clamp(min=0)))
        return TokenScores(
            per_token_logps=in_rows(pack, chosen, logps[rows * num_modes :]),
            entropies=None if output.entropy is None else self._entropies(pack, output.entropy[0].detach()),
            mode_logps=mode_logps,
            log_mass=log_mass,
        )

    def _entropies(self, pack: Pack, entropies: torch.Tensor) -> torch.Tensor:
        num_control = len(pack.first) * len(self.modes)
        first = entropies[: num_control : len(self.modes), None]  # the same for every control token of a rollout
        return in_rows(pack, first, entropies[num_control:])


def in_rows(pack: Pack, first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """(R, T) from the values of control tokens, (R, 1), and of response tokens, (K,); 0 in the padding."""
    values = rest.new_zeros(pack.response_mask.shape).masked_scatter(pack.response_mask, rest)
    return torch.cat([first, values[:, 1:]], dim=1)
