"""The baselines on the embedded model: each overlay over the smoke recipe, through the command line's own main."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siesta.rl.modes import Mode, Modes
from siesta.rl.recipe import RECIPES
from siesta.rl.train import main

SMALL = [
    "model.embedded={layers: 1, hidden_size: 16, heads: 2}",
    "data.train_size=400",
    "warmup.max_steps=6",
    "warmup.check_every=6",
    "rl.max_steps=2",
    "rl.logging_steps=1",
    "evaluate.items=16",
]
# The task has markers and lengths of its own.
MODES = {
    "baseline_grpo": [],
    "baseline_adaptthink": ["modes.short.max_tokens=2", "modes.think.max_tokens=12", "modes.think.answer_after='='"],
    "baseline_dler": ["modes.think.max_tokens=6", "modes.think.answer_after='='"],
}


def finished(name: str, folder: Path, *extra: str) -> Path:
    """Run a shipped overlay over `smoke`; the folder it leaves."""
    overlay = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert "base: smollm2_135m\n" in overlay
    file = folder / f"{name}.yaml"
    file.write_text(overlay.replace("base: smollm2_135m\n", "base: smoke\n"), encoding="utf-8")
    assert main([str(file), f"tracking.output_dir={folder}", *SMALL, *MODES[name], *extra]) == 0
    return folder / name


def logged(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "rl" and "mode/mass" in row]


@pytest.mark.parametrize("name", ["baseline_grpo", "baseline_adaptthink"])
def test_a_two_mode_baseline_trains_and_is_measured(name: str, tmp_path: Path) -> None:
    run = finished(name, tmp_path)
    assert list(json.loads((run / "evaluation.json").read_text())["after"]["greedy"])[:2] == [
        "always-short",
        "always-think",
    ]
    shares = [row["mode/short/share"] for row in logged(run)]
    assert (set(shares) == {0.5}) == (name == "baseline_adaptthink")


def test_the_control_token_of_a_single_mode_has_no_gradient() -> None:
    logits = torch.randn(3, 9, requires_grad=True)
    single, pair = (
        Modes([Mode(str(i), str(i), i, 2) for i in ids]).log_policy(logits)[:, 0] for ids in ((4,), (4, 5))
    )
    (gradient,) = torch.autograd.grad(single.sum(), logits)
    assert (single == 0).all()
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(pair.sum(), logits)  # negative control
    assert (gradient != 0).any()


@pytest.fixture(scope="module")
def one_mode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("baseline_dler", tmp_path_factory.mktemp("outputs"), "rl.guard={window: 1, action: stop}")


def test_one_mode_is_the_whole_policy(one_mode: Path) -> None:
    """The guard, with a window of one, has nothing to say about it."""
    for row in logged(one_mode):
        assert (row["mode/think/share"], row["mode/think/prob"], row["mode/entropy"]) == (1.0, 1.0, 0.0)
        assert "mode/short/share" not in row


def test_with_one_mode_all_policies_are_one(one_mode: Path) -> None:
    results = json.loads((one_mode / "evaluation.json").read_text())
    for decoding in ("greedy", "sampled"):
        rows = results["after"][decoding]
        assert list(rows) == ["always-think", "random", "free", "oracle"]
        assert all(row == rows["free"] for row in rows.values())
        assert rows["free"]["regret"] == 0.0
        assert rows["free"]["shares"] == {"think": 1.0}


def test_one_mode_learns_and_is_exported(one_mode: Path) -> None:
    weights = [AutoModelForCausalLM.from_pretrained(one_mode / name).state_dict() for name in ("warmup", "export")]
    assert any(not torch.equal(before, after) for before, after in zip(*(w.values() for w in weights), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(one_mode / "export")
    assert len(tokenizer.encode("<think>", add_special_tokens=False)) == 1
    assert "<short>" not in tokenizer.get_vocab()
    assert (one_mode / "report.md").read_text().count("always-think") == 4
