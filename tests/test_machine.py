"""What a machine cannot run is refused before any model is loaded; how much memory a recipe takes."""

import pytest
import torch
from peft import LoraConfig
from transformers import Qwen3Config

from siesta.data.errors import RecipeError
from siesta.rl.config import DeGRPOConfig
from siesta.rl.machine import check_machine, compute_dtype
from siesta.rl.memory import GIB, estimate, zero_stage

CONFIG = Qwen3Config(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=2000,
    tie_word_embeddings=True,
)
# embedding, per layer q k v o, MLP, two norms and two head norms, last norm
WEIGHTS = 2000 * 256 + 4 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512 + 2 * 256 + 2 * 64) + 256


def settings(**fields: object) -> DeGRPOConfig:
    return DeGRPOConfig(
        output_dir="unused",
        per_device_train_batch_size=8,
        use_cpu=True,
        **({"bf16": False, "gradient_checkpointing": False} | fields),  # pyright: ignore[reportArgumentType]
    )


def test_a_budget_that_cannot_hold_a_rollout_is_refused() -> None:
    check_machine(settings(token_budget=100), torch.float32, longest=100)
    with pytest.raises(RecipeError, match=r"rl\.token_budget: 100 tokens do not hold the longest rollout, 101"):
        check_machine(settings(token_budget=100), torch.float32, longest=101)


def test_attention_that_the_machine_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rl\.attention: 'flashy' is not one of auto"):
        check_machine(settings(attention="flashy"), torch.float32, longest=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("attention", ["flash_attention_3", "flash_attention_2", "varlen", "flex"])
def test_packed_attention_needs_a_gpu(attention: str) -> None:
    with pytest.raises(RecipeError, match=rf"rl\.attention: {attention}: needs a CUDA device; use auto or sdpa"):
        check_machine(settings(attention=attention), torch.float32, longest=1)


def test_what_products_are_computed_in() -> None:
    assert compute_dtype(settings(), torch.float32) == torch.float32
    assert compute_dtype(settings(), torch.bfloat16) == torch.bfloat16
    mixed = settings()
    mixed.bf16 = True
    assert compute_dtype(mixed, torch.float32) == torch.bfloat16


# ---- memory ------------------------------------------------------------------------------------------------------


def test_memory_by_hand() -> None:
    """float32 all through: weights, gradients and both moments of 4 bytes, and 5 values of each width kept."""
    memory = estimate(CONFIG, settings(token_budget=1000, compile_layers=False), torch.float32)
    assert memory.weights == memory.gradients == 4 * WEIGHTS
    assert memory.optimizer == 8 * WEIGHTS
    assert memory.activations == 1000 * 4 * 4 * 5 * (2 * 256 + 256 + 128 + 512)
    assert memory.rollouts == 0
    assert memory.total == pytest.approx(sum(vars(memory).values()))


def test_zero_shards_what_it_says() -> None:
    args = settings(token_budget=1000)
    whole = estimate(CONFIG, args, torch.bfloat16, processes=4, stage=1)
    assert whole.optimizer == 12 * WEIGHTS / 4
    assert whole.gradients == 2 * WEIGHTS
    second = estimate(CONFIG, args, torch.bfloat16, processes=4, stage=2)
    assert second.gradients == whole.gradients / 4
    assert second.weights == 2 * WEIGHTS
    third = estimate(CONFIG, args, torch.bfloat16, processes=4, stage=3)
    assert third.weights == 2 * WEIGHTS / 4


def test_checkpointing_compiling_and_adapters_save_what_they_should() -> None:
    plain = estimate(CONFIG, settings(compile_layers=False), torch.float32)
    compiled = estimate(CONFIG, settings(), torch.float32)
    checkpointed = estimate(CONFIG, settings(gradient_checkpointing=True), torch.float32)
    assert checkpointed.activations < compiled.activations < plain.activations
    unpacked = estimate(CONFIG, settings(), torch.float32, packed=False)
    assert unpacked.activations == plain.activations
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = estimate(CONFIG, settings(), torch.float32, lora=lora)
    assert adapted.gradients == 4 * 4 * 4 * (256 + 256)
    assert adapted.weights > plain.weights  # the adapter's own


def test_the_line_names_parts_that_matter() -> None:
    line = estimate(CONFIG, settings(token_budget=100_000), torch.float32).line()
    assert line.startswith("estimated peak per GPU: ")
    assert "activations" in line
    assert "rollouts" not in line
    assert GIB == 2**30


def test_zero_stage_is_what_accelerate_launch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert zero_stage() == 0
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert zero_stage() == 3
