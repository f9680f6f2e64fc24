"""Where examples come from: generated tasks, JSON Lines, JSON and Parquet files, hub data sets by name.

A generated source is a pure function of its index, `Random(seed + index)`. Train, validation and test are kept apart
by content: the hash of an item's text decides its split, so no item of one split can appear in another, whatever the
seeds. (Level 1 of `calc` has 210 different items; drawing each split with a seed of its own would repeat them.)
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

from siesta.data.errors import DataError
from siesta.data.formats import read_as
from siesta.data.schema import Example
from siesta.data.tasks import calc, graph, hop, rule110

Split = Literal["train", "validation", "test"]

TASKS = {"calc": calc, "hop": hop, "rule110": rule110, "graph": graph}
BLANK: dict = {}  # compared by identity
FIELDS = ("id", "context", "query", "answer", "verifier", "level", "solution")


def split_of(text: str) -> Split:
    """The split that an item belongs to, from its text: 10 % test, 10 % validation, the rest train."""
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")  # pyright: ignore[reportReturnType]


def check_level_weights(key: str, task: str, level_weights: dict[int, float] | None) -> None:
    """Raises DataError, with the recipe's `key`, unless the weights are of levels that `task` has."""
    if level_weights is None:
        return
    levels = TASKS[task].MAX_LEVEL
    unknown = [level for level in level_weights if not 1 <= level <= levels]
    if unknown:
        raise DataError(f"{key}: {task} has levels 1 to {levels}, not {sorted(unknown)}")
    if min(level_weights.values(), default=0) < 0 or not sum(level_weights.values()) > 0:
        raise DataError(f"{key}: shares of levels are at least 0, and one is more: {level_weights}")


def check_queries(task: str, queries: int) -> None:
    """Raises DataError unless a context of `task` can be asked so many queries."""
    most = TASKS[task].QUERIES
    if queries > 1 and not most:
        raise DataError(f"data.queries: {task} has no context, so an item has one query, not {queries}")
    if queries > max(most, 1):
        raise DataError(f"data.queries: a context of {task} has {most} queries, not {queries}")


def check_task_size(task: str, size: int | None) -> None:
    """Raises DataError unless `task` can be drawn in this size."""
    sizes = TASKS[task].SIZES
    if size is not None and size not in sizes:
        has = f"is from {sizes.start} to {sizes.stop - 1}" if sizes else "is fixed"
        raise DataError(f"data.task_size: the size of {task} {has}, not {size}")


class TaskSource(Sequence[Example]):
    """`size` generated items of one split; item i depends on `seed + i` alone.

    With several queries a context, item i is query i % queries of context i // queries, and that context depends on
    `seed + i // queries` alone. Its text then decides the split, so that no context stands in two.

    Args:
        task: Key of `TASKS`.
        level_weights: Share of each level; None draws all levels equally. Validation and test ignore it and go round
            the levels in turn, so that every level is measured on as many items.
        queries: Of each context.
        task_size: Of each context, in the task's own unit; None is the task's default.
    """

    def __init__(
        self,
        task: str,
        split: Split,
        size: int,
        *,
        seed: int = 0,
        level_weights: dict[int, float] | None = None,
        queries: int = 1,
        task_size: int | None = None,
    ):
        self.task, self.split, self.size, self.seed, self.queries = task, split, size, seed, queries
        self.levels = list(range(1, TASKS[task].MAX_LEVEL + 1))
        check_level_weights("data.level_weights", task, level_weights)
        check_queries(task, queries)
        check_task_size(task, task_size)
        self.scale = {} if task_size is None else {"size": task_size}
        self.weights = [level_weights.get(level, 0.0) for level in self.levels] if level_weights else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        number, query = divmod(index, self.queries)
        rng = Random(self.seed + number)
        if self.split == "train":
            level = rng.choices(self.levels, self.weights)[0]
        else:
            level = self.levels[number % len(self.levels)]
        name = f"{self.task}-{self.split}-{number}"
        while True:
            if self.queries == 1:
                example = Example(id=name, **TASKS[self.task].fields(rng, level, **self.scale))
                own = example.text
            else:
                example = Example(
                    id=f"{name}-{query}", **TASKS[self.task].every_query(rng, level, **self.scale)[query]
                )
                own = example.context
            if split_of(own) == self.split:
                return example


