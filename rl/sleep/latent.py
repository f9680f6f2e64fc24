"""Latent sleep: N passes over a context into the recurrent states of a hybrid model (arXiv 2605.26099, Algorithm 1).

A pass reads a window of the context from empty keys and values and from the recurrent states S that the pass before
left. What remains of a context is S. Two forms:

- `carry_h`, the paper's: tokens are embedded once, and what leaves the last block in one pass enters the first block
  in the next (eq. 6: Embed, then N times the blocks, then OutProj; the final norm belongs to OutProj). Between windows
  the hidden states are thrown away.
- `reread`: every pass embeds the tokens anew.

Departures from the paper: windows of one context are equally long (to one token), so that none is a lone token, for
which models have an in-place path; all blocks are looped; and gradients may be cut to the last `truncate` passes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import DataError, ModelError
from siesta.data.schema import Example
from siesta.rl.sleep.cache import functional_cache, linear_layers, recurrent_states
from siesta.rl.sleep.protocol import SleepOut
from siesta.rl.sleep.tensors import (
    UNWRITTEN,
    Tensors,
    TensorState,
    check_length,
    cost,
    in_batches,
    read_contexts,
    read_queries,
)

Form = Literal["carry_h", "reread"]


class LatentSleep:
    """Sleep into recurrent states; differentiable where the caller computes gradients.

    The state is S of every recurrent layer: `layer.index` -> (P, heads, ...), in the dtype the model keeps it in.

    Args:
        tokenizer: The model's.
        config: The model's; it says which layers are recurrent.
        form: See above.
        truncate: Gradients flow through the last so many passes, counted over all windows of a context; earlier ones
            keep no activations. None is all. With `carry_h` the embeddings of a window are in its first pass.
        window: Most tokens that attention sees at once. None is the whole context.
        instruction: Stands in the prompt behind the query.
        batch_size: Most contexts in a batch.

    Raises:
        ModelError: The model has no recurrent layers.
    """

    name = "latent"
    differentiable = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        form: Form = "carry_h",
        *,
        truncate: int | None = None,
        window: int | None = None,
        instruction: str = "",
        batch_size: int = 16,
    ):
        if not any(True for _ in linear_layers(DynamicCache(config=config))):
            raise ModelError(f"model: {config.model_type} has no recurrent layers to sleep into; take notes or gist")
        self.tokenizer = tokenizer
        self.config = config
        self.form = form
        self.truncate = truncate
        self.window = window
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
        """See `Consolidator.sleep`; nothing is random here. A batch gives what each context gives alone.

        Raises:
            DataError: A context is empty, or a window longer than the model takes.
            ModelError: Gradient checkpointing is on.
        """
        rows = read_contexts(self.tokenizer, contexts)
        lengths = [self._cut(len(row)) for row in rows]
        check_length(model, max(map(max, lengths)), "a window")
        decoder = cast(torch.nn.Module, model.get_decoder())
        state = in_batches(rows, self.batch_size, model.device, lambda ids: self._consolidate(decoder, ids, passes))
        return SleepOut(state, [], cost(model, [pieces * passes for pieces in lengths], state))

    def attach(self, state: TensorState, queries: Sequence[Example]) -> dict[str, Any]:
        """See `Consolidator.attach`. Positions start at 0. Behind the prompt, padding on the right is exact.

        Raises:
            DataError: The prompts differ in length: padding in front of a prompt would decay the state, so batches
                come from `equal_lengths`.
        """
        rows = read_queries(self.tokenizer, queries, self.instruction)
        shortest, longest = min(map(len, rows)), max(map(len, rows))
        if shortest != longest:
            raise DataError(
                f"queries: prompts of {shortest} to {longest} tokens in one batch, and padding before a recurrent "
                "state is not neutral; batch prompts of equal length"
            )
        cache = self.cache(state)
        ids = torch.tensor(rows, device=next(iter(state.parts.values())).device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}

    def cache(self, state: TensorState) -> DynamicCache:
        """A fresh cache that holds the states and no keys or values. Reading from it leaves `state` as it is."""
        # A model may decode in place, so the cache gets its own copy.
        return functional_cache(self.config, {key: part.clone() for key, part in state.parts.items()})

    def restore(self, tensors: Tensors) -> TensorState:
        """See `Consolidator.restore`."""
        return TensorState(dict(tensors))

    def _cut(self, length: int) -> list[int]:
        """Lengths of the windows of a context."""
        count = math.ceil(length / (self.window or length))
        return [length // count + (i < length % count) for i in range(count)]

    def _consolidate(self, decoder: torch.nn.Module, ids: torch.Tensor, passes: int) -> Tensors:
        """S after all passes over all windows of contexts (B, L)."""
        windows = ids.split(self._cut(ids.shape[1]), dim=1)
        total = passes * len(windows)
        since = 0 if self.truncate is None else total - self.truncate
        hidden: torch.Tensor | None = None
        states: Tensors = {}
        for turn in range(total):
            window, n = divmod(turn, passes)
            with torch.set_grad_enabled(torch.is_grad_enabled() and turn >= since):
                carried = hidden if self.form == "carry_h" and n > 0 else None
                hidden, states = one_pass(decoder, self.config, windows[window], carried, states)
        return states


def one_pass(
    decoder: torch.nn.Module,
    config: PreTrainedConfig,
    ids: torch.Tensor,
    hidden: torch.Tensor | None,
    states: Tensors,
) -> tuple[torch.Tensor, Tensors]:
    """The blocks once over a window: what leaves the last one (B, L, d), before the final norm, and the new states.

    Args:
        ids: Of the window, (B, L).
        hidden: What enters the first block, (B, L, d); None is the embedding.
        states: S of the pass before; none at first.

    Raises:
        ModelError: The blocks left no states.
    """
    cache = functional_cache(config, states)
    with looped(cast(Any, decoder).layers, hidden) as left:
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    written = recurrent_states(cache)
    if not written:
        raise ModelError(UNWRITTEN)
    return left[0], written


@contextmanager
def looped(layers: torch.nn.ModuleList, hidden: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """Inside, `hidden` enters the first block in place of the embedding, and what leaves the last one is yielded.

    The seam lies at the blocks and not at `inputs_embeds`, because some models scale those, and would at every pass.
    """
    left: list[torch.Tensor] = []

    def enter(block, args):
        return None if hidden is None else (hidden, *args[1:])

    def leave(block, args, output):
        left.append(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(enter), layers[-1].register_forward_hook(leave)]
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()
