"""benchmarks/real.py and zero.py: what they start, and what the page says of runs whose numbers are known."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from benchmarks import beside, real, real_tables, zero
from benchmarks.runs import Job
from siesta.data.families import FamilySource
from siesta.rewards.verifiers import exact, reasoning_gym
from siesta.rl.policies import Measurement, table
from siesta.rl.recipe import load_recipe

DOCS = Path(__file__).parents[1] / "docs" / "results"


def evaluation(shares: list[float], items: int = 10) -> dict:
    """Level by level, `short` is right at level 1 alone and `think` always; `shares` are P(think)."""
    levels = np.repeat(np.arange(1, len(shares) + 1), items)
    think = np.repeat(shares, items)
    scores = np.stack([(levels == 1).astype(float), np.ones(len(levels))], 1)
    rewards = scores * [2.0, 1.5] - 1
    tokens = np.tile([3.0, 60.0], (len(levels), 1))
    measured = Measurement(
        ["short", "think"],
        levels,
        np.stack([1 - think, think], 1),
        np.ones(len(levels)),
        scores,
        tokens,
        scores,
        tokens,
        rewards,
        np.zeros_like(scores),
    )
    return table(measured, resamples=20, seed=0)


def finished(folder: Path, name: str, shares: list[float], path: list[float]) -> None:
    """A run directory as a run leaves it: evaluation and the way of P(think)."""
    run = folder / f"{name}-0"
    run.mkdir(parents=True)
    stage = "before" if name == real_tables.START else "after"
    (run / "evaluation.json").write_text(json.dumps({stage: evaluation(shares)}))
    levels = {f"validation/prob/think/level_{i}": share for i, share in enumerate(shares, 1)}
    rows = [{"stage": "rl", "step": i, "mode/think/prob": p} | levels for i, p in enumerate(path, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


GROUPS = {"main": ["target", "grpo"], "sweep": ["alpha_1e-2_group", "alpha_1e-1_group"]}


def test_the_page_says_what_the_runs_show(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    fall = [0.5] * 5 + [0.2] * 5 + [0.7] * 5
    finished(runs, "warm", [0.5, 0.5], [])
    finished(runs, "target", [0.01, 0.97], fall)
    finished(runs, "grpo", [1.0, 1.0], [0.9] * 15)
    finished(runs, "alpha_1e-2_group", [0.62, 0.61], [0.6] * 15)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "real.md").write_text((DOCS / "real.md").read_text(encoding="utf-8"), encoding="utf-8")
    real_tables.write_results(runs, tmp_path, "smollm2_135m", GROUPS, [0])
    page = (tmp_path / "results" / "real.md").read_text(encoding="utf-8")
    page = page.partition("## GSM8K")[0]  # which has rows of the same names
    row = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    assert "| **target** | 100.0 [100.0, 100.0] | 31.5 [" in page
    assert "| 100.0 | 52.5 | 0 100 | 1 97 | 0.000 [0.000, 0.000] |" in row["| **target**"]
    for line in (
        "- met: accuracy 100.0 % of always-think's (at least 98)",
        "- met: tokens 52.5 % of always-think's (at most 60)",
        "- met: P(think) rises with the level: 1 97",
        "| target | 50 | 20, 8 | 70 | yes | 1.0 97.0 | 100.0 [100.0, 100.0] |",
        "| grpo | 90 | 90, 3 | 90 | no | 100.0 100.0 | 100.0 [100.0, 100.0] | 60.0 [60.0, 60.0] | thinks about every",
        "| alpha_1e-1_group | not measured yet |",
    ):
        assert line in page, line
    assert row["| alpha_1e-2_group"].endswith("| levels not told apart |")
    assert image.imread(tmp_path / "figures" / "real_smollm2_135m.png").size
    assert json.loads((tmp_path / "results" / "real_smollm2_135m.json").read_text())["grpo"][0]["items"] == 20


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ([0.995, 1.0], "thinks about everything"),
        ([0.0, 0.01], "thinks about nothing"),
        ([0.50, 0.54], "levels not told apart"),
        ([0.50, 0.56], "no"),
        ([0.0, 1.0], "no"),
        ([0.5], "no"),  # GSM8K has no levels
    ],
)
def test_when_a_mode_policy_has_collapsed(shares: list[float], verdict: str) -> None:
    assert real_tables.collapse(evaluation(shares)["sampled"]["free"]) == verdict


def test_every_block_of_the_page_is_one_that_is_written() -> None:
    page = (DOCS / "real.md").read_text(encoding="utf-8")
    for recipe in ("smollm2_135m", "smollm2_gsm8k"):
        for block in ("main", "curves", "criteria", "figure", *(["sweep"] if recipe == real.BASE else [])):
            assert f"<!-- {recipe} {block} -->" in page
    assert "<!-- zero -->" in page


@pytest.mark.parametrize("recipe", [real.BASE, "smollm2_gsm8k"])
def test_every_arm_is_a_recipe(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another base a baseline has that base's data and caps, and keeps its method."""
    started: list[Job] = []
    monkeypatch.setattr(real, "run_all", lambda jobs, places, gap: started.extend(jobs))
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").touch()
    arms = list(real.ARMS)
    options = ["--recipe", recipe, "--data", str(tmp_path), "--runs", str(tmp_path), "--jobs", "6", "--arms", *arms]
    real.main([*options, "--out", str(tmp_path)])
    assert [job.name for job in started] == ["warm", *arms]
    base = load_recipe(recipe)
    for job in started:
        own = load_recipe(job.recipe, job.settings)
        assert own.data.families is None
        assert own.data.test is not None
        assert own.data.test.path == str(tmp_path / "test.jsonl")
        assert own.evaluate.items == base.evaluate.items
        think = base.modes["think"].max_tokens
        assert own.modes["think"].max_tokens == (think // 2 if job.name == "dler" else think)
        if "short" in own.modes:
            assert own.modes["short"].max_tokens == base.modes["short"].max_tokens
        if job.name.startswith("alpha"):
            assert own.rl.setting("mode_objective") == "policy_gradient"
            assert own.rl.setting("alpha") == float(job.name.split("_")[1])
    adaptthink = next(load_recipe(job.recipe, job.settings) for job in started if job.name == "adaptthink")
    assert adaptthink.rl.setting("advantage") == "reference"


def test_places_share_the_cards_evenly() -> None:
    places = real.places([0, 1], 3, 4)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1"] * 3
    assert len({place["MASTER_PORT"] for place in places}) == 6


def test_an_engine_beside_others_gets_a_cache_of_a_given_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class LLM:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))  # type: ignore
    beside.fix_cache(5)
    assert LLM(model="x", seed=1).settings == {"model": "x", "seed": 1, "kv_cache_memory_bytes": 5}


