"""From a recipe's section `sleep` to a way to sleep, with what the model needs for it: slots, or a memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import ModelError, RecipeError
from siesta.rl.generation import fixed_randomness
from siesta.rl.models import build_modes, load_model, load_weights, make_tokenizer
from siesta.rl.modes import Modes, grow_embeddings
from siesta.rl.origin import recipe_origin
from siesta.rl.precision import default_device
from siesta.rl.recipe import Recipe
from siesta.rl.sleep.gist import GistSleep, add_slots
from siesta.rl.sleep.latent import LatentSleep
from siesta.rl.sleep.memory import BRANCH, MemorySleep, add_memory, load_memory
from siesta.rl.sleep.notes import NotesSleep
from siesta.rl.sleep.protocol import Consolidator
from siesta.rl.sleep.raw import NoSleep, RawSleep
from siesta.rl.sleep.tensors import TensorSleep
from siesta.rl.sleep_section import SleepSection

Way = Consolidator[Any]
Builder = Callable[[SleepSection, PreTrainedTokenizerBase, PreTrainedConfig, dict[str, Any]], TensorSleep]


def build_way(
    section: SleepSection, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, **settings: Any
) -> TensorSleep:
    """The way to sleep that a section names, for a model of `config` that has what it takes.

    Args:
        settings: Of `TensorSleep`: `instruction`, `batch_size`.

    Raises:
        RecipeError: The mechanism cannot be had, or not with this model.
    """
    try:
        return BUILDERS[section.mechanism](section, tokenizer, config, settings)
    except ModelError as error:
        raise RecipeError(f"sleep.mechanism: {section.mechanism}: {error}") from error


def build_consolidator(
    section: SleepSection,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    reserved: Sequence[int] = (),
    **settings: Any,
) -> Way:
    """Notes, or `build_way` with what the model lacks for it: slots are added to model and tokenizer, a memory to the
    model. Both are new weights, so this comes before an optimizer is made or weights are loaded.

    Args:
        reserved: Ids of the control tokens, which notes must not hold.

    Raises:
        RecipeError: See `build_way`.
    """
    if section.mechanism == "notes":
        return NotesSleep(tokenizer, section, reserved, **settings)
    if section.mechanism == "gist":
        add_slots(model, tokenizer, section.slots)
    way = build_way(section, tokenizer, model.config, **settings)
    if section.mechanism == "memory":
        try:
            give_memory(model, section)
        except ModelError as error:
            raise RecipeError(f"sleep.mechanism: memory: {error}") from error
    return way


def give_memory(model: PreTrainedModel, section: SleepSection) -> None:
    """Add the section's memory to a model without one."""
    if BRANCH not in dict(model.named_children()):
        add_memory(model, section.layer, segment=section.segment)


def load_whole(folder: Path, recipe: Recipe, dtype: str | None = None) -> PreTrainedModel:
    """`load_model` with the memory that the run trains, if it does: transformers does not know of it."""
    section = recipe.model
    model = load_model(folder, dtype=dtype or section.dtype, trust_remote_code=section.trust_remote_code)
    if recipe.sleep.mechanism == "memory":
        give_memory(model, recipe.sleep)
        load_memory(model, folder)
    return model


def _none(section, tokenizer, config, settings) -> TensorSleep:
    return NoSleep(tokenizer, config, **settings)


def _raw(section, tokenizer, config, settings) -> TensorSleep:
    return RawSleep(tokenizer, config, **settings)


def _latent(section, tokenizer, config, settings) -> TensorSleep:
    options = {"truncate": section.truncate, "window": section.window}
    return LatentSleep(tokenizer, config, section.form, **options, **settings)


def _gist(section, tokenizer, config, settings) -> TensorSleep:
    return GistSleep(tokenizer, config, section.slots, **settings)


def _memory(section, tokenizer, config, settings) -> TensorSleep:
    way = MemorySleep(tokenizer, config, section.layer, **settings)
    layers = config.get_text_config().num_hidden_layers
    if section.layer >= layers:
        raise RecipeError(f"sleep.layer: {section.layer}: the model has the layers 0 to {layers - 1}")
    return way


BUILDERS: dict[str, Builder] = {"none": _none, "raw": _raw, "latent": _latent, "gist": _gist, "memory": _memory}


@dataclass(frozen=True)
class Sleeper:
    """A model that sleeps and wakes, with all that it takes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    modes: Modes
    way: Way
    trained: bool


def open_sleeper(recipe: Recipe, path: Path | str | None) -> Sleeper:
    """The recipe's way to sleep with a trained model.

    `trained` is False where the mechanism's own weights (slots, memory, the token that opens notes) are new: they say
    nothing.

    Args:
        path: A folder or a hub name; None is the export of the recipe's run.

    Raises:
        UserError: There is no such model, or it cannot sleep in this way.
    """
    export = recipe.run_dir / "export"
    if path is None and not export.is_dir():
        raise ModelError(
            f"{export}: the run of this recipe has no export; train it first, or name a model with --model"
        )
    section = recipe.model.model_copy(update={"path": str(path or export), "revision": None})
    recipe = recipe.model_copy(update={"model": section})
    tokenizer, added = make_tokenizer(recipe)
    origin = recipe_origin(recipe)
    assert origin is not None  # there is a path
    model = load_weights(origin, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    grow_embeddings(model, tokenizer, added)
    known = len(tokenizer)
    reserved = build_modes(recipe.modes, tokenizer).token_ids
    with fixed_randomness(recipe.seed):
        way = build_consolidator(
            recipe.sleep, tokenizer, model, reserved=reserved, instruction=recipe.data.instruction
        )
    trained = len(tokenizer) == known and (way.name != "notes" or recipe.sleep.token not in added)
    if way.name == "memory":
        trained = load_memory(model, Path(section.path or ""))
    cast(torch.nn.Module, model).to(default_device())
    return Sleeper(model, tokenizer, build_modes(recipe.modes, tokenizer), way, trained)
