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
    "of `raw`",
    "sleep, s",
    "wake, s",
    "saved a query, s",
    "pays from query",
]


def pays_from(sleep: dict, wake: dict, whole: dict) -> str:
    """The number of queries after which a sleep has cost no more time than it saved.

    Args:
        sleep, wake, whole: Median and quartiles of the sleep, of a query from its state, and of one without a state.
    """
    if wake["low"] > whole["high"]:
        return "never"
    if wake["high"] >= whole["low"]:
        return "no difference"
    return str(math.ceil(sleep["median"] / (whole["median"] - wake["median"])))


def line(length: int, name: str, ways: dict) -> list[str]:
    """A row of the table: one way to sleep on one length."""
    way, whole = ways[name], ways["none"]["wake"]
    if name == "none":
        return [f"{length:,}", name, "0", "", "", seconds(way["wake"]), "", ""]
    saved = f"{whole['median'] - way['wake']['median']:.3f}"
    times = [seconds(way["sleep"]), seconds(way["wake"]), saved, pays_from(way["sleep"], way["wake"], whole)]
    return [f"{length:,}", name, f"{way['bytes']:,}", f"{way['bytes'] / ways['raw']['bytes']:.3f}", *times]


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
