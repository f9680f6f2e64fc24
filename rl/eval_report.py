"""What `siesta eval` shows: tables on the screen, frontier.png and calibration.png."""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from siesta.rl.evaluate import print_table
from siesta.rl.frontier import best_order, differences, path
from siesta.rl.policies import Measurement, hack_line


def number(found: dict, *, percent: bool = False, digits: int = 3) -> str:
    """`0.531 [0.501, 0.560]`; a dash where there is none."""
    if found["value"] is None:
        return "-"
    scale, digits = (100.0, 1) if percent else (1.0, digits)
    value, low, high = (f"{scale * part:.{digits}f}" for part in (found["value"], *found["interval"]))
    return f"{value} [{low}, {high}]"


def relative(part: float, whole: float) -> str:
    """`97.3 %`; a dash where the whole is nothing."""
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"


def frontier_table(result: dict, decoding: str) -> Table:
    """A row for each threshold, accuracy and tokens also as shares of those of always thinking."""
    own = result["frontier"][decoding]
    last = list(result[decoding]["free"]["shares"])[-1]
    full = result[decoding][f"always-{last}"]
    timed = "milliseconds" in own["points"][0]
    view = Table(
        title=f"thresholds on p({last}), {decoding}",
        caption="; ".join(
            f"area over random routing, by {unit}: {number(own[name], percent=True)} points of accuracy "
            f"(an oracle's {number(own[f'oracle_{name}'], percent=True)})"
            for unit, name in (("tokens", "area"), ("share", "area_by_share"))
        ),
    )
    names = ["threshold", f"{last} %", "accuracy %", f"of always-{last}'s", "tokens", f"of always-{last}'s"]
    for name in (*names, *(["ms"] if timed else []), "regret"):
        view.add_column(name, justify="right", no_wrap=True)
    for point in own["points"]:
        accuracy = {"value": point["accuracy"], "interval": point["interval"]["accuracy"]}
        view.add_row(
            f"{point['threshold']:.4f}",
            f"{100 * point['shares'][last]:.0f}",
            number(accuracy, percent=True),
            relative(point["accuracy"], full["accuracy"]),
            f"{point['tokens']:.2f}",
            relative(point["tokens"], full["tokens"]),
            *([f"{point['milliseconds']:.1f}"] if timed else []),
            f"{point['regret']:.3f}",
        )
    return view


def keeping_line(result: dict, decoding: str) -> str:
    """The threshold that `--keep` asked for."""
    kept, last = result["frontier"][decoding]["keeps"], list(result[decoding]["free"]["shares"])[-1]
    return (
        f"{decoding}: {kept['threshold']:.4f} is the highest threshold that keeps {100 * kept['share']:g} % of "
        f"always-{last}'s accuracy on these items"
    )


def voting_table(result: dict) -> Table:
    """Several answers in one mode at the tokens of the model's own choice."""
    own = result["voting"]["equal_tokens"]
    view = Table(
        title=f"compute baselines at the tokens of `free`, sampled: {own['free']['tokens']:.2f} a query, "
        f"{number(own['free']['accuracy'], percent=True)} % right",
        caption=f"difficulty is {own['difficulty']}; best of N has a perfect verifier; - costs more than that",
    )
    for name in ("baseline", "majority %", "free ahead by", "best of N %", "free ahead by"):
        view.add_column(name, justify="right", no_wrap=True)
    for name, vote in own["majority"].items():
        cells = [
            number(found, percent=True)
            for row in (vote, own["best_of_n"][name])
            for found in (row["accuracy"], row["free_ahead"])
        ]
        view.add_row(name, *cells)
    return view


def calibration_lines(result: dict) -> list[str]:
    """The numbers of calibration in two lines."""
    own, last = result["calibration"], list(result["greedy"]["free"]["shares"])[-1]
    return [
        f"p({last}) against whether it pays: AUROC {number(own['auroc'])} (by accuracy alone "
        f"{number(own['auroc_accuracy'])}), calibration error {number(own['calibration_error'])}",
        f"the better mode is chosen for {number(own['hybrid_accuracy'], percent=True)} % of the items; by chance "
        f"{number(own['hybrid_chance'], percent=True)} %, by always the same mode "
        f"{number(own['hybrid_one_mode'], percent=True)} %; kappa {number(own['hybrid_kappa'])}",
    ]


def over_table(report: dict) -> Table:
    """The main numbers over checkpoints."""
    count = len(report["checkpoints"])
    view = Table(
        title=f"over {count} checkpoints",
        caption="brackets: 95 % bootstrap interval over checkpoints and items; too narrow for few checkpoints",
    )
    for name in ("number", "mean", "each"):
        view.add_column(name, no_wrap=True)
    shown = (
        "/accuracy",
        "/tokens",
        "/share",
        "/regret",
        "/area",
        "area_by_share",
        "oracle_area",
        "calibration/auroc",
        "free_ahead",
    )
    for name, row in report["over_checkpoints"].items():
        if name.endswith(shown) or "hybrid" in name:
            each = " ".join("-" if value is None else f"{value:.3f}" for value in row["each"])
            view.add_row(name, number(row), each)
    return view


