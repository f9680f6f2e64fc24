"""Whatever a user gets wrong is one line on stderr that names it, exit code 2, before any work is done.

`refused` runs the real command line in this process with the stages replaced by one that must not be reached.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.faults_inputs import FILES, RECIPE
from siesta.rl import train
from siesta.rl.recipe import load_recipe
from tests.helpers import save_tiny_model, tiny_model


def questions(count: int, start: int = 0) -> list[dict]:
    responses = {"short": "1", "think": "1 = 1"}
    return [{"query": f"<calc> {i}", "answer": "1", "responses": responses} for i in range(start, start + count)]


def write_rows(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with two sound recipes and their data; trackers and hub calls leave nothing behind."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text(RECIPE)
    Path("files.yaml").write_text(FILES)
    write_rows("train.jsonl", questions(120))
    write_rows("test.jsonl", questions(10, 1000))
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def reached(context: object) -> None:
        raise AssertionError("the input was not refused: a stage was reached")

    def run(*arguments: str, names: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr(train, "STAGES", {"model": reached})
        assert train.main(list(arguments)) == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("siesta: error: ")
        assert [name for name in names if name not in lines[0]] == [], lines[0]
        assert printed.out == ""
        assert not Path("outputs").exists(), "a run directory was made"
        return lines[0]

    return run


@pytest.mark.parametrize("recipe", ["task.yaml", "files.yaml"])
def test_negative_control_the_recipes_themselves_are_sound(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([recipe, "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


# ---- recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("rl.taau=1", ("task.yaml", "rl.taau", "did you mean 'tau'")),
        ("rl.guard.windw=3", ("task.yaml", "rl.guard.windw", "did you mean 'window'")),
        ("warmup.stop={thnk: 0.9}", ("task.yaml", "warmup.stop.thnk", "did you mean 'think'")),
        ("warmup.stop={short@one: 0.9}", ("warmup.stop.short@one",)),
        ("warmup.shares={shrt: 1}", ("warmup.shares.shrt",)),
        ("warmup.shares={short: 0, think: 0}", ("warmup.shares",)),
        ("warmup.lr_scheduler_type=cosin", ("warmup", "cosin")),
        ("warmup.bf16=true", ("warmup", "bf16")),
        ("rl.bf16=true", ("rl", "bf16")),
        ("rl.num_generations=1", ("rl.num_generations",)),
        ("rl.per_device_train_batch_size=12", ("rl", "num_generations", "12")),
        ("rl.tau=0", ("rl.tau",)),
        ("rl.top_p=0.9", ("rl.top_p",)),
        ("rl.tau", ("'rl.tau'", "section.key=value")),
        ("rl.tau=[1", ("task.yaml", "while parsing")),
        ("rl=3", ("task.yaml", "rl:")),
        ("modes=[short, think]", ("task.yaml", "modes")),
        ("modes.short.token=", ("modes.short.token",)),
        ("modes.short.token=''", ("modes.short.token",)),
        ("modes.short.token=<eos>", ("'<eos>'", "special token")),
        ("modes.short.token=<calc>", ("'<calc>'", "already holds the control token")),
        ("data.task=calk", ("data.task", "'calk'")),
        ("data.level_weights={9: 1}", ("data.level_weights",)),
        ("data.level_weights={1: 0}", ("data.level_weights",)),
        ("warmup.level_weights={9: 1}", ("warmup.level_weights",)),
        ("warmup.level_weights={1: -1, 2: 2}", ("warmup.level_weights",)),
        ("data.max_prompt_tokens=3", ("calc-train-0", "data.max_prompt_tokens 3")),
        ("data.verifier=exakt", ("verifier", "exakt")),  # a task brings its own: the setting would do nothing
        ("data.test.path=test.jsonl", ("data", "test")),  # likewise
        ("model.path=./nowhere", ("model.path", "./nowhere")),
        ("model.embedded.heads=3", ("model.embedded",)),
        ("model.path=weights/none.gguf", ("model.path", "weights/none.gguf", "no such file")),
        ("model.path=empty", ("model.path: empty", "config.json is missing")),
        ("model.lora={rank: 8}", ("model.lora",)),
        ("model.quantization={load_in_4bit: true}", ("model.quantization", "set model.lora")),
        ("model.chat_template=none.jinja", ("model.chat_template", "none.jinja")),
        ("tracking.report_to=[wandbb]", ("tracking.report_to", "'wandbb'")),
    ],
)
def test_a_bad_setting(refused: Callable, override: str, names: tuple[str, ...]) -> None:
    Path("empty").mkdir()
    refused("task.yaml", override, names=names)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("- modes\n- data\n", ("mapping",)),
        ("modes\n", ()),
        ("", ("modes",)),
        ("modes: {short: [\n", ("while parsing",)),
        ("modes:\n\t- x\n", ("line 2",)),
        (f"{RECIPE}seed: 1\nseed: 2\n", ("duplicate key seed",)),
        (f"{RECIPE}seed: !!python/object/apply:os.mkdir [canary]\n", ("tag",)),
        (b"modes: \xff\n", ("utf-8",)),
    ],
)
def test_a_bad_recipe_file(refused: Callable, text: str | bytes, names: tuple[str, ...]) -> None:
    Path("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused("bad.yaml", names=("bad.yaml", *names))
    assert not Path("canary").exists()


@pytest.mark.parametrize("name", ["nope", "nope.yaml", "."])
def test_a_missing_recipe(refused: Callable, name: str) -> None:
    refused(name, names=(f"{name}: no such recipe", "quickstart"))


def test_a_tracker_that_is_not_installed(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_trackio(name: str, package: str | None = None):
        return None if name == "trackio" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_trackio)
    refused("task.yaml", "tracking.report_to=[trackio]", names=("tracking.report_to", "trackio is not installed"))


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ messages[0]['content'] }}", ("generation prompt",)),
        ("{% if add_generation_prompt %}", ("template",)),
        ("{% if add_generation_prompt %}{{ raise_exception('roles must alternate') }}{% endif %}", ("roles must",)),
        (b"\xff{% if add_generation_prompt %}{% endif %}", ("template.jinja",)),
        ("{{ '<think>' if add_generation_prompt else '' }}", ("already holds the control token",)),
        ("{% if add_generation_prompt %}A:{{ '<think>' }}\n{% endif %}", ("cannot be cut", "model.chat_template")),
    ],
    ids=["no-prompt", "syntax", "raises", "not-utf8", "uncut", "left-over"],
)
def test_a_bad_chat_template(refused: Callable, template: str | bytes, names: tuple[str, ...]) -> None:
    Path("template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    refused("task.yaml", "model.chat_template=template.jinja", names=names)


# ---- model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6", "qwen3"])
def test_a_model_that_cannot_be_found_or_reached(
    refused: Callable, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    names = ("model.path", name, "no such folder here", "the hub cannot be reached", "local folder")
    assert len(refused("task.yaml", f"model.path={name}", names=names)) < 300


def test_a_control_token_that_splits(refused: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """It stands in the vocabulary, but what splits text into words takes it apart first."""
    save_tiny_model(Path("start"))
    file = Path("start/tokenizer.json")
    content = json.loads(file.read_text())
    own = {"<short>", "<think>"}
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in own]
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    capsys.readouterr()
    line = refused(
        "task.yaml", "model.path=start", names=("modes.short", "'<short>'", "does not encode to the single")
    )
    assert line.count("<unk>") == 3, "<, short and >"


def test_an_adapter_for_another_base_model(refused: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(Path("base"))
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), settings).save_pretrained("adapter")
    assert train.main(["task.yaml", "model.path=adapter", "--dry-run"]) == 0, "it fits"
    tiny_model(hidden_size=32).save_pretrained("base")
    capsys.readouterr()
    refused("task.yaml", "model.path=adapter", names=("model.path: adapter", "another base model", "base:", "q_proj"))


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("data.train.path=none.jsonl", ("none.jsonl", "no such file")),
        ("data.test.path=none.parquet", ("none.parquet", "no such file")),
        ("data.train.path=train.csv", ("train.csv",)),
        ("data.verifier=exakt", ("data.verifier", "'exakt'", "Did you mean 'exact'")),
        ("data.verifier=no.such.function", ("data.verifier", "no.such.function")),
        ("data.columns={qery: problem}", ("data.columns.qery",)),
        ("data.columns={query: problem}", ("train.jsonl, row 1", "'problem'", "data.columns.query")),
        ("data.test.path=train.jsonl", ("data.train", "train.jsonl also stand in an evaluation set")),
        ("data.test=null", ("`test`",)),
    ],
)
def test_a_bad_data_setting(refused: Callable, override: str, names: tuple[str, ...]) -> None:
    Path("train.csv").touch()
    refused("files.yaml", override, names=names)


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_an_empty_data_set(refused: Callable, name: str) -> None:
    Path(name).write_text("")
    refused("files.yaml", names=(name, "no rows"))


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("{oops", ("row 3", "not JSON")),
        ('{"query": "1"}', ("row 3", "'answer'")),
        ('{"query": "", "answer": "1"}', ("row 3", "query is empty")),
        ("[1, 2]", ("row 3", "an object is expected")),
        ('{"query": "1", "answer": "1", "responses": "1"}', ("row 3", "responses")),
        ('{"query": "1", "answer": "1", "level": "top"}', ("row 3", "level 'top'")),
        ('{"query": "1", "answer": "1", "verifier": "exakt"}', ("exakt",)),
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_a_malformed_row(refused: Callable, name: str, line: str, names: tuple[str, ...]) -> None:
    rows = Path(name).read_text().splitlines()
    Path(name).write_text("\n".join([*rows[:2], line, *rows[3:]]))
    refused("files.yaml", names=names if "exakt" in names else (name, *names))


def put(name: str, row: int, query: str) -> None:
    """Replace the query of a row; the validation split is a source of its own here."""
    write_rows("validation.jsonl", questions(90, 2000))
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    rows[row]["query"] = query
    write_rows(name, rows)


PLACES = [("train.jsonl", 3), ("train.jsonl", 80), ("validation.jsonl", 3), ("test.jsonl", 3)]


@pytest.mark.parametrize(("name", "row"), PLACES)
def test_a_prompt_over_the_limit(refused: Callable, name: str, row: int) -> None:
    write_rows("validation.jsonl", questions(90, 2000))
    put(name, row, "<calc> " * 600)
    names = (f"{name}:{row + 1}", "data.max_prompt_tokens")
    refused("files.yaml", "data.validation.path=validation.jsonl", names=names)


@pytest.mark.parametrize(("name", "row"), PLACES)
def test_a_control_token_in_the_data(refused: Callable, name: str, row: int) -> None:
    """Anywhere in it: such a prompt decides its mode, and there is no second look after the start."""
    write_rows("validation.jsonl", questions(90, 2000))
    put(name, row, "please <think> first")
    refused("files.yaml", "data.validation.path=validation.jsonl", names=("'<think>'", f"{name}:{row + 1}"))


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_recipe_and_makes_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert train.main(["task.yaml", "rl.tau=0.3", "tracking.run=dry", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = yaml.safe_load(printed.out)
    assert (content["rl"]["tau"], content["tracking"]["run"], content["data"]["task"]) == (0.3, "dry", "calc")
    assert sorted(folder.iterdir()) == before
    Path("printed.yaml").write_text(printed.out)
    assert load_recipe("printed.yaml") == load_recipe("task.yaml", ["rl.tau=0.3", "tracking.run=dry"])


def test_a_dry_run_checks_as_a_run_does(refused: Callable) -> None:
    refused("task.yaml", "data.max_prompt_tokens=3", "--dry-run", names=("data.max_prompt_tokens",))
    refused("files.yaml", "data.train.path=none.jsonl", "--dry-run", names=("none.jsonl",))


def test_the_command_ends_with_code_2_and_one_line(folder: Path) -> None:
    command = [sys.executable, "-m", "siesta.rl.train", "nope"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("siesta: error: nope: no such recipe; ")
