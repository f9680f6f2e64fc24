"""SleepTrainer against its definition: who reads what, which rows join the batch, and what their weights add up to."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from siesta.data.errors import DataError, RecipeError
from siesta.data.prompts import messages
from siesta.data.sources import TaskSource
from siesta.rl import embedded
from siesta.rl.config import SleepConfig
from siesta.rl.judge import Judge, build_judge
from siesta.rl.models import build_modes
from siesta.rl.modes import grow_embeddings, prepare_tokenizer
from siesta.rl.passes import with_prompts
from siesta.rl.sleep.context_trainer import BlockSampler
from siesta.rl.sleep.notes import NotesSleep, note_tokens
from siesta.rl.sleep.trainer import SleepTrainer
from siesta.rl.sleep_section import SleepSection
from siesta.rl.spread import Batch, select
from tests.helpers import SECTIONS, one_step, parameters

TOKENS = [section.token for section in SECTIONS.values()]
QUERIES, SLEEPS, GROUP = 2, 2, 2
BLOCK = QUERIES * SLEEPS * GROUP


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """Every `train()` collects garbage; what imports have left is not looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def uneven_judge() -> Judge:
    """Over the embedded tokenizer with the sleep token; finds about half of the answers right, by their order."""
    tokenizer = embedded.build_tokenizer()
    prepare_tokenizer(tokenizer, [*TOKENS, "<sleep>"])
    modes = build_modes(SECTIONS, tokenizer)
    judge = build_judge(tokenizer, modes, {"exact"}, price_per_token=0.0, verifier_timeout=5.0)
    calls = iter(range(10**6))
    judge.verifiers["exact"] = lambda solution, answer: float(next(calls) % 7 in (0, 3, 4, 6))
    return judge


def rows(contexts: int, queries: int = QUERIES) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": messages(x), "answer": x.answer, "verifier": "exact", "context": x.context, "query": x.query}
            for x in TaskSource("hop", "train", contexts * queries, queries=queries)
        ]
    )


def embedded_model(folder: Path) -> PreTrainedModel:
    """The model that `build` starts from."""
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder / "model")).eval()


def save_embedded(folder: Path, judge: Judge) -> None:
    """A tiny model over the judge's tokenizer."""
    model = embedded.build_model(judge.tokenizer, seed=0, layers=2, hidden_size=16, heads=2, init=0.2)
    grow_embeddings(model, judge.tokenizer, [*TOKENS, "<sleep>"])
    model.save_pretrained(folder)
    judge.tokenizer.save_pretrained(folder)


def build(
    folder: Path,
    data: Dataset | None = None,
    sleep: dict | None = None,
    peft_config: LoraConfig | None = None,
    kind: type[SleepTrainer] = SleepTrainer,
    judge: Judge | None = None,
    **settings: Any,
) -> SleepTrainer:
    """A trainer on a tiny model; two contexts a step on each device unless `settings` say otherwise."""
    judge = judge or uneven_judge()
    if not (folder / "model").exists():
        save_embedded(folder / "model", judge)
    options = {"mechanism": "notes", "queries": QUERIES, "sleeps": SLEEPS, "max_tokens": 12} | (sleep or {})
    section = SleepSection.model_validate(options)
    fields: dict[str, Any] = one_step(folder) | {
        "per_device_train_batch_size": 2 * BLOCK,
        "num_generations": SLEEPS * GROUP,
        "sleeps": SLEEPS,
    }
    args = SleepConfig(**(fields | settings))
    return kind(
        model=str(folder / "model"),
        judge=judge,
        args=args,
        train_dataset=data if data is not None else rows(4),
        sleep=NotesSleep(judge.tokenizer, section, judge.modes.token_ids, temperature=1.0),
        peft_config=peft_config,
    )


