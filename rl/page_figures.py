"""The figures of a report page, as SVG: what the mode policy did over training, what it costs, and where it pays.

Every function takes metric rows or an evaluation and returns the markup of one figure, drawn small, so that it can be
read on a phone as it is. Text stays text: the page's fonts are used, and it can be searched.
"""

import io
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from siesta.rl.report import series

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
SIZE = (4.4, 2.9)  # inches: two beside each other on a screen, one on a phone
COLOURS = ("#2a6fbb", "#d1603d", "#3d8f5f", "#8a5fb0", "#b08a2e", "#5b6b7a")
MODES = ("#e0a030", "#2a6fbb", "#3d8f5f", "#8a5fb0")

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

_numbers = count()


def svg(draw: Callable[[Axes], None], title: str, size: tuple[float, float] = SIZE) -> str:
    """A figure with one panel; `title` is also what a screen reader says."""
    # A salt of its own: ids of several figures in a page must not meet.
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"siesta-{next(_numbers)}"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    markup = buffer.getvalue()
    head = f'<svg role="img" aria-label="{title}" '
    return head + markup[markup.index("<svg") + len("<svg ") :]


def mode_over_steps(rows: Sequence[dict], mode: str) -> str:
    """P(mode) by level on validation items; on the rollouts where nothing was validated."""
    start, stop = f"validation/prob/{mode}/level_", f"mode/{mode}/prob"
    keys = sorted({key for row in rows for key in row if key.startswith(start)}, key=_level)

    def draw(axes: Axes) -> None:
        for i, key in enumerate(keys):
            colour = mpl.colormaps["viridis"](0.9 * i / max(1, len(keys) - 1))
            axes.plot(*series(list(rows), key), color=colour, marker=".", label=f"level {key.removeprefix(start)}")
        if not keys:
            axes.plot(*series(list(rows), stop), color=MODES[1], label="rollouts")
        axes.set(xlabel="step", ylim=(-0.03, 1.03))
        axes.legend(ncols=2)

    return svg(draw, f"P({mode}) over steps")


def accuracy_over_steps(rows: Sequence[dict], modes: Sequence[str]) -> str:
    """Accuracy of the rollouts of each mode, and of the free choice on validation items."""

    def draw(axes: Axes) -> None:
        for mode, colour in zip(modes, MODES, strict=False):
            axes.plot(*series(list(rows), f"mode/{mode}/accuracy"), color=colour, alpha=0.8, label=mode)
        _validated(axes, rows, "validation/accuracy")
        axes.set(xlabel="step", ylim=(-0.03, 1.03))
        axes.legend()

    return svg(draw, "accuracy over steps")


def tokens_over_steps(rows: Sequence[dict], modes: Sequence[str]) -> str:
    """Tokens a response, by mode and of the free choice."""

    def draw(axes: Axes) -> None:
        for mode, colour in zip(modes, MODES, strict=False):
            axes.plot(*series(list(rows), f"mode/{mode}/tokens"), color=colour, alpha=0.8, label=mode)
        _validated(axes, rows, "validation/tokens")
        axes.set(xlabel="step")
        axes.set_ylim(bottom=0)
        axes.legend()

    return svg(draw, "tokens per response over steps")


def runs_over_steps(named: Sequence[tuple[str, Sequence[dict]]], key: str, title: str) -> str:
    """One metric of several runs."""

    def draw(axes: Axes) -> None:
        for (name, rows), colour in zip(named, COLOURS, strict=False):
            axes.plot(*series(list(rows), key), color=colour, label=name)
        axes.set(xlabel="step")
        axes.legend()

    return svg(draw, title)


def frontier(named: Sequence[tuple[str, dict, dict | None]]) -> str:
    """Accuracy against tokens of every policy, greedy. The dotted line joins the forced modes: what random routing
    gives; the other one is what thresholds on p(think) give.

    Args:
        named: Name of a run, its evaluation, and what `siesta eval` found if it was run.
    """

    def draw(axes: Axes) -> None:
        for (name, result, found), colour in zip(named, COLOURS, strict=False):
            rows = result["greedy"]
            if found is not None:
                points = found["frontier"]["greedy"]["points"]
                axes.plot([_tokens(row) for row in points], [row["accuracy"] for row in points], ".-", color=colour)
            forced = sorted((row for policy, row in rows.items() if policy.startswith("always-")), key=_tokens)
            axes.plot([_tokens(row) for row in forced], [row["accuracy"] for row in forced], ":", color=colour)
            for policy, row in rows.items():
                marker = {"free": "o", "oracle": "*"}.get(policy, "s")
                axes.plot(_tokens(row), row["accuracy"], marker, color=colour, ms=8 if policy == "oracle" else 5)
                if len(named) == 1 and policy not in ("free", "oracle"):
                    axes.annotate(
                        policy, (_tokens(row), row["accuracy"]), (4, -9), textcoords="offset points", fontsize=7
                    )
            low, high = rows["free"]["interval"]["accuracy"]
            axes.vlines(_tokens(rows["free"]), low, high, color=colour, lw=1)
            axes.plot([], [], "o", color=colour, label=f"{name}, free (* oracle)")
        axes.set(xlabel="tokens per answer", ylabel="accuracy")
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])  # room for the names
        axes.legend(loc="lower right")

    return svg(draw, "accuracy against tokens")


