"""Log-probabilities of rollouts behind states, with a gradient through the sleep that made the states.

A latent state belongs to the weights that made it, so the training pass sleeps again: once on each context, however
many rollouts there are behind it. Their gradients add up in the state before they go back through the sleep.

Rows are padded on the right, where neither causal attention nor a recurrent state ever looks; so prompts of one batch
need not be equally long, as they must where the padding is on the left.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from siesta.rl.packing import Pack, lay_out
from siesta.rl.scoring import Scorer, TokenScores
from siesta.rl.sleep.tensors import TensorSleep, TensorState

STATELESS = -1  # owner of a row that is read as it stands


class StateScorer:
    """Scores rows of which some are read behind the state of a context.

    Args:
        scorer: Attached to the model; its back end takes rows apart, not packed.
        way: How to sleep; differentiable.
        passes: N.
    """

    def __init__(self, scorer: Scorer, way: TensorSleep, passes: int):
        self.scorer = scorer
        self.way = way
        self.passes = passes

    def score(
        self,
        model: PreTrainedModel,
        contexts: Sequence[str],
        owners: Sequence[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_length: int,
    ) -> TokenScores:
        """Score the completions of R rows, as `Scorer.score` does.

        Args:
            contexts: What is slept on.
            owners: Place in `contexts` of each row's state, or `STATELESS`. Contexts without a row are not slept on.
            input_ids, attention_mask: (R, P + T), prompts padded on the left, completions on the right; the prompt of
                a row with a state is without its context.
            completion_length: T.
        """
        parts = []
        for stateless in (False, True):
            rows = [row for row, owner in enumerate(owners) if (owner == STATELESS) == stateless]
            if rows:
                pack = lay_out(input_ids[rows], attention_mask[rows], completion_length, packed=False)
                if not stateless:
                    pack = self._behind(model, contexts, [owners[row] for row in rows], pack)
                parts.append((rows, self.scorer.score(model, pack)))
        return in_order(parts)

    def _behind(self, model: PreTrainedModel, contexts: Sequence[str], owners: list[int], pack: Pack) -> Pack:
        """The pack with the states of its rows in front."""
        state = fanned_out(self.way, model, contexts, owners, self.passes)
        return replace(pack, inputs=pack.inputs | behind(self.way, state, pack.inputs["position_ids"]))


def fanned_out(
    way: TensorSleep, model: PreTrainedModel, contexts: Sequence[str], owners: Sequence[int], passes: int
) -> TensorState:
    """The states of some contexts, one for each owner; each context is slept on once."""
    asked = sorted(set(owners))
    state = way.sleep(model, [contexts[place] for place in asked], passes=passes).state
    return state.select([asked.index(owner) for owner in owners])


def behind(way: TensorSleep, state: TensorState, position_ids: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments that put rows, padded on the right, behind their states.

    Args:
        position_ids: Of the rows, counted from 0, (R, L).
    """
    cache = way.cache(state)
    return {"past_key_values": cache, "position_ids": position_ids + cache.get_seq_length(), "use_cache": True}


def in_order(parts: Sequence[tuple[list[int], TokenScores]]) -> TokenScores:
    """Scores of rows that were scored apart, each with its place, in the order of the places."""
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    merged = {}
    for field in fields(TokenScores):
        values = [getattr(scores, field.name) for _, scores in parts]
        merged[field.name] = None if values[0] is None else torch.cat(values)[order.to(values[0].device)]
    return TokenScores(**merged)
