"""The warm-up with states: who is asked how, and a loss that is that of unrolled rows and trains the sleep."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from siesta.data.sources import TaskSource
from siesta.rl import embedded
from siesta.rl.judge import build_judge
from siesta.rl.models import build_modes
from siesta.rl.modes import grow_embeddings, prepare_tokenizer
from siesta.rl.sleep.gist import GistSleep, add_slots
from siesta.rl.sleep.latent import LatentSleep
from siesta.rl.sleep.state_warmup import StateWarmupTrainer, state_examples, with_contexts
from siesta.rl.warmup import IGNORED, warmup_rows
from tests.helpers import SECTIONS
from tests.hybrids import hybrid

EXAMPLES = list(TaskSource("hop", "train", 8, queries=2))
TOKENS = [section.token for section in SECTIONS.values()]
PASSES = 2


def build(folder: Path, mechanism: str) -> Any:
    """A trainer on a tiny model and rows of hop, every example in both modes."""
    tokenizer = embedded.build_tokenizer()
    added = prepare_tokenizer(tokenizer, TOKENS)
    judge = build_judge(
        tokenizer, build_modes(SECTIONS, tokenizer), {"exact"}, price_per_token=0.0, verifier_timeout=5.0
    )
    plain = embedded.build_tokenizer()
    model: Any = embedded.build_model(plain, seed=0, layers=2, hidden_size=16, heads=2, init=0.2)
    if mechanism == "latent":
        model = hybrid("qwen3_5", torch.float32)
    grow_embeddings(model, tokenizer, added)
    if mechanism == "gist":
        add_slots(model, tokenizer, 2)
    model.save_pretrained(folder / "model")
    way = GistSleep(tokenizer, model.config, 2) if mechanism == "gist" else LatentSleep(tokenizer, model.config)
    asked, contexts = state_examples(EXAMPLES, seed=1)
    rows = warmup_rows(asked, judge, pairing="paired", shares=None, instruction="", seed=0)
    args = SFTConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
        max_steps=2,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
    )
    return StateWarmupTrainer(
        way=way,
        passes=PASSES,
        model=str(folder / "model"),
        args=args,
        train_dataset=with_contexts(rows, contexts),
        processing_class=tokenizer,
    )


def gradient(made: Any, loss: torch.Tensor) -> torch.Tensor:
    made.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])


def test_who_is_asked_how() -> None:
    many = list(TaskSource("hop", "train", 400))
    asked, contexts = state_examples(many, seed=0)
    assert 150 < sum(context != "" for context in contexts) < 250
    for example, shown, context in zip(many, asked, contexts, strict=True):
        if context:
            assert (context, shown.context) == (example.context, "")
            assert shown.meta["responses"] == example.meta["responses_with_notes"]
        else:
            assert shown == example


def test_every_mode_is_taught_in_every_state() -> None:
    """Each row draws its mode and its state; drawn from the same numbers, one would tell the other."""
    tokenizer = embedded.build_tokenizer()
    prepare_tokenizer(tokenizer, TOKENS)
    modes = build_modes(SECTIONS, tokenizer)
    judge = build_judge(tokenizer, modes, {"exact"}, price_per_token=0.0, verifier_timeout=5.0)
    asked, contexts = state_examples(list(TaskSource("hop", "train", 400)), seed=0)
    rows = with_contexts(warmup_rows(asked, judge, pairing="cross", shares=None, instruction="", seed=0), contexts)
    shown = [(next(x for x in row["labels"] if x != IGNORED), row["context"] != "") for row in rows.to_list()]
    counts = Counter(shown)
    assert len(counts) == 4
    assert 70 < min(counts.values()) <= max(counts.values()) < 130


@pytest.mark.parametrize("mechanism", ["gist", "latent"])
def test_the_loss_is_that_of_unrolled_rows(tmp_path: Path, mechanism: str) -> None:
    made = build(tmp_path, mechanism)
    rows = [made.train_dataset[i] for i in range(12)]
    batch = made.data_collator(rows)
    assert 0 < sum(context != "" for context in batch["contexts"]) < 12
    count = sum(label != IGNORED for row in rows for label in row["labels"])
    slept: list[int] = []
    consolidate = made.way.consolidate

    def watching(model: Any, ids: list[list[int]], passes: int) -> Any:
        slept.append(len(ids))
        return consolidate(model, ids, passes)

    made.way.consolidate = watching
    made.model.train()
    mine = made.compute_loss(made.model, dict(batch), num_items_in_batch=torch.tensor(count))
    assert slept == [len({row["context"] for row in rows if row["context"]})]
    mine_gradient = gradient(made, mine)
    loss = torch.zeros(())
    for row in rows:
        cache = None
        if row["context"]:
            cache = made.way.cache(made.way.sleep(made.model, [row["context"]], passes=PASSES).state)
        logits = made.model(input_ids=torch.tensor([row["input_ids"]]), past_key_values=cache).logits[0]
        labels = torch.tensor(row["labels"])[1:]
        loss = loss + torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum") / count
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine_gradient, gradient(made, loss), rtol=1e-3, atol=1e-5)
    for row in batch["contexts"]:
        assert row in {example.context for example in EXAMPLES} | {""}
    made.way.consolidate = lambda *settings: (lambda state, cost: (state.detach(), cost))(*consolidate(*settings))
    cut = made.compute_loss(made.model, dict(batch), num_items_in_batch=torch.tensor(count))  # the negative control
    assert (gradient(made, cut) - mine_gradient).norm() > 1e-3


@pytest.mark.parametrize("mechanism", ["gist", "latent"])
def test_it_trains(tmp_path: Path, mechanism: str) -> None:
    made = build(tmp_path, mechanism)
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    moved = [not torch.equal(old, new) for old, new in zip(before, made.model.parameters(), strict=True)]
    assert all(moved)
    assert "mean_token_accuracy" in made.state.log_history[0]
