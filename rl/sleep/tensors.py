"""What the latent ways to sleep share: states that are tensors, batches without padding, FLOPs of a pass.

Padding is not neutral in front of a recurrent state: a padded position still decays it. So contexts are put into
batches of equal length, and a batch gives what each context would give alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.data.prompts import context_ids, messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl.sleep.protocol import SleepCost

Tensors = dict[str, torch.Tensor]

# transformers takes the cache away from checkpointed blocks, with no more than a warning.
UNWRITTEN = "model: its blocks wrote no state into the cache; gradient checkpointing does this: turn it off for sleep"


@dataclass(frozen=True)
class TensorState:
    """States of P contexts as named tensors, first axis P."""

    parts: Tensors

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TensorState":
        return TensorState({name: function(part) for name, part in self.parts.items()})

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def select(self, rows: Sequence[int]) -> "TensorState":
        """See `State.select`; gradients of a row's copies add up."""
        return self._map(lambda part: part.index_select(0, torch.tensor(rows, device=part.device)))

    def to(self, device: torch.device | str) -> "TensorState":
        return self._map(lambda part: part.to(device))

    def detach(self) -> "TensorState":
        return self._map(lambda part: part.detach())

    def nbytes(self) -> list[int]:
        return [sum(part[0].nbytes for part in self.parts.values())] * len(self)

    def tensors(self) -> Tensors:
        return dict(self.parts)


def read_contexts(tokenizer: PreTrainedTokenizerBase, contexts: Sequence[str]) -> list[list[int]]:
    """Token ids of contexts.

    Raises:
        DataError: A context is empty.
    """
    for row, context in enumerate(contexts):
        if not context.strip():
            raise DataError(f"context {row}: empty, there is nothing to sleep on")
    return [context_ids(tokenizer, context) for context in contexts]


def read_queries(tokenizer: PreTrainedTokenizerBase, queries: Sequence[Example], instruction: str) -> list[list[int]]:
    """Prompt ids of queries without their contexts, up to the place of the control token."""
    bare = [replace(query, context="") for query in queries]
    return [prompt_ids(tokenizer, messages(query, instruction)) for query in bare]


def equal_lengths(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of `rows` in batches whose rows are equally long."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_length[len(row)].append(index)
    return [
        indices[start : start + batch_size]
        for indices in by_length.values()
        for start in range(0, len(indices), batch_size)
    ]


def in_batches(
    rows: Sequence[Sequence[int]], batch_size: int, device: torch.device, function: Callable[[torch.Tensor], Tensors]
) -> TensorState:
    """State of every row, in order; `function` takes ids (B, L) without padding and gives tensors of B rows."""
    batches = equal_lengths(rows, batch_size)
    done = [function(torch.tensor([rows[i] for i in batch], device=device)) for batch in batches]
    stacked = TensorState({name: torch.cat([part[name] for part in done]) for name in done[0]})
    place = {row: i for i, row in enumerate(i for batch in batches for i in batch)}
    return stacked.select([place[row] for row in range(len(rows))])


def check_length(model: PreTrainedModel, longest: int, what: str) -> None:
    """Refuse what the model has no positions for.

    Raises:
        DataError: `longest` tokens are more than the model takes.
    """
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if limit is not None and longest > limit:
        raise DataError(f"context: {what} of {longest} tokens, the model takes {limit}")


def cost(model: PreTrainedModel, lengths: Sequence[Sequence[int]], state: TensorState) -> SleepCost:
    """Cost of contexts that were read in pieces of `lengths` tokens each."""
    flops = forward_flops(model)
    return SleepCost(
        tokens=[sum(pieces) for pieces in lengths],
        flops=[sum(map(flops, pieces)) for pieces in lengths],
        state_bytes=state.nbytes(),
    )


def forward_flops(model: PreTrainedModel) -> Callable[[int], float]:
    """FLOPs of the blocks over a sequence of so many tokens, forward only: two per weight of a matrix and token, and
    causal attention in the layers that have it. The update of recurrent states, small beside them, is left out.
    """
    text = model.config.get_text_config()
    keys = text.to_dict()
    layers = cast(Any, model.get_decoder()).layers
    weights = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    attention = sum("keys" in vars(layer) for layer in DynamicCache(config=model.config).layers)
    query = (keys.get("head_dim") or text.hidden_size // text.num_attention_heads) * text.num_attention_heads
    return lambda length: 2.0 * weights * length + 2.0 * attention * query * length**2
