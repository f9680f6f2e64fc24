"""What wandb is shown beside curves: numbers by hand, on stand-ins for wandb; the real one is in test_hostile."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback

from siesta.rl.page import read_story
from siesta.rl.panels import Grid, Panels, Spread, final_panels, side_by_side, validation_panels
from siesta.rl.policies import table
from siesta.rl.tracking import STEP, StageRun
from tests.test_page import measured, row, sample


class Wandb:
    """As much of wandb as is asked for."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.runs: list[str] = []
        self.run: Any = None
        self.config: Any = type("Config", (dict,), {"update": lambda self, *args, **kwargs: None})()

    def init(self, project: str, name: str) -> None:
        self.runs.append(name)
        self.run = SimpleNamespace(id=f"id{len(self.runs)}", summary={}, _label=lambda code: None)

    def finish(self) -> None:
        self.runs.append("finished")
        self.run = None

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def Table(self, columns: list, data: list) -> tuple:
        assert {len(line) for line in data} <= {len(columns)}
        return ("table", columns, data)

    def Histogram(self, values: list, num_bins: int) -> tuple:
        return ("histogram", values, num_bins)

    def Html(self, markup: str, inject: bool, data_is_not_path: bool) -> tuple:
        assert data_is_not_path, "a path would be opened"
        return ("html", markup)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    own = Wandb()
    own.init("p", "r")
    monkeypatch.setitem(sys.modules, "wandb", own)  # pyright: ignore[reportArgumentType]
    return own


def test_a_validation_by_hand() -> None:
    own = measured()
    found = validation_panels(own, table(own, resamples=1, seed=0))
    levels, bins = found["panels/levels"], found["panels/calibration"]
    assert isinstance(levels, Grid)
    assert list(levels.header)[-2:] == ["think chosen", "tokens"]
    # Level 1: items 1 and 2, both answered at once, of which short has one right; level 2: both thought about.
    assert levels.rows == [[1, 2, 0.5, 1.0, 0.5, 0.0, 2.0], [2, 2, 0.0, 0.5, 0.5, 1.0, 8.0]]
    assert isinstance(bins, Grid)
    assert [line[2] for line in bins.rows] == [1, 1, 1, 1], "p(think) 0.1, 0.2, 0.7, 0.9"
    assert [line[4] for line in bins.rows] == [0.0, 1.0, 0.0, 1.0], "thinking earns more on items 2 and 3"
    free = found["panels/tokens free"]
    assert isinstance(free, Spread)
    assert free.values.tolist() == [2, 2, 8, 8]
    figures = {name for name, panel in found.items() if isinstance(panel, str)}
    assert figures == {
        "panels/accuracy by level",
        "panels/think chosen by level",
        "panels/does p think know when it pays",
    }


def test_with_one_mode_there_is_nothing_to_calibrate() -> None:
    own = measured()
    names = ("greedy_scores", "greedy_tokens", "sampled_scores", "sampled_tokens", "sampled_rewards", "truncated")
    arrays: dict[str, Any] = {name: vars(own)[name][:, -1:] for name in names}
    alone = replace(own, modes=["think"], mode_probs=np.ones((4, 1)), **arrays)
    found = validation_panels(alone, table(alone, resamples=1, seed=0))
    assert "panels/calibration" not in found
    assert "panels/tokens think" in found


def test_the_end_shows_what_the_report_shows(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    (tmp_path / "evaluation.json").write_text(json.dumps({"after": table(measured(), resamples=20, seed=0)}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2)))
    rollouts = [sample(2, "3 + 4", "short", 0.0), sample(2, "3 + 4", "think", 1.0), sample(2, "x", "think", 1.0)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rollouts))
    found = final_panels(read_story(tmp_path))
    policies, pairs = found["final/policies"], found["final/samples side by side"]
    assert isinstance(policies, Grid)
    assert isinstance(pairs, Grid)
    assert [line[0] for line in policies.rows][:5] == ["always-short", "always-think", "random", "free", "oracle"]
    assert list(pairs.header) == ["step", "prompt", "short", "short is", "think", "think is"]
    assert [(line[1], line[3], line[5]) for line in pairs.rows] == [("3 + 4", "wrong", "right")]
    drawn = {name.removeprefix("final/") for name, panel in found.items() if isinstance(panel, str)}
    assert {"accuracy against tokens", "P think over steps", "accuracy over steps", "response lengths"} <= drawn


def test_a_mode_without_a_sample_leaves_its_cells_empty() -> None:
    pair = {"step": 3, "prompt": "q", "responses": [{"mode": "a", "response": "1", "score": "right"}]}
    assert side_by_side([pair], ["a", "b"]).rows == [[3, "q", "1", "right", "", ""]]


def test_panels_are_shown_in_the_run_under_way(wandb: Wandb) -> None:
    own = Panels(True)
    own.show(lambda: {"t": Grid(["a"], [[1]]), "h": Spread(np.array([2.0, 8.0])), "f": "<svg>"}, step=7)
    assert wandb.logged == [
        {"t": ("table", ["a"], [[1]]), "h": ("histogram", [2.0, 8.0], 2), "f": ("html", "<svg>"), STEP: 7}
    ]
    wandb.run = None
    own.show(lambda: {"t": Grid(["a"], [[1]])})
    Panels(False).show(lambda: {"t": Grid(["a"], [[1]])})
    assert len(wandb.logged) == 1


def test_panels_that_fail_are_given_up_with_one_line(wandb: Wandb, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def make() -> dict:
        asked.append(1)
        raise BrokenPipeError("the service is gone")

    own = Panels(True)
    for _ in range(2):
        own.show(make)
    assert len(asked) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the panels in wandb is given up: BrokenPipeError: the service is gone")


# ---- stages --------------------------------------------------------------------------------------------------------


def stages(kind: type, wandb: Wandb, tmp_path: Path) -> list[str]:
    """The names of the runs that two stages open, each with a callback of its own."""
    for name in ("naps-warmup", "naps-rl"):
        callback: Any = kind()
        callback._wandb = wandb
        args = TrainingArguments(output_dir=str(tmp_path), run_name=name, report_to=[], use_cpu=True)
        state, control = TrainerState(global_step=3), TrainerControl()
        model = SimpleNamespace(config=None, num_parameters=lambda: 1)
        callback.on_train_begin(args, state, control, model=model)
        callback.on_log(args, state, control, model=model, logs={"loss": 1.0, "mode/mass": 0.9, "train_runtime": 2.0})
    return wandb.runs


def test_each_stage_is_a_run_of_its_own_and_metrics_keep_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(StageRun, "opened", None)
    own = Wandb()
    assert stages(StageRun, own, tmp_path) == ["naps-warmup", "finished", "naps-rl"]
    assert own.logged[0] == {"train/loss": 1.0, "mode/mass": 0.9, STEP: 3}
    assert own.run.summary == {"train_runtime": 2.0}


def test_a_run_that_somebody_else_has_opened_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(StageRun, "opened", None)
    own = Wandb()
    own.init("p", "a sweep's")
    assert stages(StageRun, own, tmp_path) == ["a sweep's"]


def test_negative_control_transformers_callback_mixes_stages(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    own = Wandb()
    assert stages(WandbCallback, own, tmp_path) == ["naps-warmup"]
    assert "train/mode/mass" in own.logged[0]
