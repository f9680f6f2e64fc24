"""Caches of hybrid models that gradients can flow through, opened from recurrent states and nothing else.

A stock cache of transformers copies new recurrent states into the old buffer, which destroys what the pass before has
saved for its backward pass. The layers here put new tensors in place of old ones. A cache opened from states holds no
keys and values, so positions start at 0, and no inputs of the short convolution, so it starts as at the beginning of a
text: what one pass hands to the next is S alone, as in Algorithm 1 of arXiv 2605.26099.
"""

from collections.abc import Iterator, Mapping

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from siesta.data.errors import ModelError


class _Functional(LinearAttentionLayer):
    """Assigns states instead of copying them in place. `record_past` keeps a model from updating the inputs of its
    convolution in place when it reads a single token.
    """

    @property
    def is_compileable(self) -> bool:
        return False  # compiled decoding needs buffers that stay where they are

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> torch.Tensor:
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        past = self.conv_states[state_idx]
        if past is None:
            past = conv_states.new_zeros((*conv_states.shape[:-1], size))
        full = torch.cat([past, conv_states], dim=-1)
        self.conv_kernel_size[state_idx] = size
        self.conv_states[state_idx] = full[..., -size:]
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        self.dtype, self.device = full.dtype, full.device
        return full

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


class FunctionalLinear(_Functional):
    """A layer with recurrent states only: Qwen3.5, OLMo-hybrid."""


class FunctionalLinearAndFull(_Functional, LinearAttentionAndFullAttentionLayer):
    """A layer with attention heads beside the recurrent ones: Falcon-H1."""


class FunctionalLinearAndSliding(_Functional, LinearAttentionAndSlidingWindowAttentionLayer):
    """The same with a sliding window."""


FUNCTIONAL: dict[type, type[_Functional]] = {
    LinearAttentionLayer: FunctionalLinear,
    LinearAttentionAndFullAttentionLayer: FunctionalLinearAndFull,
    LinearAttentionAndSlidingWindowAttentionLayer: FunctionalLinearAndSliding,
}


def functional_cache(config: PreTrainedConfig, states: Mapping[str, torch.Tensor]) -> DynamicCache:
    """A cache for the model of `config` that holds `states` (see `recurrent_states`) and no keys or values.

    Raises:
        ModelError: The states are another model's.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_functional(layer) for layer in cache.layers]
    linear = {str(i) for i, _ in linear_layers(cache)}
    if states and {key.split(".")[0] for key in states} != linear:
        raise ModelError(f"state: its layers are not the recurrent layers of this {config.model_type} model")
    for key, value in states.items():
        layer, index = map(int, key.split("."))
        opened = dict(linear_layers(cache))[layer]
        opened.update_recurrent_state(value, index)
        opened.has_previous_state[index] = True
        opened.dtype, opened.device = value.dtype, value.device
    return cache


def recurrent_states(cache: DynamicCache) -> dict[str, torch.Tensor]:
    """Every recurrent state in the cache, keyed `layer.index`; (B, heads, ...) each, not copied."""
    return {
        f"{i}.{index}": state
        for i, layer in linear_layers(cache)
        for index, state in layer.recurrent_states.items()
        if state is not None
    }


def linear_layers(cache: DynamicCache) -> Iterator[tuple[int, LinearAttentionLayer]]:
    """The layers that have recurrent states, with their numbers."""
    return ((i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionLayer))


def _functional(layer):
    """The functional form of a fresh layer, whatever arguments it was made with; attention layers as they are."""
    if type(layer) not in FUNCTIONAL:
        return layer
    functional = object.__new__(FUNCTIONAL[type(layer)])
    vars(functional).update(vars(layer))
    functional.record_past = True
    return functional
