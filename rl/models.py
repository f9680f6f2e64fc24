"""Loading and saving models and tokenizers, whatever they come from: embedded, or what `rl/origin.py` finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from siesta.data.errors import ModelError
from siesta.data.prompts import end_id, pad_id
from siesta.rl import embedded
from siesta.rl.generation import replaced
from siesta.rl.modes import Mode, Modes, grow_embeddings, prepare_tokenizer
from siesta.rl.origin import ADAPTER, Origin, adapter_origin, check_adapter, recipe_origin, write_origin
from siesta.rl.recipe import ModelSection, ModeSection, Recipe


def build_modes(sections: dict[str, ModeSection], tokenizer: PreTrainedTokenizerBase) -> Modes:
    """The recipe's modes with the ids that this tokenizer gives their control tokens."""
    vocabulary = tokenizer.get_vocab()
    return Modes(
        [
            Mode(name=name, token_id=vocabulary[section.token], **section.model_dump())
            for name, section in sections.items()
        ]
    )


def make_tokenizer(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The recipe's tokenizer with control tokens and cut chat template, and the tokens that were added."""
    tokenizer = published_tokenizer(recipe.model, recipe_origin(recipe), task=recipe.data.task)
    sleep = [recipe.sleep.token] if recipe.sleep.mechanism == "notes" else []
    return tokenizer, prepare_tokenizer(tokenizer, [*(mode.token for mode in recipe.modes.values()), *sleep])


def published_tokenizer(
    section: ModelSection, origin: Origin | None, key: str = "model.path", task: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer without control tokens, with the section's chat template if it names one.

    Args:
        origin: Of the section's model; None for the embedded one.
        key: The recipe's key of the path, for messages.
        task: Whose words the embedded model's tokenizer knows.
    """
    if origin is None:
        tokenizer = embedded.build_tokenizer(task)
    else:
        tokenizer = _load_tokenizer(origin, section.trust_remote_code, key)
    if section.chat_template is not None:
        if not section.chat_template.is_file():
            raise ModelError(f"model.chat_template: {section.chat_template}: no such file")
        try:
            tokenizer.chat_template = section.chat_template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"model.chat_template: {section.chat_template}: not UTF-8") from error
    return tokenizer


def make_model(
    recipe: Recipe, folder: Path, prepare: Callable[[PreTrainedTokenizerBase, PreTrainedModel], object] | None = None
) -> None:
    """Build or fetch the model, give it the control tokens, and save it to `folder`.

    Args:
        prepare: Adds to tokenizer and model what else the run trains.
    """
    section, origin = recipe.model, recipe_origin(recipe)
    tokenizer, added = make_tokenizer(recipe)
    if origin is None:
        model = embedded.build_model(tokenizer, seed=recipe.seed, **section.embedded.model_dump())
        model = model.to(getattr(torch, section.dtype))
    else:
        model = load_weights(origin, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    grow_embeddings(model, tokenizer, added)
    if prepare is not None:
        prepare(tokenizer, model)
    # Sampling settings that a model ships (penalties, suppressed tokens) would make rollouts another policy than the
    # one in the loss, and a second end-of-sequence id would end rollouts that count as cut.
    model.generation_config = GenerationConfig(eos_token_id=end_id(tokenizer), pad_token_id=pad_id(tokenizer))
    save_model(model, tokenizer, folder)
    if origin is not None:
        write_origin(origin, folder)


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Shape of the recipe's model, without its weights.

    Raises:
        ModelError: It cannot be trained: quantised weights, or an adapter that does not fit its base.
    """
    section, origin = recipe.model, recipe_origin(recipe)
    if origin is None:
        return embedded.model_config(tokenizer, **section.embedded.model_dump())
    config = _load(AutoConfig, origin, section.trust_remote_code)
    if "quantization_config" in config.to_dict():
        raise ModelError(
            f"model.path: {section.path}: its weights are quantised and cannot be trained; name the unquantised model "
            "(model.quantization quantises it for QLoRA)"
        )
    check_adapter(origin, config)
    return config


def load_weights(
    origin: Origin, *, dtype: str, trust_remote_code: bool = False, key: str = "model.path"
) -> PreTrainedModel:
    """The model of an origin in `dtype`: a GGUF file is unpacked, an adapter merged into its base.

    Its weights are whole: where a trainer shards its own (ZeRO-3), transformers would shard these as well.

    Args:
        key: What errors call the path.
    """
    # Without this transformers may keep a GGUF file's weights packed, which can be neither trained nor saved.
    unpacked = {"quantization_config": GgufConfig(dequantize=True)} if origin.gguf_file else {}
    with replaced(deepspeed, "_hf_deepspeed_config_weak_ref", None):
        model = _load(
            AutoModelForCausalLM,
            origin,
            trust_remote_code,
            key,
            dtype=getattr(torch, dtype),
            use_safetensors=True,  # the older formats are pickles, which are programs
            **unpacked,
        )
    if origin.adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, origin.adapter).merge_and_unload()


def _load_tokenizer(origin: Origin, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an origin; an adapter's own, if it brings one."""
    if origin.adapter is not None and (Path(origin.adapter) / "tokenizer_config.json").is_file():
        origin = Origin(origin.adapter)
    tokenizer = _load(AutoTokenizer, origin, trust_remote_code, key)
    if origin.gguf_file is not None:
        # transformers 5.17 makes a GGUF file's first special token the end of a response; its config is right.
        config = _load(AutoConfig, origin, trust_remote_code, key)
        for name in ("eos_token", "pad_token"):
            token_id = vars(config)[f"{name}_id"]
            if token_id is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    return tokenizer


def _load(auto: Any, origin: Origin, trust_remote_code: bool, key: str = "model.path", **kwargs: Any) -> Any:
    try:
        return auto.from_pretrained(origin.path, trust_remote_code=trust_remote_code, **origin.place, **kwargs)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            section = key.rpartition(".")[0]
            raise ModelError(
                f"{key}: {origin}: it brings Python code of its own (auto_map), which is not run; read the code, "
                f"then set {section}.trust_remote_code: true and {section}.revision to the commit that was read"
            ) from error
        raise ModelError(f"{key}: {origin}: {' '.join(str(error).split())[:300]}") from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights as safetensors, tokenizer with its chat template."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(
    folder: Path, *, device: str | torch.device = "cpu", dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A saved model on `device`, a LoRA adapter merged into its unquantised base.

    Raises:
        ModelError: The folder holds no model.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such checkpoint folder")
    if (folder / ADAPTER).exists():
        origin = adapter_origin(folder, "checkpoint")
    elif (folder / "config.json").exists():
        origin = Origin(str(folder))
    else:
        raise ModelError(f"{folder}: no model in this folder (config.json is missing)")
    model = load_weights(origin, dtype=dtype, trust_remote_code=trust_remote_code)
    return cast(torch.nn.Module, model).to(device)  # pyright: ignore[reportReturnType]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    return AutoTokenizer.from_pretrained(folder)


def lora_config(settings: dict | None, *, train_embeddings: bool):
    """peft's LoraConfig from the recipe, or None.

    Args:
        settings: The recipe's `model.lora`.
        train_embeddings: Train the embedding matrix along. The warm-up needs it: an adapter cannot tell two control
            tokens apart whose rows both stand at the mean. (peft's `trainable_token_indices` would train these rows
            alone, but TRL's fused head reads past it.)

    Raises:
        ModelError: peft does not know a setting.
    """
    if settings is None:
        return None
    from peft import LoraConfig

    saved = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if train_embeddings else {}
    try:
        return LoraConfig(task_type="CAUSAL_LM", **(saved | settings))
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.lora: {error}") from error
