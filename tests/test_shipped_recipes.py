"""Shipped recipes beyond parsing: the first step of each runs, and docs/recipes.md says what to expect of each.

The recipes name models of a hub and run on GPUs. Here the embedded model takes the place of theirs and a few rows of
the same format that of their data; modes, objective and everything else of the method stay the recipe's own.
"""

import json
from pathlib import Path

import pytest
import yaml

from siesta.rl.recipe import RECIPES, load_recipe
from siesta.rl.train import main

ROOT = Path(__file__).resolve().parents[1]
HUB = ["smollm2_gsm8k", "qwen3_0.6b_gsm8k", "lora_24gb", "thinkless_1.5b_deepscaler", "r1_distill_qwen_1.5b"]
SMALL = [
    "model.path=null",
    "model.dtype=float32",
    "model.embedded={layers: 1, hidden_size: 16, heads: 2}",
    "modes.short.max_tokens=4",
    "modes.think.max_tokens=8",
    "data.train_size=64",
    "data.max_prompt_tokens=200",
    "warmup.max_steps=1",
    "warmup.per_device_train_batch_size=8",
    "warmup.gradient_accumulation_steps=1",
    "warmup.check_every=5",
    "warmup.check_items=4",
    "warmup.min_mass=0",
    "warmup.min_share=0",
    "rl.use_vllm=false",
    "rl.vllm_enable_sleep_mode=false",
    "rl.per_device_train_batch_size=16",
    "rl.max_steps=2",
    "rl.logging_steps=1",
    "evaluate={items: 4, samples: 1, resamples: 10}",
]


def rows(data_format: str, start: int, count: int) -> list[dict]:
    numbers = range(start, start + count)
    if data_format == "gsm8k":
        return [{"question": f"What is {n} + 1?", "answer": f"It is {n} + 1.\n#### {n + 1}"} for n in numbers]
    return [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "solution": f"It is {n + 1}."} for n in numbers]


def local_data(name: str, folder: Path) -> list[str]:
    """Overrides that put files of the recipe's own format in the place of its hub data."""
    data_format = "deepscaler" if "deepscaler" in name or "r1" in name else "gsm8k"
    overrides = []
    for place, split in enumerate(("train", "validation", "test")):
        file = folder / f"{split}.jsonl"
        lines = rows(data_format, 1000 * place, 64 if split == "train" else 8)
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
        overrides.append(f"data.{split}={{path: {file}, format: {data_format}}}")
    return overrides


def trained(name: str, folder: Path, overrides: list[str]) -> dict:
    assert main([name, f"tracking.output_dir={folder}", *SMALL, *overrides]) == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "rl" and "mode/mass" in row][-1]


@pytest.mark.parametrize("name", HUB)
def test_the_first_step_runs(name: str, tmp_path: Path) -> None:
    row = trained(name, tmp_path, local_data(name, tmp_path))
    assert row["rollout/unscorable"] == 0
    assert (tmp_path / name / "rl" / "adapter").is_dir() == (name == "lora_24gb")
    if name != "thinkless_1.5b_deepscaler":  # the paper's modes are drawn freely
        assert row["mode/short/share"] == 0.5


def test_the_first_step_on_reasoning_gym_runs(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    row = trained("smollm2_135m", tmp_path, [])
    assert row["rollout/unscorable"] == 0


def test_the_paper_is_followed() -> None:
    rl = load_recipe("thinkless_1.5b_deepscaler").rl
    settings = {name: rl.setting(name) for name in ("alpha", "beta", "temperature", "learning_rate", "epsilon")}
    assert settings == {"alpha": 1e-3, "beta": 1e-3, "temperature": 0.6, "learning_rate": 1e-6, "epsilon": 0.2}
    launch = yaml.safe_load((RECIPES / "accelerate" / "zero2.yaml").read_text())
    rollouts = launch["num_processes"] * rl.setting("per_device_train_batch_size") * rl.setting("steps_per_generation")
    assert rollouts == 128 * 8


def test_the_table_has_every_recipe_and_no_other() -> None:
    first_table, _, _ = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("\n## ")
    named = [line.split("`")[1] for line in first_table.splitlines() if line.startswith("| `")]
    assert sorted(named) == sorted(file.stem for file in RECIPES.glob("*.yaml"))
