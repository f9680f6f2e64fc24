"""Tables and figure of `real`: reads finished runs, fills the blocks of docs/results/real.md.

What the page claims is computed here: the criteria on the mode targets, which arms collapsed, and which curves fall
and rise again. An arm without results is named as not measured.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.mode_selection_tables import draw, replace_block
from siesta.rl.report import read_metrics, series

START = "warm"  # the run that makes the model all arms start from
FIXED = ("always-short", "always-think", "random", "oracle")
TARGET = "target"
OWN_REWARDS = ("adaptthink", "dler")  # regret in another reward is another quantity
SLACK = 0.02  # a share that falls by less from one level to the next has not fallen
SPREAD = 0.05  # levels whose shares lie closer together than this are not told apart
DIP = 0.05  # depth of a U


def read_run(run: Path, stage: str) -> dict:
    """Results of one run: of the model RL started from (`before`) or of the one it left (`after`)."""
    result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))[stage]
    return {"result": result, "rows": read_metrics(run, "rl")}


def read_arm(folder: Path, arm: str, seeds: list[int], stage: str = "after") -> list[dict]:
    """The finished runs of an arm, a seed each."""
    runs = [folder / f"{arm}-{seed}" for seed in seeds]
    return [read_run(run, stage) for run in runs if (run / "evaluation.json").exists()]


def cell(rows: list[dict], name: str, *, scale: float = 1, digits: int = 1) -> str:
    """Mean over seeds, and in brackets the 95 % interval over items (of several seeds, the widest)."""
    low = min(row["interval"][name][0] for row in rows)
    high = max(row["interval"][name][1] for row in rows)
    mean = np.mean([row[name] for row in rows])
    return f"{scale * mean:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def by_level(rows: list[dict], digits: int = 0) -> str:
    """Think share in per cent, level by level, means over seeds."""
    shares = np.mean([level_shares(row) for row in rows], axis=0)
    return " ".join(f"{100 * share:.{digits}f}" for share in shares)


def has_choice(run: dict) -> bool:
    """Whether there is more than one mode to choose from."""
    return len(run["result"]["greedy"]["free"]["shares"]) > 1


def level_shares(row: dict) -> list[float]:
    return [level["shares"]["think"] for level in row["levels"].values()]


def policy_line(name: str, runs: list[dict], policy: str, reference: list[dict], *, regret: bool = True) -> str:
    """One policy of some runs: greedy accuracy and tokens, also as shares of always-think's, and think shares."""
    greedy = [run["result"]["greedy"][policy] for run in runs]
    sampled = [run["result"]["sampled"][policy] for run in runs]
    full = [run["result"]["greedy"]["always-think"] for run in reference]
    relative = [
        f"{100 * np.mean([row[key] for row in greedy]) / max(np.mean([row[key] for row in full]), 1e-9):.1f}"
        for key in ("accuracy", "tokens")
    ]
    cells = [cell(greedy, "accuracy", scale=100), cell(greedy, "tokens"), *relative]
    cells += [by_level(greedy), by_level(sampled)]
    cells.append(cell(greedy, "regret", digits=3) if regret else "other rewards")
    return f"| {name} | " + " | ".join(cells) + " |"


