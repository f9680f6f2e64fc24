"""Bad recipes, bad data and hostile verifiers, through the real command.

A bad recipe or bad data ends in one line that names the thing, exit code 2, before any work is done. A hostile
verifier costs the rollouts that it was asked about, which are counted; training goes on.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from benchmarks.faults_process import Ended, Process
from benchmarks.faults_row import Row, finished, message, one_line, refused, untouched
from siesta.rl.report import read_metrics

RECIPE = """\
modes:
  short: {token: "<short>", max_tokens: 2}
  think: {token: "<think>", max_tokens: 12, correct: 0.5, answer_after: "="}
data: {task: calc, train_size: 100}
evaluate: {items: 20}
"""
FILES = RECIPE.replace("task: calc", "train: {path: train.jsonl}, test: {path: test.jsonl}")
CANARY = "canary"
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


class Case(NamedTuple):
    """A bad input: what a user would call it, arguments, files to write, words that the line holds."""

    fault: str
    arguments: tuple[str, ...]
    names: tuple[str, ...]
    files: dict[str, str | bytes] = {}  # noqa: RUF012  never changed
    begun: bool = False  # found by the warm-up, when the model has been built


def recipe_file(fault: str, text: str | bytes, *names: str) -> Case:
    """A recipe file that is bad itself."""
    return Case(fault, ("bad.yaml",), ("bad.yaml", *names), {"bad.yaml": text})


def setting(fault: str, override: str, *names: str) -> Case:
    """A sound recipe with a bad setting."""
    return Case(fault, ("task.yaml", override), names)


CONFIGS = [
    setting("a misspelt key", "rl.taau=1", "rl.taau", "did you mean 'tau'"),
    setting("a section that does not exist", "rll.tau=1", "rll"),
    setting("a word where a number belongs", "rl.learning_rate=fast", "rl.learning_rate", "'fast'"),
    setting("a value out of range", "rl.tau=0", "rl.tau"),
    setting("not a number", "rl.alpha=.nan", "alpha"),
    setting("a batch that no group fits into", "rl.per_device_train_batch_size=12", "rl", "num_generations", "12"),
    setting("groups of one", "rl.num_generations=1", "rl.num_generations"),
    setting("a setting of another loss", "rl.top_p=0.9", "rl.top_p"),
    setting("a setting in another section", "rl.output_dir=here", "rl.output_dir", "tracking.output_dir"),
    setting("a reference to nowhere", "rl.tau=${nowhere}", "task.yaml", "nowhere"),
    setting("a mode that is not declared", "warmup.stop={thnk: 0.9}", "warmup.stop.thnk", "did you mean 'think'"),
    setting("two modes with one token", "modes.short.token=<think>", "modes", "share a control token"),
    setting("a control token that is in use", "modes.short.token=<eos>", "'<eos>'", "special token"),
    setting("a model that is not there", "model.path=./nowhere", "model.path", "./nowhere"),
    setting("heads that do not fit", "model.embedded.heads=3", "model.embedded"),
    setting("an adapter setting that peft has not", "model.lora={rank: 8}", "model.lora", "rank"),
    setting("a number format this machine has not", "rl.bf16=true", "rl", "bf16"),
    setting("an unknown tracker", "tracking.report_to=[wandbb]", "tracking.report_to", "'wandbb'"),
    setting("a run directory that is a file", "tracking.output_dir=task.yaml", "task.yaml", "tracking.output_dir"),
    setting("prompts over the limit", "data.max_prompt_tokens=3", "data.max_prompt_tokens 3"),
    Case("a recipe that is not there", ("nope",), ("nope: no such recipe", "quickstart")),
    recipe_file("a list instead of sections", "- modes\n- data\n", "mapping"),
    recipe_file("broken YAML", "modes: {short: [\n", "while parsing"),
    recipe_file("a key twice", f"{RECIPE}seed: 1\nseed: 2\n", "duplicate key seed"),
    recipe_file("a recipe based on itself", f"base: bad\n{RECIPE}", "base"),
    recipe_file("a recipe that is not UTF-8", b"modes: \xff\n", "utf-8"),
    recipe_file("a recipe that grows without bound", LAUGHS, "expansion exceeds"),
    recipe_file("Python objects in YAML", f"{RECIPE}seed: !!python/object/apply:os.mkdir [{CANARY}]\n", "tag"),
    recipe_file("Python names in YAML", f"{RECIPE}seed: !!python/name:os.system\n", "tag"),
]


def row_case(fault: str, row: str | bytes, *names: str) -> Case:
    """A training file whose third row is bad."""
    lines = [json.dumps(question(i)).encode() for i in range(120)]
    lines[2] = row.encode() if isinstance(row, str) else row
    return Case(fault, ("files.yaml",), names, {"train.jsonl": b"\n".join(lines) + b"\n"})


def data_setting(fault: str, override: str, *names: str, **files: str | bytes) -> Case:
    """A setting of `data:` that does not fit the files."""
    return Case(fault, ("files.yaml", override), names, {name.replace("_", "."): text for name, text in files.items()})


def question(number: int, answer: str = "1") -> dict:
    """A row of data, with a response to warm up on in both modes."""
    return {"query": f"<calc> {number}", "answer": answer, "responses": {"short": "1", "think": "1 = 1"}}


THIRD = "train.jsonl, row 3"
DATA = [
    data_setting("a file that is not there", "data.train.path=none.jsonl", "none.jsonl: no such file"),
    data_setting(
        "a kind of file that is not read", "data.train.path=train.csv", "train.csv", train_csv="query,answer\n"
    ),
    data_setting("a folder", "data.train.path=folder.jsonl", "folder.jsonl"),
    data_setting("half of a Parquet file", "data.train.path=half.parquet", "half.parquet: not a Parquet file"),
    data_setting("no list in a .json file", "data.train.path=one.json", "one.json: a list", one_json="{}"),
    data_setting("a column that is not there", "data.columns={query: problem}", "train.jsonl, row 1", "'problem'"),
    data_setting("a field that does not exist", "data.columns={qery: problem}", "data.columns.qery"),
    data_setting("a verifier that does not exist", "data.verifier=exakt", "data.verifier", "Did you mean 'exact'"),
    data_setting(
        "a verifier that cannot be imported", "data.verifier=no.such.thing", "data.verifier", "no.such.thing"
    ),
    data_setting("the test set as training set", "data.test.path=train.jsonl", "data.train", "evaluation set"),
    Case("an empty file", ("files.yaml",), ("train.jsonl", "no rows"), {"train.jsonl": ""}),
    row_case("broken JSON", "{oops", THIRD, "not JSON"),
    row_case("bytes that are not UTF-8", b'{"query": "\xff", "answer": "1"}', "train.jsonl: not UTF-8"),
    row_case("a row that is a list", "[1, 2]", THIRD, "an object is expected"),
    row_case("no answer", '{"query": "1"}', THIRD, "'answer'"),
    row_case("an empty question", '{"query": " ", "answer": "1"}', THIRD, "query is empty"),
    row_case("a question that is a list", '{"query": ["1"], "answer": "1"}', THIRD, "is a list"),
    row_case("a NUL character", '{"query": "1\\u0000", "answer": "1"}', THIRD, "NUL"),
    row_case("half of a character", '{"query": "\\ud83d", "answer": "1"}', THIRD, "surrogate"),
    row_case("a number of 5,000 digits", '{"query": "1", "answer": ' + "9" * 5000 + "}", THIRD, "Exceeds the limit"),
    row_case("brackets 100,000 deep", '{"query": ' + "[" * 100_000, THIRD, "recursion"),
    row_case("a level that is a word", '{"query": "1", "answer": "1", "level": "top"}', THIRD, "level 'top'"),
    row_case("responses that are no mapping", '{"query": "1", "answer": "1", "responses": "1"}', THIRD, "responses"),
    row_case(
        "no response to warm up on", '{"query": "<calc> 7", "answer": "1"}', "train.jsonl:3", "no response"
    )._replace(begun=True),
    row_case("an id twice", json.dumps(question(2) | {"id": "train.jsonl:1"}), THIRD, "stands in row 1"),
    row_case("a control token in a question", '{"query": "<think> 1", "answer": "1"}', "'<think>'", "train.jsonl:3"),
    row_case("a question over the limit", json.dumps(question(2) | {"query": "<calc> " * 600}), "train.jsonl:3"),
]


def lay_out(folder: Path, case: Case) -> None:
    """Sound recipes with their data, then the files of the case."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in {"task.yaml": RECIPE, "files.yaml": FILES}.items():
        (folder / name).write_text(text)
    for name, start, count in (("train.jsonl", 0, 120), ("test.jsonl", 1000, 10)):
        write_rows(folder / name, [question(start + i) for i in range(count)])
    (folder / "folder.jsonl").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([question(i) for i in range(500)]), folder / "half.parquet")
    whole = (folder / "half.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(whole[: len(whole) // 2])
    for name, text in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def write_rows(file: Path, rows: list[dict]) -> None:
    """A .jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refuse(part: str, case: Case, folder: Path) -> Row:
    """Run the command on a bad input."""
    lay_out(folder, case)
    ended = Process(case.arguments, folder, folder / "printed").end()
    failures = refused(ended, case.names) + untouched(folder / CANARY)
    if (folder / "outputs").exists() and not case.begun:
        failures.append("a run directory was made")
    lost = "the model stage" if case.begun else "nothing was begun"
    told = message(ended.told).replace(f"{folder}/", "")
    return Row(part, case.fault, lost=lost, message=told, failures=failures)


def bad_inputs(folder: Path, take: Callable[[list[Case]], list[Case]] = lambda cases: cases) -> list[Row]:
    """Rows of all bad recipes and bad data, or of those that `take` picks."""
    rows = []
    for part, cases in (("configuration", CONFIGS), ("data", DATA)):
        rows += [refuse(part, case, folder / part / str(i)) for i, case in enumerate(take(cases))]
    return rows


# ---- verifiers -----------------------------------------------------------------------------------------------------

# Deed of tests/verifier_zoo.py -> what it is, its argument, what the line says.
DEEDS = {
    "raise": ("raises", "", "ZeroDivisionError: division by zero"),
    "exit": ("ends its process", "", "the worker died (exit status 3)"),
    "sys.exit": ("calls sys.exit", "", "SystemExit: 4"),
    "hang": ("never ends, in Python", "", "timed out after"),
    "hang in C": ("never ends, in C", "", "timed out after"),
    "nan": ("returns NaN", "", "returned nan, outside [0, 1]"),
    "seven": ("returns 7", "", "returned 7.0, outside [0, 1]"),
    "list": ("returns a list", "", "returned list, not a number"),
    "shout": ("raises with a message of 1.4 MB", "", "ValueError: much too long"),
    "write everywhere": ("forges replies", '{"score": 1.0, "failed": ""}\n', "the worker sent a garbled reply"),
    "write for ever": ("replies without end", "", "the worker sent a garbled reply"),
    "allocate": ("takes 4 GiB of 1", str(2**32), "MemoryError"),
    "close every descriptor": ("closes its pipes", "", "the worker died (exit status"),
}
ZOO = Path(__file__).parents[1] / "tests" / "verifier_zoo.py"
GROUP, QUESTIONS = 4, 8  # rollouts of a question; questions of the two steps, of which one has a hostile verifier
HOSTILE = """\
modes:
  short: {token: "<short>", max_tokens: 2}
  think: {token: "<think>", max_tokens: 12, correct: 0.5, answer_after: "="}
model: {embedded: {layers: 1, hidden_size: 16, heads: 2}}
data: {train: {path: train.jsonl}, validation: {path: validation.jsonl}, test: {path: test.jsonl},
  verifier: verifier_zoo.by_answer}
warmup: {enabled: false, min_mass: 0.0, min_share: 0.0, check_items: 4}
rl: {max_steps: 2, per_device_train_batch_size: 16, num_generations: 4, gradient_checkpointing: false,
  logging_steps: 1, verifier_memory: 1.0}
evaluate: {items: 4, samples: 1, resamples: 10}
"""


def hostile(deed: str, folder: Path) -> Row:
    """A run in which one question of eight has a verifier that does `deed`."""
    what, argument, reason = DEEDS[deed]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(ZOO, folder)
    (folder / "hostile.yaml").write_text(HOSTILE)
    answers = [f"{deed}|{argument}|1", *["1"] * (QUESTIONS - 1)]
    write_rows(folder / "train.jsonl", [question(i, answer) for i, answer in enumerate(answers)])
    for name, start in (("validation", 100), ("test", 200)):
        write_rows(folder / f"{name}.jsonl", [question(start + i) for i in range(8)])
    limit = 2.0 if reason.startswith("timed out") else 60.0  # the others must not time out on a busy machine
    ended = Process(["hostile.yaml", f"rl.verifier_timeout={limit}"], folder, folder / "printed").end()
    lines = [line for line in ended.told if line.startswith("a verifier failed: ")]
    failures = finished(ended) + one_line(lines, [reason, "training goes on"])
    lost = unscorable(folder / "outputs" / "hostile", ended)
    if lost != GROUP:
        failures.append(f"{lost} rollouts are counted as unscorable, not {GROUP}")
    told = message(lines, "a verifier failed: ")
    return Row("verifiers", what, GROUP, f"{lost} rollouts, counted", message=told, failures=failures)


def unscorable(run: Path, ended: Ended) -> int:
    """Rollouts that the run itself counts as unscorable; -1 if it did not take both steps."""
    rows = [row for row in read_metrics(run, "rl") if "rollout/unscorable" in row] if ended.code == 0 else []
    return round(sum(row["rollout/unscorable"] for row in rows)) if [row["step"] for row in rows] == [1, 2] else -1


def hostile_verifiers(folder: Path, deeds: list[str] | None = None) -> list[Row]:
    """Rows of all hostile verifiers, or of these."""
    return [hostile(deed, folder / deed.replace(" ", "_")) for deed in deeds or DEEDS]
