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
from siesta.rl.sleep.protocol import SleepCost
from siesta.rl.sleep.tensors import UNWRITTEN, Tensors, TensorSleep, TensorState, check_length, cost, in_batches

Form = Literal["carry_h", "reread"]


class LatentSleep(TensorSleep):
    """Sleep into recurrent states.

    The state is S of every recurrent layer: `layer.index` -> (P, heads, ...), in the dtype the model keeps it in.
    Gradient checkpointing must be off.

    Args:
        form: See above.
        truncate: Gradients flow through the last so many passes, counted over all windows of a context; earlier ones
            keep no activations. None is all. With `carry_h` the embeddings of a window are in its first pass.
        window: Most tokens that attention sees at once. None is the whole context.
        settings: Of `TensorSleep`.

    Raises:
        ModelError: The model has no recurrent layers.
    """

    name = "latent"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        form: Form = "carry_h",
        *,
        truncate: int | None = None,
        window: int | None = None,
        **settings: Any,
    ):
        super().__init__(tokenizer, config, **settings)
        if not any(True for _ in linear_layers(DynamicCache(config=config))):
            raise ModelError(f"model: {config.model_type} has no recurrent layers to sleep into; take notes or gist")
        self.form = form
        self.truncate = truncate
        self.window = window

    def fit(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> None:
        check_length(model, max(max(self._cut(len(row))) for row in rows), "a window")

    def consolidate(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> tuple[TensorState, SleepCost]:
        lengths = [self._cut(len(row)) for row in rows]
        decoder = cast(torch.nn.Module, model.get_decoder())
        state = in_batches(rows, self.batch_size, model.device, lambda ids: self._consolidate(decoder, ids, passes))
        return state, cost(model, [pieces * passes for pieces in lengths], state)

    def attach(self, state: TensorState, queries: Sequence[Example]) -> dict[str, Any]:
        """See `Consolidator.attach`. Positions start at 0. Behind the prompt, padding on the right is exact.

        Raises:
            DataError: The prompts differ in length: padding in front of a prompt would decay the state, so batches
                come from `equal_lengths`.
        """
        attached = super().attach(state, queries)
        lengths = attached["attention_mask"].sum(dim=1)
        if lengths.min() != lengths.max():
            raise DataError(
                f"queries: prompts of {lengths.min()} to {lengths.max()} tokens in one batch, and padding before a "
                "recurrent state is not neutral; batch prompts of equal length"
            )
        return attached

    def cache(self, state: TensorState) -> DynamicCache:
        """See `TensorSleep.cache`; there are no keys or values in it."""
        # A model may decode in place, so the cache gets its own copy.
        return functional_cache(self.config, {key: part.clone() for key, part in state.parts.items()})

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
