"""What watches a training, on synthetic logs."""

import json
import logging
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from siesta.data.errors import CheckpointError
from siesta.rl.callbacks import CollapseGuard, MetricsFile, SampleFile, ScreenLine, Validation
from siesta.rl.recipe import GuardSection

ARGS: Any = TrainingArguments
NAN = float("nan")


def state(step: int = 1, *, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=100, is_world_process_zero=main)


def log(think: float, entropy: float | None = None) -> dict[str, float]:
    """The guard's view of one log: P(think), and the entropy of the mean policy that goes with it."""
    shares = (1 - think, think)
    own = -sum(p * math.log(p) for p in shares if p > 0) if entropy is None else entropy
    return {"mode/short/prob": shares[0], "mode/think/prob": think, "mode/entropy_mean_policy": own, "loss": 0.1}


def guard(window: int = 3, **settings: Any) -> CollapseGuard:
    return CollapseGuard(GuardSection(window=window, **settings), ["short", "think"])


def feed(own: CollapseGuard, logs: list[dict[str, float]]) -> TrainerControl:
    control = TrainerControl()
    for step, entry in enumerate(logs, start=1):
        own.on_log(ARGS, state(step), control, logs=entry)
    return control


# ---- collapse guard ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("think", [0.0, 0.003, 0.997, 1.0])
def test_the_guard_fires_after_exactly_a_window_of_faults(window: int, think: float) -> None:
    own = guard(window, action="stop")
    assert not feed(own, [log(think)] * (window - 1)).should_training_stop
    assert own.fired_at is None
    own = guard(window, action="stop")
    assert feed(own, [log(think)] * window).should_training_stop
    assert own.fired_at == window


def test_a_healthy_log_starts_the_count_again() -> None:
    own = guard(3)
    feed(own, [log(1.0), log(1.0), log(0.5), log(1.0), log(1.0)])
    assert own.fired_at is None
    own = guard(3)
    feed(own, [log(1.0), log(1.0), log(0.5), log(1.0), log(1.0), log(1.0), log(1.0)])
    assert own.fired_at == 6


