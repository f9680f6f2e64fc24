"""Sources: generated splits that cannot touch, files and hub data sets that fail with the file and the row."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, get_args

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from siesta.data.errors import DataError
from siesta.data.loading import load_examples, skipped_rows, training_examples
from siesta.data.prompts import messages
from siesta.data.schema import Example
from siesta.data.sources import Split, TaskSource, read_rows, split_of, to_examples, without_overlap
from siesta.data.tasks import calc
from siesta.rl.data_section import DataSection, Source

SPLITS = get_args(Split)
ROWS = [
    {"id": "a", "query": "1 + 1 = ?", "answer": "2", "level": 1, "responses": {"short": "2", "think": "1 1 = 2"}},
    {"id": "b", "query": "Grüße?\u2028ja", "answer": "ja", "level": 2, "responses": {"short": "ja", "think": "= ja"}},
]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def questions(count: int, start: int = 0) -> list[dict]:
    return [{"query": f"question {i}", "answer": str(i)} for i in range(start, start + count)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """Writes a file and returns its path as text."""

    def writer(name: str, content: str | bytes) -> str:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return writer


def load(path: str, columns: dict[str, str] | None = None) -> list[Example]:
    return to_examples(read_rows(path), path, columns or {}, "exact")


# ---- generated tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["calc", "hop"])
def test_an_item_is_a_function_of_seed_and_index(task: str, split: Split) -> None:
    source = TaskSource(task, split, 60, seed=7)
    forwards = list(source)
    assert forwards == list(TaskSource(task, split, 60, seed=7))
    assert [source[i] for i in reversed(range(60))] == forwards[::-1], "independent of the order of access"
    assert list(TaskSource(task, split, 1000, seed=7))[:60] == forwards, "and of the size"
    assert forwards[10:20] == [source[i] for i in range(10, 20)]
    assert forwards != list(TaskSource(task, split, 60, seed=8_000))


def test_the_seed_of_item_i_is_seed_plus_i() -> None:
    """Whatever else an item needs (level, redraws for its split) comes out of Random(seed + i)."""
    later = TaskSource("hop", "train", 40, seed=100)
    assert [x.query for x in TaskSource("hop", "train", 30, seed=110)] == [later[i].query for i in range(10, 40)]


def test_a_task_source_ends_at_its_size() -> None:
    source = TaskSource("calc", "train", 5)
    assert len(source) == len(list(source)) == 5
    for index in (5, -6):
        with pytest.raises(IndexError):
            source[index]


def test_ids_are_unique_and_name_the_split() -> None:
    items = [x for split in SPLITS for x in TaskSource("calc", split, 100)]
    assert len({x.id for x in items}) == 300
    assert items[0].id == "calc-train-0"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_goes_round_the_levels(split: Split) -> None:
    source = TaskSource("calc", split, 80, level_weights={1: 1.0})
    assert [x.level for x in source] == [1, 2, 3, 4, 5, 6, 7, 8] * 10


def test_training_levels_follow_their_weights() -> None:
    counts = Counter(x.level for x in TaskSource("calc", "train", 4000, level_weights={1: 3.0, 5: 1.0}))
    assert set(counts) == {1, 5}
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.03)
    even = Counter(x.level for x in TaskSource("calc", "train", 4000))
    assert all(even[level] / 4000 == pytest.approx(1 / 8, abs=0.03) for level in range(1, 9))


@pytest.mark.parametrize("weights", [{9: 1.0}, {0: 1.0, 1: 1.0}])
def test_unknown_levels_are_refused(weights: dict[int, float]) -> None:
    with pytest.raises(DataError, match=r"data\.level_weights: calc has levels 1 to 8"):
        TaskSource("calc", "train", 10, level_weights=weights)


@pytest.mark.parametrize("weights", [{1: 0.0}, {1: -1.0}, {1: -1.0, 2: 3.0}])
def test_weights_that_are_no_weights_are_refused(weights: dict[int, float]) -> None:
    with pytest.raises(DataError, match=r"data\.level_weights"):
        list(TaskSource("calc", "train", 10, level_weights=weights))


@pytest.mark.parametrize(("task", "weights"), [("calc", None), ("calc", {1: 1.0}), ("hop", None)])
def test_splits_never_share_an_item(task: str, weights: dict[int, float] | None) -> None:
    texts = {s: {x.text for x in TaskSource(task, s, 3000, level_weights=weights)} for s in SPLITS}
    for split, own in texts.items():
        assert own, split
        assert all(split_of(text) == split for text in own)
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    if weights:  # every one of the 210 items has its place, and none has two
        first = {x.text for s in SPLITS for x in TaskSource(task, s, 3000, level_weights=weights) if x.level == 1}
        assert len(first) == 210


def test_negative_control_splits_by_seed_alone_do_share_items() -> None:
    def by_seed(seed: int) -> set[str]:
        return {calc.fields(Random(seed + i), 1)["query"] for i in range(3000)}

    train, test = by_seed(0), by_seed(1_000_000)
    assert len(test & train) > 0.9 * len(test)


def test_split_sizes_by_text() -> None:
    counts = Counter(split_of(f"item {i}") for i in range(5000))
    assert counts["test"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert counts["validation"] / 5000 == pytest.approx(0.1, abs=0.02)


# ---- files ---------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, rows: list[dict]) -> Iterator[str]:
    """The rows in every kind of file that is read."""
    (tmp_path / "rows.jsonl").write_text(jsonl(rows), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return (str(tmp_path / f"rows.{kind}") for kind in ("jsonl", "json", "parquet"))


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "query": "Grüße?"}]
    for path in written(tmp_path, rows):
        first, second = load(path)
        assert first == Example("a", "", "1 + 1 = ?", "2", "exact", {"level": 1, "responses": ROWS[0]["responses"]})
        assert (second.query, second.answer, second.level) == ("Grüße?", "ja", 2)


def test_a_unicode_line_separator_inside_a_row_is_not_a_new_row(tmp_path: Path) -> None:
    """JSON allows it unescaped in strings, and only a line feed ends a row of JSON Lines."""
    for path in written(tmp_path, ROWS):
        assert load(path)[1].query == ROWS[1]["query"]


def test_rows_may_have_responses_for_different_modes(tmp_path: Path) -> None:
    """Parquet fills the response that a row lacks with null."""
    rows = [{**ROWS[0], "responses": {"short": "2"}}, {**ROWS[1], "responses": {"think": "1 1 = 2"}}]
    for path in written(tmp_path, rows):
        assert [x.meta["responses"] for x in load(path)] == [row["responses"] for row in rows]


def test_blank_lines_and_windows_line_ends_are_no_rows(write: Callable) -> None:
    path = write("rows.jsonl", jsonl(questions(2)).replace("\n", "\r\n\r\n"))
    assert [x.query for x in load(path)] == ["question 0", "question 1"]


def test_columns_are_mapped(write: Callable) -> None:
    row = {"problem": " 2 + 2 ", "solution": 4, "note": "sum", "fast": "4", "slow": "2 2 = 4", "diff": "3"}
    columns = {"query": "problem", "answer": "solution", "context": "note", "level": "diff"}
    columns |= {"responses.short": "fast", "responses.think": "slow"}
    (example,) = load(write("rows.jsonl", jsonl([row])), columns)
    assert (example.query, example.answer, example.context, example.level) == ("2 + 2", "4", "sum", 3)
    assert example.meta["responses"] == {"short": "4", "think": "2 2 = 4"}
    assert example.verifier == "exact"


def test_a_row_may_name_its_verifier_and_id(write: Callable) -> None:
    path = write("rows.jsonl", jsonl([{**questions(1)[0], "verifier": "math", "id": 7}, questions(1)[0]]))
    first, second = load(path)
    assert (first.verifier, first.id) == ("math", "7")
    assert (second.verifier, second.id) == ("exact", f"{path}:2")


def test_an_unknown_field_in_the_column_map_is_refused(write: Callable) -> None:
    with pytest.raises(DataError, match=r"data\.columns\.qery: not a field; fields are id, context, query"):
        load(write("rows.jsonl", jsonl(questions(1))), {"qery": "query"})


GOOD = json.dumps(questions(1)[0])


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (f"{GOOD}\n{GOOD}\n{{oops\n", "row 3", "not JSON"),
        (f'{GOOD}\n{{"answer": "1"}}\n', "row 2", "no column 'query'"),
        (f'{GOOD}\n{{"query": "1"}}\n', "row 2", "no column 'answer'"),
        (f'{GOOD}\n{{"query": null, "answer": "1"}}\n', "row 2", "no column 'query'"),
        (f'{GOOD}\n{{"query": "  ", "answer": "1"}}\n', "row 2", "query is empty"),
        (f'{GOOD}\n{{"query": "1", "answer": ""}}\n', "row 2", "answer is empty"),
        (f'{GOOD}\n["query", "answer"]\n', "row 2", "an object is expected, this is a list"),
        (f"{GOOD}\n3\n", "row 2", "an object is expected, this is a int"),
        (f'{GOOD}\n{{"query": "1", "answer": "1", "level": "hard"}}\n', "row 2", "level 'hard' is not a whole number"),
        (f'{GOOD}\n{{"query": "1", "answer": "1", "responses": ["1"]}}\n', "row 2", "responses must map mode names"),
        (f'{GOOD}\n{{"query": "1", "answer": "1", "responses": {{"short": 1}}}}\n', "row 2", "responses must map"),
        (f'{GOOD}\n\n{{"answer": "1"}}\n', "row 3", "no column 'query'"),  # as an editor counts
        (f'{GOOD}\n{{"query": [{{"role": "user", "content": "1"}}], "answer": "1"}}\n', "row 2", "query"),
        (f'{GOOD}\n{{"query": "1", "answer": {{"value": 1}}}}\n', "row 2", "answer"),
    ],
)
def test_a_malformed_row_is_named(write: Callable, content: str, where: str, what: str) -> None:
    path = write("rows.jsonl", content)
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, {where}: "), message
    assert what in message


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.jsonl", b'{"query": "\xff"}\n', "not UTF-8 at byte 11"),
        ("rows.json", b'[{"query": "\xff"}]', "not UTF-8 at byte 12"),
        ("rows.json", '{"query": "1", "answer": "1"}', "a list of rows is expected, this is a dict"),
        ("rows.json", '[\n{"query": "1"},\n{"query": oops}\n]', "line 3: not JSON"),
        ("rows.parquet", "PAR1 but not really", "not a Parquet file"),
        ("rows.parquet", "", "not a Parquet file"),
        ("rows.csv", "query,answer\n", "only .jsonl, .json and .parquet files are read"),
    ],
)
def test_an_unreadable_file_is_named(write: Callable, name: str, content: str | bytes, what: str) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(path)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapped_column_must_be_there(write: Callable) -> None:
    path = write("rows.jsonl", jsonl(questions(1)))
    with pytest.raises(DataError, match=r"row 1: no column 'hint' \(field 'context'\); map it with data\.columns"):
        load(path, {"context": "hint"})
    with pytest.raises(DataError, match=r"row 1: no text in column 'fast' \(field 'responses\.short'\)"):
        load(path, {"responses.short": "fast"})


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=rf"none\.{kind}: no such file; paths are relative to the working directory"):
        read_rows(str(tmp_path / f"none.{kind}"))


# ---- hub -----------------------------------------------------------------------------------------------------------


def test_any_other_name_is_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(questions(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("owner/set", name="main", split="test", revision="abc")
    assert rows == questions(3)
    assert asked == [(("owner/set", "main"), {"split": "test", "revision": "abc"})]


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'owner/set'\ndoesn't exist"),
        ValueError("Unknown split 'tset'"),
        ConnectionError("no route"),
        DatasetGenerationError("An error occurred while generating the dataset"),
    ],
)
def test_a_hub_data_set_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_rows("owner/set")
    assert str(caught.value).startswith("owner/set: not a file, and no data set of this name could be loaded: ")
    assert "\n" not in str(caught.value)


# ---- splits of files -----------------------------------------------------------------------------------------------


def section(train: str, test: str, validation: str | None = None, **fields: Any) -> DataSection:
    own = None if validation is None else Source(path=validation)
    return DataSection(train=Source(path=train), test=Source(path=test), validation=own, **fields)


def test_without_a_validation_source_the_tail_of_training_is_it(write: Callable) -> None:
    own = section(write("train.jsonl", jsonl(questions(50))), write("test.jsonl", jsonl(questions(9, 100))))
    train, validation, test = (load_examples(own, split, 1000) for split in SPLITS)
    assert [len(x) for x in (train, validation, test)] == [45, 5, 9]
    assert train[-1].answer == "44"
    assert validation[0].answer == "45"
    assert load_examples(own, "train", 7) == train[:7]


def test_a_validation_source_leaves_training_whole(write: Callable) -> None:
    train, test = write("train.jsonl", jsonl(questions(50))), write("test.jsonl", jsonl(questions(9, 100)))
    own = section(train, test, write("validation.jsonl", jsonl(questions(3, 200))))
    assert [len(load_examples(own, split, 1000)) for split in SPLITS] == [50, 3, 9]


@pytest.mark.parametrize(("empty", "split"), [("train", "train"), ("test", "test")])
def test_an_empty_data_set_is_refused(write: Callable, empty: str, split: Split) -> None:
    content = {"train": jsonl(questions(20)), "test": jsonl(questions(9, 100)), empty: "\n"}
    paths = {name: write(f"{name}.jsonl", text) for name, text in content.items()}
    with pytest.raises(DataError, match=rf"{empty}\.jsonl: no rows for the {split} split"):
        load_examples(section(**paths), split, 10)


def test_too_few_rows_for_a_validation_tail_are_refused(write: Callable) -> None:
    own = section(write("train.jsonl", jsonl(questions(9))), write("test.jsonl", jsonl(questions(9, 100))))
    with pytest.raises(DataError, match=r"train\.jsonl: no rows for the validation split"):
        load_examples(own, "validation", 10)


def test_training_items_that_stand_in_an_evaluation_set_are_left_out_and_counted(write: Callable) -> None:
    train = write("train.jsonl", jsonl(questions(20)))
    apart = section(train, write("apart.jsonl", jsonl(questions(5, 100))))
    assert training_examples(apart) == (load_examples(apart, "train", 1000), 0)
    spaced = [{"query": "Question   3 ", "answer": "3"}, {"query": "question\t4", "answer": "4"}, *questions(5, 100)]
    shared = section(train, write("shared.jsonl", jsonl(spaced)), train_size=10)
    examples, dropped = training_examples(shared)
    assert dropped == 2
    assert [example.answer for example in examples] == ["0", "1", "2", *map(str, range(5, 12))]


def test_rows_of_the_validation_tail_are_not_trained_on_twice(write: Callable) -> None:
    """The last two of twenty rows are the tail; the first is a copy of one of them."""
    rows = questions(20)
    rows[0] = rows[19]
    own = section(write("train.jsonl", jsonl(rows)), write("test.jsonl", jsonl(questions(5, 100))))
    examples, dropped = training_examples(own)
    assert (len(examples), dropped) == (17, 1)
    nine = section(write("nine.jsonl", jsonl(questions(9))), write("test.jsonl", jsonl(questions(5, 100))))
    assert len(training_examples(nine)[0]) == 9  # without a tail there is none to compare with


def test_a_training_set_that_is_all_test_items_is_refused(write: Callable) -> None:
    file = write("train.jsonl", jsonl(questions(5)))
    with pytest.raises(
        DataError, match=r"^data\.train: all 5 rows of .*train\.jsonl also stand in an evaluation set$"
    ):
        training_examples(section(file, file))


def test_unusable_rows_are_left_out_and_reported_where_the_recipe_says_so(write: Callable) -> None:
    rows = [*questions(12), {"query": "no answer?"}, {"query": "", "answer": "1"}]
    file, test = write("train.jsonl", jsonl(rows)), write("test.jsonl", jsonl(questions(3, 100)))
    own = section(file, test)
    own.train = Source(path=file, bad_rows="skip")
    assert len(training_examples(own)[0]) == 11  # twelve, less the tail for validation
    assert skipped_rows(own) == [
        f"data: 2 rows of {file} are left out; the first: {file}, row 13: no column 'answer' (field 'answer'); map it "
        "with data.columns.answer"
    ]
    refusing = section(file, test)
    assert skipped_rows(refusing) == []
    with pytest.raises(DataError, match="row 13"):
        training_examples(refusing)
    broken = Source(path=write("broken.jsonl", "{"), bad_rows="skip")  # a file that is no JSON is not a matter of rows
    own.train = broken
    with pytest.raises(DataError, match=r"broken\.jsonl, row 1: not JSON"):
        training_examples(own)


def test_the_context_counts_when_sets_are_compared() -> None:
    first = Example("1", "a>b", "a", "b")
    other = Example("2", "a>c", "a", "c")
    assert without_overlap([first], [other]) == [first]
    assert without_overlap([first], [first, other]) == []
    assert without_overlap([other], [Example("3", "A>C", " a", "")]) == []
    assert without_overlap([Example("4", "", "x - y?", "")], [Example("5", "", "x + y?", "")])  # signs count


def test_a_task_section_loads_the_task() -> None:
    own = DataSection(task="calc", seed=5, level_weights={2: 1.0})
    expected = list(TaskSource("calc", "train", 4, seed=5, level_weights={2: 1.0}))
    assert load_examples(own, "train", 4) == expected
    assert training_examples(own.model_copy(update={"train_size": 4})) == (expected, 0)
    assert {x.level for x in expected} == {2}


def test_messages_leave_out_what_is_empty() -> None:
    example = Example("1", "Facts.", "Question?", "x")
    assert messages(example, "Be brief.") == [{"role": "user", "content": "Facts.\nQuestion?\nBe brief."}]
    assert messages(Example("1", "", "Question?", "x")) == [{"role": "user", "content": "Question?"}]
