"""The command `siesta eval`: what a checkpoint's modes, its choice between them and the whole frontier are worth.

    siesta eval outputs/quickstart --out outputs/quickstart/eval
    siesta eval outputs/a outputs/b outputs/c --out outputs/seeds --responses      # runs that differ in the seed
    siesta eval some/model --recipe my_recipe.yaml evaluate.samples=16 --out found

Every item is answered in every mode, once greedily and K times sampled, as in the stage `evaluate` of a run. All that
is reported is arithmetic on these responses: see `siesta.rl.eval_numbers`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel

from siesta.data.errors import DataError, ModelError, RecipeError, UserError
from siesta.data.prompts import end_id, pad_id
from siesta.data.schema import Example
from siesta.rl import policies
from siesta.rl.console import progress, quiet_libraries, tracked
from siesta.rl.context import Context
from siesta.rl.eval_numbers import Setting, checkpoint_numbers, over_checkpoints
from siesta.rl.eval_report import draw, show
from siesta.rl.evaluate import measure
from siesta.rl.export import final_model, find_run
from siesta.rl.frontier import check_keep, check_thresholds
from siesta.rl.generation import complete, fixed_randomness
from siesta.rl.judge import Judge
from siesta.rl.latency import Latency, time_responses
from siesta.rl.machine import check_engine
from siesta.rl.models import load_weights, make_tokenizer
from siesta.rl.modes import check_prompts
from siesta.rl.origin import ADAPTER, recipe_origin
from siesta.rl.policies import Measurement
from siesta.rl.precision import default_device, training_autocast
from siesta.rl.recipe import Recipe, load_recipe
from siesta.rl.responses import ResponseRows
from siesta.rl.run import Run, write_atomically
from siesta.rl.sleep_section import STATES


@dataclass(frozen=True)
class Checkpoint:
    """A model to measure and the recipe it is measured by, whose `model.path` is that model."""

    name: str
    recipe: Recipe


def find_checkpoint(path: str, recipe: str | None, overrides: Sequence[str]) -> Checkpoint:
    """The model that a path or a hub name stands for, with a recipe given or found above it.

    Raises:
        UserError: There is no model or no recipe.
    """
    place = Path(path)
    own = place if (place / "recipe.yaml").is_file() else None
    if own is None and place.is_dir():
        found = [folder for folder in place.resolve().parents if (folder / "recipe.yaml").is_file()]
        own = find_run(place) if found else None
    if own is None and recipe is None:
        kind = "no recipe.yaml in it or above it" if place.is_dir() else "no such folder here; of a hub model"
        raise RecipeError(f"{path}: {kind}, so name the recipe it is measured by: --recipe FILE")
    loaded = load_recipe(recipe or cast(Path, own) / "recipe.yaml", overrides)
    folder = path
    if own is not None and own == place:
        folder = str(final_model(place, load_recipe(place / "recipe.yaml"), or_export=True))
    # What lies in a run has its template and its quantisation behind it.
    changes: dict[str, Any] = {"path": folder, "revision": None, "quantization": None}
    changes |= {"chat_template": None} if own is not None else {}
    if not Path(folder).exists():
        changes["revision"] = loaded.model.revision if loaded.model.path == folder else None
    return Checkpoint(path, loaded.model_copy(update={"model": loaded.model.model_copy(update=changes)}))


def check_control_tokens(recipe: Recipe) -> None:
    """Raises ModelError if the checkpoint's tokenizer does not have every control token of the recipe."""
    _, added = make_tokenizer(recipe)
    missing = [f"{mode.token!r} ({name})" for name, mode in recipe.modes.items() if mode.token in added]
    if missing:
        raise ModelError(
            f"{recipe.model.path}: its tokenizer lacks the control tokens {', '.join(missing)}, so this model was not "
            "trained with the recipe's modes; name its own recipe with --recipe, or train it first"
        )


