"""Run a recipe: model, warm-up, RL, evaluation, export, report.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m siesta.rl.train recipes/quickstart.yaml
    siesta train quickstart rl.tau=0.3 tracking.run=warmer --dry-run

Exit code 2: the input cannot be used, one line says why. 3: a guard ended the run. 4: a rank died or stalled. 143,
130: SIGTERM, SIGINT ended it. After 4, 143 and 130 the same command goes on. 1: an error that nobody expected; its
traceback is kept in the run directory.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from accelerate import PartialState
from rich.console import Console

from siesta.data.errors import RecipeError
from siesta.data.loading import skipped_rows
from siesta.rl.card import DATA_FILE
from siesta.rl.config import DeGRPOConfig, check_method
from siesta.rl.console import quiet_libraries, tracked
from siesta.rl.context import Context
from siesta.rl.exits import DEBUG_HELP, command, keep_tracebacks
from siesta.rl.launch import world_line
from siesta.rl.machine import check_engine, check_machine, memory_estimate
from siesta.rl.memory import zero_stage
from siesta.rl.models import lora_config, model_config
from siesta.rl.modes import check_prompts
from siesta.rl.precision import lost_updates
from siesta.rl.quantize import quantization_config
from siesta.rl.recipe import Recipe, dump_recipe, load_recipe
from siesta.rl.run import Run, write_atomically
from siesta.rl.sleep.context_trainer import check_batch
from siesta.rl.sleep.state_trainer import check_states
from siesta.rl.stages import STAGES, rl_config, show_evaluation, warmup_config


def preflight(recipe: Recipe, context: Context) -> None:
    """Find everything that can be known to be wrong before any work is done.

    Raises:
        UserError: One line.
    """
    config = rl_config(context)
    check_method(config, len(recipe.modes))
    check_sleep(recipe, context, config)
    check_model(recipe, context)
    for line in skipped_rows(recipe.data):
        context.say(line)
    examples = context.train_examples + context.examples("test", recipe.evaluate.items)
    examples += context.examples("validation", max(recipe.warmup.check_items, recipe.evaluate.every_items))
    examples += context.warmup_examples if recipe.warmup.responses else []
    check_sides(recipe, context)
    prompts = context.prompts(examples)
    names = [example.id for example in examples]
    openers = [*context.modes, context.notes().mode] if context.writes_notes else context.modes
    check_prompts(context.tokenizer, openers, dict(zip(names, prompts, strict=True)))
    longest = max(map(len, prompts)) + 1 + max(mode.max_tokens for mode in context.modes)
    if context.writes_notes:
        longest += recipe.sleep.max_tokens  # as a completion, or in a reader's prompt
    check_machine(config, getattr(torch, recipe.model.dtype), longest)
    if recipe.evaluate.engine == "vllm":
        check_engine("evaluate.engine", "engine: generate")
    context.judge.verifiers  # noqa: B018  builds every verifier that the examples name


def check_sides(recipe: Recipe, context: Context) -> None:
    """Say how the questions are shared out between warm-up and RL.

    Raises:
        DataError: Nothing is left for one of them.
    """
    if recipe.data.unseen_share == 0:
        return
    rl, total = len(context.rl_examples), len(context.train_examples)
    if recipe.warmup.enabled:
        context.warmup_examples  # noqa: B018  is there anything left?
    context.say(f"data: RL is trained on {rl} of {total} training items; the warm-up does not see them")


def check_sleep(recipe: Recipe, context: Context, config: DeGRPOConfig) -> None:
    """Refuse a sleep that would not be trained or measured as the recipe says.

    Raises:
        RecipeError: With the key to change.
    """
    mechanism = recipe.sleep.mechanism
    if mechanism == "none":
        return
    if mechanism == "raw":
        raise RecipeError("sleep.mechanism: raw: there is nothing in it to train, answers are those of none; use none")
    check_batch(config, recipe.sleep.queries)
    if recipe.evaluate.engine == "vllm":
        raise RecipeError(
            f"evaluate.engine: vllm: with {mechanism} evaluation is by the model itself; set engine: generate"
        )
    if context.trains_states:
        check_states(config, recipe.sleep)
        if recipe.model.lora is not None:
            raise RecipeError(f"model.lora: an adapter would not train all that {mechanism} needs; set it to null")
        if warmup_config(context).gradient_checkpointing and recipe.warmup.enabled:
            raise RecipeError("warmup.gradient_checkpointing: such blocks leave no state; set it to false")
        context.way.read([example.context for example in context.train_examples])


def check_model(recipe: Recipe, context: Context) -> None:
    """Find what is wrong with the model section, and say what its dtype does to the training.

    Raises:
        UserError: One line.
    """
    model_config(recipe, context.tokenizer)
    quantization_config(recipe.model)
    lora_config(recipe.model.lora, train_embeddings=True)
    # DeepSpeed keeps float32 master weights whatever the model's dtype, and peft a float32 adapter, save for QLoRA.
    plain = zero_stage() == 0 and (recipe.model.lora is None or recipe.model.quantization is not None)
    stages = (("warmup", recipe.warmup, warmup_config(context)), ("rl", recipe.rl, rl_config(context)))
    for name, section, args in stages:
        line = lost_updates(args, getattr(torch, recipe.model.dtype))
        if plain and section.enabled and line is not None:
            context.say(f"{name}: {line}")


def data_sizes(context: Context) -> dict[str, int]:
    """Items of each split as this run uses them, and how many were left out because they stand in two."""
    recipe = context.recipe
    validation = max(
        recipe.warmup.check_items if recipe.warmup.enabled else 0,
        recipe.evaluate.every_items if recipe.evaluate.every and recipe.rl.enabled else 0,
    )
    sizes = {
        "train": len(context.train_examples),
        "validation": len(context.examples("validation", validation)) if validation else 0,
        "test": len(context.examples("test", recipe.evaluate.items)),
        "overlap": context.overlap,
    }
    sizes |= {"rl": len(context.rl_examples)} if recipe.rl.enabled else {}
    return sizes | ({"warmup": len(context.warmup_examples)} if recipe.warmup.enabled else {})


def run_recipe(recipe: Recipe) -> None:
    """Do every stage that is not finished.

    Raises:
        SignalStop: A signal ended it.
    """
    console = Console(soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        if PartialState().is_main_process:
            console.print(line, markup=False)

    run = Run(recipe)
    context = Context(run, say)
    with context.stop.handled():
        launch = world_line(rl_config(context))
        preflight(recipe, context)
        run.check()
        run.prepare()
        if PartialState().is_main_process:
            write_atomically(run.path / DATA_FILE, json.dumps(data_sizes(context), indent=1) + "\n")
        say(launch)
        say(f"run directory {run.path}")
        for name, stage in STAGES.items():
            say(f"== {name}")
            with tracked(console if PartialState().is_main_process else Console(quiet=True), name) as context.tracker:
                done = run.stage(name, lambda stage=stage: stage(context))
            if not done:
                say("finished before, skipped")
                if name == "evaluate":
                    show_evaluation(context)
        say(f"done: {run.path}/report.md, {run.path}/export")


@command
def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="siesta train", description="Run a siesta recipe.", epilog=DEBUG_HELP)
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    options = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    recipe = load_recipe(options.recipe, options.overrides)
    keep_tracebacks(recipe.run_dir)
    if not options.dry_run:
        run_recipe(recipe)
        return 0
    context = Context(Run(recipe), lambda line: print(f"# {line}"))
    preflight(recipe, context)
    print(f"# {memory_estimate(recipe, rl_config(context)).line()}")
    print(dump_recipe(recipe), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
