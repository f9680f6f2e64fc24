"""A recipe that is warmed up on a responses file: the rows it takes, those it must not see, the whole stage."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from siesta.data.sources import TaskSource
from siesta.rl import cli
from siesta.rl.context import Context
from siesta.rl.recipe import load_recipe
from siesta.rl.run import Run
from tests.teaching import MODES

SMALL = "model: {embedded: {layers: 1, hidden_size: 16, heads: 2}}\nevaluate: {items: 16, samples: 1}\n"
WARMUP = "warmup: {max_steps: 2, check_items: 16, min_mass: 0, min_share: 0, per_device_train_batch_size: 8}\n"
RECIPE = (
    MODES + SMALL + WARMUP + "data: {task: calc, train_size: 40}\nrl: {enabled: false}\nexport: {enabled: false}\n"
)
TEACHERS = "teachers={short: {from: written}, think: {from: written}}"


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Context, list[str]]]:
    """A run on `rows.jsonl` in a working directory of its own, and the list of what it says."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    said: list[str] = []

    def make(*overrides: str) -> tuple[Context, list[str]]:
        return Context(Run(load_recipe("recipe.yaml", ["warmup.responses=rows.jsonl", *overrides])), said.append), said

    return make


def write(rows: list[dict]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(query: str, **responses: str) -> dict:
    return {"query": query, "answer": "1", "verifier": "exact", "level": 1, "responses": responses}


def test_the_rows_are_taken_and_counted(context: Callable) -> None:
    write([row("<calc> 1", short="1", think="1 = 1"), row("<calc> 2", short="1"), row("<calc> 3", think="1 = 1")])
    own, said = context()
    assert [example.query for example in own.warmup_examples] == ["<calc> 1", "<calc> 2", "<calc> 3"]
    paired, _ = context("warmup.pairing=paired")
    assert [example.query for example in paired.warmup_examples] == ["<calc> 1"]
    assert said == [
        "warm-up: 3 of 3 rows of rows.jsonl, pairing cross",
        "warm-up: 1 of 3 rows of rows.jsonl, pairing paired",
    ]
    assert own.own_warmup_examples == own.train_examples, "RL keeps the recipe's own"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_items_of_an_evaluation_set_are_left_out(context: Callable, split) -> None:
    asked = TaskSource("calc", split, 16)[15].query
    write([row("<calc> 1", short="1", think="1 = 1"), row(f"  {asked.upper()} ", short="1", think="1 = 1")])
    own, said = context("warmup.check_items=16", "evaluate.every_items=16")
    assert [example.query for example in own.warmup_examples] == ["<calc> 1"]
    assert said == ["warm-up: 1 of 1 rows of rows.jsonl, pairing cross; 1 more also stand in an evaluation set"]


def test_the_tail_that_is_held_out_of_a_source_is_left_out(context: Callable) -> None:
    """Without a validation source, a tenth of the training rows validates."""
    Path("train.jsonl").write_text("".join(json.dumps(row(f"<calc> {i}")) + "\n" for i in range(10)))
    Path("test.jsonl").write_text(json.dumps(row("<calc> 77")) + "\n")
    write([row(f"<calc> {i}", short="1", think="1 = 1") for i in (0, 8, 9, 77)])
    own, _ = context("data={train: {path: train.jsonl}, test: {path: test.jsonl}}")
    assert [example.query for example in own.warmup_examples] == ["<calc> 0", "<calc> 8"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "rows.jsonl: no such file"),
        ([], "warmup.responses: rows.jsonl: empty"),
        ([{"query": "q"}], "rows.jsonl, row 1: no column 'answer'"),
        ([row("<calc> 1", short="1")], "warmup.responses: rows.jsonl: no row has a response for mode 'think'"),
        ([row("<short> 1", short="1", think="1 = 1")], "the prompt already holds the control token '<short>'"),
    ],
)
def test_bad_files_are_one_line_before_any_work(
    context: Callable, rows: list[dict] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if rows is not None:
        write(rows)
    assert cli.main(["train", "recipe.yaml", "warmup.responses=rows.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("outputs").exists()


def test_from_warm_up_data_to_a_warmed_up_model(context: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands in turn; the stage itself proves that its prompts are those of data/prompts.py."""
    assert cli.main(["warmup-data", "recipe.yaml", TEACHERS, "--out", "made"]) == 0
    for pairing in ("paired", "cross"):
        more = ["warmup.responses=made/responses.jsonl", f"warmup.pairing={pairing}", f"tracking.run={pairing}"]
        assert cli.main(["train", "recipe.yaml", *more]) == 0
        assert f"warm-up: 40 of 40 rows of made/responses.jsonl, pairing {pairing}" in capsys.readouterr().out
        assert Path(f"outputs/{pairing}/warmup/model.safetensors").exists()
