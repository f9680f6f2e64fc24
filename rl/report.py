"""The report of a run: report.md with the evaluation table and the curves of training (curves.png)."""

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from siesta.rl.card import markdown_table
from siesta.rl.policies import hack_line


def read_metrics(run: Path, stage: str) -> list[dict]:
    """Rows of one stage in metrics.jsonl."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["stage"] == stage]


def series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; a NaN in the log becomes a gap."""
    found = [(row["step"], float(row[key])) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def draw_curves(rows: list[dict], file: Path) -> None:
    """Three panels: mode policy by level on validation items, accuracy, tokens per rollout."""
    keys = sorted({key for row in rows for key in row if key.startswith("validation/prob/") and "/level_" in key})
    last = sorted({key.split("/")[2] for key in keys})[-1:] or [""]
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(10, 3), layout="constrained")
        shares, accuracy, tokens = figure.subplots(1, 3)
        levels = [key for key in keys if f"/{last[0]}/" in key]
        for i, key in enumerate(levels):
            colour = mpl.colormaps["viridis"](i / max(1, len(levels) - 1))
            shares.plot(*series(rows, key), color=colour, label=f"level {key.rsplit('_', 1)[1]}")
        shares.set(title=f"P({last[0]}) on validation items", xlabel="step", ylim=(-0.03, 1.03))
        if levels:
            shares.legend(fontsize=7, ncols=2)
        accuracy.plot(*series(rows, "rollout/accuracy"), color="0.7", label="rollouts")
        accuracy.plot(*series(rows, "validation/accuracy"), color="C0", marker="o", label="validation, free choice")
        accuracy.set(title="accuracy", xlabel="step", ylim=(-0.03, 1.03))
        accuracy.legend(fontsize=7)
        steps, values = series(rows, "validation/tokens")
        tokens.plot(steps, values, color="C0", marker="o")
        tokens.set(title="tokens per answer, free choice", xlabel="step")
        tokens.set_ylim(0, 1.1 * max(values, default=1.0))
        figure.savefig(file, dpi=150)


def write_report(run: Path) -> None:
    """Write report.md and curves.png into the run directory."""
    results = json.loads((run / "evaluation.json").read_text())
    parts = [f"# {run.name}"]
    for name, result in results.items():
        parts += [f"## {name.capitalize()} RL", f"Mass on control tokens {result['mode_mass']:.3f}."]
        parts.append(hack_line(result["hacks"]))
        parts += [markdown_table(result, decoding) for decoding in ("greedy", "sampled")]
    rows = read_metrics(run, "rl")
    if rows:
        draw_curves(rows, run / "curves.png")
        parts += ["## Training", "![curves](curves.png)"]
    parts.append("Recipe: `recipe.yaml`; every logged number: `metrics.jsonl`; sample rollouts: `samples.jsonl`.")
    (run / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
