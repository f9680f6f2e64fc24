"""Does the warm-up end where it should on every seed? Five seeds of both embedded tasks.

python -m benchmarks.warmup          # writes the block `warmup` of docs/results/quickstart.md
"""

import argparse
import json
import os
from pathlib import Path

from benchmarks.mode_selection_tables import replace_block
from benchmarks.runs import Job, run_all

RECIPES = {"calc": "quickstart", "hop": "hop"}


def row(run: Path) -> dict[str, float]:
    """Steps, seconds and greedy test accuracy of one warm-up."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    end = next(line for line in reversed(lines) if "train_runtime" in line)
    result = json.loads((run / "evaluation.json").read_text())["before"]["greedy"]
    short = {int(k): v["accuracy"] for k, v in result["always-short"]["levels"].items()}
    think = [level["accuracy"] for level in result["always-think"]["levels"].values()]
    return {
        "steps": end["step"],
        "seconds": end["train_runtime"],
        "short, level 1": 100 * short[1],
        "short, best level beyond": 100 * max(v for k, v in short.items() if k > 1),
        "think, worst level": 100 * min(think),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("outputs/warmup"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(recipe, task, seed, ["rl.enabled=false", "export.enabled=false"], options.runs)
        for task, recipe in RECIPES.items()
        for seed in options.seeds
    ]
    run_all(jobs, options.workers)
    rows = [(task, seed, row(options.runs / f"{task}-{seed}")) for task in RECIPES for seed in options.seeds]
    header = ["task", "seed", *rows[0][2]]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for task, seed, values in rows:
        lines.append(f"| {task} | {seed} | " + " | ".join(f"{value:.0f}" for value in values.values()) + " |")
    page = options.out / "results" / "quickstart.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else "# Quickstart results\n"
    page.write_text(replace_block(text, "warmup", "\n".join(lines)), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
