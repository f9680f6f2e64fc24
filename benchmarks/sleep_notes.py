"""What are notes worth at wake, and does RL help their writer? Runs of recipes/quickstart_sleep.yaml.

    python -m benchmarks.sleep_notes                    # writes the blocks of docs/results/sleep.md and sleep.json
    python -m benchmarks.sleep_notes --arms wake --seeds 0

`wake` is the recipe as it is: its evaluation tells what the trained model does in each state. `writer` is about the
writer alone: one mode, a warm-up that stops early, and RL whose only gradient is that of the notes. Afterwards the
trained reader is given the notes of the warm-up's model and those of the trained one, on the same contexts. Finished
runs are skipped.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.mode_selection_tables import cell, replace_block
from benchmarks.runs import Job, run_all
from siesta.rl.context import Context
from siesta.rl.recipe import load_recipe
from siesta.rl.report import read_metrics
from siesta.rl.run import Run
from siesta.rl.sleep.states import PRICES, QUERIES, STATES, estimate, free_choice

# One answer a query: a group of one has no advantage, so what is trained is the writer.
WRITER = [
    "rl.beta=0",  # what is trained shall move
    "modes.think=null",
    "sleep.sleeps=8",
    "sleep.stateless=0",
    "warmup.max_steps=1000",
    "warmup.max_level=null",
    "warmup.length_power=1",
    "warmup.stop={short@1: 0.97, sleep: 0.75}",
    "rl.mode_objective=policy_gradient",
    "rl.mode_sampling=free",
    "rl.advantage=group",
    "rl.num_generations=1",
    "rl.share_prompts=false",
    "rl.max_steps=100",
    "rl.learning_rate=3.0e-4",
    "rl.lr_scheduler_type=cosine",
    "rl.lr_scheduler_kwargs=null",
    "rl.warmup_steps=5",
]
POLICIES = ("always-short", "always-think", "free")
COMMAND = "python -m benchmarks.sleep_notes"
ARMS = {"wake": [], "writer": WRITER}


def writers(run: Path) -> dict[str, dict]:
    """Decoding of notes -> writer -> its notes' rows right and tokens, and the trained reader's accuracy with them.

    Notes are greedy, or drawn as in training. Mean and interval each; `gain` is the accuracy with the trained writer's
    notes less that with the warm-up's, item by item.
    """
    context = Context(Run(load_recipe(run / "recipe.yaml")), print)
    examples = context.examples("test", context.recipe.evaluate.items)
    reader = context.load(run / "rl")
    section = context.recipe.evaluate
    folders = {"warm-up": context.start, "RL": run / "rl"}
    result: dict[str, dict] = {}
    for decoding, temperature in (("greedy", None), ("drawn", context.temperature)):
        found, accuracy = {}, {}
        for name, folder in folders.items():
            states = context.sleep_states(context.load(folder), examples, temperature)
            measured = context.measure_states(reader, states, 1, only=["own"])["own"]
            accuracy[name] = free_choice(measured)["accuracy"]
            found[name] = {
                "accuracy": accuracy[name],
                "rows_right": states.rows_right,
                "tokens": states.tokens,
                "kept": states.kept,
            }
        found["gain"] = {"accuracy": accuracy["RL"] - accuracy["warm-up"]}
        result[decoding] = {
            name: {
                key: estimate(values.astype(float), states.contexts, resamples=section.resamples, seed=section.seed)
                for key, values in columns.items()
            }
            for name, columns in found.items()
        }
    return result


def read_run(run: Path, arm: str) -> dict:
    """All numbers of a run: the evaluation before and after RL, steps and seconds of the stages, the writers."""
    times = {}
    for stage in ("warmup", "rl"):
        end = next(row for row in reversed(read_metrics(run, stage)) if "train_runtime" in row)
        times[stage] = {"steps": end["step"], "seconds": end["train_runtime"]}
    found = {"evaluation": json.loads((run / "evaluation.json").read_text()), "times": times}
    if arm != "writer":
        return found
    file = run / "writers.json"
    if not file.exists():
        file.write_text(json.dumps(writers(run)) + "\n")
    return found | {"writers": json.loads(file.read_text())}


def of_state(evaluation: dict, state: str) -> dict:
    """The policies' table of a state."""
    return evaluation if state == "none" else evaluation["states"][state]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, with the command that makes it."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([f"`{COMMAND}`", "", *lines, *("| " + " | ".join(row) + " |" for row in rows)])


