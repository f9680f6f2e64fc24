"""StateTrainer against its definition: who reads what, one sleep a context, and gradients that reach the sleep."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from siesta.data.errors import RecipeError
from siesta.rl import embedded
from siesta.rl.config import DeGRPOConfig
from siesta.rl.judge import build_judge
from siesta.rl.models import build_modes
from siesta.rl.modes import grow_embeddings, prepare_tokenizer
from siesta.rl.passes import with_prompts
from siesta.rl.sleep.gist import GistSleep, add_slots
from siesta.rl.sleep.latent import LatentSleep
from siesta.rl.sleep.state_trainer import StateTrainer
from siesta.rl.sleep_section import SleepSection
from siesta.rl.spread import Batch, select
from tests.helpers import SECTIONS, one_step, parameters, tell_apart
from tests.hybrids import hybrid
from tests.test_sleep_trainer import gradient, rows

TOKENS = [section.token for section in SECTIONS.values()]
QUERIES, GROUP = 2, 4
BLOCK = QUERIES * GROUP


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """Every `train()` collects garbage; what imports have left is not looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def build(folder: Path, mechanism: str = "gist", sleep: dict | None = None, **settings: Any) -> StateTrainer:
    """A trainer on a tiny model; two contexts a step unless `settings` say otherwise."""
    tokenizer = embedded.build_tokenizer()
    added = prepare_tokenizer(tokenizer, TOKENS)
    model: Any
    if mechanism == "latent":
        model = hybrid("qwen3_5", torch.float32)
    else:
        model = embedded.build_model(embedded.build_tokenizer(), seed=0, layers=2, hidden_size=16, heads=2, init=0.2)
    grow_embeddings(model, tokenizer, added)
    tell_apart(model, tokenizer)
    if mechanism == "gist":
        add_slots(model, tokenizer, 2)
        way: Any = GistSleep(tokenizer, model.config, 2)
    else:
        way = LatentSleep(tokenizer, model.config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    judge = build_judge(
        tokenizer, build_modes(SECTIONS, tokenizer), {"exact"}, price_per_token=0.0, verifier_timeout=5
    )
    calls = iter(range(10**6))
    judge.verifiers["exact"] = lambda solution, answer: float(next(calls) % 7 in (0, 3, 4, 6))
    fields: dict[str, Any] = one_step(folder) | {
        "per_device_train_batch_size": 2 * BLOCK,
        "num_generations": GROUP,
    }
    section = SleepSection.model_validate({"mechanism": mechanism, "queries": QUERIES, "passes": 2} | (sleep or {}))
    return StateTrainer(
        model=str(folder / "model"),
        judge=judge,
        args=DeGRPOConfig(**(fields | settings)),
        train_dataset=rows(4),
        way=way,
        sleep_section=section,
    )


def rollout_batch(trainer: StateTrainer, contexts: int = 2) -> Batch:
    """One generation batch, as the trainer would make it."""
    policy(trainer).train()
    data = cast(Dataset, trainer.train_dataset)
    inputs = [dict(data[i // GROUP]) for i in range(contexts * BLOCK)]
    return cast(Batch, trainer._generate_and_score_completions(inputs))


def policy(trainer: StateTrainer) -> torch.nn.Module:
    return cast(torch.nn.Module, trainer.model)


def watched(trainer: StateTrainer) -> list[int]:
    """How many contexts each sleep from now on is of."""
    counts: list[int] = []
    way = cast(Any, trainer.way)
    consolidate = way.consolidate

    def watching(model: Any, ids: list[list[int]], passes: int) -> Any:
        counts.append(len(ids))
        return consolidate(model, ids, passes)

    way.consolidate = watching
    return counts


@pytest.mark.parametrize("mechanism", ["gist", "latent"])
def test_a_step_trains_the_model_and_logs_states(tmp_path: Path, mechanism: str) -> None:
    trainer = build(tmp_path, mechanism, {"stateless": 0.5})
    before = parameters(policy(trainer))
    trainer.train()
    after = parameters(policy(trainer))
    assert torch.isfinite(after).all()
    assert (after != before).float().mean() > 0.5
    logs = trainer.state.log_history[0]
    assert logs["sleep/own/share"] == logs["sleep/none/share"] == 0.5
    assert logs["sleep/own/prob/short"] + logs["sleep/own/prob/think"] == pytest.approx(1.0)
    assert "time/sleep" in logs
    assert "sleep/note_tokens" not in logs


def test_who_reads_what(tmp_path: Path) -> None:
    trainer = build(tmp_path, sleep={"stateless": 0.5})
    counts = watched(trainer)
    batch = rollout_batch(trainer)
    assert counts == [1], "one of two contexts is slept on, once for all of its rollouts"
    data = cast(Dataset, trainer.train_dataset)
    for i, (ids, mask) in enumerate(zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)):
        row = data[i // GROUP]
        seen = [*([] if i < BLOCK else row["context"].split()), row["query"], "<q>"]
        assert str(trainer._tokenizer.decode(ids[mask])).split() == seen
    assert batch["contexts"].tolist() == [0] * BLOCK + [1] * BLOCK
    assert trainer.modes.of(batch["completion_ids"]).tolist() == [0, 1] * BLOCK


@pytest.mark.parametrize("mechanism", ["gist", "latent"])
def test_rollouts_are_written_by_the_policy_in_the_loss(tmp_path: Path, mechanism: str) -> None:
    """The plan's mode policy is that of the training pass; near zero temperature its likeliest tokens are written."""
    trainer = build(tmp_path / "warm", mechanism, {"stateless": 0.5})
    batch = rollout_batch(trainer)
    with torch.no_grad():
        scores = trainer.passes.scores(policy(trainer), batch)
    torch.testing.assert_close(scores.mode_logps.exp(), trainer._plan.mode_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.log_mass.exp(), trainer._plan.mass, rtol=1e-4, atol=1e-5)
    assert trainer._plan.mode_probs[:, 0].unique().numel() >= 4, "contexts and queries decide"
    trainer = build(tmp_path / "cold", mechanism, {"stateless": 0.5}, temperature=0.01)
    batch = rollout_batch(trainer)
    with torch.no_grad():
        scores = trainer.passes.scores(policy(trainer), batch)
    torch.testing.assert_close(scores.per_token_logps[:, 1:].mean(), torch.tensor(0.0), rtol=0, atol=0.1)


def test_the_state_is_that_of_the_own_context(tmp_path: Path) -> None:
    """The negative control: behind the other context's state the same rollouts are unlikely."""
    trainer = build(tmp_path, temperature=0.01)
    batch = rollout_batch(trainer)
    with torch.no_grad():
        own = trainer.passes.scores(policy(trainer), batch).per_token_logps[:, 1:].mean()
        trainer._state_passes.contexts.reverse()
        other = trainer.passes.scores(policy(trainer), batch).per_token_logps[:, 1:].mean()
    assert own > -0.1
    assert other < -0.3


def test_old_log_probabilities_are_those_of_the_loss(tmp_path: Path) -> None:
    trainer = build(tmp_path, sleep={"stateless": 0.5}, num_iterations=2, beta=0.1, max_steps=2)
    batch = rollout_batch(trainer)
    with torch.no_grad():
        scores = trainer.passes.scores(policy(trainer), batch).per_token_logps
    mask = batch["completion_mask"]
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(batch[name] * mask, scores * mask, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert torch.isfinite(parameters(policy(trainer))).all()


@pytest.mark.parametrize("mechanism", ["gist", "latent"])
def test_the_gradient_is_that_of_unrolled_rollouts(tmp_path: Path, mechanism: str) -> None:
    """Each behind a sleep of its own; what is left where sleep has no gradient is another one."""
    trainer = build(tmp_path, mechanism, {"stateless": 0.5}, mode_objective="policy_gradient", mass_weight=0.0)
    batch = rollout_batch(trainer)
    whole = gradient(cast(Any, trainer), batch)
    model = cast(PreTrainedModel, trainer.model)
    model.zero_grad()
    loss = torch.zeros(())
    for row in range(2 * BLOCK):
        ids, mask = with_prompts({key: value[[row]] for key, value in batch.items() if value.dim() == 2})
        context = trainer._state_passes.contexts[row // BLOCK]
        cache = None if context is None else trainer.way.cache(trainer.way.sleep(model, [context], passes=2).state)
        logits = cast(Any, model)(input_ids=ids[mask.bool()][None], past_key_values=cache).logits[0].float()
        length = int(batch["completion_mask"][row].sum())
        completion = batch["completion_ids"][row, :length]
        logps = torch.log_softmax(logits[-length - 1 : -1], dim=-1).gather(1, completion[:, None])[:, 0]
        control = trainer.modes.log_policy(logits[-length - 1])[trainer.modes.of(completion[None])]
        logps = torch.cat([control, logps[1:]])
        loss = loss - (batch["weights"] * batch["advantages"])[row, :length] @ logps
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    torch.testing.assert_close(whole, torch.cat([grad.flatten() for grad in grads]), atol=1e-5, rtol=1e-3)
    way = cast(Any, trainer.way)
    consolidate = way.consolidate

    def cut(*arguments: Any) -> Any:
        state, cost = consolidate(*arguments)
        return state.detach(), cost

    way.consolidate = cut
    assert (gradient(cast(Any, trainer), batch) - whole).norm() > 1e-2


def test_a_small_budget_sleeps_more_often_and_gives_the_same_gradient(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    batch = rollout_batch(trainer)
    counts = watched(trainer)
    whole = gradient(cast(Any, trainer), batch)
    assert sum(counts) == 2
    counts.clear()
    trainer.method.token_budget = 40  # of 14 tokens of sleep and rollouts of 4 to 15
    torch.testing.assert_close(gradient(cast(Any, trainer), batch), whole, atol=1e-5, rtol=1e-3)
    assert sum(counts) > 2


def test_micro_batches_hold_whole_contexts(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_train_batch_size=BLOCK, gradient_accumulation_steps=2)
    batch = rollout_batch(trainer)
    micros = trainer.passes.deal(batch, seed=0)
    assert sorted(sorted(set(micro["contexts"].tolist())) for micro in micros) == [[0], [1]]
    counts = watched(trainer)
    parts = sum(gradient(cast(Any, trainer), micro) for micro in micros)
    assert counts == [1, 1]
    torch.testing.assert_close(parts, gradient(cast(Any, trainer), select(batch, range(2 * BLOCK))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_checkpointing": True}, r"^rl\.gradient_checkpointing: .* set it to false$"),
        ({"share_prompts": True}, r"^rl\.share_prompts: "),
        ({"attention": "flex"}, r"^rl\.attention: flex: rows behind a state cannot be packed; use sdpa$"),
        ({"per_device_train_batch_size": 12}, "no whole number of contexts: each has sleep.queries 2 x rl.num_gen"),
        (
            {"per_device_train_batch_size": BLOCK // 2, "steps_per_generation": 2},
            r"^rl\.steps_per_generation: 1 contexts .* dealt evenly to 2 optimizer steps",
        ),
    ],
)
def test_what_would_not_train_the_sleep_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(tmp_path, **settings)
