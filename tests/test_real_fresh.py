"""The tables of two rules on other items: the page shows what its file gives; thresholds are worked out by hand."""

import shutil
from pathlib import Path

import pytest

from benchmarks.real_fresh import DOCS, around, chosen, condensed, kept, main, span


def run_of(*rows: tuple[float, float, float]) -> dict:
    """Rows of threshold, accuracy, tokens; the last one is always thinking."""
    frontier = [{"threshold": t, "accuracy": accuracy, "tokens": tokens} for t, accuracy, tokens in rows]
    return {"greedy": {"always-think": frontier[-1]}, "frontier": frontier}


ONE = run_of((1.0, 0.5, 2.0), (0.4, 0.98, 4.0), (0.0, 1.0, 8.0))
OTHER = run_of((1.0, 0.5, 2.0), (0.6, 0.9, 4.0), (0.2, 1.0, 6.0), (0.0, 1.0, 8.0))


def test_a_threshold_is_a_row_or_stands_between_two() -> None:
    assert around(ONE, 0.4) == (ONE["frontier"][1], ONE["frontier"][1])
    assert around(ONE, 0.4003) == (ONE["frontier"][1], ONE["frontier"][1]), "computed by another engine"
    assert around(OTHER, 0.4) == (OTHER["frontier"][1], OTHER["frontier"][2])


def test_shares_are_of_means_over_runs() -> None:
    runs = {"a-0": ONE, "a-1": OTHER}
    assert kept(runs, 0.4, "accuracy") == pytest.approx(((0.98 + 0.9) / 2, (0.98 + 1.0) / 2))
    assert kept(runs, 0.4, "tokens") == pytest.approx((4 / 8, 5 / 8))
    assert span(*kept(runs, 0.4, "tokens")) == "50.0 to 62.5"
    assert span(*kept({"a-0": ONE}, 0.4, "tokens")) == "50.0"


def test_the_largest_threshold_that_keeps_98_percent_by_the_worse_of_two_rows() -> None:
    assert chosen({"a-0": ONE}) == (0.4, 1.0)
    assert chosen({"a-1": OTHER}) == (0.2, 0.6)
    assert chosen({"a-0": ONE, "a-1": OTHER}) == (0.2, 0.4), "at 0.4 the second may have 90 %"


def test_the_page_shows_what_its_file_gives(tmp_path: Path) -> None:
    for name in ("real.md", "real_fresh.json"):
        shutil.copy(DOCS / name, tmp_path)
    page = tmp_path / "real.md"
    before = page.read_text()
    page.write_text(before.replace("| all | 98.8 to 99.3 |", "| all | 100.0 |"))
    assert page.read_text() != before
    main(["--out", str(tmp_path)])
    assert page.read_text() == before


def test_what_is_kept_of_an_evaluation() -> None:
    row = {"threshold": 0.5, "accuracy": 0.9, "tokens": 3.0, "shares": {"think": 0.5}}
    found = {"greedy": {"free": row}, "frontier": {"greedy": {"points": [row | {"levels": {}, "milliseconds": 1.0}]}}}
    report = {
        "checkpoints": {"outputs/a-0": found},
        "over_checkpoints": {"greedy/free/accuracy": {"value": 0.9}, "sampled/free/accuracy": {"value": 0.8}},
    }
    assert condensed(report) == {
        "over_checkpoints": {"greedy/free/accuracy": {"value": 0.9}},
        "runs": {"a-0": {"greedy": {"free": row}, "frontier": [row]}},
    }
