"""Tables and figure of `mode_selection`: reads finished runs, fills the blocks of docs/results/quickstart.md."""

import json
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from siesta.rl.report import read_metrics, series

MAIN = ["grpo", "degrpo_paper", "per_mode_pg", "target", "target_from_think", "target_from_short"]
GROUPS = ("1", "2", "3+")


def read_run(run: Path) -> dict:
    """Test-set numbers of the final model and the first validation at which every criterion held."""
    result = json.loads((run / "evaluation.json").read_text())["after"]
    rows = read_metrics(run, "rl")
    mass = [row["mode/mass"] for row in rows if "mode/mass" in row]
    start = next(row for row in rows if "validation/prob/think" in row)
    numbers = {"start": 100 * start["validation/prob/think"], "steps": steps_to_criteria(rows), "mass": mass[-1]}
    return {"result": result, "rows": rows} | numbers


def reached(row: dict) -> bool:
    """The criteria on one validation: accuracy within a point of always-think, think share at level 1 at most 5 %, at
    levels 3 and up at least 95 % (chosen greedily and in P), regret at most 0.02."""
    levels = sorted({int(key.rsplit("_", 1)[1]) for key in row if key.startswith("validation/prob/think/level_")})
    easy = max(row[f"validation/{kind}/think/level_1"] for kind in ("prob", "choice"))
    hard = min(row[f"validation/{kind}/think/level_{n}"] for kind in ("prob", "choice") for n in levels if n >= 3)
    accurate = row["validation/accuracy"] >= row["validation/accuracy_always/think"] - 0.01
    return accurate and easy <= 0.05 and hard >= 0.95 and row["validation/regret"] <= 0.02


def steps_to_criteria(rows: list[dict]) -> int | None:
    """First validated step at which all criteria hold; None if there is none."""
    return next((row["step"] for row in rows if "validation/regret" in row and reached(row)), None)


def shares(row: dict) -> dict[str, float]:
    """Think share at level 1, 2 and the mean over levels 3 and up."""
    by_level = {int(level): values["shares"]["think"] for level, values in row["levels"].items()}
    return {"1": by_level[1], "2": by_level[2], "3+": float(np.mean([v for k, v in by_level.items() if k >= 3]))}


def numbers(run: dict, policy: str = "free") -> dict[str, float | None]:
    """The columns of the table for one policy of one run."""
    greedy, sampled = run["result"]["greedy"][policy], run["result"]["sampled"][policy]
    columns: dict[str, float | None] = {"accuracy": 100 * greedy["accuracy"], "tokens": greedy["tokens"]}
    columns |= {f"choice {level}": 100 * share for level, share in shares(greedy).items()}
    columns |= {f"prob {level}": 100 * share for level, share in shares(sampled).items()}
    columns |= {"regret": greedy["regret"], "regret sampled": sampled["regret"]}
    if policy == "free":
        columns |= {"start": run["start"], "steps": run["steps"], "mass": run["mass"]}
    return columns


def cell(values: list[float | None], digits: int) -> str:
    """Mean and range over seeds, `12.3 (11.0-13.1)`; counts the seeds that have no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    low, high = (f"{bound:.{digits}f}" for bound in (min(known), max(known)))
    text = f"{np.mean(known):.{digits}f}" + ("" if low == high else f" ({low}-{high})")
    return text if len(known) == len(values) else f"{text}, {len(values) - len(known)} of {len(values)} never"


DIGITS = {"accuracy": 1, "tokens": 2, "regret": 3, "regret sampled": 3, "steps": 0, "mass": 3}


def table(rows: dict[str, list[dict[str, float | None]]]) -> str:
    """Markdown: one row an arm, one column a number."""
    columns = list(dict.fromkeys(name for seeds in rows.values() for name in seeds[0]))
    names = {
        "accuracy": "accuracy %",
        "regret sampled": "regret, sampled",
        "steps": "steps to criteria",
        "start": "P(think) % at start",
    }
    names |= {f"choice {level}": f"think % L{level}" for level in GROUPS}
    names |= {f"prob {level}": f"P(think) % L{level}" for level in GROUPS}
    lines = ["| arm | " + " | ".join(names.get(c, c) for c in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for arm, seeds in rows.items():
        cells = [cell([seed[c] for seed in seeds], DIGITS.get(c, 1)) if c in seeds[0] else "" for c in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(
    runs: dict[str, list[dict]], file: Path, levels: tuple[int, ...] = (1, 2, 3, 8), *, asked: bool = False
) -> None:
    """Think probability on validation items over steps: a panel an arm, a colour a level (of four), a line a seed.

    Args:
        asked: Also that on the questions of each step, in grey.
    """
    width = min(6, len(runs))
    height = -(-len(runs) // width)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8}):
        figure = Figure(figsize=(2.3 * width, 1.9 * height + 0.4), layout="constrained")
        panels = figure.subplots(height, width, sharex=True, sharey=True, squeeze=False).flatten()
        for panel in panels[len(runs) :]:
            panel.set_visible(False)
        for panel, (arm, seeds) in zip(panels, runs.items(), strict=False):
            panel.set_title(arm, fontsize=8)
            for i, run in enumerate(seeds if asked else []):
                label = "questions of the step" if i == 0 else None
                panel.plot(*series(run["rows"], "mode/think/prob"), color="0.6", lw=1, label=label)
            for level, colour in zip(levels, ("C3", "C1", "C2", "C0"), strict=False):
                for i, run in enumerate(seeds):
                    label = f"level {level}" if i == 0 else None
                    key = f"validation/prob/think/level_{level}"
                    steps, values = series(run["rows"], key)
                    if steps:
                        panel.plot(steps, values, color=colour, lw=1, alpha=0.8, label=label)
        panels[0].set_ylim(-0.04, 1.04)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.supxlabel("optimizer step")
        figure.supylabel("P(think)" if asked else "P(think), validation items")
        figure.savefig(file, dpi=140)


def replace_block(text: str, name: str, content: str) -> str:
    """Put `content` between the markers of a block, or append the block."""
    block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
    pattern = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    return pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text}\n{block}\n"


def write_results(runs_dir: Path, docs: Path, arms: list[str], seeds: list[int]) -> None:
    """quickstart.md (its marked blocks), quickstart.json and the figure."""
    runs = {arm: [read_run(runs_dir / f"{arm}-{seed}") for seed in seeds] for arm in arms}
    rows = {arm: [numbers(run) for run in found] for arm, found in runs.items()}
    reference = runs["target"] if "target" in runs else next(iter(runs.values()))
    fixed = ("always-short", "always-think", "random", "oracle")
    policies = {name: [numbers(run, name) for run in reference] for name in fixed}
    main = policies | {arm: rows[arm] for arm in MAIN if arm in rows}
    for folder in ("results", "figures"):
        (docs / folder).mkdir(parents=True, exist_ok=True)
    page = docs / "results" / "quickstart.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Quickstart results\n"
    text = replace_block(text, "main", table(main))
    rest = {arm: rows[arm] for arm in arms if arm not in MAIN}
    text = replace_block(text, "ablations", table(rest)) if rest else text
    page.write_text(text, encoding="utf-8")
    content = {"seeds": seeds, "policies": policies, "arms": rows}
    (docs / "results" / "quickstart.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(runs, docs / "figures" / "mode_selection.png")
    print(table(main))
