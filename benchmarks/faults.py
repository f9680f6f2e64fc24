"""The table of faults: what was injected, how often, what was lost, how long it took to recover, and the verdict.

    python -m benchmarks.faults                  # everything; writes docs/results/faults.md and faults.json
    python -m benchmarks.faults --parts inputs   # one part; the others keep their rows
    python -m benchmarks.faults --fast --out folder

Every row is judged by the program: exit code, one line that names the thing, no traceback, nothing executed, runs that
are equal bit by bit. A row that does not hold is printed and makes the exit code 1.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults_files import Stage, damaged_files, gadgets, none_left, sharded_files
from benchmarks.faults_inputs import bad_inputs, hostile_verifiers
from benchmarks.faults_kills import SETTINGS, kill_rows, run_kills
from benchmarks.faults_more import further
from benchmarks.faults_process import preload
from benchmarks.faults_row import Row
from benchmarks.mode_selection_tables import replace_block

COMMAND = "make faults"
HEADER = "| fault | times | lost | time to recover | what is said | verdict |\n|---|---|---|---|---|---|"
ENDS = ("all together", "the runs after")  # rows about runs whose faults are counted in other rows
SHOWN = 200  # characters of a message
# Small runs, so that a test can afford them.
SMALL = ["warmup.max_steps=4", "rl.max_steps=5", "evaluate.every=0"]
TINY = [
    "warmup.max_steps=2",
    "rl.per_device_train_batch_size=4",
    "rl.num_generations=4",
    "rl.gradient_accumulation_steps=1",
]


def kills(folder: Path, count: int) -> list[Row]:
    """SIGKILLs, in the end of which nothing differs."""
    return kill_rows(run_kills(folder, count))


def files(folder: Path, seeds: int) -> list[Row]:
    """Damaged checkpoints, and code in them."""
    stage = Stage(folder, 40)
    return [*damaged_files(stage, seeds), none_left(stage), *gadgets(stage)]


def fast(folder: Path) -> dict[str, list[Row]]:
    """A part of everything: some kills, all files of a checkpoint, every twelfth bad input, one hostile verifier."""
    found = run_kills(folder / "kills", 3, kills=3, settings=[*SETTINGS, *SMALL], fresh=False)
    stage = Stage(folder / "files", 14, *TINY)
    return {
        "kills": kill_rows(found),
        "files": [*damaged_files(stage, 1, ["one bit changed"]), none_left(stage)],
        "inputs": bad_inputs(folder / "inputs", lambda cases: cases[::12]),
        "verifiers": hostile_verifiers(folder / "verifiers", ["raise"]),
    }


def block(rows: list[Row]) -> str:
    """Rows as Markdown."""
    lines = [f"`{COMMAND}`", "", HEADER]
    for row in rows:
        told = row.message if len(row.message) <= SHOWN else f"{row.message[:SHOWN]}..."
        said = f"`{told.replace('`', chr(39)).replace('|', '/')}`" if told else ""
        lines.append(f"| {row.fault} | {row.times} | {row.lost} | {row.recovery} | {said} | {row.verdict} |")
    return "\n".join(lines)


def summary(parts: dict[str, list[Row]]) -> str:
    """Faults and failures of every part in a table."""
    lines = ["| part | kinds | injected | do not hold |", "|---|---|---|---|"]
    for name, rows in parts.items():
        times = sum(row.times for row in rows if not row.fault.startswith(ENDS))
        lines.append(f"| {name} | {len(rows)} | {times} | {sum(bool(row.failures) for row in rows)} |")
    return "\n".join(lines)


def write(out: Path, parts: dict[str, list[Row]]) -> None:
    """faults.md (its marked blocks) and faults.json; parts that were not run keep what they have."""
    out.mkdir(parents=True, exist_ok=True)
    file, page = out / "faults.json", out / "faults.md"
    kept = json.loads(file.read_text()) if file.exists() else {}
    content: dict[str, list[dict[str, Any]]] = {
        name: [asdict(row) | {"verdict": row.verdict} for row in parts[name]] if name in parts else kept[name]
        for name in (*PARTS, *(set(parts) - set(PARTS)))
        if name in parts or name in kept
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
    read = {
        name: [Row(**{key: value for key, value in row.items() if key != "verdict"}) for row in rows]
        for name, rows in content.items()
    }
    text = page.read_text(encoding="utf-8") if page.exists() else "# Faults\n"
    text = replace_block(text, "summary", summary(read))
    for name, rows in read.items():
        text = replace_block(text, name, block(rows))
    page.write_text(text, encoding="utf-8")


def judge(parts: dict[str, list[Row]]) -> int:
    """Print every row that does not hold; the exit code."""
    failed = [row for rows in parts.values() for row in rows if row.failures]
    for row in failed:
        print(f"FAILS: {row.part}: {row.fault}: {'; '.join(row.failures)[:1000]}", file=sys.stderr)
    print(f"{sum(map(len, parts.values()))} rows, {len(failed)} do not hold")
    return 1 if failed else 0


# Name -> what makes its rows, in a folder of its own, with so many kills.
PARTS: dict[str, Callable[[Path, int], list[Row]]] = {
    "kills": kills,
    "files": lambda folder, count: files(folder, 5),
    "sharded": lambda folder, count: sharded_files(folder, 3),
    "inputs": lambda folder, count: bad_inputs(folder),
    "verifiers": lambda folder, count: hostile_verifiers(folder),
    "further": lambda folder, count: further(folder, 10),
}


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("outputs/faults"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--fast", action="store_true", help="a small part of everything")
    options = parser.parse_args()
    preload()
    folder = options.folder.absolute()
    if options.fast:
        parts = fast(folder)
        write(options.out, parts)
        return judge(parts)
    parts = {}
    for name in options.parts:
        parts[name] = PARTS[name](folder / name, options.kills)
        write(options.out, parts)
        print(f"{name}: {len(parts[name])} rows", flush=True)
    return judge(parts)


if __name__ == "__main__":
    sys.exit(main())
