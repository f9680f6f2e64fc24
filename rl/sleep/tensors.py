"""What the latent ways to sleep share: their frame, states that are tensors, batches without padding, FLOPs of a pass.

Padding is not neutral in front of a recurrent state: a padded position still decays it. So contexts are put into
batches of equal length, and a batch gives what each context would give alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.data.prompts import context_ids, messages, pad_id, prompt_ids
from siesta.data.schema import Example
from siesta.rl.generation import left_pad, positions
from siesta.rl.sleep.protocol import SleepCost, SleepOut

Tensors = dict[str, torch.Tensor]

# transformers takes the cache away from checkpointed blocks, with no more than a warning.
UNWRITTEN = "model: its blocks wrote no state into the cache; gradient checkpointing does this: turn it off for sleep"


@dataclass(frozen=True)
class TensorState:
    """States of P contexts as named tensors, first axis P."""

    parts: Tensors

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, parts={name: function(part) for name, part in self.parts.items()})

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def select(self, rows: Sequence[int]) -> Self:
        """See `State.select`; gradients of a row's copies add up."""
        return self._map(lambda part: part.index_select(0, torch.tensor(rows, device=part.device)))

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda part: part.to(device))

    def detach(self) -> Self:
        return self._map(lambda part: part.detach())

    def nbytes(self) -> list[int]:
        return [sum(part[0].nbytes for part in self.parts.values())] * len(self)

    def tensors(self) -> Tensors:
        return dict(self.parts)


class TensorSleep:
    """A way to sleep whose state is tensors; differentiable where the caller computes gradients. Nothing is random.

    Args:
        tokenizer: The model's.
        config: The model's.
        instruction: Stands in the prompt behind the query.
        batch_size: Most contexts in a batch.
    """

    name: str
    differentiable = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        *,
        instruction: str = "",
        batch_size: int = 16,
    ):
        self.tokenizer = tokenizer
        self.config = config
        self.instruction = instruction
        self.batch_size = batch_size

    def sleep(
        self,
        model: PreTrainedModel,
        contexts: Sequence[str],
        *,
        passes: int,
        generator: torch.Generator | None = None,
    ) -> SleepOut[TensorState]:
        """See `Consolidator.sleep`. A batch gives what each context gives alone.

        Raises:
            DataError: A context is empty, or longer than the model takes.
            ModelError: The model kept nothing.
        """
        rows = self.read(contexts)
        self.fit(model, rows, passes)
        state, costs = self.consolidate(model, rows, passes)
        return SleepOut(state, [], costs)

    def read(self, contexts: Sequence[str]) -> list[list[int]]:
        """Token ids of what sleep reads of contexts.

        Raises:
            DataError: A context is empty.
        """
        return read_contexts(self.tokenizer, contexts)

    def check(self, model: PreTrainedModel, contexts: Sequence[str], passes: int) -> None:
        """Refuse, before any of them is slept on, contexts that `sleep` would refuse.

        Raises:
            DataError: See `sleep`.
        """
        self.fit(model, self.read(contexts), passes)

    def fit(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> None:
        """Refuse contexts, given as ids, that are longer than the model takes.

        Raises:
            DataError: One is.
        """
        check_length(model, max(map(len, rows)), "a text")

    def consolidate(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> tuple[TensorState, SleepCost]:
        """The states of contexts, given as ids, and what they cost."""
        raise NotImplementedError

    def cache(self, state: TensorState) -> DynamicCache:
        """A fresh cache that holds the states. Reading from it leaves `state` as it is."""
        raise NotImplementedError

    def restore(self, tensors: Tensors) -> TensorState:
        """See `Consolidator.restore`."""
        return TensorState(dict(tensors))

    def prompts(self, state: TensorState, queries: Sequence[Example]) -> list[list[int]]:
        """Token ids that follow each state, up to the place of the control token: the queries, without contexts."""
        return read_queries(self.tokenizer, queries, self.instruction)

    def attach(self, state: TensorState, queries: Sequence[Example]) -> dict[str, Any]:
        """See `Consolidator.attach`: ids (P, longest prompt), padded on the left, behind an empty prefix."""
        return self.behind(torch.ones(len(queries), 0, dtype=torch.long), state, queries)

    def behind(self, before: torch.Tensor, state: TensorState, queries: Sequence[Example]) -> dict[str, Any]:
        """Prompts behind K tokens that the cache holds.

        Args:
            before: Mask of the tokens in the cache, (P, K). What is returned covers both, (P, K + longest prompt).
        """
        device = next(iter(state.parts.values())).device
        ids, mask = left_pad(self.prompts(state, queries), pad_id(self.tokenizer))
        mask = torch.cat([before, mask], dim=1).to(device)
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask,
            "position_ids": positions(mask)[:, before.shape[1] :],
            "past_key_values": self.cache(state),
        }


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
    stacked = TensorState(joined(done))
    place = {row: i for i, row in enumerate(i for batch in batches for i in batch)}
    return stacked.select([place[row] for row in range(len(rows))])


def joined(several: Sequence[Tensors]) -> Tensors:
    """Tensors of the same names one below the other; those that are smaller are filled with zeros in front."""
    return {name: torch.cat(_filled([parts[name] for parts in several])) for name in several[0]}


def _filled(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parts that differ in their first axis only."""
    shape = [max(part.shape[axis] for part in parts) for axis in range(parts[0].dim())]
    missing = [[shape[axis] - part.shape[axis] for axis in range(part.dim() - 1, 0, -1)] for part in parts]
    return [F.pad(part, [x for n in each for x in (n, 0)]) for part, each in zip(parts, missing, strict=True)]


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
