"""DeGRPOTrainer against its definition: gradients, micro-batches, forced tokens, caps, unscorable rollouts."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel

from siesta.data.errors import ModelError, RecipeError
from siesta.data.prompts import end_id, messages
from siesta.rl import passes
from siesta.rl.attention import BACKENDS, Backend
from siesta.rl.config import DeGRPOConfig
from siesta.rl.judge import Judge
from siesta.rl.packing import Pack
from siesta.rl.scoring import Scorer
from siesta.rl.spread import Batch, select, sequence_lengths
from siesta.rl.trainer import DeGRPOTrainer
from tests.given import GivenRollouts
from tests.helpers import PACKED_SDPA, calc_examples, one_step, parameters, save_tiny_model, tiny_judge

METHODS = {
    "target": {},
    "per_mode": {"mode_objective": "policy_gradient", "alpha": 0.1},
    "thinkless": {"mode_objective": "policy_gradient", "mode_sampling": "free", "advantage": "group", "alpha": 1e-3},
    "grpo": {
        "mode_objective": "policy_gradient",
        "mode_sampling": "free",
        "advantage": "group",
        "decoupled": False,
        "scale_rewards": "group",
    },
}


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """Every `train()` collects garbage; what imports have left is not looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def dataset(count: int = 16) -> Dataset:
    return Dataset.from_list(
        [{"prompt": messages(x), "answer": x.answer, "verifier": x.verifier} for x in calc_examples(count)]
    )


def uneven_judge() -> Judge:
    """A judge that finds about half of the answers right, by their order: random models are never right."""
    judge = tiny_judge()
    calls = iter(range(10**6))
    judge.verifiers["exact"] = lambda solution, answer: float(next(calls) % 8 in (0, 3, 4, 6, 7))
    return judge


def build(
    folder: Path, judge: Judge | None = None, kind: type[DeGRPOTrainer] = DeGRPOTrainer, **settings
) -> DeGRPOTrainer:
    """A trainer on a tiny model; 8 rollouts a step unless `settings` say otherwise."""
    fields: dict[str, Any] = one_step(folder) | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
    }
    args = DeGRPOConfig(**(fields | settings))
    model = str(save_tiny_model(folder / "model"))
    return kind(model=model, judge=judge or uneven_judge(), args=args, train_dataset=dataset())


def policy(trainer: DeGRPOTrainer) -> torch.nn.Module:
    return cast(torch.nn.Module, trainer.model)


