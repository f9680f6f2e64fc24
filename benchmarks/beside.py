"""`siesta train` on a card that other runs share: vLLM's cache has the size `SIESTA_KV_GIB` instead of a measured one.

    SIESTA_KV_GIB=4 python -m benchmarks.beside smollm2_135m tracking.run=here

vLLM measures how much of the card's memory its start takes and gives its cache the rest of its share. What runs beside
it allocate in the meantime counts as its own, and what they free is an error: engines that start together fail.
"""

import importlib
import os
import sys
from importlib.util import find_spec
from typing import Any

from siesta.rl.train import main


def fix_cache(size: int) -> None:
    """Have every engine of this process take `size` bytes for its cache."""
    llm: Any = importlib.import_module("vllm").LLM
    begin = llm.__init__

    def with_size(self: Any, *positional: Any, **settings: Any) -> None:
        begin(self, *positional, **({"kv_cache_memory_bytes": size} | settings))

    llm.__init__ = with_size


if __name__ == "__main__":
    if "SIESTA_KV_GIB" in os.environ and find_spec("vllm") is not None:
        fix_cache(int(float(os.environ["SIESTA_KV_GIB"]) * 2**30))
    sys.exit(main())
