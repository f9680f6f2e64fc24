"""The command `siesta report`: runs as one HTML page that needs no network and no script.

    siesta report outputs/quickstart                        # writes outputs/quickstart/report.html
    siesta report outputs/target outputs/grpo --out two.html

Figures are drawn by `siesta.rl.page_figures`, the page itself is `page.html`, a template. What a run does not have
(RL, samples, levels) is left out; a run without an evaluation is refused, because that is what the page is about.
"""

import argparse
import difflib
import importlib.metadata
import importlib.resources
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from siesta.data.errors import ReportError
from siesta.rl import page_figures as figures
from siesta.rl.origin import read_origin
from siesta.rl.report import read_metrics
from siesta.rl.run import write_atomically

EVAL = "eval/evaluation.json"  # of `siesta eval RUN --out RUN/eval`
SHOWN = 8  # prompts of a run whose responses are shown
# Metric -> what a value above 0 means.
EVENTS = {
    "guard/skipped_steps": "steps were skipped because something was not finite",
    "rollout/unscorable": "of the rollouts could not be scored, on average",
    "rollout/truncated": "of the rollouts met their mode's cap, on average",
}


@dataclass(frozen=True)
class Story:
    """What a run has left: the resolved recipe as text, RL's metric rows, evaluations by name, sampled rollouts, and
    what `siesta eval` found if it was run.
    """

    path: Path
    recipe: str
    rows: list[dict]
    evaluation: dict[str, dict]
    samples: list[dict]
    found: dict | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def result(self) -> dict:
        """The last evaluation: after RL, if there was any."""
        return list(self.evaluation.values())[-1]

    @property
    def modes(self) -> list[str]:
        """In the recipe's order."""
        return list(self.result["greedy"]["free"]["shares"])


def read_story(path: Path) -> Story:
    """A run directory.

    Raises:
        ReportError: It is none, or it has not been evaluated, or a file is damaged.
    """
    names = ("recipe.yaml", "evaluation.json", "samples.jsonl", EVAL)
    recipe, evaluation, samples, found = (path / name for name in names)
    if not recipe.exists():
        raise ReportError(f"{path}: no run directory (recipe.yaml is missing)")
    if not evaluation.exists():
        raise ReportError(
            f"{path}: no evaluation.json, the run has not been evaluated; give its command again, to go on"
        )
    try:
        rows = samples.read_text(encoding="utf-8").splitlines() if samples.exists() else []
        return Story(
            path.resolve(),
            recipe.read_text(encoding="utf-8"),
            read_metrics(path, "rl"),
            json.loads(evaluation.read_text(encoding="utf-8")),
            [json.loads(row) for row in rows],
            next(iter(json.loads(found.read_text())["checkpoints"].values())) if found.exists() else None,
        )
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: a file is damaged, {error}") from error


# ---- the parts of the page, as plain data for the template ---------------------------------------------------------


def facts(story: Story) -> list[dict[str, str]]:
    """The numbers to see first."""
    rows = story.result["greedy"]
    free, last = rows["free"], story.modes[-1]
    low, high = (100 * value for value in free["interval"]["accuracy"])
    always = rows[f"always-{last}"]
    return [
        {"name": f"accuracy %, free choice [{low:.1f}, {high:.1f}]", "value": f"{100 * free['accuracy']:.1f}"},
        {"name": f"accuracy %, always {last}", "value": f"{100 * always['accuracy']:.1f}"},
        {"name": f"tokens an answer (always {last} {always['tokens']:.1f})", "value": f"{free['tokens']:.1f}"},
        {"name": f"% {last}", "value": f"{100 * free['shares'][last]:.0f}"},
        {"name": "regret against the oracle", "value": f"{free['regret']:.3f}"},
        *found_facts(story),
    ]


