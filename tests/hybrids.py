"""Tiny random hybrid models over the embedded tokenizer, and contexts and queries for them."""

from typing import Any, cast

import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    set_seed,
)

from siesta.data.schema import Example
from siesta.data.tasks import hop
from siesta.rl import embedded

TOKENIZER: PreTrainedTokenizerBase = embedded.build_tokenizer()
COMMON = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
    "initializer_range": 0.3,
}
LINEAR = {
    "layer_types": ["full_attention", "linear_attention"] * 2,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_state": 8, "mamba_chunk_size": 8, "embedding_multiplier": 3.0}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**COMMON, **LINEAR, head_dim=8)),
    "olmo_hybrid": (OlmoHybridForCausalLM, OlmoHybridConfig(**COMMON, **LINEAR)),
    "falcon_h1": (FalconH1ForCausalLM, FalconH1Config(**COMMON, **MAMBA)),
}


def hybrid(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model of the family with random weights, no two tensors alike."""
    set_seed(0)
    build, config = FAMILIES[family]
    model = cast(Any, build(config)).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def words(count: int, seed: int) -> str:
    """So many random words of the tokenizer."""
    drawn = torch.randint(len(hop.WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(hop.WORDS[i] for i in drawn.tolist())


def context(count: int, seed: int = 0) -> str:
    return words(count, seed)


def query(count: int, seed: int = 0) -> Example:
    """A question of so many words; the context it brings must not be read."""
    return Example(id="q", context=words(5, 100), query=words(count, 50 + seed), answer="")
