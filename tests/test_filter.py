"""Items that are answered without their context are dropped, those that need it stay; luck is told from knowledge."""

import json
from pathlib import Path
from random import Random

import pytest

from siesta.data.errors import DataError
from siesta.data.filter import chance_level, needing_context, reached_by_luck, read_scores, without_context
from siesta.data.loading import load_examples, skipped_rows, training_examples
from siesta.data.schema import Example
from siesta.data.sources import TaskSource
from siesta.rl.data_section import ContextFree, DataSection, Source

ITEMS = [Example(name, f"Facts of {name}.", "Which?", answer) for name, answer in zip("abcd", "wxyz", strict=True)]
WITHOUT = {"a": [1.0, 1.0, 0.0, 1.0], "b": [0.0, 0.0, 1.0, 0.0], "c": [1.0, 0.0, 1.0, 0.0], "d": [0.0] * 4}


def test_by_hand() -> None:
    """Means 3/4, 1/4, 1/2, 0; four different answers, so chance is 1/4; two or more of four by luck: 67 of 256."""
    kept, report = needing_context(ITEMS, WITHOUT)
    assert [x.id for x in kept] == ["b", "d"]
    assert (report.items, report.dropped, report.unmeasured) == (4, 2, 0)
    assert report.without == pytest.approx(0.375)
    assert report.with_context is None
    assert report.chance == 0.25
    assert report.by_luck == pytest.approx(4 * 67 / 256)


def test_the_score_with_context_is_only_reported() -> None:
    kept, report = needing_context(ITEMS, WITHOUT, with_context={name: [1.0, 0.0] for name in "abcd"})
    assert [x.id for x in kept] == ["b", "d"]
    assert report.with_context == 0.5
    assert str(report) == (
        "2 of 4 items are answered without their context and left out (a guesser: 1.0); mean score without context "
        "0.375, with it 0.500, chance 0.250"
    )


def test_an_item_at_the_threshold_is_dropped_and_one_below_is_kept() -> None:
    for threshold, left in [(0.3, "bd"), (0.5, "bd"), (0.51, "bcd"), (0.75, "bcd"), (0.76, "abcd")]:
        kept, _ = needing_context(ITEMS, WITHOUT, threshold=threshold)
        assert "".join(x.id for x in kept) == left


def test_negative_control_items_that_need_their_context_are_kept() -> None:
    """Of hop nothing can be known from the query: a guesser's scores have dropped what luck would, no more."""
    items = list(TaskSource("hop", "test", 400, queries=8))
    rng = Random(0)
    guesses = {x.id: [float(rng.choice("abcdefgh") == x.answer) for _ in range(8)] for x in items}
    kept, report = needing_context(items, guesses)
    assert len(kept) >= 0.97 * len(items)
    assert report.dropped == pytest.approx(report.by_luck, abs=3 * report.by_luck**0.5)
    assert report.without == pytest.approx(1 / 8, abs=0.02)
    known = {x.id: [1.0] * 8 for x in items[:100]}
    kept, report = needing_context(items, guesses | known)
    assert not {x.id for x in kept} & set(known)
    assert report.dropped > 10 * report.by_luck


def test_a_threshold_that_guessing_reaches_is_refused() -> None:
    """Else half of a task with two answers would go, though all of it needs its context."""
    items = list(TaskSource("rule110", "test", 90))
    guesses = {x.id: [0.0, 1.0] for x in items}
    assert chance_level(items) > 0.5
    with pytest.raises(DataError, match=r"the threshold 0\.5 is not above the chance level 0\.\d+: guessing would"):
        needing_context(items, guesses)
    assert len(needing_context(items, guesses, threshold=0.9)[0]) == 90


def test_luck_by_hand() -> None:
    assert reached_by_luck(1, 0.25, 0.5) == 0.25
    assert reached_by_luck(2, 0.5, 1.0) == 0.25
    assert reached_by_luck(10, 0.5, 0.3) == pytest.approx(1 - (1 + 10 + 45) / 1024)


def test_answers_that_could_not_be_scored_do_not_count() -> None:
    scores = WITHOUT | {"a": [None, None], "b": [None, 1.0]}
    kept, report = needing_context(ITEMS, scores)
    assert [x.id for x in kept] == ["a", "d"]
    assert report.unmeasured == 1
    assert "1 could not be measured and are kept" in str(report)
    assert report.by_luck == pytest.approx(2 * 67 / 256 + 0.25)


def test_items_without_a_context_are_kept_and_not_measured() -> None:
    plain = Example("e", "", "Which?", "w")
    kept, report = needing_context([*ITEMS, plain], WITHOUT)
    assert kept[-1] is plain
    assert report.items == 4
    assert [(x.id, x.context, x.query) for x in without_context([ITEMS[0], plain])] == [("a", "", "Which?")]
    with pytest.raises(DataError, match="no item has a context"):
        needing_context([plain], {})


def test_every_item_must_have_been_measured() -> None:
    with pytest.raises(DataError, match=r"^d: no scores; measure every item that has a context$"):
        needing_context(ITEMS, {name: [0.0] for name in "abc"})


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_recipe_names_a_file_of_scores(tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "context": f"Fact {n}.", "query": f"q{n}", "answer": str(n)} for n in range(20)]
    train = write(tmp_path / "train.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [row | {"context": "Else."} for row in rows[:3]])
    scores = [{"id": f"i{n}", "without": [int(n < 5), 0, 1], "with": [1, 1, 0]} for n in range(20)]
    file = write(tmp_path / "scores.jsonl", scores)
    source = Source(path=train, context_free=ContextFree(scores=file, threshold=0.6))
    section = DataSection(train=source, test=Source(path=test))
    examples, _ = training_examples(section)
    assert [x.id for x in examples] == [f"i{n}" for n in range(5, 19)]  # the last is the tail for validation
    assert len(load_examples(section, "test", 10)) == 3
    assert skipped_rows(section) == [
        f"data: {train}: 5 of 20 items are answered without their context and left out (a guesser: 0.1); mean score "
        "without context 0.417, with it 0.667, chance 0.050"
    ]
    source.context_free = ContextFree(scores=write(tmp_path / "few.jsonl", scores[:4]))
    with pytest.raises(DataError, match=r"train\.jsonl: context_free: i4: no scores"):
        load_examples(section, "train", 10)


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a"},
        {"without": [1]},
        {"id": "a", "without": 1},
        {"id": "a", "without": [2]},
        {"id": "a", "without": ["1"]},
    ],
)
def test_rows_that_are_no_scores_are_refused(tmp_path: Path, row: dict) -> None:
    file = write(tmp_path / "scores.jsonl", [{"id": "z", "without": [0, None, 0.5]}, row])
    with pytest.raises(DataError, match=r"scores\.jsonl, row 2: an id and 'without', a list of scores from 0 to 1"):
        read_scores(file)


def test_scores_with_context_count_only_where_all_have_them(tmp_path: Path) -> None:
    rows = [{"id": "a", "without": [0], "with": [1]}, {"id": "b", "without": [1]}]
    assert read_scores(write(tmp_path / "one.jsonl", rows)) == ({"a": [0], "b": [1]}, None)
    assert read_scores(write(tmp_path / "all.jsonl", rows[:1])) == ({"a": [0]}, {"a": [1]})
