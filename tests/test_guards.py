"""Steps that are not finite are skipped, and a few in a row end the run; spikes are said."""

import json
import logging
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siesta.data.errors import RecipeError
from siesta.rl.config import DeGRPOConfig
from siesta.rl.guards import FiniteSteps, GuardStop, SpikeGuard
from siesta.rl.train import main
from siesta.rl.trainer import DeGRPOTrainer
from siesta.rl.warmup_trainer import WarmupTrainer
from tests.given import GivenRollouts
from tests.helpers import one_step, parameters, save_tiny_model
from tests.test_trainer import dataset, uneven_judge

NAN, INF = float("nan"), float("inf")
SMALL = ["model.embedded={layers: 1, hidden_size: 16, heads: 2}", "data.train_size=100", "evaluate.items=4"]
SHORT = ["warmup.max_steps=8", "warmup.check_every=8", "rl.max_steps=8", "rl.logging_steps=1", "rl.save_steps=2"]


class Weights(TrainerCallback):
    """The weights before training and after each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def keep(self, args, state, control, model=None, **kwargs):
        self.seen.append(parameters(cast(torch.nn.Module, model)).clone())

    on_train_begin = on_step_end = keep

    @property
    def moved(self) -> list[bool]:
        """Whether each step changed them."""
        return [not torch.equal(a, b) for a, b in zip(self.seen[:-1], self.seen[1:], strict=True)]


class Faulty(GivenRollouts):
    """Breaks one number in some steps."""

    fault = "none"
    at: tuple[int, ...] = (1,)

    @property
    def _now(self) -> bool:
        return self.state.global_step in self.at

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._now and self.fault in ("nan reward", "inf reward", "-inf reward"):
            self.reward_function.outcomes[0, 0] = float(self.fault.split()[0])
        if self._now and self.fault == "unscorable":
            self.reward_function.outcomes[0, :2] = NAN
        return rewards

    def _pass_loss(self, scores, inputs):
        old = scores.per_token_logps.detach().clone()
        if self._now and self.fault.endswith("old"):
            old[0, 1] = float(self.fault.split()[0])
        loss, logged = super()._pass_loss(scores, {**inputs, "old_per_token_logps": old})
        return (loss * NAN if self._now and self.fault == "gradient" else loss), logged


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("guards") / "model")


def trained(model: Path, folder: Path, fault: str, at: tuple[int, ...] = (1,), steps: int = 3, **settings: Any):
    """A trainer that has trained with faults, and the weights along the way."""
    own: dict[str, Any] = {"max_steps": steps, "num_generations": 4, "per_device_train_batch_size": 8}
    args = DeGRPOConfig(**(one_step(folder) | own | settings))
    trainer = Faulty(model=str(model), judge=uneven_judge(), args=args, train_dataset=dataset())
    trainer.fault, trainer.at = fault, at
    weights = Weights()
    trainer.add_callback(weights)
    try:
        trainer.train()
    except GuardStop as stop:
        return trainer, weights, str(stop)
    return trainer, weights, None


def skipped(trainer: Trainer) -> list[float]:
    return [row["guard/skipped_steps"] for row in trainer.state.log_history if "grad_norm" in row]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("nan reward", "reward (1)"),
        ("inf reward", "reward (1)"),
        ("-inf reward", "reward (1)"),
        ("nan old", "log-probability (1)"),
        ("-inf old", "log-probability (1)"),
        ("gradient", "gradient"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str, named: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="siesta.rl.guards"):
        trainer, weights, stop = trained(model, tmp_path, fault)
    assert stop is None
    assert weights.moved == [True, False, True]
    assert skipped(trainer) == [0.0, 1.0, 0.0]
    assert [record.getMessage() for record in caplog.records] == [f"step 2 is skipped, not finite: {named}"]
    assert weights.seen[-1].isfinite().all()


@pytest.mark.parametrize("fault", ["none", "unscorable"])
def test_a_verifier_that_failed_skips_nothing(model: Path, tmp_path: Path, fault: str) -> None:
    trainer, weights, _ = trained(model, tmp_path, fault)
    assert weights.moved == [True, True, True]
    assert skipped(trainer) == [0.0, 0.0, 0.0]


def test_without_the_guard_the_weights_are_lost(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FiniteSteps, "_get_grad_norm", Trainer._get_grad_norm)
    _, weights, _ = trained(model, tmp_path, "gradient")
    assert weights.seen[1].isfinite().all()
    assert weights.seen[2].isnan().any()


def test_a_log_probability_of_minus_infinity_would_pass_unseen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped ratios have no gradient, so the norm stays finite: this is why they are counted."""
    monkeypatch.setattr(FiniteSteps, "with_faults", lambda self, loss, faults: loss)
    trainer, _, _ = trained(model, tmp_path, "-inf old", at=(0, 1, 2))
    assert 0.0 in skipped(trainer)


def test_skipped_steps_in_a_row_end_the_run(model: Path, tmp_path: Path) -> None:
    faults: dict[str, Any] = {
        "max_skipped_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_only_model": True,
    }
    trainer, weights, stop = trained(model, tmp_path, "gradient", at=(1, 3, 4), steps=9, **faults)
    assert weights.moved == [True, False, True, False], "one alone does not"
    assert trainer.state.global_step == 4
    assert stop == (
        "2 steps in a row were skipped, the last one step 5, not finite: gradient; last checkpoint: "
        f"{tmp_path / 'out' / 'checkpoint-4'}"
    )