def main_table(arms: dict[str, list[dict]], start: list[dict]) -> str:
    """Policies of the mode-target model, the free choice of every arm, and the model before RL."""
    reference = arms[TARGET] or start
    columns = ["accuracy %", "tokens", "accuracy, % of always-think", "tokens, % of always-think"]
    columns += ["think % by level", "P(think) % by level", "regret"]
    lines = ["| policy | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    lines += [policy_line(name, reference, name, reference) for name in FIXED]
    lines.append(policy_line("before RL, always-think", start, "always-think", reference))
    lines.append(policy_line("before RL, free choice", start, "free", reference))
    for arm, runs in arms.items():
        if runs:
            name = f"**{arm}**" if arm == TARGET else arm
            lines.append(policy_line(name, runs, "free", reference, regret=arm not in OWN_REWARDS))
        else:
            lines.append(f"| {arm} | not measured yet |" + " |" * (len(columns) - 1))
    return "\n".join(lines)


def criteria(runs: list[dict]) -> str:
    """What the free choice of mode targets has to reach, and whether it does, a line each."""
    lines = []
    for i, run in enumerate(runs):
        greedy, sampled = run["result"]["greedy"], run["result"]["sampled"]["free"]
        free, full = greedy["free"], greedy["always-think"]
        accuracy, tokens = free["accuracy"] / max(full["accuracy"], 1e-9), free["tokens"] / full["tokens"]
        shares = level_shares(sampled)
        rising = all(b >= a - SLACK for a, b in pairwise(shares)) and shares[-1] > shares[0]
        found = [
            (accuracy >= 0.98, f"accuracy {100 * accuracy:.1f} % of always-think's (at least 98)"),
            (tokens <= 0.6, f"tokens {100 * tokens:.1f} % of always-think's (at most 60)"),
        ]
        if len(shares) > 1:
            found.append((rising, f"P(think) rises with the level: {by_level([sampled])}"))
        seed = f"run {i + 1}: " if len(runs) > 1 else ""
        lines += [f"- {seed}{'met' if met else '**not met**'}: {text}" for met, text in found]
    return "\n".join(lines)


def collapse(row: dict) -> str:
    """How the mode policy of a sampled row has collapsed: one mode for everything, or one share for every level."""
    share, levels = row["shares"]["think"], level_shares(row)
    if share > 0.99:
        return "thinks about everything"
    if share < 0.01:
        return "thinks about nothing"
    if len(levels) > 1 and max(levels) - min(levels) < SPREAD:
        return "levels not told apart"
    return "no"


def curve(rows: list[dict]) -> dict:
    """P(think) over steps: where it starts, its lowest, its end, and whether that is a U.

    Each is a mean over five logs, since a log is the mean of the 64 questions of its step.
    """
    steps, values = series(rows, "mode/think/prob")
    smooth = np.convolve(values, np.ones(5) / 5, mode="valid") if len(values) >= 5 else np.array(values)
    place = int(smooth.argmin())
    u = min(smooth[0], smooth[-1]) - smooth[place] >= DIP
    return {
        "start": smooth[0],
        "lowest": smooth[place],
        "step": steps[place + (len(values) - len(smooth)) // 2],
        "end": smooth[-1],
        "u": bool(u),
    }


def curve_table(arms: dict[str, list[dict]]) -> str:
    """Every arm with a choice of modes: the way of P(think), where it ends, and whether that is a collapse."""
    columns = "arm | P(think) % at start | lowest, at step | at end | U | P(think) % by level | accuracy % | tokens"
    lines = [f"| {columns} | collapsed |", "|" + "---|" * (columns.count("|") + 2)]
    for arm, runs in arms.items():
        if not runs:
            lines.append(f"| {arm} | not measured yet |" + " |" * columns.count("|"))
        for run in runs:
            free, sampled = run["result"]["greedy"]["free"], run["result"]["sampled"]["free"]
            if not has_choice(run):
                continue
            way = curve(run["rows"])
            cells = [f"{100 * way['start']:.0f}", f"{100 * way['lowest']:.0f}, {way['step']}"]
            cells += [f"{100 * way['end']:.0f}", "yes" if way["u"] else "no", by_level([sampled], 1)]
            cells += [cell([free], "accuracy", scale=100), cell([free], "tokens"), collapse(sampled)]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(folder: Path, docs: Path, recipe: str, groups: dict[str, list[str]], seeds: list[int]) -> None:
    """The blocks of a recipe in real.md, its numbers as JSON, and its figure.

    Args:
        groups: Arms of the `main` table and of the `sweep`.
    """
    start = read_arm(folder, START, seeds, "before")
    if not start:
        print(f"{folder}: no warm-up is finished, nothing to write")
        return
    arms = {group: {arm: read_arm(folder, arm, seeds) for arm in names} for group, names in groups.items()}
    page = docs / "results" / "real.md"
    for place in ("results", "figures"):
        (docs / place).mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else "# Real weights\n"
    blocks = {"main": main_table(arms["main"], start), "curves": curve_table(arms["main"])}
    blocks["criteria"] = criteria(arms["main"][TARGET]) or "Not measured yet."
    if any(arms["sweep"].values()):
        blocks["sweep"] = curve_table(arms["sweep"])
    for name, content in blocks.items():
        text = replace_block(text, f"{recipe} {name}", content)
    finished = {arm: runs for group in arms.values() for arm, runs in group.items() if runs}
    if chosen := {arm: runs for arm, runs in finished.items() if has_choice(runs[0])}:
        draw(chosen, docs / "figures" / f"real_{recipe}.png", levels=tuple(map(int, levels_of(start))), asked=True)
        text = replace_block(text, f"{recipe} figure", f"![P(think) over steps](../figures/real_{recipe}.png)")
    page.write_text(text, encoding="utf-8")
    content = {arm: [run["result"] for run in runs] for arm, runs in {"before": start, **finished}.items()}
    (docs / "results" / f"real_{recipe}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(blocks.values()))


def levels_of(runs: list[dict]) -> list[str]:
    return list(runs[0]["result"]["greedy"]["free"]["levels"])
