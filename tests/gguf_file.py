"""A tiny GGUF file, written with the gguf package as llama.cpp would: packed weights, tokenizer, chat template."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
KIND = gguf.GGMLQuantizationType.Q4_1


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order of rotary pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def packed_name(name: str) -> str:
    """A weight's name in the file."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(file: Path, model: LlamaForCausalLM, tokenizer: Any) -> dict[str, np.ndarray]:
    """Write a tied Llama with a byte-level tokenizer; returns each weight as it is after packing and unpacking."""
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges(tokenizer)])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(tokenizer.eos_token))
    writer.add_pad_token_id(tokenizer.convert_tokens_to_ids(tokenizer.pad_token))
    writer.add_chat_template(str(tokenizer.chat_template))
    unpacked = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        order = next((n for part, n in heads.items() if part in name), None)
        if weight.ndim == 1:
            writer.add_tensor(packed_name(name), weight)
            unpacked[name] = weight
            continue
        blocks = gguf.quantize(weight if order is None else interleaved(weight, order), KIND)
        writer.add_tensor(packed_name(name), blocks, raw_dtype=KIND)
        unpacked[name] = gguf.dequantize(gguf.quantize(weight, KIND), KIND)  # rows are packed one by one
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


def merges(tokenizer: Any) -> list[list[str]]:
    """The merges of a BPE tokenizer, first to last."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
