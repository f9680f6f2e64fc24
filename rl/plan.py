"""The command `siesta plan`: what a recipe comes to before it is run.

    siesta plan recipe.yaml                    # everything is checked, tokens and memory are estimated
    siesta plan recipe.yaml --like outputs/old # and hours, from the speed at which an earlier run worked

Tokens are upper bounds: every rollout is counted with its mode's cap, in equal shares of the modes. How long they take
depends on machine, model and lengths too much to be guessed; an earlier run on the same machine knows.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from siesta.data.errors import ReportError
from siesta.rl.console import quiet_libraries
from siesta.rl.context import Context
from siesta.rl.machine import memory_estimate
from siesta.rl.recipe import Recipe, dump_recipe, load_recipe
from siesta.rl.report import read_metrics
from siesta.rl.run import Run
from siesta.rl.stages import rl_config, warmup_config
from siesta.rl.train import preflight


@dataclass(frozen=True)
class Load:
    """What RL has to do, at most.

    Args:
        steps: Optimizer steps.
        rollouts: Of a step, over all processes.
        prompts: Distinct prompts of a step.
        prompt_tokens: Of the mean prompt.
        response_tokens: Of the mean response, control token included, if each met its cap.
    """

    steps: int
    rollouts: int
    prompts: int
    prompt_tokens: float
    response_tokens: float

    @property
    def tokens(self) -> float:
        """All tokens of all rollouts that a training pass reads."""
        return self.steps * self.rollouts * (self.prompt_tokens + self.response_tokens)

    def lines(self) -> list[str]:
        """For people."""
        written = self.steps * self.rollouts * self.response_tokens
        return [
            f"rl: {self.steps:,} steps of {self.rollouts:,} rollouts, {self.prompts:,} prompts each",
            f"rl: at most {written:,.0f} tokens written and {self.tokens:,.0f} trained on "
            f"(mean prompt {self.prompt_tokens:.0f}, mean cap {self.response_tokens:.0f})",
        ]


def rl_load(context: Context, processes: int) -> Load:
    """The load of the recipe's RL, launched on so many processes."""
    config = rl_config(context)
    sample = context.rl_examples[:1000]
    lengths = [len(ids) for ids in context.prompts(sample)]
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    group = config.num_generations
    assert group is not None
    epoch = len(context.rl_examples) * group / rollouts
    steps = config.max_steps if config.max_steps > 0 else round(epoch * config.num_train_epochs)
    caps = [1 + mode.max_tokens for mode in context.modes]
    return Load(steps, rollouts, rollouts // group, statistics.fmean(lengths), statistics.fmean(caps))


def seconds_per_step(run: Path) -> float:
    """Median seconds of a step of RL in an earlier run.

    Raises:
        ReportError: It has logged none.
    """
    found = [row["time/step"] for row in read_metrics(run, "rl") if "time/step" in row]
    if not found:
        raise ReportError(
            f"--like {run}: no seconds of RL steps in its metrics.jsonl; name a run directory that trained"
        )
    return statistics.median(found)


def make(recipe: Recipe, like: Path | None, console: Console) -> None:
    """Check the recipe and print what it comes to.

    Raises:
        UserError: It cannot be run.
    """
    seconds = None if like is None else seconds_per_step(like)

    def say(line: str) -> None:
        console.print(f"# {line}", markup=False)

    context = Context(Run(recipe), say)
    preflight(recipe, context)
    say(memory_estimate(recipe, rl_config(context)).line())
    if recipe.warmup.enabled:
        warmup = warmup_config(context)
        rows = warmup.per_device_train_batch_size * warmup.gradient_accumulation_steps * PartialState().num_processes
        length = (
            f"at most {warmup.max_steps:,} steps" if warmup.max_steps > 0 else f"{warmup.num_train_epochs:g} epochs"
        )
        say(f"warm-up: {length} of {rows:,} rows")
    if recipe.rl.enabled:
        load = rl_load(context, PartialState().num_processes)
        for line in load.lines():
            say(line)
        if seconds is not None:
            say(f"rl: {load.steps * seconds / 3600:.2f} hours at {seconds:.2f} s a step, as in {like}")
    console.print(dump_recipe(recipe), markup=False, end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="siesta plan", description="What a recipe comes to before it is run.")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--like", type=Path, help="an earlier run whose speed is taken for this one's")
    options = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    recipe = load_recipe(options.recipe, options.overrides)
    make(recipe, options.like, Console(soft_wrap=True, highlight=False))
    return 0
