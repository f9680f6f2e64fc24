"""Loading and saving models and tokenizers, whatever they come from: embedded, a folder, a hub, a LoRA adapter."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from siesta.data.errors import ModelError
from siesta.data.prompts import end_id, pad_id
from siesta.rl import embedded
from siesta.rl.modes import Mode, Modes, grow_embeddings, prepare_tokenizer
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
    tokenizer = published_tokenizer(recipe.model)
    return tokenizer, prepare_tokenizer(tokenizer, [mode.token for mode in recipe.modes.values()])


def published_tokenizer(section: ModelSection, key: str = "model.path") -> PreTrainedTokenizerBase:
    """A tokenizer without control tokens, with the section's chat template if it names one.

    Args:
        key: The recipe's key of the path, for messages.
    """
    tokenizer = embedded.build_tokenizer() if section.path is None else _load(AutoTokenizer, section, key)
    if section.chat_template is not None:
        if not section.chat_template.is_file():
            raise ModelError(f"model.chat_template: {section.chat_template}: no such file")
        try:
            tokenizer.chat_template = section.chat_template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"model.chat_template: {section.chat_template}: not UTF-8") from error
    return tokenizer


def published_model(section: ModelSection, key: str = "model.path") -> PreTrainedModel:
    """The model at the section's path, without control tokens, in the section's dtype."""
    return _load(AutoModelForCausalLM, section, key, dtype=getattr(torch, section.dtype))


def make_model(recipe: Recipe, folder: Path) -> None:
    """Build or fetch the model, give it the control tokens, and save it to `folder`."""
    section = recipe.model
    tokenizer, added = make_tokenizer(recipe)
    if section.path is None:
        model = embedded.build_model(tokenizer, seed=recipe.seed, **section.embedded.model_dump())
    else:
        model = published_model(section)
    grow_embeddings(model, tokenizer, added)
    # Sampling settings that a model ships (penalties, suppressed tokens) would make rollouts another policy than the
    # one in the loss, and a second end-of-sequence id would end rollouts that count as cut.
    model.generation_config = GenerationConfig(eos_token_id=end_id(tokenizer), pad_token_id=pad_id(tokenizer))
    save_model(model, tokenizer, folder)


def model_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Shape of the recipe's model, without its weights."""
    if section.path is None:
        return embedded.model_config(tokenizer, **section.embedded.model_dump())
    return _load(AutoConfig, section)


def _load(auto: Any, section: ModelSection, key: str = "model.path", **kwargs: Any) -> Any:
    try:
        return auto.from_pretrained(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code, **kwargs
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: {section.path}: {' '.join(str(error).split())[:300]}") from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights as safetensors, tokenizer with its chat template."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path, *, device: str | torch.device = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """A saved model on `device`, a LoRA adapter merged into its base.

    Raises:
        ModelError: The folder holds no model.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such checkpoint folder")
    if (folder / "adapter_config.json").exists():
        return merge_adapter(folder, dtype=dtype).to(device)  # pyright: ignore[reportArgumentType]
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no model in this folder (config.json is missing)")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return cast(torch.nn.Module, model).to(device)  # pyright: ignore[reportReturnType]


def merge_adapter(folder: Path, *, dtype: str) -> PreTrainedModel:
    """A LoRA adapter merged into the base model that its configuration names."""
    from peft import PeftModel

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


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


def default_device() -> str:
    """Where evaluation and export run."""
    return "cuda" if torch.cuda.is_available() else "cpu"