def test_losses_are_compared_step_by_step(tmp_path: Path) -> None:
    values = {zero.PLAIN: [1.0, 2.0], zero.UNSHARDED: [1.0, 1.25], "zero2": [1.0, 1.5]}
    runs = {name: tmp_path / name for name in values}
    for name, run in runs.items():
        run.mkdir()
        rows = [{"stage": stage, "step": i, "loss": x} for stage in zero.STAGES for i, x in enumerate(values[name], 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = zero.gaps(runs, 2)["rl"]["zero2"]
    assert (row["first_difference"], row["largest_difference"], row["mean_difference"]) == (0.0, 0.5, 0.25)
    assert row["mean_difference_to_zero0"] == 0.125
    with pytest.raises(AssertionError, match="2 losses of warmup, not 3"):
        zero.gaps(runs, 3)


def test_comparing_text_is_never_milder_than_reasoning_gym() -> None:
    """The items of `--data` are scored without the package: right here must be right there."""
    pytest.importorskip("reasoning_gym")
    families = load_recipe(real.BASE).data.families
    assert families is not None
    for example in FamilySource(families, "test", 40):
        answer = str(json.loads(example.answer)["answer"])
        for said in (
            answer,
            f" {answer} ",
            f"+{answer}",
            f"0{answer}",
            f"{answer}.0",
            answer.upper(),
            answer + "1",
            "",
        ):
            solution = said.strip()  # as `solution_part` gives it
            assert exact(solution, answer) <= reasoning_gym(solution, example.answer), (example.id, said)
        assert exact(answer, answer) == reasoning_gym(answer, example.answer) == 1