def found_facts(story: Story) -> Iterator[dict[str, str]]:
    """Numbers that `siesta eval` adds."""
    if story.found is None:
        return
    last, calibration = story.modes[-1], story.found["calibration"]
    area = story.found["frontier"]["greedy"]["area"]
    for name, own, scale in (
        (f"AUROC of p({last}): does it know where {last} pays?", calibration["auroc"], 1),
        ("points of accuracy over random routing, all budgets", area, 100),
        (
            f"% of items in the better mode (chance {_percent(calibration['hybrid_chance'])})",
            calibration["hybrid_accuracy"],
            100,
        ),
    ):
        if own["value"] is not None:
            digits = 3 if scale == 1 else 1
            low, high = (f"{scale * value:.{digits}f}" for value in own["interval"])
            yield {"name": f"{name} [{low}, {high}]", "value": f"{scale * own['value']:.{digits}f}"}


def _percent(own: dict) -> str:
    return "-" if own["value"] is None else f"{100 * own['value']:.1f}"


def policy_table(story: Story) -> dict[str, Any]:
    """Every policy, greedy and sampled."""
    last = story.modes[-1]
    rows = []
    for decoding in ("greedy", "sampled"):
        for policy, row in story.result[decoding].items():
            low, high = (100 * value for value in row["interval"]["accuracy"])
            share = f"{100 * row['shares'][last]:.0f}"
            accuracy = f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
            rows.append([policy, decoding, accuracy, f"{row['tokens']:.1f}", share, f"{row['regret']:.3f}"])
    header = ["policy", "decoding", "accuracy % [95 %]", "tokens", f"{last} %", "regret"]
    note = f"{story.result['items']} test items; brackets: 95 % bootstrap interval over items."
    return {"header": header, "rows": rows, "note": note}


def state_table(story: Story) -> dict[str, Any]:
    """The free choice behind every state of a sleep, greedy; see `siesta.rl.sleep.states`."""
    last = story.modes[-1]
    rows = []
    for state, own in {"none": story.result, **story.result["states"]}.items():
        free = own["greedy"]["free"]
        low, high = (100 * value for value in free["interval"]["accuracy"])
        accuracy = f"{100 * free['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
        chosen, likely = (100 * own[decoding]["free"]["shares"][last] for decoding in ("greedy", "sampled"))
        rows.append([state, accuracy, f"{free['tokens']:.2f}", f"{chosen:.0f}", f"{likely:.0f}"])
    header = ["state", "accuracy % [95 %]", "tokens", f"{last} %", f"P({last}) %"]
    note = (
        "Free choice by state: none (the context), own, another context's (shuffled), nothing but the query (zeroed)."
    )
    return {"header": header, "rows": rows, "note": note}


def events(story: Story) -> Iterator[str]:
    """What guards and verifiers had to say over the training."""
    quiet = True
    for key, meaning in EVENTS.items():
        values = [row[key] for row in story.rows if key in row and row[key] == row[key]]
        total = sum(values)
        if total > 0:
            quiet = False
            number = f"{total:.0f}" if key.startswith("guard/") else f"{100 * total / len(values):.2f} %"
            yield f"{number} {meaning}."
    for key in sorted({key for row in story.rows for key in row if key.startswith("hack/")}):
        values = [row[key] for row in story.rows if key in row]
        if max(values) >= 0.01:
            quiet = False
            _, flag, mode = key.split("/")
            yield f"{flag.replace('_', ' ')} in up to {100 * max(values):.1f} % of the {mode} rollouts of a log."
    if quiet:
        yield "No guard fired, every rollout was scored, nothing was flagged."


def phase_seconds(story: Story) -> dict[str, float]:
    """Median seconds of a step in each phase; the first of several logs, where things compile and fill, aside."""
    rows = [row for row in story.rows if "time/step" in row]
    rows = rows[1:] or rows
    names = list(dict.fromkeys(key for row in rows for key in row if key.startswith("time/") and key != "time/step"))
    return {key.removeprefix("time/"): statistics.median(row.get(key, 0.0) for row in rows) for key in names}


def paired_samples(story: Story) -> list[dict[str, Any]]:
    """Prompts that were sampled in more than one mode, latest first, with a response in each."""
    found = []
    latest = sorted(story.samples, key=lambda row: -row["step"])
    for (step, prompt), group in groupby(latest, key=lambda row: (row["step"], _text(row["prompt"]))):
        by_mode = {row["mode"]: row for row in group}
        if len(by_mode) > 1:
            shown = [_response(by_mode[mode]) for mode in story.modes if mode in by_mode]
            found.append({"step": step, "prompt": prompt, "responses": shown})
    return found[:SHOWN]


