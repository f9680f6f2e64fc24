"""The two baselines of sleep: `raw` keeps everything a context left in the cache, `none` keeps nothing.

`raw` reads the whole context once, as the beginning of its prompts, and every query of the context goes on from there:
keys and values, and in hybrid models the recurrent states and the inputs of the convolutions. Answers are those to the
whole prompt. It is the strong baseline: what sleep makes smaller, or makes in advance, is to be compared with this.

How far prompts of a context begin alike is the tokenizer's to say: the last characters of the context may be one
token with the first of the query. So the kept beginning is what prompts with unlike queries share, and each query is
checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from siesta.data.errors import DataError, ModelError
from siesta.data.prompts import messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl.sleep.cache import FUNCTIONAL, functional_cache, linear_layers
from siesta.rl.sleep.protocol import SleepCost, SleepOut
from siesta.rl.sleep.tensors import (
    UNWRITTEN,
    Tensors,
    TensorSleep,
    TensorState,
    cost,
    in_batches,
    joined,
    read_contexts,
)

PROBES = ("a", "1", "(", "\n")  # queries that begin as unlike as queries do
KEPT = (DynamicLayer, DynamicSlidingWindowLayer, *FUNCTIONAL)


@dataclass(frozen=True)
class Prefix:
    """A context, and the tokens with which all of its prompts begin."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class RawState(TensorState):
    """Caches of P contexts.

    `parts` has `layer.keys` and `layer.values` -> (P, key-value heads, longest, head size), zeros in front of the
    shorter contexts, `layer.index.recurrent` -> (P, heads, ...) and `layer.index.conv` -> (P, channels, kernel).
    """

    prefixes: list[Prefix]

    def select(self, rows: Sequence[int]) -> "RawState":
        return replace(super().select(rows), prefixes=[self.prefixes[row] for row in rows])

    def nbytes(self) -> list[int]:
        """Of the caches without what fills them."""
        return [
            sum(_own(name, part[row], len(prefix.ids)).nbytes for name, part in self.parts.items())
            for row, prefix in enumerate(self.prefixes)
        ]

    def tensors(self) -> Tensors:
        """The parts, `ids` (P, longest) counted from 1, and `text` (P, bytes) in UTF-8; 0 fills both in front."""
        ids = [torch.tensor(prefix.ids, dtype=torch.int32) + 1 for prefix in self.prefixes]
        text = [torch.tensor(list(prefix.text.encode()), dtype=torch.uint8) for prefix in self.prefixes]
        return self.parts | {"ids": _from_the_right(ids), "text": _from_the_right(text)}


