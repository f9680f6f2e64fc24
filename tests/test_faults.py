"""A part of the table of faults is injected anew; the judge fires on what does not hold; the page is the file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks import faults
from benchmarks.faults_equal import differences
from benchmarks.faults_injectors import flip, truncate
from benchmarks.faults_kills import kill_rows, last_step, place_of
from benchmarks.faults_process import Ended
from benchmarks.faults_row import Row, finished, refused, untouched
from siesta.rl.run import write_atomically

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "results"


def test_a_part_of_every_fault_through_the_real_command(tmp_path: Path) -> None:
    """Three kills, every file of a checkpoint, some bad inputs, a hostile verifier, in forks of one process."""
    command = [sys.executable, "-m", "benchmarks.faults", "--fast", "--folder", str(tmp_path), "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "faults.json").read_text())
    assert list(parts) == ["kills", "files", "inputs", "verifiers"]
    assert [row for rows in parts.values() for row in rows if row["verdict"] != "holds"] == []
    assert parts["kills"][-1]["times"] == 3
    named = " ".join(row["fault"] for row in parts["files"])
    assert all(name in named for name in ("model.safetensors", "optimizer.pt", "progress_0.pt", "manifest.json"))


# ---- the judge -----------------------------------------------------------------------------------------------------

SOUND = Ended(2, "", "siesta: error: rl.tau: 0 must be positive\n")


@pytest.mark.parametrize(
    ("ended", "failure"),
    [
        (SOUND, None),
        (SOUND._replace(code=0), "exit code 0 instead of 2"),
        (SOUND._replace(err=""), "0 lines instead of one"),
        (SOUND._replace(err=2 * SOUND.err), "2 lines instead of one"),
        (SOUND._replace(err="siesta: error: something\n"), "'rl.tau' is not named"),
        (SOUND._replace(err="rl.tau: bad\n"), "'siesta: error: ' is not named"),
        (SOUND._replace(out="Traceback (most recent call last):"), "a traceback"),
    ],
)
def test_a_refusal_is_one_line_with_the_thing_in_it(ended: Ended, failure: str | None) -> None:
    found = refused(ended, ["rl.tau"])
    assert (found == []) if failure is None else (failure in " ".join(found))


def test_other_judgements(tmp_path: Path) -> None:
    assert finished(Ended(0, "", "")) == []
    assert "exit code 1" in finished(Ended(1, "", "oh"))[0]
    assert untouched(tmp_path / "canary") == []
    assert untouched(tmp_path) != []


def test_a_row_that_does_not_hold_is_told_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("data", "sound"), Row("data", "broken", failures=["a traceback"])]
    assert faults.judge({"data": rows[:1]}) == 0
    assert faults.judge({"data": rows}) == 1
    printed = capsys.readouterr()
    assert printed.err == "FAILS: data: broken: a traceback\n"
    assert printed.out.endswith("2 rows, 1 do not hold\n")
    assert "| broken | 1 | nothing |  |  | FAILS |" in faults.block(rows)


def trial(**changes: object) -> dict:
    kill = {"place": "save", "lost_steps": 2, "faults": []}
    return {"seed": 0, "starts": 3, "faults": [], "recoveries": [[False, 2.0]], "kills": [kill, kill]} | changes


def test_kills_are_counted_by_place_and_any_fault_fails() -> None:
    sound = kill_rows({"trials": [trial()]})
    assert [row.times for row in sound] == [2, 0, 0, 0, 2]
    assert sound[0].lost == "steps: 2.00 in the mean, 2 at most"
    assert {row.verdict for row in sound} == {"holds"}
    unequal = kill_rows({"trials": [trial(faults=["rl/model.safetensors differs"])]})
    assert [row.verdict for row in unequal] == ["holds"] * 4 + ["FAILS"]
    torn = trial()["kills"][0] | {"faults": ["a traceback"]}
    assert kill_rows({"trials": [trial(kills=[torn])]})[0].verdict == "FAILS"


@pytest.mark.parametrize(
    ("printed", "unfinished", "place"),
    [
        ("", False, "start"),
        ("== model\n== warmup\n", False, "start"),
        ("== warmup\nwarmup 3/9 (1 s): loss 1\n", False, "training"),
        ("== warmup\nwarmup 3/9 (1 s): loss 1\n", True, "save"),
        ("== warmup\nwarmup 9/9 (1 s): loss 1\n== rl\nrl 0/9 (1 s): accuracy 1\n", False, "other"),
        ("== rl\nrl 9/9 (1 s): reward 1\n== evaluate\n", False, "other"),
    ],
)
def test_where_a_kill_fell(tmp_path: Path, printed: str, unfinished: bool, place: str) -> None:
    if unfinished:
        (tmp_path / "warmup" / "unfinished").mkdir(parents=True)
    assert place_of(tmp_path, printed) == place
    assert last_step("rl 0/9 (1 s): x\nrl 12/99 (1 s): x\n") == ("rl", 12)


# ---- equality ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ in what a clock says, and in nothing else."""
    for name, clock in (("own", 1.0), ("other", 2.0)):
        checkpoint = tmp_path / name / "rl" / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        (tmp_path / name / "rl" / "model.safetensors").write_bytes(b"weights")
        (checkpoint / "optimizer.pt").write_bytes(b"moments")
        progress = {"seconds": {"time/step": clock}, "loss": torch.tensor(1.0)}
        torch.save(progress, checkpoint / "progress_0.pt")
        history = {"log_history": [{"loss": 0.5, "train_runtime": clock, "speed/x": clock}]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(history))
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": clock, "loss": 0.5}) + "\n")
        (tmp_path / name / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": "1"}) + "\n")
    return tmp_path / "own", tmp_path / "other"


def test_clocks_make_no_difference(pair: tuple[Path, Path]) -> None:
    assert differences(*pair, stages=("rl",)) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("rl/model.safetensors", "weights", "weightz", "rl/model.safetensors differs"),
        ("rl/checkpoint-2/optimizer.pt", "moments", "momentz", "rl/checkpoint-2/optimizer.pt differs"),
        ("rl/checkpoint-2/trainer_state.json", "0.5", "0.6", "rl/checkpoint-2/trainer_state.json differs"),
        ("metrics.jsonl", "0.5", "0.6", "metrics.jsonl, row 0: step 1, loss differ"),
        ("samples.jsonl", '"1"', '"2"', "samples.jsonl, row 0: step 1, prompt differ"),
        ("samples.jsonl", "{", '{"step": 1}\n{', "samples.jsonl has 2 rows, not 1"),
    ],
)
def test_anything_else_does(pair: tuple[Path, Path], name: str, old: str, new: str, said: str) -> None:
    file = pair[0] / name
    write_atomically(file, file.read_text().replace(old, new))
    assert said in differences(*pair, stages=("rl",))


