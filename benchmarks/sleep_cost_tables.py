"""Fills the marked blocks of docs/results/sleep_cost.md from the JSON files of `benchmarks.sleep_cost`.

python -m benchmarks.sleep_cost_tables        # reads docs/results/sleep_cost/*.json
"""

import argparse
import math
from pathlib import Path

from benchmarks.speed_tables import DOCS, fill, seconds, table

HEADER = [
    "context tokens",
    "state",
    "bytes",
    "of keys and values",
    "sleep, s",
    "wake, s",
    "saved a query, s",
    "pays from query",
]


def pays_from(sleep: float, saved: float) -> str:
    """The number of queries after which a sleep has cost no more time than it saved."""
    return str(max(1, math.ceil(sleep / saved))) if saved > 0 else "never"


def kept_bytes(ways: dict) -> int:
    """Bytes of the keys and values of the context; in hybrid models with its recurrent states."""
    return ways["raw"]["bytes"]


def line(length: int, name: str, ways: dict) -> list[str]:
    """A row of the table: one way to sleep on one length."""
    way, whole = ways[name], ways["none"]["wake"]["median"]
    if name == "none":
        return [f"{length:,}", name, "0", "", "", seconds(way["wake"]), "", ""]
    saved, sleep = whole - way["wake"]["median"], way["sleep"]["median"]
    share = f"{way['bytes'] / kept_bytes(ways):.3f}"
    times = [seconds(way["sleep"]), seconds(way["wake"]), f"{saved:.3f}", pays_from(sleep, saved)]
    return [f"{length:,}", name, f"{way['bytes']:,}", share, *times]


def sleep_cost(content: dict) -> str:
    """B5: a table a shape."""
    parts = []
    for shape in content["settings"]["shapes"]:
        rows = [row for row in content["rows"] if row["shape"] == shape]
        lines = [line(row["length"], name, row["ways"]) for row in rows for name in row["ways"]]
        agreed = sum(row["raw_agrees"] for row in rows)
        parts += [
            f"`{shape}`; `raw` writes the tokens of `none` at {agreed} of {len(rows)} lengths:",
            table(HEADER, lines),
        ]
    return "\n\n".join(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with sleep_cost.md and sleep_cost/")
    fill(parser.parse_args().docs / "sleep_cost.md", {"b5": sleep_cost})


if __name__ == "__main__":
    main()
