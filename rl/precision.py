"""In which precision a run computes, and what its weights can take.

`model.dtype` is what weights are kept, saved and exported in. With float32 weights and `bf16` (the default on a CUDA
device) matrix products are computed in bfloat16 from float32 master weights. Measuring uses the same pair: rollouts,
validation, gate and evaluation then see one policy.
"""

from contextlib import AbstractContextManager

import torch
from transformers import TrainingArguments

from siesta.rl.recipe import RLSection


def default_device() -> str:
    """Where training, evaluation and export run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def mixed_by_default() -> bool:
    """Whether trainers compute in bfloat16 if the recipe does not say."""
    return default_device() == "cuda"


def mixed_dtype(section: RLSection) -> torch.dtype | None:
    """What RL computes in where that is not the dtype of its weights."""
    if section.trainer_fields().get("fp16", False):
        return torch.float16
    return torch.bfloat16 if section.trainer_fields().get("bf16", mixed_by_default()) else None


def training_autocast(section: RLSection, device: torch.device) -> AbstractContextManager:
    """The mixed precision that RL trains with, for measuring outside of its trainer."""
    dtype = mixed_dtype(section)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def lost_updates(args: TrainingArguments, dtype: torch.dtype) -> str | None:
    """A line to log if rounding swallows most updates of the weights, else None.

    AdamW moves a weight by about its learning rate. A bfloat16 w with 2^e <= |w| < 2^(e+1) stays where it is if that
    is less than half its spacing, 2^(e-8); so no weight above 512 learning rates moves. Weights are around 0.02.
    """
    if dtype != torch.bfloat16 or args.learning_rate >= 1e-5 or "adamw_torch" not in args.optim:
        return None
    return (
        f"learning_rate {args.learning_rate:g} with bfloat16 weights: no weight above {512 * args.learning_rate:.2g} "
        "can move, since rounding swallows the update; set model.dtype: float32 (master weights; bf16 still computes "
        "in bfloat16) or a learning rate of 1e-5 or more"
    )
