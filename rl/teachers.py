"""Who writes the responses of a mode: the data itself, another model, or the recipe's own model as it is published.

A teacher model has a tokenizer, a chat template and an end of its own, so what it says is taken as text. A reasoning
model encloses its work in tags: in a mode that works first the work is kept and the mode's marker put before the
answer, in one that answers at once only the answer is kept. Whether a draft is any good is decided elsewhere
(`siesta.rl.warmup_data`); here it is only read.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from siesta.data.errors import DataError, ModelError, RecipeError
from siesta.data.prompts import end_id, messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl.engines import check_vllm
from siesta.rl.generation import cut_after_eos, fixed_randomness, inference, left_pad, replaced, sampling_config
from siesta.rl.models import load_weights, published_tokenizer
from siesta.rl.modes import Mode
from siesta.rl.origin import Origin, find_origin
from siesta.rl.precision import default_device
from siesta.rl.recipe import ModelSection, Recipe
from siesta.rl.teacher_section import TeacherSection
from siesta.rl.warmup import worked, written_response


@dataclass(frozen=True)
class Draft:
    """A response as text; `ended` is False where a cap cut it off."""

    text: str
    ended: bool = True


@dataclass(frozen=True)
class Asked:
    """A model that is asked for responses: where it comes from, and how it answers.

    Args:
        source: Its `model:` section; the path's key in the recipe is `key`.
        max_tokens: Cap of a response in its own tokens.
    """

    source: ModelSection
    key: str
    origin: Origin
    section: TeacherSection
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int


# Examples and a seed -> the drafts for each example; none where there is nothing to say.
Teacher = Callable[[Sequence[Example], int], list[list[Draft]]]
# Prompt ids and a seed -> the same number of drafts for each prompt.
Engine = Callable[[Sequence[list[int]], int], list[list[Draft]]]


def check_teachers(recipe: Recipe) -> None:
    """Find what is known to be wrong before a model is loaded.

    Raises:
        RecipeError: A mode has no teacher, or one that cannot work.
    """
    for mode in recipe.modes:
        if mode not in recipe.teachers:
            raise RecipeError(
                f"teachers: mode {mode!r} has none; say how its responses come to be, "
                f"such as teachers.{mode}={{from: written}}"
            )
        section = recipe.teachers[mode]
        if section.origin == "self" and recipe.model.path is None:
            raise RecipeError(f"teachers.{mode}.from: self: the embedded model has learnt nothing yet; set model.path")
        if section.engine == "vllm":
            check_vllm(f"teachers.{mode}.engine", "engine: generate")


def open_teacher(recipe: Recipe, mode: Mode) -> Teacher:
    """The teacher of a mode, its model loaded; it is released when the last reference goes."""
    section = recipe.teachers[mode.name]
    if section.origin == "written":
        return lambda examples, seed: [_written(example, mode) for example in examples]
    source, key = recipe.model, "model.path"
    if section.origin == "model":
        named = {name: vars(section)[name] for name in ("path", "revision", "dtype", "trust_remote_code")}
        source, key = ModelSection(**named), f"teachers.{mode.name}.path"
    assert source.path is not None  # check_teachers has seen to it
    origin = find_origin(source.path, source.revision, key)
    tokenizer = published_tokenizer(source, origin, key)
    if tokenizer.chat_template is None:
        raise ModelError(f"{key}: {source.path}: the tokenizer has no chat template, so the model cannot be asked")
    asked = Asked(source, key, origin, section, tokenizer, section.max_tokens or mode.max_tokens)
    engine = ENGINES[section.engine](asked)

    def teach(examples: Sequence[Example], seed: int) -> list[list[Draft]]:
        prompts = [
            prompt_ids(
                tokenizer,
                messages(example, recipe.data.instruction, section.instruction, system=section.system),
                **section.chat_template_kwargs,
            )
            for example in examples
        ]
        return [[shaped(draft, mode, section.thought) for draft in drafts] for drafts in engine(prompts, seed)]

    return teach


def _written(example: Example, mode: Mode) -> list[Draft]:
    try:
        return [Draft(written_response(example, mode))]
    except DataError:  # a data set may have worked solutions for some of its rows
        return []


def shaped(draft: Draft, mode: Mode, thought: tuple[str, str] | None) -> Draft:
    """A draft as a response of `mode`: thought tags give way to the mode's marker, or go with the thought.

    A thought that is opened and never closed counts as cut off. Without tags the text stays as it is.

    Args:
        thought: Texts that open and close the work. The first may be missing: some templates put it in the prompt.
    """
    if thought is None:
        return Draft(draft.text.strip(), draft.ended)
    before, closed, answer = draft.text.rpartition(thought[1])
    if not closed:
        return Draft(draft.text.strip(), draft.ended and thought[0] not in draft.text)
    work = before.strip().removeprefix(thought[0]).strip()
    return Draft(worked(work, answer.strip(), mode), draft.ended)


def with_generate(asked: Asked) -> Engine:
    """transformers' `generate`, `batch_size` prompts at a time."""
    section, tokenizer, source = asked.section, asked.tokenizer, asked.source
    trust = source.trust_remote_code
    loaded = load_weights(asked.origin, dtype=source.dtype, trust_remote_code=trust, key=asked.key)
    model: Any = loaded.to(default_device())  # pyright: ignore[reportArgumentType]
    own_end = model.generation_config.eos_token_id
    # Chat models often end a turn with another token than a text; theirs may be one or several.
    end_ids = [end_id(tokenizer)] if own_end is None else [own_end] if isinstance(own_end, int) else list(own_end)
    pad_id = end_ids[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)  # pyright: ignore
    config = sampling_config(section.temperature, pad_id, end_ids)
    config.max_new_tokens, config.num_return_sequences = asked.max_tokens, section.samples

    def answer(prompts: Sequence[list[int]]) -> list[list[Draft]]:
        ids, mask = (x.to(model.device) for x in left_pad(prompts, pad_id))
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        rows = [cut_after_eos(row, end_ids) for row in output.sequences[:, ids.shape[1] :].tolist()]
        drafts = [
            Draft(str(tokenizer.decode(row[:-1] if row[-1] in end_ids else row)), row[-1] in end_ids) for row in rows
        ]
        return [drafts[start : start + section.samples] for start in range(0, len(drafts), section.samples)]

    def engine(prompts: Sequence[list[int]], seed: int) -> list[list[Draft]]:
        batches = [prompts[start : start + section.batch_size] for start in range(0, len(prompts), section.batch_size)]
        # `generate` fills what the given config leaves open from the model's own.
        with fixed_randomness(seed), inference(model), replaced(model, "generation_config", GenerationConfig()):
            return [drafts for batch in batches for drafts in answer(batch)]

    return engine