def interval_cell(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and 95 % interval, `12.3 [11.0, 13.1]`."""
    mean, low, high = (f"{scale * value:.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def by_level(rows: list[dict]) -> str:
    """Think share at each level, in per cent, a mean over seeds."""
    levels = [row["levels"] for row in rows]
    return " ".join(f"{np.mean([100 * own[level]['shares']['think'] for own in levels]):.0f}" for level in levels[0])


def states_table(runs: dict[str, dict]) -> str:
    """State and policy: means over seeds with their range."""
    rows = []
    for state in STATES:
        for policy in POLICIES:
            own = [of_state(seed["evaluation"]["after"], state) for seed in runs.values()]
            greedy, sampled = ([each[decoding][policy] for each in own] for decoding in ("greedy", "sampled"))
            rows.append(
                [
                    state,
                    policy,
                    cell([100 * row["accuracy"] for row in greedy], 1),
                    cell([row["tokens"] for row in greedy], 2),
                    cell([100 * row["shares"]["think"] for row in greedy], 1),
                    cell([100 * row["shares"]["think"] for row in sampled], 1),
                    by_level(greedy),
                ]
            )
    return markdown(
        ["state", "policy", "accuracy %", "wake tokens", "think %", "P(think) %", "think % by level"], rows
    )


def differences_table(runs: dict[str, dict]) -> str:
    """Free choice in each state less that without one, per seed with its interval over contexts."""
    rows = []
    for number, seed in runs.items():
        sleep = seed["evaluation"]["after"]["sleep"]
        for state, values in sleep["against_none"].items():
            saved = [100 * value / sleep["without"][0] for value in values["tokens"]]
            rows.append(
                [
                    number,
                    state,
                    interval_cell(values["accuracy"], 100),
                    interval_cell(saved, 1, 0),
                    interval_cell(values["last_mode"], 100),
                ]
            )
    return markdown(["seed", "state", "accuracy, points", "wake tokens, %", "think share, points"], rows)


def costs_table(runs: dict[str, dict]) -> str:
    """Cost of a query in wake tokens at each price and number of queries, and the break-even."""
    rows = []
    for number, seed in runs.items():
        sleep = seed["evaluation"]["after"]["sleep"]
        for price in PRICES:
            costs = sleep["costs"][str(price)]
            cells = [interval_cell(costs[str(m)], digits=2) for m in QUERIES]
            without = interval_cell(sleep["without"], digits=2)
            rows.append([number, str(price), without, *cells, interval_cell(costs["break_even"], digits=1)])
    return markdown(["seed", "price", "without sleep", *(f"m = {m}" for m in QUERIES), "break-even m"], rows)


def writers_table(runs: dict[str, dict]) -> str:
    """The trained reader with the notes of either writer."""
    rows = []
    for number, seed in runs.items():
        for decoding, found in seed["writers"].items():
            for name in ("warm-up", "RL"):
                own = found[name]
                gain = interval_cell(found["gain"]["accuracy"], 100) if name == "RL" else ""
                cells = [interval_cell(own[key], 100) for key in ("rows_right", "accuracy")]
                tokens = [interval_cell(own[key]) for key in ("tokens", "kept")]
                rows.append([number, decoding, name, *cells, *tokens, gain])
    header = ["seed", "notes", "writer", "rows right %", "accuracy %", "tokens written", "tokens kept"]
    return markdown([*header, "gain, points"], rows)


def times_table(runs: dict[str, dict]) -> str:
    """Steps and seconds of the stages, and the think share before RL."""
    rows = []
    for number, seed in runs.items():
        cells = [f"{seed['times'][stage][key]:.0f}" for stage in ("warmup", "rl") for key in ("steps", "seconds")]
        before = seed["evaluation"]["before"]
        own = 100 * of_state(before, "own")["greedy"]["free"]["accuracy"]
        rows.append([number, *cells, f"{100 * before['sleep']['rows_right'][0]:.1f}", f"{own:.1f}"])
    names = ["warm-up steps", "seconds", "RL steps", "seconds", "rows right % before RL", "accuracy % from own notes"]
    return markdown(["seed", *names], rows)


# Name of a block -> the arm it is about, and what makes it.
BLOCKS = {
    "states": ("wake", states_table),
    "differences": ("wake", differences_table),
    "costs": ("wake", costs_table),
    "wake_runs": ("wake", times_table),
    "writers": ("writer", writers_table),
    "writer_runs": ("writer", times_table),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("outputs/sleep_notes"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="run nothing, write what is there")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job("quickstart_sleep", arm, seed, ARMS[arm], options.runs) for arm in options.arms for seed in options.seeds
    ]
    if not options.tables:
        run_all(jobs, options.workers)
    file = options.out / "sleep.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    for arm in options.arms:
        content[arm] = {str(seed): read_run(options.runs / f"{arm}-{seed}", arm) for seed in options.seeds}
    file.write_text(json.dumps(content, indent=1) + "\n")
    page = options.out / "sleep.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Sleep results\n"
    for name, (arm, make) in BLOCKS.items():
        if arm in content:
            text = replace_block(text, name, make(content[arm]))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
