"""How much memory a recipe takes on each GPU, estimated before any weight is loaded.

Weights, gradients and optimizer states are counted; activations follow from the token budget and the shapes of a
transformer block. docs/results/speed.md holds the estimate against measured peaks.
"""

import os
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from siesta.rl.config import DeGRPOConfig

GIB = 2**30
# Values that a block keeps for its backward pass, in multiples of its widths, counted in bf16: inputs and outputs of
# its products, and the norms' float32 copies, which count twice.
KEPT = 5
COMPILED = 0.65  # share that is left when the block is compiled and recomputes what is cheap
# TRL's fused head: one tile of logits, and gradients of its weight and of its input in float32.
TILE = 4096 * 32768 * 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a training pass."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    rollouts: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def line(self) -> str:
        """All parts in GiB."""
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in vars(self).items() if value > 0.05 * GIB)
        return f"estimated peak per GPU: {self.total / GIB:.1f} GiB" + (f" ({parts})" if parts else "")


def zero_stage() -> int:
    """ZeRO stage that `accelerate launch` has set for its processes; 0 without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def estimate(
    config: PreTrainedConfig,
    args: DeGRPOConfig,
    dtype: torch.dtype,
    *,
    lora: LoraConfig | None = None,
    processes: int = 1,
    stage: int = 0,
    gpu_bytes: float = 0.0,
    packed: bool = True,
) -> Memory:
    """Peak memory of a training pass on each of `processes` GPUs.

    Args:
        config: Of the model.
        args: The `rl` section.
        dtype: Of the weights.
        lora: Only its adapter is trained, if given.
        stage: Of ZeRO.
        gpu_bytes: Memory of a GPU, of which colocated vLLM takes its share.
        packed: Whether rows are packed; compiled layers need that.
    """
    model = empty_model(config)
    size = float(dtype.itemsize)
    number = sum(p.numel() for p in model.parameters())
    trained = number
    if lora is not None:
        adapted = get_peft_model(model, lora)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        number += trained
    mixed = args.bf16 and dtype == torch.float32
    # Autocast keeps a bf16 copy of the weights from the forward to the end of the backward pass.
    weights = number * (size / (processes if stage == 3 else 1) + (2 if mixed and not stage else 0))
    # DeepSpeed keeps fp32 weights and both moments; AdamW keeps the moments in the weights' own type.
    moments = trained * (12 if stage else 2 * size)
    text = config.get_text_config()
    keys = text.to_dict()
    head_size = keys.get("head_dim") or text.hidden_size // text.num_attention_heads
    query = text.num_attention_heads * head_size
    key = (keys.get("num_key_value_heads") or text.num_attention_heads) * head_size
    inner = keys.get("intermediate_size") or 4 * text.hidden_size
    width = 2 if mixed or dtype != torch.float32 else 4
    block = width * KEPT * (2 * text.hidden_size + query + key + inner)
    if args.compile_layers and packed:
        block *= COMPILED
    layers = text.num_hidden_layers
    kept = layers * width * text.hidden_size + block if args.gradient_checkpointing else layers * block
    tokens = args.token_budget
    table = text.vocab_size * text.hidden_size
    engine = args.use_vllm and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode
    return Memory(
        weights=weights,
        gradients=trained * size / (processes if stage >= 2 else 1),
        optimizer=moments / (processes if stage >= 1 else 1),
        activations=tokens * kept,
        head=TILE + 4.0 * table + 4.0 * tokens * text.hidden_size,
        rollouts=args.vllm_gpu_memory_utilization * gpu_bytes * engine,
    )
