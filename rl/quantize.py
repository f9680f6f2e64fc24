"""QLoRA: the base model in 4 bits while an adapter is trained, with bitsandbytes.

Each stage quantises the model it starts from afresh, trains its adapter on that, and merges the adapter into the
*unquantised* weights in `model.dtype`, as for plain LoRA. What is evaluated, exported and served is the merged model;
it differs from the one that was trained by the rounding of the base to 4 bits. TRL keeps the adapter in bfloat16, so
the rest of the model has to be in bfloat16 as well.
"""

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from siesta.data.errors import ModelError
from siesta.rl.recipe import ModelSection


def quantization_config(section: ModelSection) -> BitsAndBytesConfig | None:
    """The recipe's `model.quantization` with TRL's defaults (nf4, computing in the dtype of the weights), or None.

    Raises:
        ModelError: An unknown setting, no `model.lora` beside it, not in bfloat16, or no bitsandbytes.
    """
    settings = section.quantization
    if settings is None:
        return None
    if section.lora is None:
        raise ModelError("model.quantization: quantised weights cannot be trained themselves; set model.lora as well")
    if section.dtype != "bfloat16":
        raise ModelError(
            "model.quantization: the adapter of a quantised model is in bfloat16; set model.dtype: bfloat16"
        )
    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    if unknown := sorted(set(settings) - known):
        raise ModelError(f"model.quantization.{unknown[0]}: BitsAndBytesConfig knows {', '.join(sorted(known))}")
    if find_spec("bitsandbytes") is None:
        raise ModelError("model.quantization: needs bitsandbytes; pip install 'siesta-rl[qlora]'")
    defaults: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": getattr(torch, section.dtype)}
    try:
        config = BitsAndBytesConfig(**(defaults | settings))
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"model.quantization: {error}") from error
    if not config.load_in_4bit:
        raise ModelError("model.quantization: set load_in_4bit: true; 8 bits are not supported")
    return config
