"""Reading from states that are tensors: the mode policy behind each, and responses in a given mode.

What `siesta.rl.generation` does for prompts, for queries behind states. Queries whose states and prompts are equally
long share a batch, so none is padded and every kind of state is read as it would be alone.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from siesta.data.prompts import end_id, pad_id
from siesta.data.schema import Example
from siesta.rl.generation import decode, inference, replaced, sampling_config
from siesta.rl.modes import Mode, Modes
from siesta.rl.sleep.protocol import Consolidator, State
from siesta.rl.sleep.tensors import TensorSleep, TensorState


def alike(way: Consolidator[Any], state: State, queries: Sequence[Example]) -> Iterator[list[int]]:
    """Indices of queries in batches of equally large states and equally long prompts."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (size, prompt) in enumerate(zip(state.nbytes(), way.prompts(state, queries), strict=True)):
        groups[size, len(prompt)].append(i)
    for group in groups.values():
        yield from (group[start : start + way.batch_size] for start in range(0, len(group), way.batch_size))


def state_policy(
    model: PreTrainedModel,
    way: TensorSleep,
    state: TensorState,
    queries: Sequence[Example],
    modes: Modes,
    *,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(m given state and query) at `temperature`, (P, M), and the mass on control tokens, (P,); on the CPU."""
    log_policy, mass = torch.empty(len(queries), len(modes)), torch.empty(len(queries))
    with inference(model):
        for batch in alike(way, state, queries):
            logits = prefill(model, way, state, queries, batch)[0].logits[:, -1]
            log_policy[batch] = modes.log_policy(logits, temperature).cpu()
            mass[batch] = modes.mass(logits).cpu()
    return log_policy, mass


def state_responses(
    model: PreTrainedModel,
    way: TensorSleep,
    state: TensorState,
    queries: Sequence[Example],
    mode: Mode,
    *,
    temperature: float | None,
) -> list[list[int]]:
    """One response per state and query in `mode`, as `siesta.rl.generation.complete` writes them.

    Args:
        state: P states, fanned out where a context has several queries or a query several responses.
        temperature: None decodes greedily.
    """
    eos = [end_id(way.tokenizer)]
    config = sampling_config(temperature, pad_id(way.tokenizer), eos)
    responses: list[list[int]] = [[] for _ in queries]
    # `generate` fills what the given config leaves open from the model's own (a repetition penalty, say).
    with inference(model), replaced(model, "generation_config", GenerationConfig()):
        for batch in alike(way, state, queries):
            output, mask = prefill(model, way, state, queries, batch)
            written = decode(model, output.past_key_values, mask, mode, config, eos)
            for i, response in zip(batch, written, strict=True):
                responses[i] = response
    return responses


def prefill(
    model: PreTrainedModel, way: Consolidator[Any], state: State, queries: Sequence[Example], batch: Sequence[int]
) -> tuple[Any, torch.Tensor]:
    """The model's output at the last prompt token of some queries, and the mask of what the cache in it holds."""
    kwargs = way.attach(state.select(batch).to(model.device), [queries[i] for i in batch])
    return cast(Any, model)(**kwargs, use_cache=True, logits_to_keep=1), kwargs["attention_mask"]