@pytest.mark.parametrize("action", ["warn", "save", "stop"])
def test_a_guard_goes_on_counting_where_a_checkpoint_has_left_it(action: Any) -> None:
    logs = [log(0.5), log(1.0), log(1.0), log(1.0), log(1.0)]
    straight = guard(3, action=action)
    feed(straight, logs)
    for cut in range(len(logs)):
        first, second = guard(3, action=action), guard(3, action=action)
        feed(first, logs[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        control = TrainerControl()
        for step, entry in enumerate(logs[cut:], start=cut + 1):
            second.on_log(ARGS, state(step), control, logs=entry)
        assert vars(second) == vars(straight)
    assert straight.fired_at == 4


@pytest.mark.parametrize("action", ["save", "stop"])
def test_a_run_that_the_guard_has_stopped_stays_stopped(action: Any) -> None:
    first, second = guard(2, action=action), guard(2, action=action)
    feed(first, [log(1.0)] * 2)
    second.load_state_dict(first.state_dict())
    control = TrainerControl()
    second.on_step_end(ARGS, state(3), control)
    assert control.should_training_stop == (action == "stop")
    fresh = TrainerControl()
    guard(2, action=action).on_step_end(ARGS, state(3), fresh)
    assert not fresh.should_training_stop


def test_healthy_policies_never_fire() -> None:
    own = guard(2)
    feed(own, [log(think) for think in (0.5, 0.02, 0.98, 0.3, 0.7)] * 5)
    assert own.fired_at is None


def test_always_short_and_always_think_are_named() -> None:
    always_short, always_think = guard(2), guard(2)
    feed(always_short, [log(0.001)] * 2)
    feed(always_think, [log(0.999)] * 2)
    assert always_short.reason == "P(short) = 0.9990 is outside [0.01, 0.99]"
    assert always_think.reason == "P(short) = 0.0010 is outside [0.01, 0.99]"


def test_faults_of_different_kinds_add_up() -> None:
    own = guard(4)
    feed(own, [log(1.0), log(0.0), log(NAN), log(0.5, entropy=0.01)])
    assert own.fired_at == 4
    assert own.reason == "mode entropy 0.0100 is under 0.05"


@pytest.mark.parametrize("entry", [log(NAN), log(0.5, entropy=NAN), {**log(0.5), "mode/think/prob": NAN}])
def test_nan_is_a_fault(entry: dict[str, float]) -> None:
    own = guard(1)
    feed(own, [entry])
    assert own.fired_at == 1
    assert "nan" in own.reason


def test_the_bounds_themselves_are_healthy() -> None:
    own = guard(1, min_share=0.25, max_share=0.75, min_entropy=0.5)
    feed(own, [log(0.25), log(0.75), log(0.5, entropy=0.5)])
    assert own.fired_at is None


def test_every_mode_is_watched() -> None:
    own = CollapseGuard(GuardSection(window=1), ["short", "think", "wide"])
    feed(own, [{**log(0.5), "mode/wide/prob": 0.0}])
    assert own.reason == "P(wide) = 0.0000 is outside [0.01, 0.99]"


@pytest.mark.parametrize("entry", [None, {}, {"train_runtime": 3.0}, {"validation/accuracy": 0.5}])
def test_logs_of_something_else_count_neither_way(entry: dict[str, float] | None) -> None:
    own = guard(2)
    control = TrainerControl()
    for step, logs in enumerate([log(1.0), entry, log(1.0)], start=1):
        own.on_log(ARGS, state(step), control, logs=logs)
    assert own.fired_at == 3


@pytest.mark.parametrize(
    ("action", "saves", "stops"), [("warn", False, False), ("save", True, False), ("stop", True, True)]
)
def test_actions(caplog: pytest.LogCaptureFixture, action: str, saves: bool, stops: bool) -> None:
    with caplog.at_level(logging.WARNING):
        control = feed(guard(2, action=action), [log(1.0)] * 2)
    assert (control.should_save, control.should_training_stop) == (saves, stops)
    (record,) = caplog.records
    assert record.getMessage() == (
        "collapse guard, step 2, 2 logs in a row: P(short) = 0.0000 is outside [0.01, 0.99]"
    )


def test_one_rank_tells_what_all_act_on(caplog: pytest.LogCaptureFixture) -> None:
    own, control = guard(1, action="stop"), TrainerControl()
    with caplog.at_level(logging.WARNING):
        own.on_log(ARGS, state(main=False), control, logs=log(1.0))
    assert (own.fired_at, control.should_save, control.should_training_stop) == (1, True, True)
    assert not caplog.records


def test_the_guard_fires_once(caplog: pytest.LogCaptureFixture) -> None:
    own = guard(2, action="save")
    control = feed(own, [log(1.0)] * 2)
    control.should_save = False
    for step in range(3, 9):
        own.on_log(ARGS, state(step), control, logs=log(1.0))
    assert (own.fired_at, control.should_save, len(caplog.records)) == (2, False, 1)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_metrics_are_json_lines_even_with_nan(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    own = MetricsFile(file, "rl")
    own.on_log(ARGS, state(1), TrainerControl(), logs={"loss": 0.5, "mode/mass": NAN})
    own.on_log(ARGS, state(2), TrainerControl(), logs={"loss": float("inf"), "kl": float("-inf")})
    own.on_log(ARGS, state(3, main=False), TrainerControl(), logs={"loss": 1.0})
    own.on_log(ARGS, state(4), TrainerControl(), logs=None)

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    rows = [json.loads(line, parse_constant=no_constant) for line in file.read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("rl", 1), ("rl", 2), ("rl", 4)]
    assert all(isinstance(row.pop("time"), float) for row in rows)
    assert rows[0] == {"stage": "rl", "step": 1, "loss": 0.5, "mode/mass": "nan"}
    assert rows[1] == {"stage": "rl", "step": 2, "loss": "inf", "kl": "-inf"}
    assert math.isnan(float(rows[0]["mode/mass"])), "and every reader gets the number back"


def rows_of(*places: tuple[str, int]) -> str:
    return "".join(json.dumps({"stage": stage, "step": step, "loss": "nan"}) + "\n" for stage, step in places)


@pytest.mark.parametrize(
    ("resumed_at", "kept"),
    [
        (20, [("warmup", 30), ("rl", 0), ("rl", 10), ("rl", 20)]),
        (0, [("warmup", 30)]),
    ],
)
@pytest.mark.parametrize("torn", ["", '{"stage": "rl", "st'])
def test_a_resumed_training_rewrites_no_metric(
    tmp_path: Path, resumed_at: int, kept: list[tuple[str, int]], torn: str
) -> None:
    """`torn`: the line that was being written when the first attempt was killed."""
    file = tmp_path / "metrics.jsonl"
    places = [("warmup", 30), ("rl", 0), ("rl", 10), ("rl", 20), ("rl", 30)]
    file.write_text(rows_of(*places) + torn)
    MetricsFile(file, "rl").on_train_begin(ARGS, state(resumed_at, main=False), TrainerControl())
    assert file.read_text() == rows_of(*places) + torn, "the main process alone writes"
    MetricsFile(file, "rl").on_train_begin(ARGS, state(resumed_at), TrainerControl())
    assert file.read_text() == rows_of(*kept)


def test_the_summary_of_a_training_stands_once(tmp_path: Path) -> None:
    """One that was killed behind its summary, before its stage was finished, logs it again."""
    file = tmp_path / "metrics.jsonl"
    summaries = [{"stage": stage, "step": 2, "train_runtime": 1.0} for stage in ("warmup", "rl")]
    file.write_text(rows_of(("rl", 2)) + "".join(json.dumps(row) + "\n" for row in summaries))
    MetricsFile(file, "rl").on_train_begin(ARGS, state(2), TrainerControl())
    assert file.read_text() == rows_of(("rl", 2)) + json.dumps(summaries[0]) + "\n"


@pytest.mark.parametrize("line", [b'{"stage": "rl", "st', b'{"stage": "\xff"}', b"\0"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(rows_of(("rl", 1)).encode() + line + b"\n" + rows_of(("rl", 2)).encode())
    with pytest.raises(CheckpointError, match=rf"^{file}, line 2: damaged; remove the line$"):
        MetricsFile(file, "rl").on_train_begin(ARGS, state(2), TrainerControl())


def test_a_first_training_has_no_metrics_to_drop(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl", "rl").on_train_begin(ARGS, state(0), TrainerControl())
    assert not list(tmp_path.iterdir())


def test_samples_are_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    rows = [
        {"mode": "short", "response": "größer", "reward": None},
        {"mode": "think", "response": "\n", "reward": 1.0},
    ]
    own = SampleFile(file, lambda: rows, to_wandb=False)
    own.on_log(ARGS, state(7), TrainerControl(), logs={})
    own.on_log(ARGS, state(8, main=False), TrainerControl(), logs={})
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {"step": 7, **row} for row in rows
    ]


@pytest.mark.parametrize("resumed_at", [0, 8])
def test_samples_of_steps_that_are_done_again_do_not_stand_twice(tmp_path: Path, resumed_at: int) -> None:
    file = tmp_path / "samples.jsonl"
    own = SampleFile(file, lambda: [{"response": "a\u2028b"}], to_wandb=False)
    for step in (4, 8, 12):
        own.on_log(ARGS, state(step), TrainerControl(), logs={})
    before = file.read_text(encoding="utf-8")
    file.write_text(before + '{"step": 12, "resp', encoding="utf-8")
    own.on_train_begin(ARGS, state(resumed_at, main=False), TrainerControl())
    own.on_train_begin(ARGS, state(resumed_at), TrainerControl())
    kept = [line for line in before.split("\n")[:-1] if json.loads(line)["step"] <= resumed_at]
    assert file.read_text(encoding="utf-8") == "".join(line + "\n" for line in kept)
    assert len(kept) == resumed_at // 4


@pytest.mark.parametrize("resumed_at", [0, 4])
def test_the_summary_of_a_training_repeats_no_sample(tmp_path: Path, resumed_at: int) -> None:
    """It is another log of the last step, be it of this training or of the one that it went on from."""
    file = tmp_path / "samples.jsonl"
    own = SampleFile(file, lambda: [{"response": "7"}], to_wandb=False)
    own.on_train_begin(ARGS, state(resumed_at), TrainerControl())
    for step in (4, 4):
        own.on_log(ARGS, state(step), TrainerControl(), logs={})
    assert file.exists() == (resumed_at == 0)
    assert not file.exists() or len(file.read_text().splitlines()) == 1


def test_no_samples_leave_no_file(tmp_path: Path) -> None:
    SampleFile(tmp_path / "samples.jsonl", list, to_wandb=True).on_log(ARGS, state(), TrainerControl(), logs={})
    assert not list(tmp_path.iterdir())


# ---- screen --------------------------------------------------------------------------------------------------------


def test_a_screen_line_shows_its_columns() -> None:
    said: list[str] = []
    own = ScreenLine("rl", {"rollout/reward": "reward", "mode/mass": "mass", "missing": "missing"}, said.append)
    own.on_log(ARGS, state(5), TrainerControl(), logs={"mode/mass": NAN, "rollout/reward": 0.123456, "other": 1.0})
    (line,) = said
    assert line.startswith("rl 5/100 (")
    assert line.endswith(" s): reward 0.1235, mass nan")


@pytest.mark.parametrize(("logs", "main"), [(None, True), ({}, True), ({"other": 1.0}, True), ({"loss": 1.0}, False)])
def test_a_screen_line_without_its_columns_is_not_printed(logs: dict[str, float] | None, main: bool) -> None:
    said: list[str] = []
    ScreenLine("rl", {"loss": "loss"}, said.append).on_log(ARGS, state(main=main), TrainerControl(), logs=logs)
    assert said == []


# ---- validation ----------------------------------------------------------------------------------------------------


def validation(every: int) -> tuple[Validation, Any]:
    """The callback on a stand-in that has the parts of a trainer it uses."""
    logged: list[dict[str, float]] = []
    trainer: Any = SimpleNamespace(logged=logged, log=logged.append, _metrics={"train": defaultdict(list)})
    return Validation(trainer, every, lambda: {"validation/accuracy": 0.5}), trainer


def test_validation_starts_before_the_first_step_but_not_on_a_resumed_run() -> None:
    own, trainer = validation(10)
    own.on_train_begin(ARGS, state(30), TrainerControl())
    assert trainer.logged == []
    own.on_train_begin(ARGS, state(0), TrainerControl())
    assert trainer.logged == [{"validation/accuracy": 0.5}]


def test_validation_joins_the_log_of_its_step() -> None:
    own, trainer = validation(10)
    for step in range(1, 31):
        control = TrainerControl()
        own.on_step_end(ARGS, state(step), control)
        assert control.should_log == (step % 10 == 0)
    assert trainer._metrics["train"] == {"validation/accuracy": [0.5, 0.5, 0.5]}
