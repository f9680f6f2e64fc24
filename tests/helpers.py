"""A tiny two-mode setting that tests share: embedded tokenizer and model, modes, judge, a few examples."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.schema import Example
from siesta.data.sources import TaskSource
from siesta.rl import embedded
from siesta.rl.attention import Backend
from siesta.rl.judge import Judge, build_judge
from siesta.rl.models import build_modes
from siesta.rl.modes import grow_embeddings, prepare_tokenizer
from siesta.rl.recipe import ModeSection

SECTIONS = {
    "short": ModeSection(token="<short>", max_tokens=2),
    "think": ModeSection(token="<think>", max_tokens=12, correct=0.5, answer_after="="),
}

# Packed rows on any machine: transformers reads the boundaries off the positions and builds the whole mask.
PACKED_SDPA = Backend("positions", "sdpa", True, lambda pack: {}, lambda device, dtype: None)

Rows = list[tuple[list[int], list[int]]]  # prompt, completion


def tiny_judge(price_per_token: float = 0.0) -> Judge:
    """Judge over the embedded tokenizer with the modes `short` and `think` and the `exact` verifier."""
    tokenizer = embedded.build_tokenizer()
    prepare_tokenizer(tokenizer, [section.token for section in SECTIONS.values()])
    modes = build_modes(SECTIONS, tokenizer)
    return build_judge(tokenizer, modes, {"exact"}, price_per_token=price_per_token, verifier_timeout=5.0)


def tiny_model(seed: int = 0, hidden_size: int = 16) -> LlamaForCausalLM:
    """Two-layer embedded model with the control tokens, random weights."""
    tokenizer = embedded.build_tokenizer()
    added = prepare_tokenizer(tokenizer, [section.token for section in SECTIONS.values()])
    model = embedded.build_model(tokenizer, seed=seed, layers=2, hidden_size=hidden_size, heads=2, init=0.2)
    grow_embeddings(model, tokenizer, added)
    return model


def tell_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the control tokens rows of their own; new ones stand at the mean, where every mode is as likely as another,
    whatever comes before it.
    """
    ids = [tokenizer.get_vocab()[section.token] for section in SECTIONS.values()]
    weight = cast(torch.Tensor, cast(torch.nn.Module, model.get_output_embeddings()).weight)
    with torch.no_grad():
        noise = torch.randn((len(ids), weight.shape[1]), generator=torch.Generator().manual_seed(0))
        weight[ids] += 0.1 * noise.to(weight)


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A tiny model with its tokenizer on disk."""
    tiny_model(seed).save_pretrained(folder)
    tiny_judge().tokenizer.save_pretrained(folder)
    return folder


def calc_examples(count: int) -> list[Example]:
    """Training examples of `calc`."""
    return list(TaskSource("calc", "train", count))


def parameters(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batch_of(rows: Rows, pad_id: int = 0, *, left: int = 0, right: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids, mask and completion length of a batch, with `left` and `right` more columns of padding than it needs."""
    before = left + max(len(prompt) for prompt, _ in rows)
    length = right + max(len(completion) for _, completion in rows)
    ids = torch.full((len(rows), before + length), pad_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        real = slice(before - len(prompt), before + len(completion))
        ids[i, real], mask[i, real] = torch.tensor(prompt + completion), 1
    return ids, mask, length


def one_step(folder: Path) -> dict[str, Any]:
    """Settings of a trainer that takes one step on the CPU and leaves nothing behind but its numbers."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
