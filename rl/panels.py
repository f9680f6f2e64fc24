"""What wandb shows beside curves: tables, histograms and the report's own figures, at each validation and at the end.

    panels/...  of validation items, a step of RL each: levels, calibration, lengths, figures
    final/...   of the test items, once: what `siesta report` shows, samples of every mode side by side

The curves themselves are metrics (`mode/think/prob`, `validation/accuracy`), which wandb draws by itself.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from siesta.rl import page_figures as figures
from siesta.rl.calibration import bins_table
from siesta.rl.page import Story, chapter, overview
from siesta.rl.policies import Measurement, scorable_items
from siesta.rl.tracking import STEP, attempt

LABEL = re.compile(r'aria-label="([^"]*)"')
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Grid:
    """A table."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Spread:
    """A histogram of values, (I,)."""

    values: np.ndarray


Panel = Grid | Spread | str  # text is the markup of a figure


def named(prefix: str, drawn: Sequence[str]) -> dict[str, Panel]:
    """Figures by what a screen reader says of them, without signs that wandb's file names should not have."""
    labels = {svg: match[1] for svg in drawn if (match := LABEL.search(svg))}
    return {f"{prefix}/{' '.join(re.findall(WORD, label))}": svg for svg, label in labels.items()}


def validation_panels(measured: Measurement, result: dict) -> dict[str, Panel]:
    """Of one validation.

    Args:
        result: `policies.table` of it.
    """
    last = measured.modes[-1]
    found: dict[str, Panel] = {"panels/levels": level_grid(result, last)}
    kept = scorable_items(measured)
    for column, mode in enumerate(measured.modes):
        found[f"panels/tokens {mode}"] = Spread(kept.greedy_tokens[:, column])
    chosen = kept.mode_probs.argmax(1)
    found["panels/tokens free"] = Spread(kept.greedy_tokens[np.arange(len(chosen)), chosen])
    drawn = [figures.by_level(result, "accuracy", "accuracy by level")]
    if len(measured.modes) > 1:
        drawn.append(figures.by_level(result, "shares", f"{last} chosen, by level"))
        bins = bins_table(kept, np.ones((1, len(chosen))))
        rows = [[own["low"], own["high"], own["items"], own["p"], own["pays"]["value"]] for own in bins]
        found["panels/calibration"] = Grid(["p from", "p to", "items", f"p({last})", f"{last} earns more"], rows)
        drawn.append(figures.reliability([("validation", {"calibration": {"bins": bins}})], last))
    return found | named("panels", drawn)


def level_grid(result: dict, last: str) -> Grid:
    """A row for each level: how right each forced mode and the free choice are, and what that chooses and writes."""
    rows = result["greedy"]
    policies = [name for name in rows if name.startswith("always-")] + ["free"]
    header = ["level", "items", *(f"accuracy {name}" for name in policies), f"{last} chosen", "tokens"]
    free = rows["free"]["levels"]
    lines = [
        [
            int(level),
            own["items"],
            *(rows[name]["levels"][level]["accuracy"] for name in policies),
            own["shares"][last],
            own["tokens"],
        ]
        for level, own in free.items()
    ]
    return Grid(header, lines)


def final_panels(story: Story) -> dict[str, Panel]:
    """Of a run that has been evaluated: the tables and figures of its report."""
    parts = chapter(story)
    found: dict[str, Panel] = {}
    for name, table in zip(("policies", "states"), parts["tables"], strict=False):
        found[f"final/{name}"] = Grid(table["header"], table["rows"])
    if parts["samples"]:
        found["final/samples side by side"] = side_by_side(parts["samples"], story.modes)
    return found | named("final", [*overview([story]), *parts["levels"], *(parts["curves"] or [])])


def side_by_side(samples: Sequence[dict], modes: Sequence[str]) -> Grid:
    """A row for each prompt, with what every mode answered and how that was judged."""
    header = ["step", "prompt", *(column for mode in modes for column in (mode, f"{mode} is"))]
    rows = []
    for pair in samples:
        own = {response["mode"]: response for response in pair["responses"]}
        shown = [(own[mode]["response"], own[mode]["score"]) if mode in own else ("", "") for mode in modes]
        rows.append([pair["step"], pair["prompt"], *(cell for cells in shown for cell in cells)])
    return Grid(header, rows)


class Panels:
    """Shows panels in the wandb run that is under way, if there is one; given up when wandb fails.

    Args:
        wanted: Whether the recipe names wandb.
    """

    def __init__(self, wanted: bool):
        self.wanted = wanted

    def show(self, make: Callable[[], Mapping[str, Panel]], step: int | None = None) -> None:
        """Log what `make` returns.

        Args:
            step: Of the training; None: after it.
        """
        if not self.wanted:
            return
        import wandb

        if wandb.run is None:
            return
        axis = {} if step is None else {STEP: step}
        self.wanted = attempt(
            "the panels in wandb",
            lambda: wandb.log({name: shown(wandb, panel) for name, panel in make().items()} | axis),
        )


def shown(wandb: Any, panel: Panel) -> Any:
    """A panel as wandb has it."""
    if isinstance(panel, Grid):
        return wandb.Table(columns=list(panel.header), data=[list(row) for row in panel.rows])
    if isinstance(panel, Spread):
        return wandb.Histogram(panel.values.tolist(), num_bins=min(32, max(1, len(np.unique(panel.values)))))
    return wandb.Html(panel, inject=False, data_is_not_path=True)
