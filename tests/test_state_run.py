"""A recipe whose state is tensors from its first line to its evaluation, tiny; and what the start refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from siesta.rl import embedded
from siesta.rl.recipe import load_recipe
from siesta.rl.sleep.factory import open_sleeper
from siesta.rl.sleep.states import STATES
from siesta.rl.train import main
from tests.hybrids import hybrid

TINY = [
    "model.embedded={layers: 2, hidden_size: 16, heads: 2}",
    "data.queries=8",
    "data.train_size=64",
    "warmup.max_steps=2",
    "warmup.check_every=2",
    "warmup.check_items=16",
    "warmup.stop={sleep: 0.0}",
    "warmup.per_device_train_batch_size=16",
    "warmup.min_mass=0",
    "warmup.min_share=0",
    "rl.max_steps=2",
    "rl.per_device_train_batch_size=64",
    "rl.num_generations=4",
    "rl.share_prompts=false",
    "rl.save_strategy='no'",
    "rl.logging_steps=1",
    "rl.lr_scheduler_type=constant",
    "rl.lr_scheduler_kwargs=null",
    "evaluate={items: 16, samples: 1, resamples: 20, every: 2, every_items: 8, every_samples: 1}",
]
SLEEP = {
    "gist": "sleep={mechanism: gist, slots: 3, passes: 2, queries: 8, stateless: 0.5}",
    "memory": "sleep={mechanism: memory, layer: 1, segment: 4, queries: 8, stateless: 0.5}",
    "latent": "sleep={mechanism: latent, queries: 8, stateless: 0.5}",
}


def model_options(mechanism: str, folder: Path) -> list[str]:
    """A tiny hybrid in a folder, where the mechanism needs one."""
    if mechanism != "latent":
        return []
    model: Any = hybrid("qwen3_5", torch.float32)
    model.save_pretrained(folder)
    embedded.build_tokenizer().save_pretrained(folder)
    return [f"model.path={folder}"]


@pytest.fixture(scope="module", params=SLEEP)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    mechanism = request.param
    if mechanism == "memory":
        pytest.importorskip("titans_pytorch")
    folder = tmp_path_factory.mktemp("runs")
    options = [f"tracking.output_dir={folder}", "tracking.run=states", *TINY, SLEEP[mechanism]]
    assert main(["hop", *options, *model_options(mechanism, folder / "hybrid")]) == 0
    return mechanism, folder / "states"


def test_every_stage_knows_of_states(run: tuple[str, Path]) -> None:
    mechanism, folder = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "rl" and "sleep/own/share" in row]
    assert [row["sleep/own/share"] for row in trained] == [0.5, 0.5]
    validated = [row for row in rows if "validation/regret" in row]
    assert {"validation/prob/think", "validation/own/prob/think"} <= set(validated[0])
    for result in json.loads((folder / "evaluation.json").read_text()).values():
        assert set(result["states"]) == set(STATES) - {"none"}
        assert result["sleep"]["contexts"] == 2
        assert set(result["sleep"]["against_none"]) == set(STATES) - {"none"}
    tokens, kept = result["sleep"]["sleep_tokens"][0], result["sleep"]["state_bytes"][0]
    if mechanism == "gist":
        assert tokens == 10 + 2 * 3, "a context of 10 tokens, and 2 passes of 3 slots"
        assert kept == 2 * 2 * 3 * 16 * 4, "keys and values of 2 layers, 3 slots, width 16, 4 bytes"
    else:
        assert tokens == 10
        assert kept > 0


def test_what_is_exported_sleeps(run: tuple[str, Path]) -> None:
    """The export has all that was trained, and `siesta sleep` finds nothing missing."""
    _, folder = run
    untrained, exported = (load_file(folder / name / "model.safetensors") for name in ("model", "export"))
    assert untrained.keys() == exported.keys()
    unmoved = [name for name, weight in untrained.items() if torch.equal(weight, exported[name])]
    assert [name for name in unmoved if ".memory_model." not in name] == [], "that one is a template with no use"
    sleeper = open_sleeper(load_recipe(folder / "recipe.yaml", []), None)
    assert sleeper.trained
    assert len(sleeper.way.sleep(sleeper.model, ["<ctx> k1 a>b b>a"], passes=1).state) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.share_prompts=true"], "rl.share_prompts: rows behind a state do not share prompts"),
        (["evaluate.engine=vllm"], "evaluate.engine: vllm: with gist evaluation is by the model itself"),
        (["model.lora={r: 4}"], "model.lora: an adapter would not train all that gist needs"),
        (["warmup.gradient_checkpointing=true"], "warmup.gradient_checkpointing: such blocks leave no state"),
        (["rl.per_device_train_batch_size=24"], "24 rollouts of a device are no whole number of contexts"),
        (["sleep={mechanism: latent}"], "sleep.mechanism: latent: model: llama has no recurrent layers to sleep into"),
        (["sleep={mechanism: raw}"], "sleep.mechanism: raw: there is nothing in it to train"),
        (["sleep={mechanism: memory, layer: 2}"], "sleep.layer: 2: the model has the layers 0 to 1"),
        (["data.task=calc", "data.queries=1", "sleep.queries=1"], "context 0: empty, there is nothing to sleep on"),
        (["warmup.length_power=0.5"], "warmup.length_power: rows behind a state of gist know 1 alone"),
    ],
)
def test_what_the_start_refuses(overrides: list[str], message: str, tmp_path: Path, capsys) -> None:
    arguments = ["hop", f"tracking.output_dir={tmp_path}", *TINY, SLEEP["gist"], *overrides]
    if any("{mechanism: raw}" in override for override in overrides):
        arguments = [argument for argument in arguments if "warmup.stop" not in argument]
    assert main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
