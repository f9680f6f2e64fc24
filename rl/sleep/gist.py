"""Gist sleep: the keys and values of k learned slots stand for a context, for models that have attention only.

After gist tokens (arXiv 2304.08467). The slots `<gist_0>` ... are added tokens, so their embedding rows are the
learned parameters: they train, and are saved, with the model. A context is read with the slots behind it; then its own
keys and values are dropped, and what later tokens know of it is what the slots' attention took in. Gradients reach the
slots and every weight through the kept keys and values.

N passes repeat the slots N times and keep the last k: later slots read the context and the earlier slots.

Positions: the kept slots stand at 0 to k - 1, and the context before them, at negative positions. Rotary embeddings
know differences only, so this is the same as counting from the start of the context, and yet the state looks like an
ordinary prefix of k tokens: queries follow at k, whatever the length of their context.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from siesta.data.errors import ModelError
from siesta.data.schema import Example
from siesta.rl.modes import grow_embeddings
from siesta.rl.sleep.protocol import SleepCost
from siesta.rl.sleep.tensors import UNWRITTEN, Tensors, TensorSleep, TensorState, check_length, cost, in_batches


def slot_tokens(k: int) -> list[str]:
    """Text of the k slots."""
    return [f"<gist_{i}>" for i in range(k)]


def add_slot_tokens(tokenizer: PreTrainedTokenizerBase, k: int) -> list[str]:
    """Add the slots a tokenizer lacks; return those."""
    vocabulary = tokenizer.get_vocab()
    added = [token for token in slot_tokens(k) if token not in vocabulary]
    tokenizer.add_tokens(added, special_tokens=True)
    return added


def add_slots(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, k: int) -> None:
    """Add the slots a tokenizer lacks, with embedding rows around the mean row, as far from it as rows are, so that no
    two slots begin alike.
    """
    added = add_slot_tokens(tokenizer, k)
    if not added:
        return
    grow_embeddings(model, tokenizer, added)
    ids = [tokenizer.get_vocab()[token] for token in added]
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    noise = torch.randn((len(ids), weight.shape[1]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight[ids] += weight[: min(ids)].std(dim=0) * noise.to(weight)


class GistSleep(TensorSleep):
    """Sleep into the keys and values of slots.

    The state is `layer.keys` and `layer.values` -> (P, key-value heads, k, head size).

    Args:
        tokenizer: The model's, with the slots (see `add_slots`).
        k: Slots.
        settings: Of `TensorSleep`.

    Raises:
        ModelError: The slots are missing, or the model has other layers than full attention, or positions that are
            not rotary.
    """

    name = "gist"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, k: int, **settings: Any):
        super().__init__(tokenizer, config, **settings)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in slot_tokens(k) if token not in vocabulary]
        if missing:
            raise ModelError(f"model: the tokenizer has no {missing[0]}; add the slots of gist first (add_slots)")
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
            raise ModelError(
                f"model: gist keeps full attention only, {config.model_type} has other layers; take latent"
            )
        if not config.get_text_config().to_dict().get("rope_parameters"):
            raise ModelError(f"model: gist needs rotary positions, {config.model_type} has none; take notes")
        self.slots = [vocabulary[token] for token in slot_tokens(k)]

    def fit(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> None:
        longest = max(map(len, rows)) + passes * len(self.slots)
        check_length(model, longest, f"with {passes} x {len(self.slots)} slots a text")

    def consolidate(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> tuple[TensorState, SleepCost]:
        rows = [row + self.slots * passes for row in rows]
        decoder = cast(torch.nn.Module, model.get_decoder())
        state = in_batches(rows, self.batch_size, model.device, lambda ids: self._read(decoder, ids))
        return state, cost(model, [[len(row)] for row in rows], state)

    def attach(self, state: TensorState, queries: Sequence[Example]) -> dict[str, Any]:
        """See `Consolidator.attach`. The mask covers the slots too: (P, k + longest prompt)."""
        return self.behind(torch.ones(len(queries), len(self.slots), dtype=torch.long), state, queries)

    def cache(self, state: TensorState) -> DynamicCache:
        """See `TensorSleep.cache`: this one concatenates."""
        cache = DynamicCache(config=self.config)
        for i in range(len(cache.layers)):
            cache.update(state.parts[f"{i}.keys"], state.parts[f"{i}.values"], i)
        return cache

    def _read(self, decoder: torch.nn.Module, ids: torch.Tensor) -> Tensors:
        """Keys and values of the last k of (B, L) tokens, the slots of the last pass."""
        k, length = len(self.slots), ids.shape[1]
        place = torch.arange(k - length, k, device=ids.device).expand(len(ids), -1)
        cache = DynamicCache(config=self.config)
        decoder(input_ids=ids, position_ids=place, past_key_values=cache, use_cache=True)
        kept: Tensors = {}
        for i, layer in enumerate(cast(list[DynamicLayer], cache.layers)):
            if layer.keys is None or layer.values is None:
                raise ModelError(UNWRITTEN)
            kept |= {f"{i}.keys": layer.keys[:, :, -k:], f"{i}.values": layer.values[:, :, -k:]}
        return kept
