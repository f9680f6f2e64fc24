"""Where the time of finished runs went: median seconds of a training step by phase, from their metrics.jsonl.

    python -m benchmarks.phases outputs/before outputs/after --skip 10 --out speed/phases.json

`step` is the time between two logs, so runs of older versions, which log no phases, can stand beside new ones; log
every step (`rl.logging_steps=1`).
"""

import argparse
import itertools
import statistics
from pathlib import Path

from benchmarks.timing import environment, write_json
from siesta.rl.report import read_metrics


def phases(run: Path, skip: int) -> dict[str, float]:
    """Median seconds of a step, with quartiles, and of each of its phases, without the first `skip` steps."""
    rows = [row for row in read_metrics(run, "rl") if "reward" in row][skip:]
    if len(rows) < 3:
        raise SystemExit(f"{run}: fewer than {skip + 3} logged training steps; log every one (rl.logging_steps=1)")
    seconds = [after["time"] - before["time"] for before, after in itertools.pairwise(rows)]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    names = sorted({key for row in rows for key in row if key.startswith("time/") and key != "time/step"})
    parts = {name.removeprefix("time/"): statistics.median(row.get(name, 0.0) for row in rows) for name in names}
    return {"step": median, "low": low, "high": high} | parts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--skip", type=int, default=10, help="steps at the start that are left out")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    found = {run.name: phases(run, options.skip) for run in options.runs}
    for name, row in found.items():
        print(name, " ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if options.out:
        write_json(options.out, {"settings": vars(options), "environment": environment("cpu"), "runs": found})


if __name__ == "__main__":
    main()