def rollout_batch(trainer: DeGRPOTrainer, rows: int = 8) -> dict:
    """One generation batch, as the trainer would make it."""
    policy(trainer).train()
    data = cast(Dataset, trainer.train_dataset)
    group = trainer.group
    inputs = [dict(data[i // group]) for i in range(rows)]
    return trainer._generate_and_score_completions(inputs)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_trains_every_parameter_and_logs_every_mode(tmp_path, method):
    trainer = build(tmp_path, **METHODS[method])
    before = parameters(policy(trainer))
    trainer.train()
    assert torch.isfinite(parameters(policy(trainer))).all()
    assert (parameters(policy(trainer)) != before).float().mean() > 0.5
    logs = trainer.state.log_history[0]
    for name in (
        "mode/short/prob",
        "mode/think/share",
        "mode/mass",
        "rollout/unscorable",
        "rollout/reward",
        "entropy",
    ):
        assert name in logs
    assert logs["mode/short/prob"] + logs["mode/think/prob"] == pytest.approx(1.0)


def test_stratified_completions_open_with_their_token_and_keep_their_cap(tmp_path):
    trainer = build(tmp_path)
    batch = rollout_batch(trainer)
    modes = trainer.modes.of(batch["completion_ids"])
    assert modes.tolist() == [0, 1] * 4
    lengths = batch["completion_mask"][:, 1:].sum(1)
    for row, mode in enumerate(modes.tolist()):
        assert lengths[row] <= trainer.modes[mode].max_tokens
    assert lengths[modes == 1].max() > trainer.modes[0].max_tokens  # the longer cap is really used


def test_weights_add_up_to_their_global_counts(tmp_path):
    trainer = build(tmp_path, **METHODS["per_mode"])
    batch = rollout_batch(trainer)
    weights = batch["weights"]
    assert weights[:, 1:].sum().item() == pytest.approx(1.0, rel=1e-5)
    # rho averages to 1 under the plan: control weights add up to alpha times the mean of pi / q.
    rho = trainer._plan.importance
    torch.testing.assert_close(weights[:, 0], 0.1 * rho / 8)
    assert (weights[batch["completion_mask"] == 0] == 0).all()


def loss_gradient(trainer: DeGRPOTrainer, batch: dict, splits: list[list[int]]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a batch computed in micro-batches."""
    policy(trainer).zero_grad()
    total = 0.0
    for rows in splits:
        part = {k: v[rows] for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
        loss = trainer._compute_loss(trainer.model, part)
        loss.backward()
        total += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in policy(trainer).parameters() if p.grad is not None])
    return total, gradient.clone()


@pytest.mark.parametrize("method", METHODS)
def test_any_split_into_micro_batches_gives_the_same_gradient(tmp_path, method):
    trainer = build(tmp_path, **METHODS[method])
    batch = rollout_batch(trainer)
    whole = loss_gradient(trainer, batch, [list(range(8))])
    assert whole[1].norm() > 0
    for splits in ([[0], [1, 2, 3, 4, 5, 6], [7]], [[7, 0], [3], [1, 5, 2], [6, 4]]):
        loss, gradient = loss_gradient(trainer, batch, splits)
        assert loss == pytest.approx(whole[0], abs=1e-6)
        torch.testing.assert_close(gradient, whole[1], atol=1e-6, rtol=1e-4)


def test_gradient_accumulation_takes_the_same_step(tmp_path):
    """Two micro-batches of 4 make the step of one of 8; the rollouts are equal, made before the split."""
    common = {"max_grad_norm": 1e9, "optim": "sgd", "lr_scheduler_type": "constant"}
    whole = build(tmp_path / "a", **common)
    whole.train()
    split = build(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2, **common)
    split.train()
    torch.testing.assert_close(parameters(policy(split)), parameters(policy(whole)), atol=1e-6, rtol=1e-4)


def test_rollouts_reused_for_several_steps_are_off_policy_and_clipped(tmp_path):
    trainer = build(tmp_path, num_iterations=4, max_steps=4, learning_rate=0.05, **METHODS["per_mode"])
    trainer.train()
    assert torch.isfinite(parameters(policy(trainer))).all()
    clipped = [row.get("clip_ratio/low", 0) + row.get("clip_ratio/high", 0) for row in trainer.state.log_history]
    assert clipped[0] == 0  # the first pass is on policy
    assert max(clipped) > 0


def test_reference_policy_has_no_divergence_from_itself(tmp_path):
    trainer = build(tmp_path, beta=0.1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def failing_judge(fails: set[int]) -> Judge:
    """A judge whose verifier fails on the calls numbered in `fails`."""
    from siesta.rewards.score import Unscorable

    judge = tiny_judge()
    calls = iter(range(10**6))

    def verifier(solution: str, answer: str) -> float:
        if next(calls) in fails:
            raise Unscorable("made to fail")
        return 0.0

    judge.verifiers["exact"] = verifier
    return judge


def test_unscorable_rollouts_weigh_nothing_and_are_counted(tmp_path):
    trainer = build(tmp_path, failing_judge({0, 5}), **METHODS["per_mode"])
    batch = rollout_batch(trainer)
    silent = batch["weights"].sum(1) == 0
    assert silent.sum() == 2
    assert batch["weights"][~silent][:, 1:].sum(1).tolist() == pytest.approx([1 / 6] * 6)
    assert trainer._metrics["train"]["rollout/unscorable"] == [2]
    assert trainer.reward_function.judge.reasons == {"exact: made to fail": 2}


def test_a_batch_without_any_score_takes_a_step_of_zero(tmp_path):
    trainer = build(tmp_path, failing_judge(set(range(10**4))))
    batch = rollout_batch(trainer)
    loss, gradient = loss_gradient(trainer, batch, [list(range(8))])
    assert loss == 0
    assert (gradient == 0).all()


def test_mode_targets_move_the_mode_policy_and_hold_the_mass(tmp_path):
    """Short always right, think always wrong: P(short) rises, and the mass on control tokens does not leak."""
    judge = tiny_judge()
    judge.verifiers["exact"] = lambda solution, answer: 1.0
    trainer = build(tmp_path, judge, max_steps=8, learning_rate=3e-3, alpha=1.0)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "mode/mass" in row]
    assert logs[-1]["mode/short/prob"] > logs[0]["mode/short/prob"]
    assert logs[-1]["mode/mass"] > logs[0]["mode/mass"]


def test_nan_is_shown_in_the_log(tmp_path):
    trainer = build(tmp_path)
    policy(trainer).train()
    trainer._metrics["train"]["some/metric"] = [1.0, float("nan")]
    trainer.log({})
    assert trainer.state.log_history[-1]["some/metric"] != trainer.state.log_history[-1]["some/metric"]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo"},
        {"top_p": 0.9},
        {"use_liger_kernel": True},
        {"entropy_coef": 0.1},
        {"max_completion_length": 100},
    ],
)
def test_settings_without_effect_are_refused(tmp_path, settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        build(tmp_path, **settings)


def test_a_batch_in_which_no_rollout_has_a_mode_is_scored(tmp_path):
    """What a collapsed policy that draws freely gives."""
    trainer = build(tmp_path, **METHODS["thinkless"])
    group = trainer.reward_function
    think, end = trainer.modes[1].token_id, end_id(trainer._tokenizer)
    rewards = group(prompts=["?"] * 4, completion_ids=[[think, end]] * 4, answer=["1"] * 4, verifier=["exact"] * 4)
    assert len(rewards) == 4
    assert group.outcomes[:, 2].tolist() == [1.0] * 4


# ---- the token budget --------------------------------------------------------------------------------------------

SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}  # step = gradient
SMALL = 20  # tokens; a prompt of `calc` has 5 to 13, a rollout up to 13 more


def trained(folder: Path, **settings) -> tuple[torch.Tensor, int, list[dict]]:
    """How far a run moves the parameters, the forward and backward passes that took, and its log."""
    trainer = build(folder, **(SGD | settings))
    taken, score = [], trainer.passes.score
    trainer.passes.score = lambda model, rows: taken.append(sequence_lengths(rows)) or score(model, rows)
    before = parameters(policy(trainer))
    trainer.train()
    budget = cast(DeGRPOConfig, trainer.args).token_budget
    assert all(len(lengths) * max(lengths) <= budget or len(lengths) == 1 for lengths in taken)
    return parameters(policy(trainer)) - before, len(taken), trainer.state.log_history


def assert_same_step(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_small_token_budget_takes_the_same_step(tmp_path, method):
    """One pass of 8 rollouts, passes of at most 20 tokens, and these in two micro-batches."""
    whole, count, log = trained(tmp_path / "a", **METHODS[method])
    assert count == 1
    small, count, small_log = trained(tmp_path / "b", token_budget=SMALL, **METHODS[method])
    assert count > 4
    assert_same_step(small, whole)
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    split, count, split_log = trained(tmp_path / "c", token_budget=SMALL, **accumulated, **METHODS[method])
    assert count > 4
    assert_same_step(split, whole)
    for name in ("loss", "grad_norm", "entropy", "clip_ratio/low", "clip_ratio/high"):
        assert small_log[0][name] == pytest.approx(log[0][name], rel=1e-3, abs=1e-6), name
    for name in ("loss", "grad_norm"):  # entropies of micro-batches are averaged, whatever their tokens
        assert split_log[0][name] == pytest.approx(log[0][name], rel=1e-3, abs=1e-6), name


def test_the_last_pass_alone_takes_another_step(tmp_path, monkeypatch):
    """Negative control: passes that are not accumulated show."""
    whole, _, _ = trained(tmp_path / "a")
    backward = Accelerator.backward
    calls = []

    def last_only(self: Accelerator, loss: torch.Tensor, **settings) -> None:
        calls.append(self.sync_gradients)
        if self.sync_gradients:
            backward(self, loss, **settings)

    monkeypatch.setattr(Accelerator, "backward", last_only)
    last, count, _ = trained(tmp_path / "b", token_budget=SMALL)
    assert calls == [False] * (count - 1) + [True]
    assert (last - whole).norm() > 0.1 * whole.norm()


def test_old_and_reference_policies_fit_into_a_small_budget(tmp_path):
    """Rollouts used twice: the second step needs the old policy, and both need the reference."""
    settings = {"num_iterations": 2, "max_steps": 2, "beta": 0.5, "learning_rate": 0.1} | METHODS["per_mode"]
    whole, count, log = trained(tmp_path / "a", **settings)
    assert count == 2
    small, count, small_log = trained(tmp_path / "b", token_budget=SMALL, **settings)
    assert count > 8
    assert_same_step(small, whole)
    assert log[1]["kl"] > 1e-6
    assert small_log[1]["kl"] == pytest.approx(log[1]["kl"], rel=1e-3)


def use(trainer: DeGRPOTrainer, backend: Backend, budget: int, share: bool = False) -> None:
    """Another back end and budget for a trainer that is there already."""
    trainer.passes.scorer = Scorer(trainer.modes, backend, share=share)
    trainer.passes.scorer.attach(cast(PreTrainedModel, trainer.model))
    trainer.passes.args.token_budget = budget


SDPA = BACKENDS["sdpa"]
WAYS = [
    *[(SDPA, budget, False) for budget in (SMALL, 1)],
    *[(PACKED_SDPA, budget, False) for budget in (10_000, 40, 1)],
    *[(SDPA, budget, True) for budget in (10_000, 30, 1)],
]


def ids_and_mask(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
    return *passes.with_prompts(batch), batch["completion_ids"].shape[1]


def test_log_probabilities_do_not_depend_on_the_passes(tmp_path):
    trainer = build(tmp_path)
    batch = rollout_batch(trainer)
    ids, mask, length = ids_and_mask(batch)

    def logps() -> torch.Tensor:
        found, entropies, loss = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
        assert entropies is loss is None
        assert not found.requires_grad
        return found

    whole = logps()
    assert whole.shape == (8, length)
    scored = trainer.passes.score(policy(trainer), select(batch, range(8))).per_token_logps
    torch.testing.assert_close(whole, scored.detach(), atol=1e-6, rtol=1e-5)
    assert not whole[batch["completion_mask"] == 0].any()
    assert (whole[batch["completion_mask"] == 1] < 0).all()
    for way in WAYS:
        use(trainer, *way)
        torch.testing.assert_close(logps(), whole, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["target", "grpo"])
def test_any_layout_and_budget_gives_the_same_gradient(tmp_path, method):
    trainer = build(tmp_path, beta=0.1, **METHODS[method])
    batch = rollout_batch(trainer)
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"] - 0.3 * batch["completion_mask"]
    whole = loss_gradient(trainer, batch, [list(range(8))])
    for way in WAYS:
        use(trainer, *way)
        for splits in ([list(range(8))], [[7, 0], [3, 1, 5, 2, 6, 4]]):
            loss, gradient = loss_gradient(trainer, batch, splits)
            assert loss == pytest.approx(whole[0], abs=1e-6)
            assert_same_step(gradient, whole[1])


def test_every_rank_makes_as_many_passes_and_those_without_rows_add_nothing(tmp_path, monkeypatch):
    """Another rank needs eleven: here they are filled up, and loss and gradient stay."""
    trainer = build(tmp_path, **METHODS["per_mode"])
    batch = rollout_batch(trainer)
    whole = loss_gradient(trainer, batch, [list(range(8))])
    monkeypatch.setattr(trainer.accelerator, "gather", lambda number: torch.cat([number, torch.tensor([11])]))
    for way in WAYS:
        use(trainer, *way)
        parts = trainer.passes.split(batch)
        assert len(parts) == 11
        assert sorted(row for part in parts for row in part) == list(range(8))
        assert parts[-1] == []
        loss, gradient = loss_gradient(trainer, batch, [list(range(8))])
        assert loss == pytest.approx(whole[0], abs=1e-6)
        assert_same_step(gradient, whole[1])


def test_micro_batches_of_one_optimizer_step_are_dealt_together(tmp_path, monkeypatch):
    """As many as surely belong together: steps_per_generation and gradient_accumulation_steps need not agree."""
    trainer, asked = build(tmp_path), []
    monkeypatch.setattr(passes, "spread", lambda *args, **given: asked.append((given["steps"], given["accumulation"])))
    for number, accumulation in [(4, 4), (4, 2), (1, 4), (4, 6), (6, 4)]:
        trainer.passes.args.steps_per_generation = number
        trainer.passes.args.gradient_accumulation_steps = accumulation
        trainer.passes.deal({}, seed=0)
    assert asked == [(1, 4), (2, 2), (1, 1), (2, 2), (3, 2)]


def test_a_back_end_that_mixes_sequences_up_stops_the_run(tmp_path):
    """Once, before the first step; a right one goes on to the same gradient."""
    trainer = build(tmp_path)
    batch = rollout_batch(trainer)
    whole = loss_gradient(trainer, batch, [list(range(8))])
    for backend in (PACKED_SDPA, replace(BACKENDS["varlen"], arguments=lambda pack: {})):
        use(trainer, backend, 10_000)
        trainer.passes._checked = False
        if backend is PACKED_SDPA:
            assert_same_step(loss_gradient(trainer, batch, [list(range(8))])[1], whole[1])
        else:
            with pytest.raises(
                ModelError, match=r"^attention varlen: rows as it takes them score .* nats a token off"
            ):
                loss_gradient(trainer, batch, [list(range(8))])
        assert trainer.passes._checked


# ---- shared prompts ----------------------------------------------------------------------------------------------


def watched(trainer: DeGRPOTrainer) -> list[Pack]:
    """The packs that the trainer will lay out."""
    packs, lay_out = [], trainer.passes.scorer.lay_out

    def watching(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> Pack:
        packs.append(lay_out(input_ids, attention_mask, completion_length))
        return packs[-1]

    trainer.passes.scorer.lay_out = watching
    return packs


def steps_on_given_rollouts(folder: Path, **settings) -> tuple[torch.Tensor, list[Pack]]:
    """The weights after three steps, and the packs of all passes."""
    trainer = build(folder, kind=GivenRollouts, **(SGD | {"max_steps": 3, "learning_rate": 0.3} | settings))
    packs = watched(trainer)
    trainer.train()
    return parameters(policy(trainer)), packs[1:] if packs[0].shared else packs  # the first is the look at the layout


def tokens_of(packs: list[Pack]) -> int:
    """Real tokens, each prompt as often as it is laid out."""
    return sum(int((pack.branches != -2).sum()) for pack in packs)


@pytest.mark.parametrize("method", METHODS)
def test_shared_prompts_take_the_same_steps(tmp_path, method):
    """In one pass a step; with groups cut into passes of 24 tokens; and with groups in micro-batches of their own."""
    before = parameters(policy(build(tmp_path)))
    plain, packs = steps_on_given_rollouts(tmp_path / "a", **METHODS[method])
    assert not any(pack.shared for pack in packs)
    shared, whole = steps_on_given_rollouts(tmp_path / "b", share_prompts=True, **METHODS[method])
    assert all(pack.shared for pack in whole)
    assert tokens_of(whole) < 0.6 * tokens_of(packs)
    assert [len(pack.trees) for pack in whole] == [2, 2, 2]  # two groups a step
    assert_same_step(shared - before, plain - before)
    small, cut = steps_on_given_rollouts(tmp_path / "c", share_prompts=True, token_budget=24, **METHODS[method])
    assert len(cut) > 2 * len(whole)  # more than one pass for each of the two groups
    assert all(pack.trees.numel() <= 24 for pack in cut if len(pack.first) > 1)
    assert any(len(pack.first) > len(pack.trees) for pack in cut)  # and still some rollouts share
    assert tokens_of(whole) < tokens_of(cut) < tokens_of(packs)
    assert_same_step(small - before, plain - before)
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "share_prompts": True}
    split, parts = steps_on_given_rollouts(tmp_path / "d", **accumulated, **METHODS[method])
    assert [len(pack.trees) for pack in parts] == [1] * 6
    assert_same_step(split - before, plain - before)


def test_rollouts_behind_a_prompt_that_they_do_not_see_take_other_steps(tmp_path, monkeypatch):
    """Negative control: without the mask, and without the look at the layout that would stop it."""
    before = parameters(policy(build(tmp_path)))
    plain, _ = steps_on_given_rollouts(tmp_path / "a")
    blind = replace(SDPA, arguments=lambda pack: {})
    monkeypatch.setattr(passes, "choose_backend", lambda *args, **settings: (blind, ""))
    monkeypatch.setattr(passes, "MAX_DISAGREEMENT", 1e9)
    lost, _ = steps_on_given_rollouts(tmp_path / "b", share_prompts=True)
    assert (lost - plain).norm() > 1e-2 * (plain - before).norm()


def test_a_layout_that_loses_the_tree_stops_the_run(tmp_path):
    """Once, before the first step; the right one goes on."""
    trainer = build(tmp_path, share_prompts=True)
    assert "shared prompts" in trainer.passes.line
    assert not trainer.passes._checked
    batch = rollout_batch(trainer)
    loss_gradient(trainer, batch, [list(range(8))])
    assert trainer.passes._checked
    use(trainer, replace(SDPA, arguments=lambda pack: {}), 10_000, share=True)
    loss_gradient(trainer, batch, [list(range(8))])  # it is not looked at twice
    trainer.passes._checked = False
    advice = r"set rl\.attention: sdpa, rl\.share_prompts: false$"
    with pytest.raises(ModelError, match=rf"^attention sdpa: rows as it takes them score .* {advice}") as error:
        loss_gradient(trainer, batch, [list(range(8))])
    assert "\n" not in str(error.value)
    assert trainer.passes._checked


def test_the_look_at_the_layout_takes_rollouts_that_share(tmp_path):
    """Two of each group: one alone would be right whatever attention does."""
    trainer = build(tmp_path, share_prompts=True)
    batch, packs = rollout_batch(trainer), watched(trainer)
    trainer.passes._check(policy(trainer), batch)
    assert [(len(pack.first), len(pack.trees)) for pack in packs] == [(4, 2)]
    trainer.passes._check(policy(trainer), batch)
    assert len(packs) == 1


def test_units_of_a_batch_are_its_groups_and_passes_cut_them_by_tokens(tmp_path):
    trainer = build(tmp_path, share_prompts=True)
    batch = rollout_batch(trainer)
    assert [unit.rows for unit in trainer.passes.groups(batch)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    lengths, prompts = sequence_lengths(batch), batch["prompt_mask"].sum(1).tolist()
    tokens = [unit.tokens for unit in trainer.passes.groups(batch)]
    assert tokens == [sum(lengths[i : i + 4]) - 3 * prompts[i] for i in (0, 4)]
    twice = select(batch, [0, 4, 1, 5, 0, 2, 6, 3, 7, 1, 2, 3])  # a prompt that is drawn twice makes two groups
    assert sorted(len(unit.rows) for unit in trainer.passes.groups(twice)) == [4, 4, 4]
    trainer.passes.args.token_budget = max(lengths)
    parts = trainer.passes.split(batch)
    assert len(parts) > 2
    assert sorted(row for part in parts for row in part) == list(range(8))
    use(trainer, SDPA, 10_000)
    assert [unit.rows for unit in trainer.passes.groups(batch)] == [[row] for row in range(8)]


def test_steps_of_several_groups_are_dealt_whole(tmp_path):
    """Sixteen rollouts for two steps of two micro-batches: a group in each."""
    trainer = build(tmp_path, share_prompts=True, per_device_train_batch_size=4, steps_per_generation=4)
    trainer.passes.args.gradient_accumulation_steps = 2
    batch = rollout_batch(trainer, rows=16)
    micros = trainer.passes.deal(batch, seed=0)
    assert len(micros) == 4
    named = [passes.same_prompts(micro["prompt_ids"], micro["prompt_mask"]).tolist() for micro in micros]
    assert named == [[0] * 4] * 4
    trainer.passes.scorer.share = False  # negative control
    micros = trainer.passes.deal(batch, seed=0)
    named = [passes.same_prompts(micro["prompt_ids"], micro["prompt_mask"]).tolist() for micro in micros]
    assert named != [[0] * 4] * 4
