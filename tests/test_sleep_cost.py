"""B5 runs, its page holds what its file says, and its arithmetic is worked by hand."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import sleep_cost, sleep_cost_tables

DOCS = Path(__file__).parents[1] / "docs" / "results"


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


def test_it_writes_what_its_table_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes: two heads of 32 in three layers, in float32; a latent state is as large for every length and N."""
    file = tmp_path / "sleep_cost" / "b5_here.json"
    few = [
        "--warmups",
        "0",
        "--repeats",
        "2",
        "--lengths",
        "8",
        "16",
        "--passes",
        "1",
        "2",
        "--query",
        "4",
        "--tokens",
        "2",
    ]
    run(sleep_cost, monkeypatch, "--cpu", *few, "--out", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [(row["shape"], row["length"]) for row in rows] == [
        (shape, length) for shape in ("tiny", "tiny-hybrid") for length in (8, 16)
    ]
    assert all(row["raw_agrees"] for row in rows)
    assert [row["ways"]["raw"]["bytes"] for row in rows[:2]] == [3 * 2 * 2 * 32 * 4 * n for n in (8, 16)]
    assert rows[0]["ways"]["gist, 16 slots"]["bytes"] == rows[1]["ways"]["raw"]["bytes"]
    latent = [way for row in rows[2:] for name, way in row["ways"].items() if name.startswith("latent")]
    assert {way["bytes"] for way in latent} == {3 * 4 * 32 * 32 * 4}
    assert len(latent) == 2 * 4
    (tmp_path / "sleep_cost.md").write_text("<!-- b5_here -->\n<!-- /b5_here -->\n")
    run(sleep_cost_tables, monkeypatch, "--docs", str(tmp_path))
    lines = [line for line in (tmp_path / "sleep_cost.md").read_text().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {9}


def test_a_line_by_hand() -> None:
    """Sleep of 3 s saves 2 of 5 s a query: it pays from the second one. 30 of 120 bytes are a quarter. Where quartiles
    overlap, nothing is claimed.
    """

    def time(median: float, spread: float = 0.5) -> dict:
        return {"median": median, "low": median - spread, "high": median + spread}

    ways = {
        "none": {"bytes": 0, "wake": time(5.0)},
        "raw": {"bytes": 120, "wake": time(6.5), "sleep": time(3.0)},
        "x": {"bytes": 30, "wake": time(3.0), "sleep": time(3.0)},
    }
    assert sleep_cost_tables.line(1024, "x", ways)[2:4] == ["30", "0.250"]
    assert sleep_cost_tables.line(1024, "x", ways)[6:] == ["2.000", "2"]
    assert sleep_cost_tables.line(1024, "raw", ways)[6:] == ["-1.500", "never"]
    assert sleep_cost_tables.pays_from(time(4.0), time(3.0), time(5.0)) == "2"
    assert sleep_cost_tables.pays_from(time(4.0), time(3.0, 2.0), time(5.0)) == "no difference"


def test_the_page_holds_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DOCS / "sleep_cost", tmp_path / "sleep_cost")
    page = (DOCS / "sleep_cost.md").read_text(encoding="utf-8")
    (tmp_path / "sleep_cost.md").write_text(page, encoding="utf-8")
    run(sleep_cost_tables, monkeypatch, "--docs", str(tmp_path))
    assert (tmp_path / "sleep_cost.md").read_text(encoding="utf-8") == page
    assert "<!-- b5_cpu -->" in page