def contexts_of(examples: Sequence[Example]) -> np.ndarray | None:
    """Number of each item's context, (I,), if items share some; items without one stand alone. None: all alone."""
    places: dict[str, int] = {}
    numbers = [places.setdefault(example.context or f"\0{i}", len(places)) for i, example in enumerate(examples)]
    return np.array(numbers) if len(places) < len(numbers) else None


def prepare(checkpoint: Checkpoint, context: Context, examples: Sequence[Example]) -> Judge:
    """Find what is wrong before weights are loaded, and build the judge.

    Raises:
        UserError: In one line.
    """
    recipe = checkpoint.recipe
    check_control_tokens(recipe)
    if recipe.sleep.mechanism in ("notes", *STATES):
        context.say(f"{checkpoint.name}: sleep is left out; queries are asked with their whole context")
    if recipe.evaluate.engine == "vllm":
        check_engine("evaluate.engine", "engine: generate")
        if (Path(str(recipe.model.path)) / ADAPTER).is_file():
            raise ModelError(f"{recipe.model.path}: vLLM takes a whole model; export this adapter first")
    prompts = dict(zip([example.id for example in examples], context.prompts(examples), strict=True))
    check_prompts(context.tokenizer, context.modes, prompts)
    return context.judge_of(examples)


def load(context: Context) -> PreTrainedModel:
    """The checkpoint's model on the device of evaluations."""
    recipe = context.recipe
    if Path(str(recipe.model.path)).is_dir():
        return context.load(Path(str(recipe.model.path)))
    origin = recipe_origin(recipe)
    assert origin is not None  # there is a path
    section = recipe.model
    model = load_weights(origin, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    return cast(Any, model).to(default_device())


def measure_checkpoint(
    context: Context,
    judge: Judge,
    examples: Sequence[Example],
    rows: ResponseRows | None,
    timed: int,
    console: Console,
) -> tuple[Measurement, Latency | None]:
    """Rollouts of a checkpoint on the examples, and what responses of its take.

    Args:
        rows: Gets every response.
        timed: Prompts that are timed; 0: none.
    """
    recipe, section = context.recipe, context.recipe.evaluate
    model = load(context)
    settings: dict[str, Any] = {
        "instruction": recipe.data.instruction,
        "temperature": context.temperature,
        "samples": section.samples,
        "batch_size": section.batch_size,
    }
    total = len(examples) * len(context.modes) * (1 + section.samples)
    with (
        fixed_randomness(section.seed),
        training_autocast(recipe.rl, model.device),
        context.writer(Path(str(recipe.model.path)), examples) as write,
    ):
        with progress(console, "responses", total) as advance:
            measured = measure(model, judge, examples, write=write, advance=advance, keep=rows, **settings)
        latency = None
        if timed:
            ids: dict[str, Any] = {"pad_id": pad_id(context.tokenizer), "eos_id": end_id(context.tokenizer)}
            alone = write or partial(complete, model, batch_size=1, **ids)
            spread = examples[:: max(1, len(examples) // timed)][:timed]
            with progress(console, "timed responses", len(spread) * len(context.modes)) as advance:
                latency = time_responses(alone, context.prompts(spread), context.modes, advance=advance)
    return replace(measured, contexts=contexts_of(examples)), latency


def settings_of(checkpoints: Sequence[Checkpoint], options: argparse.Namespace, items: int) -> dict:
    """What evaluation.json says of how it was made."""
    recipe = checkpoints[0].recipe
    section = recipe.evaluate
    return {
        "checkpoints": {each.name: str(each.recipe.model.path) for each in checkpoints},
        "split": options.split,
        "items": items,
        "modes": list(recipe.modes),
        "temperature": recipe.rl.setting("temperature"),
        "device": default_device(),
        **{name: getattr(section, name) for name in ("samples", "resamples", "seed", "engine")},
    }


def same_items(first: Sequence[Example], name: str, other: Sequence[Example], own: str) -> None:
    """Raises DataError unless two checkpoints are asked the same items, in the same order."""
    if [(x.text, x.answer) for x in first] != [(x.text, x.answer) for x in other]:
        raise DataError(f"{own}: its recipe asks other items than that of {name}; name one for all with --recipe")


def make(options: argparse.Namespace, overrides: Sequence[str], console: Console) -> None:
    """Measure every checkpoint; evaluation.json comes last and stands for a finished folder.

    Raises:
        UserError: A checkpoint, a recipe, the data or the folder cannot be used.
    """
    check_thresholds(options.thresholds or [])
    check_keep(options.keep)
    checkpoints = [find_checkpoint(path, options.recipe, overrides) for path in options.checkpoints]
    if len({each.name for each in checkpoints}) < len(checkpoints):
        raise UserError("the same checkpoint is named twice")
    contexts = [Context(Run(each.recipe), lambda line: console.print(line, markup=False)) for each in checkpoints]
    items = [context.examples(options.split, context.recipe.evaluate.items) for context in contexts]
    for checkpoint, own in zip(checkpoints, items, strict=True):
        same_items(items[0], checkpoints[0].name, own, checkpoint.name)
        if list(checkpoint.recipe.modes) != list(checkpoints[0].recipe.modes):
            raise RecipeError(f"{checkpoint.name}: its modes are not those of {checkpoints[0].name}")
    judges = [prepare(*each) for each in zip(checkpoints, contexts, items, strict=True)]
    section = checkpoints[0].recipe.evaluate
    setting = Setting(section.resamples, section.seed, options.thresholds, options.keep)
    options.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Measurement] = {}
    results, named, lines = {}, [], ""
    for checkpoint, context, judge, examples in zip(checkpoints, contexts, judges, items, strict=True):
        console.print(f"== {checkpoint.name}", markup=False)
        rows = ResponseRows(judge, examples) if options.responses else None
        found, latency = measure_checkpoint(context, judge, examples, rows, options.timed, console)
        with tracked(console, "numbers and their intervals"):
            results[checkpoint.name], own = checkpoint_numbers(found, latency, setting)
        measured[checkpoint.name] = policies.scorable_items(found)
        named.append(own)
        lines += rows.lines(checkpoint.name, found) if rows else ""
    report = {"settings": settings_of(checkpoints, options, len(items[0])), "checkpoints": results}
    if len(named) > 1:
        report["over_checkpoints"] = over_checkpoints(named, section.seed)
    if options.responses:
        write_atomically(options.out / "responses.jsonl", lines)
    draw(measured, results, options.out)
    write_atomically(options.out / "evaluation.json", json.dumps(report, indent=1) + "\n")
    show(report, console)
    console.print(f"{options.out}/evaluation.json", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="siesta eval", description="Measure checkpoints in every mode, their mode policy and its frontier."
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="checkpoint | section.key=value",
        help="a run directory, a folder in it (export, rl/checkpoint-75), or a model's folder or hub name with "
        "--recipe; several are runs of one setting with different seeds. What has an = and is no folder overrides "
        "the recipe",
    )
    parser.add_argument("--recipe", help="a YAML file or the name of a shipped recipe: data, modes, evaluate")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is written")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--thresholds", type=float, nargs="+", help="on p(think); left out: by tenths of the share")
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="also the highest threshold that keeps this share (such as 0.98) of always thinking's accuracy",
    )
    parser.add_argument("--responses", action="store_true", help="write every response to responses.jsonl")
    parser.add_argument("--timed", type=int, default=16, help="prompts timed one by one for milliseconds; 0: none")
    options = parser.parse_intermixed_args(arguments)
    overrides = [each for each in options.checkpoints if "=" in each and not Path(each).exists()]
    options.checkpoints = [each for each in options.checkpoints if each not in overrides]
    if not options.checkpoints:
        parser.error("name a checkpoint")
    if options.timed < 0:
        parser.error(f"argument --timed: at least 0, not {options.timed}")
    quiet_libraries()
    make(options, overrides, Console(soft_wrap=True, highlight=False))
    return 0
