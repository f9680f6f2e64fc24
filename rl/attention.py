"""Attention back ends for the training pass, and which of them this machine and this model can use.

Packed rows need attention that knows where a sequence ends: FlashAttention, torch's own variable-length kernel, or
FlexAttention. Everything else takes rows of similar length through scaled-dot-product attention (`sdpa`). The two that
are registered here serve generation too: without sequence boundaries they are plain sdpa.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from siesta.data.errors import RecipeError
from siesta.rl.masks import block_mask, boundaries, tree_mask
from siesta.rl.packing import Pack

# True while a packed row goes through a model: the kernel gets the boundaries, so no S x S mask is built.
_packed: ContextVar[bool] = ContextVar("packed", default=False)


@contextmanager
def packed_row() -> Iterator[None]:
    """Inside, models are called with packed rows."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def no_mask_when_packed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Mask function of the registered back ends."""
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


def varlen_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`torch.nn.attention.varlen` in transformers' attention interface; q, k, v have shape (1, heads, S, D)."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    from torch.nn.attention.varlen import varlen_attn

    # Rotary embeddings and norms may leave float32 under autocast; the kernel takes half precision only.
    dtype = value.dtype
    repeat = query.shape[1] // key.shape[1]
    rows = [x[0].transpose(0, 1) for x in (query.to(dtype), key.to(dtype), value)]
    query, key, value = (row.repeat_interleave(repeat if i else 1, dim=1) for i, row in enumerate(rows))
    left = -1 if sliding_window is None else sliding_window - 1
    output: Any = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(left, 0),
    )
    return output.unsqueeze(0), None


def flex_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    block_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """FlexAttention in transformers' attention interface."""
    if block_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    compiled = _compiled_flex() if query.is_cuda else flex_attention
    output = compiled(
        query.to(value.dtype), key.to(value.dtype), value, block_mask=block_mask, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


_compiled: list[Callable] = []


def _compiled_flex() -> Callable:
    """FlexAttention, compiled once for any length."""
    if not _compiled:
        _compiled.append(torch.compile(flex_attention, dynamic=True))
    return _compiled[0]


@dataclass(frozen=True)
class Backend:
    """A way to attend in the training pass.

    Args:
        name: In recipes and logs.
        implementation: `attn_implementation` of transformers.
        packed: Whether rows are packed for it.
        arguments: Keyword arguments of the model for a pack.
        missing: Why this machine cannot run it; None if it can.
        shares: Whether it can follow a tree, so that a prompt is computed once for all its completions.
    """

    name: str
    implementation: str
    packed: bool
    arguments: Callable[[Pack], dict[str, Any]]
    missing: Callable[[str, torch.dtype], str | None]
    shares: bool = False


def _flash_missing(module: str, available: Callable[[], bool]) -> Callable[[str, torch.dtype], str | None]:
    def missing(device: str, dtype: torch.dtype) -> str | None:
        if device != "cuda":
            return "needs a CUDA device"
        if not available():
            return f"the package {module} is not installed"
        return None if dtype != torch.float32 else "computes in bf16 or fp16 only"

    return missing


def _varlen_missing(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return "needs a CUDA device"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have it"
    return None if dtype != torch.float32 else "computes in bf16 or fp16 only"


def _flex_missing(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return "needs a CUDA device"
    return None if find_spec("triton") is not None else "the package triton is not installed"


def _nothing(pack: Pack) -> dict[str, Any]:
    return {}


# In the order in which `auto` tries them.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "flash_attention_3",
            "flash_attention_3",
            True,
            boundaries,
            _flash_missing("flash_attn_interface", is_flash_attn_3_available),
        ),
        Backend(
            "flash_attention_2",
            "flash_attention_2",
            True,
            boundaries,
            _flash_missing("flash_attn", is_flash_attn_2_available),
        ),
        Backend("varlen", "siesta_varlen", True, boundaries, _varlen_missing),
        Backend("flex", "siesta_flex", True, block_mask, _flex_missing, shares=True),
        Backend("sdpa", "sdpa", False, tree_mask, lambda device, dtype: None, shares=True),
        Backend("eager", "eager", False, _nothing, lambda device, dtype: None),
    )
}

AttentionInterface.register("siesta_varlen", varlen_forward)
AttentionInterface.register("siesta_flex", flex_forward)
AttentionMaskInterface.register("siesta_varlen", no_mask_when_packed)
AttentionMaskInterface.register("siesta_flex", no_mask_when_packed)


def choose_backend(
    wanted: str,
    device: str,
    dtype: torch.dtype,
    config: PreTrainedConfig | None = None,
    model: PreTrainedModel | None = None,
    *,
    share: bool = False,
) -> tuple[Backend, str]:
    """The back end to use and a line that says why.

    Args:
        wanted: A name of `BACKENDS`, or `auto` for the first that can be used.
        device: `cuda`, `cpu`, ...
        dtype: What the model computes in.
        config: Of the model, if at hand.
        model: The model, if at hand: some of what decides it is written in its class alone.
        share: Prompts are to be shared.

    Raises:
        RecipeError: `wanted` cannot be used.
    """
    if wanted not in BACKENDS and wanted != "auto":
        raise RecipeError(f"rl.attention: {wanted!r} is not one of auto, {', '.join(BACKENDS)}")
    reasons = []
    for backend in BACKENDS.values() if wanted == "auto" else [BACKENDS[wanted]]:
        reason = backend.missing(device, dtype) or unsuited(backend, config, model, share=share)
        if reason is None and wanted == "auto" and backend.name == "flex" and dtype == torch.float32:
            reason = "slower than sorted rows in float32"
        if reason is None:
            skipped = f" ({'; '.join(reasons)})" if reasons else ""
            rows = f"{'packed' if backend.packed else 'sorted by length'}{', shared prompts' if share else ''}"
            return backend, f"attention: {backend.name}, {rows}{skipped}"
        reasons.append(f"{backend.name}: {reason}")
    if share:
        raise RecipeError(f"rl.share_prompts: {'; '.join(reasons)}; use attention: auto or share_prompts: false")
    raise RecipeError(f"rl.attention: {reasons[0]}; use auto or sdpa")


def unsuited(
    backend: Backend,
    config: PreTrainedConfig | None,
    model: PreTrainedModel | None = None,
    *,
    share: bool = False,
) -> str | None:
    """Why a model with this config cannot run on the back end; None if it can."""
    if share and not backend.shares:
        return "cannot share prompts"
    if model is not None and backend.name in ("varlen", "flex", "sdpa") and not model._supports_sdpa:
        return "the model has attention sinks or capped logits, which it does not compute"
    if config is None or not (backend.packed or share):
        return None
    if model is not None and model._is_stateful:
        return "its recurrent layers would carry state over sequence boundaries"
    text = config.get_text_config().to_dict()
    layers = set(text.get("layer_types") or ["full_attention"])
    if recurrent := layers - {"full_attention", "sliding_attention"}:
        return f"layers of type {', '.join(sorted(recurrent))} would carry state over sequence boundaries"
    if text.get("attn_logit_softcapping") is not None and backend.name in ("varlen", "flex"):
        return "does not cap attention logits"
    windowed = text.get("sliding_window") if not text.get("layer_types") else "sliding_attention" in layers
    if windowed and (share or backend.name == "flex"):
        return "has no sliding window here"
    return None
