"""Two ranks of an FSDP2 model make different numbers of forward passes inside `unsharded`; each prints what it saw."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from siesta.rl.sharding import unsharded
from tests.helpers import tiny_model

IDS = torch.tensor([[1, 2, 3, 4]])


class Counted:
    """How often FSDP2 gathers weights."""

    def __init__(self) -> None:
        self.count, self._gather = 0, _fsdp_param_group.foreach_all_gather
        _fsdp_param_group.foreach_all_gather = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self._gather(*args, **kwargs)

    def during(self, act: Callable[[], Any]) -> int:
        before = self.count
        act()
        return self.count - before


def main() -> None:
    dist.init_process_group("gloo")
    rank, plain, model = dist.get_rank(), tiny_model(), tiny_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    gathers = Counted()
    with torch.no_grad():
        once = gathers.during(lambda: model(IDS))
        with unsharded(model):
            inside = gathers.during(lambda: [model(IDS) for _ in range(1 + 3 * rank)])
            same = torch.equal(model(IDS).logits, plain(IDS).logits)
        again = gathers.during(lambda: model(IDS))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    print(json.dumps({"once": once, "inside": inside, "same": same, "again": again, "sharded": sharded}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
