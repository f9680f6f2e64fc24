"""The weights of a sharded model, whole on every rank for as long as each of them needs.

Under ZeRO-3 and FSDP2 a forward pass gathers weights, so that every rank has to make as many. Writing responses does
not: a rank stops when its own have ended, and validation is done by one. TRL gathers for both under ZeRO-3 alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from trl.models.utils import unwrap_model_for_generation


@contextmanager
def whole_weights(wrapped: torch.nn.Module, accelerator: Accelerator, checkpointing: dict | None = None) -> Iterator:
    """The unwrapped model; ranks may run it as often as they like, without gradients. Entered and left by all of them.

    Args:
        wrapped: As accelerate has prepared it.
        checkpointing: Arguments of gradient checkpointing, which is off inside.
    """
    with (
        unwrap_model_for_generation(
            cast(Any, wrapped), accelerator, gradient_checkpointing_kwargs=checkpointing
        ) as model,
        unsharded(cast(torch.nn.Module, model)),
    ):
        yield model


@contextmanager
def unsharded(model: torch.nn.Module) -> Iterator[None]:
    """FSDP2's modules hold whole weights inside; others are left alone. Costs a copy of all weights on every rank."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    groups = [group for part in parts for group in parameter_groups(part)]
    after_forward = [group.post_forward_mesh_info for group in groups]  # torch can set what it is, and not tell
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for group, before in zip(groups, after_forward, strict=True):
            group.post_forward_mesh_info = before
        for part in parts:
            part.reshard()


def parameter_groups(part: FSDPModule) -> list[Any]:
    """The groups of parameters that `part` gathers: one at most in torch 2.11, a list later."""
    state = vars(part._get_fsdp_state())
    groups = state["_fsdp_param_groups"] if "_fsdp_param_groups" in state else [state["_fsdp_param_group"]]
    return [group for group in groups if group is not None]
