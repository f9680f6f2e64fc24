"""Rows of published data sets become our columns; rows that are not of the format name file and row."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from siesta.data import loading
from siesta.data.errors import DataError
from siesta.data.formats import FORMATS, KNOWN, boxed, read_as
from siesta.data.loading import load_examples
from siesta.data.schema import Example
from siesta.data.sources import to_examples
from siesta.rl.data_section import DataSection, Source
from siesta.rl.modes import Mode
from siesta.rl.warmup import written_response

GSM8K = {
    "question": "How many clips?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n48+1,024 = 1,072.\n#### 1,072",
}


def read(name: str, row: dict[str, Any]) -> Example:
    return to_examples([row], "set", {}, "exact", name)[0]


def test_gsm8k_by_hand() -> None:
    example = read("gsm8k", GSM8K)
    assert (example.query, example.answer, example.verifier) == ("How many clips?", "1072", "math")
    assert example.meta["solution"] == "She sold 48/2 = 24 clips.\n48+1,024 = 1,072."
    assert example.id == "set:1"


def test_math_takes_the_answer_from_its_column_or_from_the_last_box() -> None:
    solution = r"First $\boxed{1}$, no: it is $\boxed{\frac{3}{4}}$."
    row = {"problem": "x?", "solution": solution, "level": "Level 3", "type": "Algebra"}
    example = read("math", row)
    assert (example.answer, example.level, example.meta["solution"]) == (r"\frac{3}{4}", 3, solution)
    packaged = {"problem": "x?", "answer": "9", "difficulty": 2.0, "unique_id": "test/algebra/1.json"}
    example = read("math", packaged)
    assert (example.answer, example.level, example.id) == ("9", 2, "test/algebra/1.json")
    assert "solution" not in example.meta


@pytest.mark.parametrize(
    ("text", "inside"),
    [(r"\boxed{1}", "1"), (r"a \boxed{x_{1}} b", "x_{1}"), (r"\boxed{1} \boxed{{2}}", "{2}"), ("1", None)],
)
def test_boxed_by_hand(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


def test_a_box_that_is_never_closed_is_none() -> None:
    assert boxed(r"\boxed{\frac{1}{2}") is None


def test_aime_reads_either_spelling_and_drops_leading_zeros() -> None:
    assert read("aime", {"Problem": "x?", "Answer": 204, "Solution": "So.", "ID": "2024-I-1"}).answer == "204"
    example = read("aime", {"problem": "x?", "answer": "025"})
    assert (example.query, example.answer) == ("x?", "25")


def test_deepscaler_by_hand() -> None:
    example = read("deepscaler", {"problem": "x?", "answer": "-2/3", "solution": "Because."})
    assert (example.query, example.answer, example.meta) == (
        "x?",
        "-2/3",
        {"responses": {}, "solution": "Because."},
    )


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "x?", "answer": "7"}, "no '#### answer' at the end of column 'answer'"),
        ("gsm8k", {"question": "x?", "answer": "So #### "}, "no '#### answer' at the end of column 'answer'"),
        ("gsm8k", {"problem": "x?", "answer": "#### 7"}, "no text in column 'question'"),
        ("math", {"problem": "x?", "solution": "No box."}, r"neither an answer nor a \boxed{...} in the solution"),
        ("math", {"answer": "1"}, "no text in column 'problem'"),
        ("aime", {"problem": "x?", "answer": "1/2"}, "the answer '1/2' is not a whole number from 0 to 999"),
        ("deepscaler", {"problem": "x?", "answer": " "}, "no text in column 'answer'"),
    ],
)
def test_a_row_of_another_format_names_file_and_row(name: str, row: dict, message: str) -> None:
    with pytest.raises(DataError) as error:
        to_examples(
            [GSM8K if name == "gsm8k" else {"problem": "x?", "answer": "1"}, row], "set.jsonl", {}, "exact", name
        )
    assert str(error.value) == f"set.jsonl, row 2: not a row of format {name}: {message}"


def test_a_known_hub_name_brings_its_format_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(path: str, **settings: Any) -> list[dict]:
        asked.append((path, settings))
        return [GSM8K]

    monkeypatch.setattr(loading, "read_rows", rows)
    source = Source(path="openai/gsm8k", split="test")
    section = DataSection(train=source, test=source)
    assert load_examples(section, "test", 5)[0].answer == "1072"
    assert asked == [("openai/gsm8k", {"name": "main", "split": "test", "revision": None})]
    assert {data_format for data_format, _ in KNOWN.values()} <= set(FORMATS)
    choices = get_args(get_args(Source.model_fields["format"].annotation)[0])
    assert set(choices) == set(FORMATS), "the recipe offers what there is"


def test_a_file_is_read_in_the_format_that_the_recipe_names(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps(GSM8K) + "\n")
    section = DataSection(train=Source(path=str(file)), test=Source(path=str(file), format="gsm8k"))
    assert load_examples(section, "test", 5)[0].answer == "1072"
    with pytest.raises(DataError, match="no column 'query'"):  # negative control
        load_examples(section, "train", 5)


def test_read_as_leaves_out_what_the_data_lack() -> None:
    assert set(read_as("deepscaler", {"problem": "x?", "answer": "1"}, "here")) == {"query", "answer", "verifier"}


# ---- responses made of solutions -----------------------------------------------------------------------------------

SHORT, THINK = Mode("short", "<short>", 2, 9), Mode("think", "<think>", 3, 99, answer_after="</think>")


def test_short_is_the_answer_and_think_the_solution_before_it() -> None:
    example = read("gsm8k", GSM8K)
    assert written_response(example, SHORT) == r"\boxed{1072}"
    assert written_response(example, THINK) == f"{example.meta['solution']}\n</think>\n\\boxed{{1072}}"
    plain = Example("1", "", "x?", "blue", meta={"solution": "Because."})
    assert written_response(plain, THINK) == "Because.\n</think>\nblue"


def test_a_response_of_the_data_comes_first_and_without_either_the_row_is_named() -> None:
    meta = {"solution": "Because.", "responses": {"short": "7!"}}
    assert written_response(Example("1", "", "x?", "7", meta=meta), SHORT) == "7!"
    with pytest.raises(DataError, match=r"^row-9: no response for mode 'think' .*data\.columns\.responses\.think"):
        written_response(Example("row-9", "", "x?", "7"), THINK)