class RawSleep(TensorSleep):
    """Keeps the cache.

    Raises:
        ModelError: The model has layers whose cache is of another kind.
    """

    name = "raw"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, **settings: Any):
        super().__init__(tokenizer, config, **settings)
        layers = DynamicCache(config=config).layers
        other = [type(layer).__name__ for layer in layers if type(layer) not in KEPT]
        if other:
            raise ModelError(f"model: raw cannot keep the {other[0]} of {config.model_type}; take none")
        # Elsewhere what fills a batch would decay a state, or push tokens out of a window.
        self.fills = all(type(layer) is DynamicLayer for layer in layers)

    def read(self, contexts: Sequence[str]) -> list[list[int]]:
        read_contexts(self.tokenizer, contexts)
        return [shared_ids(self.tokenizer, context) for context in contexts]

    def sleep(
        self,
        model: PreTrainedModel,
        contexts: Sequence[str],
        *,
        passes: int,
        generator: torch.Generator | None = None,
    ) -> SleepOut[TensorState]:
        out = super().sleep(model, contexts, passes=passes, generator=generator)
        rows = cast(RawState, out.state).prefixes
        prefixes = [Prefix(text, row.ids) for text, row in zip(contexts, rows, strict=True)]
        return replace(out, state=RawState(out.state.parts, prefixes))

    def consolidate(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> tuple[TensorState, SleepCost]:
        decoder = cast(torch.nn.Module, model.get_decoder())
        parts = in_batches(rows, self.batch_size, model.device, lambda ids: self._read(decoder, ids)).parts
        state = RawState(parts, [Prefix("", row) for row in rows])
        return state, cost(model, [[len(row)] for row in rows], state)

    def restore(self, tensors: Tensors) -> RawState:
        """See `Consolidator.restore`."""
        parts = {name: part for name, part in tensors.items() if name not in ("ids", "text")}
        ids = [[token - 1 for token in row if token] for row in tensors["ids"].tolist()]
        texts = [bytes(row).lstrip(b"\0").decode() for row in tensors["text"].tolist()]
        return RawState(parts, [Prefix(*each) for each in zip(texts, ids, strict=True)])

    def prompts(self, state: TensorState, queries: Sequence[Example]) -> list[list[int]]:
        """What follows the kept tokens in the whole prompts, with the contexts of the states.

        Raises:
            DataError: A query changes the tokens of its context.
        """
        rows = []
        for prefix, query in zip(cast(RawState, state).prefixes, queries, strict=True):
            ids = whole_ids(self.tokenizer, replace(query, context=prefix.text), self.instruction)
            if ids[: len(prefix.ids)] != prefix.ids:
                raise DataError(
                    f"query {query.id}: its beginning changes the tokens of its context; begin it otherwise"
                )
            rows.append(ids[len(prefix.ids) :])
        return rows

    def attach(self, state: TensorState, queries: Sequence[Example]) -> dict[str, Any]:
        """See `Consolidator.attach`. The mask covers the contexts too: (P, longest context + longest prompt).

        Raises:
            DataError: The model has other layers than full attention, and contexts or prompts differ in length.
        """
        kept = [torch.ones(len(prefix.ids), dtype=torch.long) for prefix in cast(RawState, state).prefixes]
        attached = self.behind(_from_the_right(kept), state, queries)
        if not self.fills and not attached["attention_mask"].all():
            raise DataError(
                f"queries: contexts or prompts of one batch differ in length, and {self.config.model_type} has layers "
                "for which padding is not neutral; batch those of equal length"
            )
        return attached

    def cache(self, state: TensorState) -> DynamicCache:
        """See `TensorSleep.cache`: this one copies."""
        longest = max(len(prefix.ids) for prefix in cast(RawState, state).prefixes)
        parts = {name: _own(name, part, longest) for name, part in state.parts.items()}
        recurrent = {name[:-10]: part.clone() for name, part in parts.items() if name.endswith(".recurrent")}
        cache = functional_cache(self.config, recurrent)
        for number, layer in linear_layers(cache):
            for index in layer.conv_states:
                layer.update_conv_state(parts[f"{number}.{index}.conv"], index)
        for number, layer in enumerate(cache.layers):
            if f"{number}.keys" in parts:
                cache.update(parts[f"{number}.keys"], parts[f"{number}.values"], number)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = longest
        return cache

    def _read(self, decoder: torch.nn.Module, ids: torch.Tensor) -> Tensors:
        """What (B, L) tokens leave in the cache."""
        cache = functional_cache(self.config, {})
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        kept: Tensors = {}
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                kept |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
        for i, layer in linear_layers(cache):
            for kind, states in (("recurrent", layer.recurrent_states), ("conv", layer.conv_states)):
                for j, part in states.items():
                    if part is not None:
                        kept[f"{i}.{j}.{kind}"] = part
        if not kept:
            raise ModelError(UNWRITTEN)
        return kept


class NoSleep(TensorSleep):
    """Keeps nothing: prompts are what they are without sleep, with whatever context the queries bring."""

    name = "none"

    def read(self, contexts: Sequence[str]) -> list[list[int]]:
        return [[] for _ in contexts]

    def consolidate(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> tuple[TensorState, SleepCost]:
        state = TensorState({"nothing": torch.empty(len(rows), 0, device=model.device)})
        return state, SleepCost([0] * len(rows), [0.0] * len(rows), state.nbytes())

    def prompts(self, state: TensorState, queries: Sequence[Example]) -> list[list[int]]:
        return [whole_ids(self.tokenizer, query, self.instruction) for query in queries]

    def cache(self, state: TensorState) -> DynamicCache:
        """An empty one."""
        return DynamicCache(config=self.config)


def whole_ids(tokenizer: PreTrainedTokenizerBase, query: Example, instruction: str) -> list[int]:
    """Prompt ids of a query with its context."""
    return prompt_ids(tokenizer, messages(query, instruction))


def shared_ids(tokenizer: PreTrainedTokenizerBase, context: str) -> list[int]:
    """The tokens with which the prompts of a context begin, whatever the query."""
    prompts = [whole_ids(tokenizer, Example("", context, probe, ""), "") for probe in PROBES]
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return [tokens[0] for tokens in alike]


def _own(name: str, part: torch.Tensor, length: int) -> torch.Tensor:
    """Keys and values (..., longest, head size) of the last `length` tokens; other parts are whole."""
    return part[..., -length:, :] if name.endswith((".keys", ".values")) else part


def _from_the_right(rows: list[torch.Tensor]) -> torch.Tensor:
    """(P, longest), rows flush right behind zeros."""
    return joined([{"row": row[None]} for row in rows])["row"]
