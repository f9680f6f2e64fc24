"""The benchmarks run, on the CPU at sizes that say nothing about speed, and the speed page holds what files say."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import phases, rollouts, shared_prompt, speed_tables, step_time, train_pass
from benchmarks.timing import measure

DOCS = Path(__file__).parents[1] / "docs" / "results"
FAST = ["--cpu", "--warmups", "0", "--repeats", "2"]


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (train_pass, ["--shares", "0.5", "--rollouts", "8", "--micro", "4", "8"]),
        (rollouts, ["--prompts", "1"]),
        (shared_prompt, ["--prompts", "200", "--responses", "150", "--groups", "4", "--rollouts", "8"]),
        (step_time, ["--groups", "2", "4", "--prompts", "2"]),
    ],
    ids=["train_pass", "rollouts", "shared_prompt", "step_time"],
)
def test_a_benchmark_writes_what_its_table_reads(
    module: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {train_pass: "b1", rollouts: "b3", shared_prompt: "b4", step_time: "b6"}[module]
    file = tmp_path / "speed" / f"{name}_here.json"
    run(module, monkeypatch, *FAST, *arguments, "--out", str(file))
    content = json.loads(file.read_text())
    assert content["environment"]["trl"] == "1.16.0"
    if module in (train_pass, shared_prompt):
        assert content["rows"][0]["agreement"]["cosine"] > 1 - 1e-9
    (tmp_path / "speed.md").write_text(f"# Speed\n<!-- {name}_here -->\n<!-- /{name}_here -->\n")
    run(speed_tables, monkeypatch, "--docs", str(tmp_path))
    assert "| --- |" in (tmp_path / "speed.md").read_text()


def test_the_speed_page_holds_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DOCS / "speed", tmp_path / "speed")
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    (tmp_path / "speed.md").write_text(page, encoding="utf-8")
    run(speed_tables, monkeypatch, "--docs", str(tmp_path))
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == page
    for file in (DOCS / "speed").glob("*.json"):
        assert f"<!-- {file.stem} -->" in page


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("mfu", [0.4, float("nan")])
def test_every_row_of_the_first_table_is_as_wide_as_its_header(stock: bool, mfu: float) -> None:
    arm = {"median": 2.0, "low": 1.0, "high": 3.0, "tokens_per_second": 10.0, "mfu": mfu, "pass_gib": 5.0}
    row = {"share_short": 0.8, "backend": "attention: varlen (x)", "arms": {"siesta": arm}}
    if stock:
        gap = {"mean": 1e-7}
        row |= {"arms": {"stock": arm, "siesta": arm}, "agreement": {"cosine": 1.0, "relative_l2": 0.0}}
        row["logp_gap"] = {"stock": gap, "siesta": gap}
    lines = speed_tables.train_pass({"rows": [row]}).split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].count("|") == 1 + 3 + 5 * stock + 2 * (mfu == mfu)


def test_arms_are_timed_in_turn_and_warm_ups_are_left_out() -> None:
    calls: list[str] = []
    arms = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = measure(arms, warmups=1, repeats=2, device="cpu")
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert {row["repeats"] for row in found.values()} == {2}


def test_phases_are_medians_of_logged_steps(tmp_path: Path) -> None:
    """Steps of 2, 4 and 3 seconds after the first, which is skipped."""
    times = [0.0, 10.0, 12.0, 16.0, 19.0]
    rows = [{"stage": "rl", "step": i, "time": t, "reward": 0.0, "time/rollout": t / 10} for i, t in enumerate(times)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = phases.phases(tmp_path, skip=1)
    assert (found["step"], found["low"], found["high"]) == (3.0, 2.5, 3.5)
    assert found["rollout"] == pytest.approx(1.4)
    with pytest.raises(SystemExit, match="fewer than 6 logged training steps"):
        phases.phases(tmp_path, skip=3)
