"""The modes of an exported model in vLLM, so that `vllm serve FOLDER` knows them without a flag.

vLLM calls `register` where siesta is installed (entry point group `vllm.general_plugins`). `ModeProcessor` acts on
logits in the engine; bad requests are refused before they reach it, because an error raised in the engine would end it
for everybody. A request carries its wishes in `vllm_xargs`:

    {"messages": [...], "vllm_xargs": {"mode": "auto", "threshold": 0.3}}

Models without `modes.json` are served as before. This module is imported by vLLM alone.
"""

# pyright: reportMissingImports=false

from functools import cache, lru_cache, wraps
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from siesta.rl.serving import Choice, Rules, read_rules, restrict

PROCESSOR = f"{__name__}:ModeProcessor"

Request = tuple[Choice, list[int]]  # and the ids that are written so far, which vLLM appends to

rules_of = lru_cache(maxsize=8)(read_rules)


class ModeProcessor(LogitsProcessor):
    """See `siesta.rl.serving.Rules`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        config = vllm_config.model_config
        self.rules: Rules | None = rules_of(config.model, config.revision)
        self.requests: dict[int, Request] = {}

    def is_argmax_invariant(self) -> bool:
        """Greedy requests open with a control token as well."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, move and go."""
        if self.rules is not None:
            process_dict_updates(self.requests, batch_update, self._request)

    def _request(self, params: SamplingParams, prompt_ids: list[int] | None, written: list[int]) -> Request | None:
        assert self.rules is not None
        if prompt_ids and self.rules.mode_of(prompt_ids[-1]) is not None:
            return None  # the prompt has chosen: a training's rollouts, or a chat that continues
        return self.rules.choice(params.extra_args or {}), written

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Restrict the rows of a batch, (B, V), in place."""
        for row, (choice, written) in self.requests.items():
            assert self.rules is not None
            first = written[0] if written else None
            restrict(logits[row], self.rules.allowed(choice, first, len(written), logits[row]))
        return logits


@cache  # vLLM may load its plugins more than once
def register() -> None:
    """Give vLLM's engines for a model with `modes.json` the processor, and its requests a check.

    The entry point group `vllm.logits_processors` would give it to every model on the machine, and takes vLLM 0.25's
    faster model runner away from all of them. vLLM's own check of a request, `LogitsProcessor.validate_params`, is not
    told which model the request is for.
    """
    create, verify = EngineArgs.create_model_config, SamplingParams.verify

    @wraps(create)
    def with_modes(self: EngineArgs) -> Any:
        if rules_of(self.model, self.revision) is not None:
            self.logits_processors = [*(self.logits_processors or []), PROCESSOR]
        return create(self)

    @wraps(verify)
    def checked(self: SamplingParams, model_config: Any, *args: Any, **kwargs: Any) -> None:
        rules = rules_of(model_config.model, model_config.revision)
        if rules is not None:
            rules.choice(self.extra_args or {})
        verify(self, model_config, *args, **kwargs)

    EngineArgs.create_model_config = with_modes
    SamplingParams.verify = checked