def test_at_least_one_step_may_be_skipped(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"rl.max_skipped_steps: 0 must be 1 or more"):
        trained(model, tmp_path, "none", max_skipped_steps=0)


def test_micro_batches_that_went_before_are_dropped_too(model: Path, tmp_path: Path) -> None:
    """The fault may come in the last of them."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "token_budget": 40}
    _, weights, _ = trained(model, tmp_path, "-inf old", **settings)
    assert weights.moved == [True, False, True]


@pytest.mark.parametrize("stage", ["warmup", "rl"])
def test_a_run_of_skipped_steps_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str
) -> None:
    if stage == "warmup":
        loss = WarmupTrainer.compute_loss
        monkeypatch.setattr(WarmupTrainer, "compute_loss", lambda self, *a, **k: loss(self, *a, **k) * NAN)
    own = ["modes.think.wrong=.nan", "evaluate.every=0"] if stage == "rl" else []
    assert main(["smoke", f"tracking.output_dir={tmp_path}", *SMALL, *SHORT, *own, "rl.max_skipped_steps=3"]) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    what = "reward" if stage == "rl" else "gradient"
    assert line.startswith(f"siesta: stopped: 3 steps in a row were skipped, the last one step 3, not finite: {what}")
    assert line.endswith("checkpoint-2" if stage == "rl" else "none")
    assert stage not in json.loads((tmp_path / "smoke" / "stages.json").read_text())


# ---- spikes --------------------------------------------------------------------------------------------------------


def feed(guard: SpikeGuard, values: list[float], name: str = "loss", *, main: bool = True) -> None:
    for step, value in enumerate(values, start=1):
        state = TrainerState(global_step=step, is_world_process_zero=main)
        guard.on_log(cast(Any, TrainingArguments), state, TrainerControl(), logs={name: value})


LEVEL = [1.0, 3.0] * 4  # mean 2, standard deviation 1


@pytest.mark.parametrize(("value", "spikes"), [(8.01, 1), (7.99, 0), (-50.0, 0), (NAN, 0), (INF, 0)])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_six_sigma_above_is_a_spike(caplog: pytest.LogCaptureFixture, value: float, spikes: int, name: str) -> None:
    guard = SpikeGuard(window=8)
    with caplog.at_level(logging.WARNING):
        feed(guard, [*LEVEL, value], name)
    assert len(caplog.records) == spikes
    if spikes:
        assert caplog.records[0].getMessage() == (
            f"spike, step 9: {name} 8.01 is more than 6 sigma above the last 8 logs (mean 2, sigma 1)"
        )


@pytest.mark.parametrize(
    "values", [[1.0, 3.0, 1.0, 99.0], [2.0] * 8 + [99.0]], ids=["less than half a window", "nothing ever varied"]
)
def test_too_little_to_judge_by(caplog: pytest.LogCaptureFixture, values: list[float]) -> None:
    feed(SpikeGuard(window=8), values)
    assert not caplog.records


def test_a_new_level_is_a_spike_once_and_then_the_level(caplog: pytest.LogCaptureFixture) -> None:
    guard = SpikeGuard(window=8)
    feed(guard, LEVEL + [101.0, 103.0] * 8)
    assert len(caplog.records) == 1
    assert guard.seen["loss"] == [101.0, 103.0] * 4


def test_other_ranks_and_other_logs_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    feed(SpikeGuard(window=8), [*LEVEL, 99.0], main=False)
    guard = SpikeGuard(window=8)
    feed(guard, [*LEVEL, 99.0], "reward")
    guard.on_log(cast(Any, TrainingArguments), TrainerState(), TrainerControl(), logs=None)
    assert not caplog.records
    assert guard.seen == {"loss": [], "grad_norm": []}


class Line(torch.nn.Module):
    """The smallest model that a Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": ((self.inner(x) - labels) ** 2).mean()}


def line_trainer(folder: Path, steps: int, *callbacks: TrainerCallback, restore: bool = True) -> Trainer:
    settings = one_step(folder) | {"max_steps": steps, "save_strategy": "steps", "save_steps": steps}
    args = TrainingArguments(
        **settings, restore_callback_states_from_checkpoint=restore, per_device_train_batch_size=1
    )
    rows: Any = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(8)]
    return Trainer(model=Line(), args=args, train_dataset=rows, callbacks=list(callbacks))


def own_guard(trainer: Trainer) -> SpikeGuard:
    (guard,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, SpikeGuard)]
    return guard


@pytest.mark.parametrize("restore", [True, False])
def test_what_was_seen_goes_on_after_a_resume(tmp_path: Path, restore: bool) -> None:
    first = line_trainer(tmp_path, 3, SpikeGuard())
    first.train()
    before = own_guard(first).seen["loss"]
    assert len(before) == 3
    again = line_trainer(tmp_path, 5, SpikeGuard(), restore=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    after = own_guard(again).seen["loss"]
    assert len(after) == (5 if restore else 2)
    assert math.isclose(after[0], before[0]) == restore


def test_a_checkpoint_from_before_the_guard_can_be_resumed(tmp_path: Path) -> None:
    line_trainer(tmp_path, 3).train()
    again = line_trainer(tmp_path, 5, SpikeGuard())
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert len(own_guard(again).seen["loss"]) == 2


def test_both_trainers_have_finite_steps() -> None:
    for kind in (DeGRPOTrainer, WarmupTrainer):
        assert kind.__mro__.index(FiniteSteps) == kind.__mro__.index(kind) + 1
