"""`siesta eval` on a small run: its own numbers come back, the frontier has its ends, bad input is one line."""

import io
import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from rich.console import Console

from siesta.data.schema import Example
from siesta.rl.checkpoint_eval import contexts_of, find_checkpoint
from siesta.rl.cli import main
from siesta.rl.eval_report import frontier_table, relative
from siesta.rl.export import final_model
from siesta.rl.recipe import load_recipe
from tests.helpers import save_tiny_model

SMALL = [
    "model.embedded={layers: 1, hidden_size: 16, heads: 2}",
    "data.train_size=400",
    "warmup.max_steps=2",
    "warmup.check_every=6",
    "warmup.min_mass=0",
    "rl.max_steps=1",
    "evaluate.items=16",
    "evaluate.every=0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "smoke", f"tracking.output_dir={folder}", *SMALL]) == 0
    return folder / "smoke"


def evaluated(out: Path, *arguments: str) -> dict:
    assert main(["eval", *arguments, "--out", str(out), "--timed", "1"]) == 0
    return json.loads((out / "evaluation.json").read_text())


def without_time(result):
    """Without what depends on the clock."""
    if isinstance(result, list):
        return [without_time(each) for each in result]
    if not isinstance(result, dict):
        return result
    return {name: without_time(part) for name, part in result.items() if name not in ("milliseconds", "latency")}


def test_a_run_its_export_and_a_named_recipe_measure_what_the_run_measured(run: Path, tmp_path: Path) -> None:
    report = evaluated(
        tmp_path / "run", str(run), str(run / "export"), "--responses", "--recipe", str(run / "recipe.yaml")
    )
    mine, export = report["checkpoints"].values()
    own = json.loads((run / "evaluation.json").read_text())["after"]
    assert {name: without_time(mine)[name] for name in own} == own
    assert without_time(export) == without_time(mine)
    assert mine["greedy"]["free"]["milliseconds"] > 0
    for name, row in report["over_checkpoints"].items():
        assert row["each"][0] == row["each"][1], name  # the same model twice
    assert report["settings"]["checkpoints"][str(run)] == str(run / "rl")
    for decoding in ("greedy", "sampled"):
        points = mine["frontier"][decoding]["points"]
        assert len(points) >= 9
        for point, policy in ((points[0], "always-short"), (points[-1], "always-think")):
            assert {name: point[name] for name in mine[decoding][policy]} == mine[decoding][policy]
    for file in ("frontier.png", "calibration.png"):
        assert (tmp_path / "run" / file).stat().st_size > 1000

    rows = [json.loads(line) for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 16
    scores = [each["score"] for row in rows[:16] for each in row["sampled"]["short"]]
    assert len(scores) == 16 * 2
    assert np.mean(scores) == pytest.approx(mine["sampled"]["always-short"]["accuracy"])
    tokens = [row["greedy"]["think"][0]["tokens"] for row in rows[:16]]
    assert np.mean(tokens) == pytest.approx(mine["greedy"]["always-think"]["tokens"])


def test_overrides_and_thresholds_of_ones_own(run: Path, tmp_path: Path) -> None:
    overrides = ["evaluate.items=8", "evaluate.samples=1", "evaluate.resamples=10"]
    report = evaluated(tmp_path, str(run / "rl"), *overrides, "--thresholds", "0.25", "0.75", "--split", "validation")
    (found,) = report["checkpoints"].values()
    assert [point["threshold"] for point in found["frontier"]["greedy"]["points"]] == [0.75, 0.25]
    assert "keeps" not in found["frontier"]["greedy"]
    assert "voting" not in found  # nothing to vote on with one sample
    assert (report["settings"]["items"], report["settings"]["split"]) == (8, "validation")
    assert "over_checkpoints" not in report


def test_the_threshold_that_keeps_a_share_is_a_row_and_a_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["evaluate.items=8", "evaluate.samples=1", "evaluate.resamples=10"]
    report = evaluated(tmp_path, str(run / "rl"), *overrides, "--thresholds", "0.75", "--keep", "0.9")
    printed = capsys.readouterr().out
    (found,) = report["checkpoints"].values()
    for decoding in ("greedy", "sampled"):
        own = found["frontier"][decoding]
        assert own["keeps"]["share"] == 0.9
        row = next(point for point in own["points"] if point["threshold"] == own["keeps"]["threshold"])
        assert row["accuracy"] >= 0.9 * found[decoding]["always-think"]["accuracy"]
        assert f"{own['keeps']['threshold']:.4f} is the highest threshold that keeps 90 % of always-think's" in printed


def test_a_threshold_is_compared_with_always_thinking() -> None:
    """Half of the accuracy for a quarter of the tokens; where nothing is right there is nothing to be half of."""
    number = {"value": 0.0, "interval": [0.0, 0.0]}
    names = ("area", "oracle_area", "area_by_share", "oracle_area_by_share")
    point = {"threshold": 0.3, "shares": {"think": 0.2}, "accuracy": 0.4, "tokens": 2.0, "regret": 0.0}
    own = dict.fromkeys(names, number) | {"points": [point | {"interval": {"accuracy": [0.3, 0.5]}}]}
    free, full = {"shares": {"short": 0.5, "think": 0.5}}, {"accuracy": 0.8, "tokens": 8.0}
    result = {"frontier": {"greedy": own}, "greedy": {"free": free, "always-think": full}}
    console = Console(width=140, file=io.StringIO())
    console.print(frontier_table(result, "greedy"))
    row = next(line for line in cast(io.StringIO, console.file).getvalue().splitlines() if "0.3000" in line)
    assert [cell.strip() for cell in row.split("│")[3:7]] == ["40.0 [30.0, 50.0]", "50.0 %", "2.00", "25.0 %"]
    assert relative(0.0, 0.0) == "-"


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["eval", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("siesta: error: ")


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    out = ["--out", str(tmp_path / "out")]
    assert "lies in 0 to 1" in one_line(capsys, str(run), *out, "--thresholds", "0.5", "1.5")
    assert one_line(capsys, str(run), *out, "--keep", "98").startswith("--keep: 98 is no share")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert one_line(capsys, str(empty), *out).startswith(f"{empty}: this run directory has no final model")
    (empty / "rl" / "checkpoint-3").mkdir(parents=True)
    assert f"such as {empty}/rl/checkpoint-3" in one_line(capsys, str(empty), *out)
    model = save_tiny_model(tmp_path / "model")
    assert "--recipe FILE" in one_line(capsys, str(model), *out)
    assert "no such folder here" in one_line(capsys, "nobody/nothing", *out)
    tokens = one_line(capsys, str(model), "--recipe", "smoke", 'modes.think={token: "<muse>", max_tokens: 4}', *out)
    assert "lacks the control tokens '<muse>' (think)" in tokens
    assert "named twice" in one_line(capsys, str(run), str(run), *out)
    assert not (tmp_path / "out").exists()


def test_where_a_model_and_its_recipe_are_found(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    assert final_model(run, recipe) == run / "rl"
    recipe.rl.enabled = False
    assert final_model(run, recipe) == run / "warmup"
    assert find_checkpoint(str(run / "warmup"), None, []).recipe.model.path == str(run / "warmup")
    other = find_checkpoint(str(run), "hop", ["evaluate.items=3"]).recipe
    assert (other.data.task, other.evaluate.items, other.model.path) == ("hop", 3, str(run / "rl"))


def test_items_of_a_context_share_a_number() -> None:
    def asked(*contexts: str) -> list[Example]:
        return [Example(str(i), context, "q", "a") for i, context in enumerate(contexts)]

    numbers = contexts_of(asked("a", "", "b", "a", ""))
    assert numbers is not None
    assert numbers.tolist() == [0, 1, 2, 0, 3]
    assert contexts_of(asked("a", "b", "", "")) is None