def with_vllm(asked: Asked) -> Engine:
    """vLLM in this process, all prompts in one call. (It reads the model's own end tokens itself.)"""
    vllm: Any = importlib.import_module("vllm")
    section, origin, where = asked.section, asked.origin, f"{asked.key}: {asked.source.path}"
    if origin.gguf_file or origin.adapter:
        raise ModelError(f"{where}: vLLM is given folders and hub names here; use engine: generate")
    loaded = asked.source.model_dump(include={"dtype", "trust_remote_code"})
    try:
        llm = vllm.LLM(model=origin.path, **(loaded | origin.place | section.vllm))
    except (OSError, TypeError, ValueError) as error:  # an unknown argument is a TypeError
        raise ModelError(f"{where}: vLLM cannot load it: {' '.join(str(error).split())[:300]}") from error

    def engine(prompts: Sequence[list[int]], seed: int) -> list[list[Draft]]:
        params = vllm.SamplingParams(
            n=section.samples,
            temperature=section.temperature or 0.0,
            max_tokens=asked.max_tokens,
            seed=seed,
            skip_special_tokens=False,
        )
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [[Draft(each.text, each.finish_reason == "stop") for each in output.outputs] for output in outputs]

    return engine


ENGINES: dict[str, Callable[[Asked], Engine]] = {"generate": with_generate, "vllm": with_vllm}
