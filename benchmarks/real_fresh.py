"""Two rules on 2,000 other items: the tables of docs/results/real.md that follow from real_fresh.json.

    python -m benchmarks.real_fresh                                  # from docs/results/real_fresh.json
    python -m benchmarks.real_fresh --evaluations outputs/fresh_eval # makes that file first

The second form reads `<think.correct>/<split>/evaluation.json` of `siesta eval` over the runs of one price each.
A threshold that a run's table has no row for stands between two: both are given, and nothing is read in between.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from benchmarks.mode_selection_tables import replace_block
from benchmarks.speed_tables import DOCS, table

SHARE = 0.98  # of always-think's accuracy
SAME = 5e-4  # thresholds lie halfway between two p(think) of bf16, far further apart than this
SPLITS = ("validation", "test")

Rows = tuple[dict, dict]


def condensed(report: dict) -> dict:
    """What the tables need of an evaluation.json: greedy policies, and thresholds without levels and milliseconds."""
    runs = {}
    for name, found in report["checkpoints"].items():
        rows = [
            {key: row[key] for key in ("threshold", "accuracy", "tokens", "shares")}
            for row in found["frontier"]["greedy"]["points"]
        ]
        runs[Path(name).name] = {"greedy": found["greedy"], "frontier": rows}
    over = {name: value for name, value in report["over_checkpoints"].items() if name.startswith("greedy/")}
    return {"over_checkpoints": over, "runs": runs}


def around(run: dict, threshold: float) -> Rows:
    """The rows of a run's table at a threshold, the same one twice, or just above and just below it."""
    above = min((row for row in run["frontier"] if row["threshold"] > threshold - SAME), key=lambda r: r["threshold"])
    below = max((row for row in run["frontier"] if row["threshold"] < threshold + SAME), key=lambda r: r["threshold"])
    return above, below


def full(run: dict) -> dict:
    """Always thinking."""
    return run["greedy"]["always-think"]


def kept(runs: dict[str, dict], threshold: float, key: str) -> tuple[float, float]:
    """Share of always-think's accuracy or tokens, over all runs, by the rows above and by those below."""
    whole = fmean(full(run)[key] for run in runs.values())
    sides = zip(*(around(run, threshold) for run in runs.values()), strict=True)
    low, high = sorted(fmean(row[key] for row in side) / whole for side in sides)
    return low, high


def chosen(runs: dict[str, dict]) -> tuple[float, float]:
    """The largest threshold of any run's table at which all runs keep `SHARE`, and the next larger one."""
    tried = sorted({round(row["threshold"], 4) for run in runs.values() for row in run["frontier"]}, reverse=True)
    place = next(i for i, threshold in enumerate(tried) if kept(runs, threshold, "accuracy")[0] >= SHARE)
    return tried[place], tried[max(0, place - 1)]


def span(low: float, high: float, unit: str = "") -> str:
    """`98.0 to 99.4`, or one number."""
    texts = [f"{100 * value:.1f}" for value in (low, high)]
    return " to ".join(dict.fromkeys(texts)) + unit


def choice(runs: dict[str, dict], key: str) -> float:
    """The free choice's accuracy or tokens, in per cent of always-think's."""
    free = fmean(run["greedy"]["free"][key] for run in runs.values())
    return 100 * free / fmean(full(run)[key] for run in runs.values())


def accuracies(runs: dict[str, dict]) -> str:
    """Of all runs; of each."""
    each = ", ".join(f"{choice({name: run}, 'accuracy'):.1f}" for name, run in runs.items())
    return f"{choice(runs, 'accuracy'):.1f}; {each}"


def free_choice(content: dict) -> str:
    """A row a price: the free choice beside always thinking, of all runs and of each."""
    lines = []
    for price, splits in sorted(content.items()):
        validation, test = (splits[split]["runs"] for split in SPLITS)
        cells = []
        for policy in ("free", "always-think"):
            found = splits["test"]["over_checkpoints"][f"greedy/{policy}/accuracy"]
            low, high = found["interval"]
            cells.append(f"{100 * found['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append([price, *cells, accuracies(test), f"{choice(test, 'tokens'):.1f}", accuracies(validation)])
    header = ["`think.correct`", "free choice, accuracy %", "always-think's", "% of always-think's; each seed"]
    return table([*header, "tokens, % of always-think's", "validation: % of always-think's; each seed"], lines)


def threshold_table(found: dict[str, dict]) -> str:
    """The threshold chosen on validation items, on the test items; and that of each run by itself."""
    threshold, larger = chosen(found["validation"]["runs"])
    runs = found["test"]["runs"]
    lines = []
    for name, run in runs.items():
        own, _ = chosen({name: found["validation"]["runs"][name]})
        lines.append([f"seed {name.split('-')[-1]}", *shares({name: run}, threshold), f"{own:.4f}"])
        lines[-1] += shares({name: run}, own)
    lines.append(["all", *shares(runs, threshold), "", "", ""])
    header = ["", f"accuracy at {threshold:.4f}, % of always-think's", "tokens, %", "the run's own threshold"]
    view = table([*header, "accuracy, %", "tokens, %"], lines)
    here, next_one = (span(*kept(found["validation"]["runs"], t, "accuracy"), " %") for t in (threshold, larger))
    return f"{view}\n\nOn validation items {threshold:.4f} keeps {here}, the next larger, {larger:.4f}, {next_one}."


def shares(runs: dict[str, dict], threshold: float) -> list[str]:
    """Accuracy and tokens at a threshold, in per cent of always-think's."""
    return [span(*kept(runs, threshold, key)) for key in ("accuracy", "tokens")]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--evaluations", type=Path, help="folder of <think.correct>/<split>/evaluation.json")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of real.md and real_fresh.json")
    options = parser.parse_args(arguments)
    file, page = options.out / "real_fresh.json", options.out / "real.md"
    if options.evaluations:
        content = {
            folder.name: {s: condensed(json.loads((folder / s / "evaluation.json").read_text())) for s in SPLITS}
            for folder in sorted(options.evaluations.iterdir())
        }
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    content = json.loads(file.read_text(encoding="utf-8"))
    text = replace_block(page.read_text(encoding="utf-8"), "fresh free", free_choice(content))
    page.write_text(replace_block(text, "fresh threshold", threshold_table(content["0.8"])), encoding="utf-8")


if __name__ == "__main__":
    main()
