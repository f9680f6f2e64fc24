"""What a recipe asks of the machine, checked before any model is loaded."""

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from siesta.data.errors import RecipeError
from siesta.rl.attention import choose_backend
from siesta.rl.config import DeGRPOConfig
from siesta.rl.engines import check_vllm
from siesta.rl.memory import Memory, estimate, zero_stage
from siesta.rl.models import lora_config, make_tokenizer, model_config
from siesta.rl.precision import default_device
from siesta.rl.recipe import Recipe


def compute_dtype(config: TrainingArguments, weights: torch.dtype) -> torch.dtype:
    """What matrix products are computed in: mixed precision, or the weights' own."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else weights


def check_engine(key: str, without: str) -> None:
    """Raises RecipeError, with the recipe's `key`, unless vLLM can run here.

    Args:
        without: The setting that does without it.
    """
    check_vllm(key, without)
    if default_device() != "cuda":
        raise RecipeError(f"{key}: vLLM needs a CUDA device, and there is none; set {without}")


def check_machine(config: DeGRPOConfig, weights: torch.dtype, longest: int) -> None:
    """Refuse what this machine cannot run.

    Args:
        config: The `rl` section.
        weights: In which the model is loaded.
        longest: Tokens of the longest rollout there can be, prompt included.

    Raises:
        RecipeError: With the key to change.
    """
    choose_backend(config.attention, default_device(), compute_dtype(config, weights), share=config.share_prompts)
    if config.use_vllm:
        check_engine("rl.use_vllm", "use_vllm: false")
    if config.token_budget < longest:
        raise RecipeError(
            f"rl.token_budget: {config.token_budget} tokens do not hold the longest rollout, {longest} with its "
            f"prompt; raise it to at least that, or lower modes.<name>.max_tokens"
        )


def memory_estimate(recipe: Recipe, config: DeGRPOConfig) -> Memory:
    """Peak of a training pass of this recipe, launched as it is, on each device of this machine."""
    device = default_device()
    dtype = getattr(torch, recipe.model.dtype)
    model = model_config(recipe, make_tokenizer(recipe)[0])
    backend, _ = choose_backend(
        config.attention, device, compute_dtype(config, dtype), model, share=config.share_prompts
    )
    return estimate(
        model,
        config,
        dtype,
        lora=lora_config(recipe.model.lora, train_embeddings=False),
        processes=PartialState().num_processes,
        stage=zero_stage(),
        gpu_bytes=torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0,
        packed=backend.packed,
    )
