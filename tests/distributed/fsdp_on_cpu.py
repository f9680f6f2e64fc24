"""FSDP2 on a CPU: torch can, accelerate 1.15 makes plain copies there.

Tests alone do this: what siesta does with sharded weights is the same on every device.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def allow() -> None:
    """From here on FSDP is in force on a CPU where `ENVIRONMENT` asks for it."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    init = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)  # sets the type of `PartialState` anew whenever somebody asks for the state
        if plugin := kwargs.get("fsdp_plugin"):
            self.fsdp_plugin = plugin
        if "fsdp_plugin" in self._shared_state:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