def read_rows(path: str, *, name: str | None = None, split: str = "train", revision: str | None = None) -> list[dict]:
    """Rows of a local file or of a hub data set.

    Raises:
        DataError: The file is missing or of a kind that is not read, or a row does not parse; names file and row.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".json", ".parquet"):
        if not file.is_file():
            raise DataError(f"{path}: no such file; paths are relative to the working directory")
        reader = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[file.suffix]
        return reader(file)
    if file.exists():
        raise DataError(f"{path}: only .jsonl, .json and .parquet files are read")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return [dict(row) for row in load_dataset(path, name, split=split, revision=revision)]
    except (OSError, ValueError, DatasetsError) as error:  # covers an unknown name, an unknown split and no connection
        raise DataError(f"{path}: not a file, and no data set of this name could be loaded: {_line(error)}") from error


def _read_jsonl(file: Path) -> list[dict]:
    """A blank line becomes BLANK, so that rows count as an editor does. (splitlines would end rows at U+2028 too.)"""
    rows = []
    text = _text(file)
    if text.lstrip().startswith("["):
        raise DataError(f"{file}, row 1: an object is expected, this is a list; a file that is one list ends in .json")
    for number, line in enumerate(text.split("\n"), start=1):
        rows.append(_parsed(line, f"{file}, row {number}") if line.strip() else BLANK)
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}{line}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets within brackets
        raise DataError(f"{where}: not read: {_line(error)}") from error


def _read_json(file: Path) -> list[dict]:
    rows = _parsed(_text(file), str(file))
    if not isinstance(rows, list):
        raise DataError(f"{file}: a list of rows is expected, this is a {type(rows).__name__}")
    return rows


def _read_parquet(file: Path) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:  # OSError: the end is sound, what it points to is not
        raise DataError(f"{file}: not a Parquet file, or not a whole one: {_line(error)}") from error


def _text(file: Path) -> str:
    """The content, without the byte order mark that some editors put before it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def to_examples(
    rows: Iterable[Any],
    path: str,
    columns: dict[str, str],
    verifier: str,
    data_format: str | None = None,
    bad: list[str] | None = None,
) -> list[Example]:
    """Rows as examples.

    Args:
        path: Named in messages.
        columns: Field -> column. Fields are those of `FIELDS` and `responses.<mode>`; one that is not mapped is read
            from the column of its own name.
        data_format: How a published data set writes its rows, a key of `siesta.data.formats.FORMATS`.
        bad: Takes the message of each row that cannot be used; without it the first one is raised.

    Raises:
        DataError: A row lacks a query or an answer, or a value is not of the right kind; names file and row.
    """
    for name in columns:
        if name not in FIELDS and not name.startswith("responses."):
            raise DataError(f"data.columns.{name}: not a field; fields are {', '.join(FIELDS)}, responses.<mode>")
    examples = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if row is BLANK:
            continue
        where = f"{path}, row {number}"
        try:
            example = _to_example(row, f"{path}:{number}", where, columns, verifier, data_format)
            if (first := seen.setdefault(example.id, number)) != number:
                raise DataError(f"{where}: id {example.id!r} stands in row {first} already; ids are unique in a file")
            examples.append(example)
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
    return examples


def _to_example(
    row: Any, own_id: str, where: str, columns: dict[str, str], verifier: str, data_format: str | None
) -> Example:
    if not isinstance(row, dict):
        raise DataError(f"{where}: an object is expected, this is a {type(row).__name__}")
    if data_format is not None:
        row = read_as(data_format, row, where)
    values: dict[str, str] = {}
    for name in FIELDS:
        column = columns.get(name, name)
        if column in row and row[column] is not None:
            if not isinstance(row[column], str | int | float):
                kind = type(row[column]).__name__
                raise DataError(f"{where}: column {column!r} (field {name!r}) is a {kind}; text is expected")
            values[name] = _sound(str(row[column]).strip(), f"{where}: column {column!r}")
        elif name in columns or name in ("query", "answer"):
            raise DataError(f"{where}: no column {column!r} (field {name!r}); map it with data.columns.{name}")
    for name in ("query", "answer"):
        if not values[name]:
            raise DataError(f"{where}: {name} is empty")
    meta: dict[str, Any] = {"responses": _responses(row, where, columns)}
    if "level" in values:
        try:
            meta["level"] = int(values["level"])
        except ValueError as error:
            raise DataError(f"{where}: level {values['level']!r} is not a whole number") from error
    if values.get("solution"):
        meta["solution"] = values["solution"]
    return Example(
        id=values.get("id", own_id),
        context=values.get("context", ""),
        query=values["query"],
        answer=values["answer"],
        verifier=values.get("verifier", verifier),
        meta=meta,
    )


def _sound(text: str, where: str) -> str:
    """`text`, unless it has what no tokenizer or file takes: half a character, or NUL."""
    if "\0" in text:
        raise DataError(f"{where} holds a NUL character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where} holds half of a surrogate pair (such as \\ud83d alone), which is no character")
    return text


def _responses(row: dict, where: str, columns: dict[str, str]) -> dict[str, str]:
    """Worked responses per mode, from the mapped columns or from a `responses` object in the row."""
    responses = row.get("responses") or {}
    if isinstance(responses, dict):  # Parquet fills what a row lacks with None
        responses = {mode: text for mode, text in responses.items() if text is not None}
    if not isinstance(responses, dict) or not all(isinstance(text, str) for text in responses.values()):
        raise DataError(f"{where}: responses must map mode names to text")
    responses = dict(responses)
    for name, column in columns.items():
        if name.startswith("responses."):
            if not isinstance(row.get(column), str):
                raise DataError(f"{where}: no text in column {column!r} (field {name!r})")
            responses[name.removeprefix("responses.")] = row[column]
    return {mode: _sound(text, f"{where}: response {mode!r}") for mode, text in responses.items()}


def normalised(example: Example) -> str:
    """What two items have in common that only differ in capitals, white space or the form of their characters."""
    return " ".join(unicodedata.normalize("NFKC", example.text).casefold().split())


def without_overlap(train: Iterable[Example], evaluation: Iterable[Example]) -> list[Example]:
    """The training items that do not also stand in an evaluation set, by normalised text."""
    seen = {normalised(example) for example in evaluation}
    return [example for example in train if normalised(example) not in seen]
