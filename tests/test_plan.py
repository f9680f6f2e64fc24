"""siesta plan: what a recipe comes to, by hand, and hours only from a run that knows."""

import json
from pathlib import Path

import pytest

from siesta.rl import cli
from siesta.rl.context import Context
from siesta.rl.plan import rl_load
from siesta.rl.recipe import load_recipe
from siesta.rl.run import Run


def test_the_load_by_hand() -> None:
    context = Context(Run(load_recipe("quickstart", ["data.train_size=50", "warmup.max_steps=1"])), print)
    load = rl_load(context, processes=2)
    # quickstart: 150 steps of 128 rollouts a process in groups of 8; caps 2 and 12, a control token each.
    assert (load.steps, load.rollouts, load.prompts, load.response_tokens) == (150, 256, 32, 8.0)
    lengths = [len(ids) for ids in context.prompts(context.rl_examples)]
    assert load.prompt_tokens == pytest.approx(sum(lengths) / len(lengths))
    assert load.tokens == pytest.approx(150 * 256 * (load.prompt_tokens + 8.0))


def test_epochs_become_steps() -> None:
    overrides = ["data.train_size=64", "rl.max_steps=-1", "rl.num_train_epochs=3"]
    context = Context(Run(load_recipe("quickstart", overrides)), print)
    assert rl_load(context, processes=1).steps == 12, "64 prompts are 4 steps of 16"


def test_hours_are_those_of_an_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"stage": "rl", "step": step, "time/step": seconds} for step, seconds in ((1, 9.0), (2, 4.8), (3, 4.8))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["plan", "smoke", "rl.max_steps=300", "--like", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"# rl: 0.40 hours at 4.80 s a step, as in {tmp_path}\n" in shown
    assert "# rl: 300 steps of " in shown
    assert "\nseed: 0\n" in shown


def test_a_run_that_never_trained_knows_no_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "smoke", "--like", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"siesta: error: --like {tmp_path}: no seconds of RL steps in its metrics.jsonl")
