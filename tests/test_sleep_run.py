"""A recipe with notes from its first line to its evaluation, tiny; what it refuses; the results page's tables."""

import json
from pathlib import Path

import pytest

from benchmarks import sleep_notes
from siesta.data.errors import RecipeError
from siesta.rl.recipe import load_recipe
from siesta.rl.sleep.states import STATES
from siesta.rl.train import main

TINY = [
    "model.embedded={layers: 1, hidden_size: 16, heads: 2}",
    "data.train_size=64",
    "warmup.max_steps=2",
    "warmup.check_every=2",
    "warmup.check_items=16",
    "warmup.stop={}",
    "warmup.min_mass=0",
    "warmup.min_share=0",
    "rl.max_steps=2",
    "rl.save_strategy='no'",
    "rl.logging_steps=1",
    "rl.lr_scheduler_type=constant",
    "rl.lr_scheduler_kwargs=null",
    "sleep.max_tokens=66",
    "evaluate={items: 16, samples: 1, resamples: 20, every: 2, every_items: 8, every_samples: 1}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert main(["quickstart_sleep", f"tracking.output_dir={folder}", "tracking.run=wake-0", *TINY]) == 0
    return folder / "wake-0"


def test_every_stage_knows_of_notes(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "rl" and "sleep/note_tokens" in row]
    assert trained[-1]["step"] == 2
    validated = [row for row in rows if "validation/rows_right" in row]
    assert {"validation/prob/think", "validation/own/prob/think", "validation/note_tokens"} <= set(validated[0])
    for result in json.loads((run / "evaluation.json").read_text()).values():
        assert set(result["states"]) == set(STATES) - {"none"}
        assert result["items"] == result["states"]["own"]["items"] == 16
        assert result["sleep"]["contexts"] == 2
    assert "<sleep>" in (run / "export" / "tokenizer.json").read_text()


def test_the_page_holds_what_the_run_says(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep_notes, "run_all", lambda *arguments: None)
    (run.parent / "writer-0").symlink_to(run)
    arguments = ["sleep_notes", "--seeds", "0", "--runs", str(run.parent), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    sleep_notes.main()
    page = (tmp_path / "sleep.md").read_text()
    content = json.loads((tmp_path / "sleep.json").read_text())
    seed = content["wake"]["0"]
    accuracy = 100 * seed["evaluation"]["after"]["states"]["own"]["greedy"]["free"]["accuracy"]
    assert f"| own | free | {accuracy:.1f} |" in page
    for block in sleep_notes.BLOCKS:
        assert page.count(f"<!-- {block} -->\n`python -m benchmarks.sleep_notes`") == 1
    for decoding in ("greedy", "drawn"):
        assert set(content["writer"]["0"]["writers"][decoding]) == {"warm-up", "RL", "gain"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sleep.token=<short>"], r"sleep\.token: <short> is a mode's control token$"),
        (["warmup.stop={slep: 0.9}"], r"warmup\.stop\.slep: unknown key; did you mean 'sleep'\?$"),
        (["sleep={mechanism: none}", "warmup.stop={sleep: 0.9}"], r"warmup\.stop\.sleep: unknown key"),
        (["sleep={mechanism: none, keep_tokens: 3}"], r"`keep_tokens` belongs to notes, not to none"),
        (["sleep.max_tokens=1"], r"sleep\.max_tokens: Input should be greater than or equal to 2"),
    ],
)
def test_what_a_recipe_cannot_ask_for(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart_sleep", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.num_generations=1"], "rl.num_generations: 1 rollouts cannot hold 2 modes; use at least 2"),
        (["rl.per_device_train_batch_size=24", "sleep.sleeps=3"], "24 rollouts of a device are no whole number"),
        (["evaluate.engine=vllm"], "evaluate.engine: vllm: with notes evaluation is by the model itself"),
    ],
)
def test_what_the_start_refuses(overrides: list[str], message: str, tmp_path: Path, capsys) -> None:
    arguments = ["quickstart_sleep", f"tracking.output_dir={tmp_path}", "data.train_size=64", *overrides]
    assert main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
