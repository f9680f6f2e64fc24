"""Completions in a given mode with `generate`, and the mode policy of prompts, for evaluation and the warm-up gate.

Prompts are sorted by length before they are batched and left-padded; masks come from lengths, never from ids, because
many tokenizers pad with their end-of-sequence token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from siesta.rl.modes import Mode, Modes


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the previous mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


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
) -> list[list[int]]:
    """One response per prompt in `mode`.

    Args:
        prompts: Ids up to the control token.
        temperature: None decodes greedily.
        eos_id: Ends a response.

    Returns:
        Ids after the control token, end of sequence included unless the cap came first; in the order of `prompts`.
    """
    sampling = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    config = GenerationConfig(
        **sampling, top_k=0, top_p=1.0, max_new_tokens=mode.max_tokens, pad_token_id=pad_id, eos_token_id=eos_id
    )
    responses: list[list[int]] = [[] for _ in prompts]
    # `generate` fills what the given config leaves open from the model's own (a repetition penalty, say).
    with inference(model), replaced(model, "generation_config", GenerationConfig()):
        for batch in by_length(prompts, batch_size):
            ids, mask = left_pad([[*prompts[i], mode.token_id] for i in batch], pad_id)
            ids, mask = ids.to(model.device), mask.to(model.device)
            output = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for i, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                responses[i] = cut_after_eos(row, [eos_id])
    return responses


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
