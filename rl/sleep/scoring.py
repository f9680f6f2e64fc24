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

from siesta.rl.packing import lay_out
from siesta.rl.scoring import Scorer, TokenScores
from siesta.rl.sleep.tensors import TensorSleep, TensorState


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
        contexts: Sequence[str | None],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_length: int,
    ) -> TokenScores:
        """Score the completions of R rows, as `Scorer.score` does.

        Args:
            contexts: What is slept on for each row; None if it is read as it stands.
            input_ids, attention_mask: (R, P + T), prompts padded on the left, completions on the right; the prompt of
                a row with a state is without its context.
            completion_length: T.
        """
        stateless = [row for row, context in enumerate(contexts) if context is None]
        slept = {row: context for row, context in enumerate(contexts) if context is not None}
        parts = []
        for rows in (list(slept), stateless):
            if rows:
                pack = lay_out(input_ids[rows], attention_mask[rows], completion_length, packed=False)
                if rows is not stateless:
                    state = fanned_out(self.way, model, list(slept.values()), self.passes)
                    before = behind(self.way, state, pack.inputs["position_ids"])
                    pack = replace(pack, inputs=pack.inputs | before)
                parts.append((rows, self.scorer.score(model, pack)))
        return in_order(parts)


def fanned_out(way: TensorSleep, model: PreTrainedModel, contexts: Sequence[str], passes: int) -> TensorState:
    """The state of each row's context; contexts that are equal are slept on once."""
    unique = {context: place for place, context in enumerate(dict.fromkeys(contexts))}
    state = way.sleep(model, list(unique), passes=passes).state
    return state.select([unique[context] for context in contexts])


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
