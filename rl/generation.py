"""Completions in a given mode with `generate`, and the mode policy of prompts, for evaluation and the warm-up gate.

Prompts are sorted by length before they are batched and left-padded; masks come from lengths, never from ids, because
many tokenizers pad with their end-of-sequence token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from siesta.rl.modes import Mode, Modes

SEGMENT = 64  # tokens between two looks at which rows have ended


class Writer(Protocol):
    """Writes one response per prompt in a mode, as `complete` does with `generate`; None is greedy."""

    def __call__(self, prompts: Sequence[list[int]], mode: Mode, *, temperature: float | None) -> list[list[int]]: ...


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, nothing compiled; the previous mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        # Layers compiled for the training pass would be compiled again for every shape of a cache.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


@contextmanager
def fixed_randomness(seed: int):
    """torch's generators seeded inside, restored outside: measuring more often must not change the training."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Attribute `name` of `owner` is `value` inside the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of shape (B, longest), content flush right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each real token in its own sequence, whatever the padding. (B, L) -> (B, L)."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def cut_after_eos(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """`ids` up to and including the first end-of-sequence token."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
    return list(ids[: end + 1])


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of `rows` in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def complete(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    mode: Mode,
    *,
    temperature: float | None,
    batch_size: int,
    pad_id: int,
    eos_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """One response per prompt in `mode`.

    Args:
        prompts: Ids up to the control token.
        temperature: None decodes greedily.
        eos_id: Ends a response.
        advance: Is told how many responses are done since the last time.

    Returns:
        Ids after the control token, end of sequence included unless the cap came first; in the order of `prompts`.
    """
    config = sampling_config(temperature, pad_id, [eos_id])
    responses: list[list[int]] = [[] for _ in prompts]
    # `generate` fills what the given config leaves open from the model's own (a repetition penalty, say).
    with inference(model), replaced(model, "generation_config", GenerationConfig()):
        for batch in by_length(prompts, batch_size):
            written = respond(cast(Any, model), [prompts[i] for i in batch], mode, config, [eos_id])
            for i, response in zip(batch, written, strict=True):
                responses[i] = response
            advance(len(batch))
    return responses


def sampling_config(temperature: float | None, pad_id: int, eos_ids: list[int]) -> GenerationConfig:
    """The model's own distribution at `temperature`; None is greedy."""
    sampling = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    return GenerationConfig(
        **sampling, top_k=0, top_p=1.0, pad_token_id=pad_id, eos_token_id=eos_ids, return_dict_in_generate=True
    )


def respond(
    model: Any, prompts: Sequence[list[int]], mode: Mode, config: GenerationConfig, eos_ids: Sequence[int]
) -> list[list[int]]:
    """Responses of one batch with `generate`, without work on rows that are not needed.

    A prompt that several rows share is read once and its cache copied; rows that have ended leave the batch every
    `SEGMENT` tokens.
    """
    unique = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids, mask = (x.to(model.device) for x in left_pad(list(map(list, unique)), config.pad_token_id))
    cache = model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1
    ).past_key_values
    rows = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=ids.device)
    cache.reorder_cache(rows)
    return decode(model, cache, mask[rows], mode, config, eos_ids, seen=ids[rows])


def decode(
    model: Any,
    cache: Any,
    mask: torch.Tensor,
    mode: Mode,
    config: GenerationConfig,
    eos_ids: Sequence[int],
    *,
    seen: torch.Tensor | None = None,
) -> list[list[int]]:
    """Responses of rows whose prompts are in the cache, opened by the control token of `mode`.

    Args:
        cache: Is written to.
        mask: Of what the cache holds, (B, L).
        seen: The ids that it holds, (B, L), for logits processors; None where a state has none.
    """
    ids, mask = append(seen, mask.new_full((len(mask), 1), mode.token_id), mask)
    responses: list[list[int]] = [[] for _ in range(len(mask))]
    going, left = list(range(len(mask))), mode.max_tokens
    while going and left > 0:
        config.max_new_tokens = min(SEGMENT, left)
        # Ranks have their own rows: each stops when it is done.
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            synced_gpus=False,
        )
        written = output.sequences[:, ids.shape[1] :]
        for i, row in zip(going, written.tolist(), strict=True):
            responses[i] += cut_after_eos(row, eos_ids)
        kept = [place for place, i in enumerate(going) if responses[i][-1] not in eos_ids]
        going, left = [going[place] for place in kept], left - SEGMENT
        if going and left > 0:
            keep = torch.tensor(kept, device=ids.device)
            cache.reorder_cache(keep)
            ids, mask = append(None if seen is None else ids[keep], written[keep], mask[keep])
    return responses


def append(seen: torch.Tensor | None, more: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask with real tokens behind every row; of ids that are unknown the last, which is not in the cache."""
    ids = more[:, -1:] if seen is None else torch.cat([seen, more], dim=1)
    return ids, torch.cat([mask, mask.new_ones(more.shape)], dim=1)


def mode_policy(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    modes: Modes,
    *,
    temperature: float,
    batch_size: int,
    pad_id: int,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(m given x) at `temperature`, (P, M), and the mass on control tokens, (P,), of each prompt; on the CPU."""
    log_policy = torch.empty(len(prompts), len(modes))
    mass = torch.empty(len(prompts))
    with inference(model):
        for batch in by_length(prompts, batch_size):
            ids, mask = left_pad([prompts[i] for i in batch], pad_id)
            mask = mask.to(device)
            output = model(
                input_ids=ids.to(device), attention_mask=mask, position_ids=positions(mask), logits_to_keep=1
            )
            log_policy[batch] = modes.log_policy(output.logits[:, -1], temperature).cpu()
            mass[batch] = modes.mass(output.logits[:, -1]).cpu()
    return log_policy, mass