def _text(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def _response(row: dict) -> dict[str, Any]:
    score = row["score"]
    verdict = (
        "unscorable" if score is None else "right" if score == 1 else "wrong" if score == 0 else f"score {score:g}"
    )
    reward = "none" if row["reward"] is None else f"{row['reward']:g}"
    colour = {"right": "good", "wrong": "bad"}.get(verdict, "dim")
    return row | {"score": verdict, "verdict": colour, "reward": reward, "hacks": ", ".join(row["hacks"])}


def recipe_diff(first: Story, other: Story) -> dict[str, Any]:
    """Settings that differ, with the lines around them left out."""
    lines = difflib.unified_diff(first.recipe.splitlines(), other.recipe.splitlines(), lineterm="", n=1)
    kinds = {"+": "plus", "-": "minus"}
    shown = [{"text": line, "kind": kinds.get(line[:1], "")} for line in lines if line[:3] not in ("+++", "---")]
    return {"title": f"{first.name} (-) against {other.name} (+)", "lines": shown}


def chapter(story: Story) -> dict[str, Any]:
    """A run's own part of the page."""
    result, modes = story.result, story.modes
    several = len(result["greedy"]["free"]["levels"]) > 1
    last = modes[-1]
    levels = [("accuracy", "accuracy by level"), ("shares", f"{last} chosen, by level"), ("tokens", "tokens by level")]
    curves = story.rows and [
        figures.mode_over_steps(story.rows, last),
        figures.accuracy_over_steps(story.rows, modes),
        figures.tokens_over_steps(story.rows, modes),
    ]
    if phases := phase_seconds(story):
        curves = [*curves, figures.phases([(story.name, phases)])]
    if story.samples:
        curves = [*curves, figures.lengths(story.samples, modes)]
    origin = read_origin(story.path / "model")
    return {
        "name": story.name,
        "path": story.path.name,
        "about": f"Trained from {origin or 'an embedded model, built from scratch'}; modes {', '.join(modes)}.",
        "facts": facts(story),
        "tables": [policy_table(story), *([state_table(story)] if "states" in result else [])],
        "levels": [figures.by_level(result, measure, title) for measure, title in levels] if several else [],
        "curves": curves,
        "events": list(events(story)) if story.rows else [],
        "samples": paired_samples(story),
        "recipe": story.recipe,
    }


def overview(stories: Sequence[Story]) -> list[str]:
    """The figures about policies."""
    drawn = [figures.frontier([(story.name, story.result, story.found) for story in stories])]
    if any(story.found is not None for story in stories):
        drawn.append(figures.reliability([(story.name, story.found) for story in stories], stories[0].modes[-1]))
    return drawn


def render(stories: Sequence[Story], title: str) -> str:
    """The page."""
    template = importlib.resources.files("siesta.rl").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    named = [(story.name, story.rows) for story in stories if story.rows]
    last = stories[0].modes[-1]
    measures = {f"mode/{last}/prob": f"P({last})", "rollout/accuracy": "accuracy", "rollout/tokens": "tokens"}
    compared = [figures.runs_over_steps(named, key, f"{name}, rollouts") for key, name in measures.items()]
    return environment.from_string(template).render(
        title=title,
        version=importlib.metadata.version("siesta-rl"),
        runs=[chapter(story) for story in stories],
        overview=overview(stories),
        compared=compared if len(named) > 1 else [],
        diffs=[recipe_diff(stories[0], other) for other in stories[1:]],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="siesta report", description="Write runs as one HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, help="left out: report.html in the first run")
    parser.add_argument("--title", help="left out: the names of the runs")
    options = parser.parse_args(arguments)
    stories = [read_story(path) for path in options.runs]
    out = options.out or options.runs[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(stories, options.title or ", ".join(story.name for story in stories)))
    print(f"{out}: {len(stories)} run{'s' if len(stories) > 1 else ''}, {out.stat().st_size / 1024:.0f} KiB")
    return 0