def test_another_step_or_a_file_less_does(pair: tuple[Path, Path]) -> None:
    (pair[0] / "rl" / "checkpoint-2" / "progress_0.pt").unlink()
    assert differences(*pair, stages=("rl",)) == ["rl/checkpoint-2/progress_0.pt differs"]
    (pair[0] / "rl" / "checkpoint-2").rename(pair[0] / "rl" / "checkpoint-1")
    assert differences(*pair, stages=("rl",)) == ["rl: its last checkpoint is checkpoint-1, not checkpoint-2"]


@pytest.mark.parametrize("seed", range(20))
def test_damages_are_damages(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "file"
    whole = bytes(range(10))
    file.write_bytes(whole)
    flip(file, Random(seed))
    changed = [bin(a ^ b).count("1") for a, b in zip(whole, file.read_bytes(), strict=True)]
    assert sum(changed) == 1
    file.write_bytes(whole)
    truncate(file, Random(seed))
    assert whole.startswith(file.read_bytes())
    assert file.stat().st_size < len(whole)


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_page_holds_what_the_file_says(tmp_path: Path) -> None:
    for name in ("faults.md", "faults.json"):
        shutil.copy(DOCS / name, tmp_path)
    faults.write(tmp_path, {})
    for name in ("faults.md", "faults.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (DOCS / name).read_text(encoding="utf-8"), name
    rows = [row for rows in json.loads((DOCS / "faults.json").read_text()).values() for row in rows]
    assert {row["verdict"] for row in rows} == {"holds"}