def show(report: dict, console: Console) -> None:
    """Print all tables."""
    wide = Console(width=None if sys.stdout.isatty() else 140)
    for name, result in report["checkpoints"].items():
        for decoding in ("greedy", "sampled"):
            print_table(result, name, decoding=decoding, console=wide)
        if "frontier" in result:
            for decoding in ("greedy", "sampled"):
                wide.print(frontier_table(result, decoding))
                if "keeps" in result["frontier"][decoding]:
                    console.print(keeping_line(result, decoding), markup=False)
            for line in calibration_lines(result):
                console.print(line, markup=False)
        if "voting" in result:
            wide.print(voting_table(result))
        console.print(hack_line(result["hacks"]), markup=False)
    if "over_checkpoints" in report:
        wide.print(over_table(report))


def draw(measured: dict[str, Measurement], results: dict[str, dict], folder: Path) -> None:
    """frontier.png and calibration.png, a line for each checkpoint; nothing where there is only one mode."""
    own = {name: each for name, each in measured.items() if len(each.modes) > 1}
    if not own:
        return
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for panel, decoding in zip(figure.subplots(1, 2), ("greedy", "sampled"), strict=True):
            draw_frontier(panel, own, results, decoding)
        figure.savefig(folder / "frontier.png", dpi=150)
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        draw_calibration(figure, own, results)
        figure.savefig(folder / "calibration.png", dpi=150)


def draw_frontier(panel: Axes, measured: dict[str, Measurement], results: dict[str, dict], decoding: str) -> None:
    """Accuracy over tokens: every threshold, an oracle's order, random routing, and more samples in one mode."""
    greedy = decoding == "greedy"
    for place, (name, own) in enumerate(measured.items()):

        def label(text: str, first: bool = place == 0) -> str | None:
            return text if first else None

        gain, cost = differences(own, greedy=greedy)
        tokens, accuracy = path(own, best_order(gain, cost), greedy=greedy)
        panel.plot(tokens, accuracy, color="0.6", lw=1, ls=":", label=label("order of an oracle"))
        tokens, accuracy = path(own, own.mode_probs[:, -1], greedy=greedy)
        panel.plot(tokens, accuracy, color="C0", lw=1.5, alpha=0.8, label=label("thresholds on p"))
        panel.plot(tokens[[0, -1]], accuracy[[0, -1]], color="0.6", lw=1, label=label("random routing"))
        free = results[name][decoding]["free"]
        panel.plot(free["tokens"], free["accuracy"], "o", color="C3", ms=5, label=label("the model's own choice"))
        if not greedy and "voting" in results[name]:
            for mode, colour in zip(own.modes, ("C1", "C2", "C4", "C5"), strict=False):
                rows = results[name]["voting"]["curves"][mode]
                spent, voted = ([row[key] for row in rows] for key in ("tokens", "majority"))
                panel.plot(spent, voted, ".-", color=colour, lw=0.8, ms=4, label=label(f"majority of N, {mode}"))
    most = max(results[name][decoding][f"always-{own.modes[-1]}"]["tokens"] for name, own in measured.items())
    panel.set(title=decoding, xlabel="tokens per answer", ylabel="accuracy", xlim=(0, 1.15 * most))
    panel.legend(fontsize=7, frameon=False)


def draw_calibration(figure: Figure, measured: dict[str, Measurement], results: dict[str, dict]) -> None:
    """Left: share of items where thinking pays, by bins of p; right: how p is spread."""
    left, right = figure.subplots(1, 2)
    last = next(iter(measured.values())).modes[-1]
    left.plot([0, 1], [0, 1], color="0.7", lw=1, ls=":")
    for place, name in enumerate(measured):
        rows = [row for row in results[name]["calibration"]["bins"] if row["pays"]["value"] is not None]
        shares = [row["pays"]["value"] for row in rows]
        bars = [
            [abs(row["pays"]["value"] - bound) for row in rows for bound in [row["pays"]["interval"][side]]]
            for side in (0, 1)
        ]
        left.errorbar([row["p"] for row in rows], shares, bars, fmt="o-", color=f"C{place}", ms=4, lw=1, label=name)
    left.set(xlabel=f"mean p({last}) in a bin", ylabel=f"share of items where {last} pays", xlim=(-0.03, 1.03))
    left.legend(fontsize=7, frameon=False)
    right.hist([each.mode_probs[:, -1] for each in measured.values()], bins=20, range=(0, 1))
    right.set(xlabel=f"p({last})", ylabel="items")