def by_level(result: dict, measure: str, title: str) -> str:
    """Bars at each level: a measure of each forced mode and of the free choice (`shares`: of the last mode)."""
    rows = result["greedy"]
    policies = ["free"] if measure == "shares" else [name for name in rows if name not in ("random", "oracle")]
    levels = list(rows["free"]["levels"])
    last = list(rows["free"]["shares"])[-1]

    def draw(axes: Axes) -> None:
        width = 0.8 / len(policies)
        for i, policy in enumerate(policies):
            own = [rows[policy]["levels"][level] for level in levels]
            values = [level["shares"][last] if measure == "shares" else level[measure] for level in own]
            places = np.arange(len(levels)) + (i - (len(policies) - 1) / 2) * width
            colour = "black" if policy == "free" else MODES[i % len(MODES)]
            axes.bar(places, values, width, color=colour, label=policy)
        axes.set_xticks(range(len(levels)), levels)
        axes.set(xlabel="level")
        if measure != "tokens":
            axes.set_ylim(0, 1)
        if len(policies) > 1:
            axes.set_ylim(top=1.25 * axes.get_ylim()[1])
            axes.legend(fontsize=7, ncols=len(policies), loc="upper left")

    return svg(draw, title)


def reliability(named: Sequence[tuple[str, dict | None]], mode: str) -> str:
    """How often the mode earns more, against its probability, in bins. On the diagonal the policy knows how often.

    Args:
        named: Name of a run and what `siesta eval` found.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], ":", color="0.6")
        for (name, found), colour in zip(named, COLOURS, strict=False):
            bins = [own for own in found["calibration"]["bins"] if own["items"]] if found is not None else []
            sizes = [8 + 120 * own["items"] / sum(each["items"] for each in bins) for own in bins]
            axes.scatter(
                [own["p"] for own in bins], [own["pays"]["value"] for own in bins], sizes, color=colour, label=name
            )
        axes.set(xlabel=f"p({mode})", ylabel=f"where {mode} earns more", xlim=(-0.03, 1.03))
        axes.set_ylim(-0.03, 1.03)
        axes.legend()

    return svg(draw, f"does p({mode}) know when it pays?")


def lengths(samples: Sequence[dict], modes: Sequence[str]) -> str:
    """Tokens of the sampled rollouts in each mode, right and wrong ones alike."""
    tokens = {mode: [row["tokens"] for row in samples if row["mode"] == mode] for mode in modes}
    edges = np.linspace(0, max((max(own) for own in tokens.values() if own), default=1) + 1, 25)

    def draw(axes: Axes) -> None:
        for (mode, own), colour in zip(tokens.items(), MODES, strict=False):
            axes.hist(own, edges.tolist(), color=colour, alpha=0.7, label=f"{mode} ({len(own)})")
        axes.set(xlabel="tokens", ylabel="rollouts")
        axes.legend()

    return svg(draw, "response lengths")


def phases(named: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Seconds of a step in each phase, a bar for each run."""
    names = list(dict.fromkeys(phase for _, own in named for phase in own))

    def draw(axes: Axes) -> None:
        left = np.zeros(len(named))
        for phase, colour in zip(names, mpl.colormaps["tab20"](np.linspace(0, 1, len(names))), strict=True):
            values = np.array([own.get(phase, 0.0) for _, own in named])
            axes.barh(range(len(named)), values, 0.6, left=left, color=colour, label=phase.replace("_", " "))
            left += values
        axes.set_yticks(range(len(named)), [name for name, _ in named])
        axes.invert_yaxis()
        axes.set(xlabel="seconds a step")
        axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.3))

    return svg(draw, "where the time goes", (SIZE[0], 1.9 + 0.3 * len(named)))


def _validated(axes: Axes, rows: Sequence[dict], key: str) -> None:
    """What validation items say, where there are any."""
    steps, values = series(list(rows), key)
    if steps:
        axes.plot(steps, values, color="black", marker="o", ms=4, label="free, validation")


def _level(key: str) -> tuple[int, str]:
    """Levels that are numbers in their order."""
    name = key.rsplit("_", 1)[1]
    return (int(name), "") if name.isdecimal() else (10**9, name)


def _tokens(row: dict) -> float:
    return row["tokens"]
