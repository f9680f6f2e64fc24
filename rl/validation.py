"""Validation during RL: the free policy on validation items, as flat metrics and as panels."""

from typing import Any, cast

from siesta.data.schema import Example
from siesta.rl import policies
from siesta.rl.context import Context, main_process
from siesta.rl.panels import Panels, validation_panels
from siesta.rl.sharding import whole_weights
from siesta.rl.trainer import DeGRPOTrainer


def validate(context: Context, trainer: DeGRPOTrainer, examples: list[Example], panels: Panels) -> dict[str, float]:
    """Numbers of the free policy on validation items; sharded weights are gathered on every rank first."""
    with whole_weights(cast(Any, trainer.model_wrapped), trainer.accelerator) as model:
        values = {}
        if main_process():
            measured = context.measure(model, examples, samples=context.recipe.evaluate.every_samples)
            result = policies.table(measured, resamples=1, seed=0)
            values = validation_numbers(result)
            panels.show(lambda: validation_panels(measured, result), trainer.state.global_step)
            if context.sleeps:
                values |= validate_states(context, model, examples)
    trainer.accelerator.wait_for_everyone()
    return values


def validate_states(context: Context, model: Any, examples: list[Example]) -> dict[str, float]:
    """The same numbers for readers of the contexts' own states, `validation/own/...`, and what those states are."""
    states = context.slept(model, examples)
    samples = context.recipe.evaluate.every_samples
    measured = context.measure_states(model, states, samples, only=["own"])["own"]
    numbers = validation_numbers(policies.table(measured, resamples=1, seed=0))
    values = {name.replace("validation/", "validation/own/"): value for name, value in numbers.items()}
    return values | {f"validation/{name}": float(own.mean()) for name, own in states.numbers.items()}


def validation_numbers(result: dict) -> dict[str, float]:
    """The free policy's row as flat metrics: sampled shares P(m), greedy accuracy, regret of both."""
    greedy, sampled = result["greedy"]["free"], result["sampled"]["free"]
    values = {
        "validation/accuracy": greedy["accuracy"],
        "validation/tokens": greedy["tokens"],
        "validation/regret": greedy["regret"],
        "validation/regret_sampled": sampled["regret"],
    }
    for mode in sampled["shares"]:
        values[f"validation/prob/{mode}"] = sampled["shares"][mode]
        values[f"validation/accuracy_always/{mode}"] = result["greedy"][f"always-{mode}"]["accuracy"]
        for level, row in sampled["levels"].items():
            values[f"validation/prob/{mode}/level_{level}"] = row["shares"][mode]
            values[f"validation/choice/{mode}/level_{level}"] = greedy["levels"][level]["shares"][mode]
    return values