def rollout_batch(trainer: SleepTrainer, contexts: int = 2) -> Batch:
    """One generation batch, as the trainer would make it."""
    cast(torch.nn.Module, trainer.model).train()
    data = cast(Dataset, trainer.train_dataset)
    inputs = [dict(data[i // (SLEEPS * GROUP)]) for i in range(contexts * BLOCK)]
    return cast(Batch, trainer._generate_and_score_completions(inputs))


def prompts(trainer: SleepTrainer, batch: Batch) -> list[str]:
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    return [str(trainer._tokenizer.decode(ids[mask])) for ids, mask in pairs]


def gradient(trainer: SleepTrainer, batch: Batch) -> torch.Tensor:
    model = cast(torch.nn.Module, trainer.model)
    model.zero_grad()
    trainer._compute_loss(model, batch).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads]).clone()


def test_a_step_trains_the_model_and_logs_states(tmp_path):
    trainer = build(tmp_path, sleep={"stateless": 0.5}, price_per_token=0.01)
    before = parameters(cast(torch.nn.Module, trainer.model))
    trainer.train()
    after = parameters(cast(torch.nn.Module, trainer.model))
    assert torch.isfinite(after).all()
    assert (after != before).float().mean() > 0.5
    logs = trainer.state.log_history[0]
    assert logs["sleep/own/share"] == logs["sleep/none/share"] == 0.5
    assert "sleep/shuffled/share" not in logs
    assert logs["sleep/own/prob/short"] + logs["sleep/own/prob/think"] == pytest.approx(1.0)
    assert 1 <= logs["sleep/note_tokens"] <= 11
    assert "sleep/write_advantage_abs" in logs
    assert "time/sleep" in logs


def test_queries_of_a_context_read_the_same_notes_in_groups(tmp_path):
    trainer = build(tmp_path)
    batch = rollout_batch(trainer)
    asked = prompts(trainer, batch)
    data = cast(Dataset, trainer.train_dataset)
    copies, passes = 2 * SLEEPS, 1
    assert len(asked) == 2 * BLOCK + copies * passes
    for i, text in enumerate(asked[: 2 * BLOCK]):
        context, query, sleep, _ = (
            i // BLOCK,
            i // (SLEEPS * GROUP) % QUERIES,
            i // GROUP % SLEEPS,
            i % GROUP,
        )
        written = trainer._night.actions[0].completion_ids[context * SLEEPS + sleep]
        notes = trainer.sleep.keep(trainer.sleep.text(written))
        assert text.split() == [*notes.split(), data[context * QUERIES + query]["query"], "<q>"]
        assert data[context * QUERIES]["context"] not in text
    modes = trainer.modes.of(batch["completion_ids"])
    assert modes[: 2 * BLOCK].tolist() == [0, 1] * BLOCK, "every group holds every mode"
    assert modes[2 * BLOCK :].tolist() == [-1] * copies, "what sleep writes is in no mode"
    assert asked[2 * BLOCK :] == [f"{data[c * QUERIES]['context']} <q>" for c in (0, 1) for _ in range(SLEEPS)]


def test_losses_of_notes_and_answers_are_normalised_apart(tmp_path):
    trainer = build(tmp_path, sleep={"weight": 3.0}, mode_objective="policy_gradient")
    batch = rollout_batch(trainer)
    answers, notes = batch["weights"][: 2 * BLOCK], batch["weights"][2 * BLOCK :]
    assert answers[:, 1:].sum().item() == pytest.approx(1.0, rel=1e-5)
    assert notes.sum().item() == pytest.approx(3.0, rel=1e-5)
    assert (notes[:, 0] == 0).all(), "the sleep token was forced"
    mask = batch["completion_mask"][2 * BLOCK :, 1:]
    torch.testing.assert_close(notes[:, 1:], 3 * mask / mask.sum(1, keepdim=True) / 4)
    for name in ("mass_weights", "kl_weights"):
        assert (batch[name][2 * BLOCK :] == 0).all()
        assert batch[name][: 2 * BLOCK].sum() > 0


def test_notes_are_credited_with_what_their_answers_earn(tmp_path):
    trainer = build(tmp_path, sleep={"price": 0.5}, price_per_token=0.1)
    batch = rollout_batch(trainer)
    rewards = trainer.reward_function.outcomes[:, 0].view(2, QUERIES, SLEEPS, GROUP)
    tokens = torch.tensor(note_tokens(trainer._night.actions)).view(2, SLEEPS)
    earned = rewards.mean(dim=(1, 3)) - 0.1 * 0.5 * tokens / QUERIES
    expected = (earned - earned.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(batch["advantages"][2 * BLOCK :, 1], expected)
    assert expected.abs().max() > 0


def test_the_gradient_is_that_of_the_answers_and_that_of_the_notes(tmp_path):
    trainer = build(tmp_path)
    batch = rollout_batch(trainer)
    total = 2 * BLOCK
    whole = gradient(trainer, batch)
    answers = gradient(trainer, select(batch, range(total)))
    notes = gradient(trainer, select(batch, range(total, len(batch["weights"]))))
    torch.testing.assert_close(whole, answers + notes, atol=1e-6, rtol=1e-4)
    assert notes.norm() > 1e-3 * answers.norm() > 0
    # By hand: - 1 / (N T) sum_t A grad log p(t), from a plain forward pass.
    model = cast(torch.nn.Module, trainer.model)
    model.zero_grad()
    loss = torch.zeros(())
    for row in range(total, len(batch["weights"])):
        ids, mask = with_prompts({key: value[[row]] for key, value in batch.items() if value.dim() == 2})
        real = ids[mask.bool()][None]
        written = int(batch["completion_mask"][row].sum()) - 1
        logps = torch.log_softmax(model(real).logits[0, :-1].float(), dim=-1)
        chosen = logps.gather(1, real[0, 1:, None])[-written:]
        loss = loss - batch["advantages"][row, 1] * chosen.mean() / 4
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    torch.testing.assert_close(torch.cat([grad.flatten() for grad in grads]), notes, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_the_kl_term_holds_the_writer_too(tmp_path, lora: bool):
    """The reference is a model of its own, or the model without its adapter."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if lora else None
    trainer = build(tmp_path, beta=0.5, peft_config=config)
    batch = rollout_batch(trainer)
    notes = select(batch, range(2 * BLOCK, len(batch["weights"])))
    torch.testing.assert_close(notes["kl_weights"], notes["weights"])
    reference = embedded_model(tmp_path)
    for row in range(len(notes["weights"])):
        ids, mask = with_prompts({key: value[[row]] for key, value in notes.items() if value.dim() == 2})
        real = ids[mask.bool()][None]
        written = int(notes["completion_mask"][row].sum())
        with torch.no_grad():
            logps = torch.log_softmax(reference(real).logits[0, :-1].float(), dim=-1)
        by_hand = logps.gather(1, real[0, 1:, None])[1 - written :, 0]  # behind the sleep token, which was forced
        torch.testing.assert_close(notes["ref_per_token_logps"][row, 1:written], by_hand, atol=1e-4, rtol=1e-4)
    # Of notes without credit nothing is left but the KL term: no gradient at the reference, one beside it.
    notes["advantages"] = torch.zeros_like(notes["advantages"])
    assert (gradient(trainer, notes).norm() > 1e-4) == lora
    trainer.beta = 0.0
    assert gradient(trainer, notes).norm() < 1e-6


@pytest.mark.parametrize("settings", [{"token_budget": 60}, {"share_prompts": True}])
def test_passes_do_not_change_the_gradient(tmp_path, settings: dict[str, Any]):
    trainer = build(tmp_path / "a")
    batch = rollout_batch(trainer)
    whole = gradient(trainer, batch)
    other = build(tmp_path / "b", **settings)
    loss_of = cast(torch.nn.Module, other.model)
    loss_of.load_state_dict(cast(torch.nn.Module, trainer.model).state_dict())
    torch.testing.assert_close(gradient(other, batch), whole, atol=1e-5, rtol=1e-3)


def test_micro_batches_and_old_log_probabilities(tmp_path):
    """Two iterations over a batch need the old policy's log-probabilities, of notes as well."""
    settings: dict[str, Any] = {
        "num_iterations": 2,
        "per_device_train_batch_size": BLOCK,
        "gradient_accumulation_steps": 2,
    }
    trainer = build(tmp_path, max_steps=2, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    assert torch.isfinite(parameters(cast(torch.nn.Module, trainer.model))).all()


def test_contexts_without_a_state_are_asked_as_they_stand(tmp_path):
    trainer = build(tmp_path, sleep={"stateless": 1.0})
    batch = rollout_batch(trainer)
    assert len(batch["weights"]) == 2 * BLOCK, "nothing was written"
    data = cast(Dataset, trainer.train_dataset)
    for i, text in enumerate(prompts(trainer, batch)):
        row = data[i // (SLEEPS * GROUP)]
        assert text.split() == [*row["context"].split(), row["query"], "<q>"]


def test_readers_who_keep_the_context_also_get_other_notes(tmp_path):
    trainer = build(tmp_path, sleep={"stateless": 0.5, "keep_context": True, "max_tokens": 6})
    batch = rollout_batch(trainer, contexts=4)
    assert trainer._night.kinds == ["own", "none", "own", "shuffled"]
    texts = prompts(trainer, batch)
    data = cast(Dataset, trainer.train_dataset)
    written = trainer._night.actions[0].completion_ids
    foreign = trainer.sleep.keep(trainer.sleep.text(written[0]))  # of context 0, the next with notes
    row = data[3 * QUERIES]
    kept = ["<sleep>", *foreign.split()]  # the token marks where the context ends and notes begin
    assert texts[3 * BLOCK].split() == [*row["context"].split(), *kept, row["query"], "<q>"]
    assert len(texts) == 4 * BLOCK + 2 * SLEEPS, "credit goes to notes on the own context alone"


def test_every_pass_is_trained(tmp_path):
    trainer = build(tmp_path, sleep={"passes": 2})
    batch = rollout_batch(trainer)
    notes = slice(2 * BLOCK, None)
    assert len(batch["weights"][notes]) == 2 * 2 * SLEEPS
    assert batch["weights"][notes].sum().item() == pytest.approx(1.0, rel=1e-5)
    advantages = batch["advantages"][notes, 1].view(2, -1)
    torch.testing.assert_close(advantages[0], advantages[1])


def test_the_sampler_gives_blocks_of_queries(tmp_path):
    data = rows(5)
    trainer = build(tmp_path, data=data)
    sampler = cast(BlockSampler, trainer._get_train_sampler())
    order = list(sampler)
    assert len(order) == len(sampler) == 2 * 2 * BLOCK, "the fifth context fills no batch"
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        assert block == [row for first in block[:1] for row in (first, first + 1) for _ in range(SLEEPS * GROUP)]
        assert len({data[row]["context"] for row in block}) == 1
    assert order != sorted(order)


def test_batches_that_cut_contexts_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"^rl\.per_device_train_batch_size: 12 rollouts of a device are no whole"):
        build(tmp_path, per_device_train_batch_size=12)
    trainer = build(tmp_path, data=rows(4, queries=1))
    with pytest.raises(DataError, match=r"^data: 0 contexts have sleep\.queries 2 rows that follow each other"):
        trainer._get_train_sampler()
