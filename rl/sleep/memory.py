"""Memory sleep: a Titans memory (arXiv 2501.00663) beside one layer, whose weights are written by reading a context.

The memory is an MLP M. Writing takes steps of gradient descent with momentum and decay on |M(k) - v|^2, token by token
(eq. 13 and 14 there, by `titans-pytorch`, the optional extra `titans`); the state is M's weights. Its output joins the
hidden states of one layer through a gate, after the paper's memory as a gate (MAG); the gate starts closed, so a model
with a new memory is the model it was. N passes are N epochs of the inner descent over the same hidden states.

Departures from the paper: one memory and not one a layer; it is written in sleep only, and read in wake only. The read
goes through `retrieve_memories`, since a forward pass of the package with an all-false `store_mask` still decays the
weights and applies their momentum.
"""

import importlib
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import ModelError
from siesta.rl.sleep.cache import linear_layers
from siesta.rl.sleep.protocol import SleepCost
from siesta.rl.sleep.tensors import Tensors, TensorSleep, TensorState, forward_flops, in_batches

BRANCH = "titans_memory"


class MemoryCache(DynamicCache):
    """An empty cache that brings along the weights of every row's memory, each (P, heads, ...)."""

    def __init__(self, config: PreTrainedConfig, weights: Tensors):
        super().__init__(config=config)
        self.weights = weights

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self.weights = TensorState(self.weights).select(beam_idx.tolist()).parts


class MemoryBranch(torch.nn.Module):
    """A memory and its gate, beside a layer of width `dim`.

    Args:
        heads: Memories side by side, each of width dim / heads.
        segment: Tokens whose steps start from the same weights, computed in parallel (the paper's chunk).
    """

    def __init__(self, dim: int, heads: int, segment: int):
        super().__init__()
        try:
            package: Any = importlib.import_module("titans_pytorch")
        except ImportError as error:
            raise ModelError("sleep: memory needs titans-pytorch; install siesta-rl[titans]") from error
        self.memory: Any = package.NeuralMemory(dim=dim, heads=heads, dim_head=dim // heads, batch_size=segment)
        self.gate = torch.nn.Linear(dim, dim)
        torch.nn.init.zeros_(self.gate.weight)
        torch.nn.init.zeros_(self.gate.bias)

    def write(self, hidden: torch.Tensor, passes: int) -> Tensors:
        """Weights after `passes` epochs over hidden states (B, L, dim): each (B, heads, ...)."""
        state = None
        for _ in range(passes):
            _, state = self.memory(hidden, state=state)
            state = state._replace(weights=state.states[0])  # the next epoch starts where this one ended
        written = cast(Any, state).weights
        return {name: part.unflatten(0, (len(hidden), -1)) for name, part in written.items()}

    def read(self, hidden: torch.Tensor, weights: Tensors) -> torch.Tensor:
        """Hidden states (B, T, dim) with what the memory answers to each token by itself."""
        # `retrieve_memories` shifts by one token and wants weights for each.
        steps = hidden.shape[1] + 1
        each = {name: part.flatten(0, 1)[:, None].expand(-1, steps, *part.shape[2:]) for name, part in weights.items()}
        return hidden + torch.tanh(self.gate(hidden)) * self.memory.retrieve_memories(hidden, each)

    def blend(self, block, args, kwargs, output):
        """Forward hook of a layer: reads where the cache brings a memory, and otherwise changes nothing."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # renamed in transformers 5.2x
        if not isinstance(cache, MemoryCache):
            return output
        if isinstance(output, tuple):
            return self.read(output[0], cache.weights), *output[1:]
        return self.read(output, cache.weights)


def add_memory(model: PreTrainedModel, layer: int, *, heads: int = 4, segment: int = 16) -> None:
    """Give a model a memory behind decoder layer `layer`. Its weights are parameters of the model and saved with it;
    `from_pretrained` does not know them, so they are loaded after this call (`load_memory`).

    Raises:
        ModelError: `titans-pytorch` is missing, or the width does not divide into heads.
    """
    dim = model.config.get_text_config().hidden_size
    if dim % heads:
        raise ModelError(f"model: width {dim} does not divide into {heads} memories")
    branch = MemoryBranch(dim, heads, segment).to(model.device, model.dtype)
    for weight in branch.parameters():
        # The package lays the weights of all heads into the same memory: they could be neither saved nor trained.
        weight.data = weight.data.contiguous()
    model.add_module(BRANCH, branch)
    cast(Any, model.get_decoder()).layers[layer].register_forward_hook(branch.blend, with_kwargs=True)


def load_memory(model: PreTrainedModel, folder: Path) -> bool:
    """Give a memory that was added the weights saved with the model in `folder`; False if none were."""
    saved: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(f"{BRANCH}.")]  # noqa: SIM118  not a mapping
            saved |= {name.removeprefix(f"{BRANCH}."): weights.get_tensor(name) for name in names}
    if saved:
        model.get_submodule(BRANCH).load_state_dict(saved)
    return bool(saved)


class MemorySleep(TensorSleep):
    """Sleep into the weights of a memory. The blocks read a context once, the memory `passes` times.

    The state is the weights of the memory by name -> (P, heads, ...).

    Args:
        layer: The decoder layer that `add_memory` was given.
        settings: Of `TensorSleep`.

    Raises:
        ModelError: The model has recurrent layers; those take `latent`.
    """

    name = "memory"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, layer: int, **settings: Any):
        super().__init__(tokenizer, config, **settings)
        if any(True for _ in linear_layers(DynamicCache(config=config))):
            raise ModelError(f"model: {config.model_type} has recurrent layers of its own to sleep into; take latent")
        self.layer = layer

    def consolidate(self, model: PreTrainedModel, rows: list[list[int]], passes: int) -> tuple[TensorState, SleepCost]:
        branch = cast(MemoryBranch, model.get_submodule(BRANCH))
        state = in_batches(
            rows, self.batch_size, model.device, lambda ids: branch.write(self._hidden(model, ids), passes)
        )
        blocks = forward_flops(model)
        step = 6.0 * sum(part[0].numel() for part in state.parts.values())  # forward and backward, per token
        costs = SleepCost(
            tokens=[passes * len(row) for row in rows],
            flops=[blocks(len(row)) + passes * step * len(row) for row in rows],
            state_bytes=state.nbytes(),
        )
        return state, costs

    def cache(self, state: TensorState) -> MemoryCache:
        """See `TensorSleep.cache`: it brings the memories along."""
        return MemoryCache(self.config, state.tensors())

    def _hidden(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """What leaves the layer over contexts (B, L): (B, L, d)."""
        left: list[torch.Tensor] = []

        def leave(block, args, output):
            left.append(output[0] if isinstance(output, tuple) else output)

        decoder = cast(Any, model.get_decoder())
        handle = decoder.layers[self.layer].register_forward_hook(leave)
        try:
            decoder(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return left[0]
