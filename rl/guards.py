"""Guards against numbers that are not finite, and a watch on numbers that jump.

A step whose rewards, log-probabilities or gradients are not all finite is skipped on every rank alike; a few in a row
end the run. All of them come down to one check, of the norm of the gradient, which is a number of all ranks: a reward
or a log-probability that is not finite makes the loss NaN, and with it the gradient. So DeepSpeed, which steps inside
its backward pass, skips as well: it refuses a norm that is not finite, and then reports an infinite one.

An unscorable rollout (its verifier failed) is none of this: it weighs nothing and the step is taken.
"""

import logging
import math
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from siesta.data.errors import Ending
from siesta.rl.checkpoints import checkpoints

logger = logging.getLogger(__name__)


class GuardStop(Ending, Exception):
    """A guard ended the run: exit code 3."""

    opening = "siesta: stopped: "
    exit_code = 3


class FiniteSteps(Trainer):
    """A Trainer that skips optimizer steps with a gradient that is not finite.

    Skipping is to have no gradients: every optimizer passes over weights without one, decay and moments included. The
    step counts as one: data, global step and (but under DeepSpeed) the learning rate go on.

    Args:
        arguments, settings: Of the Trainer.

    Attributes:
        max_skipped_steps: So many in a row end the run.
    """

    max_skipped_steps = 5

    def __init__(self, *arguments: Any, **settings: Any):
        self._faults: Counter[str] = Counter()  # of the step in hand, by what was not finite
        self._skipped = 0  # since the last log
        self._skipped_in_a_row = 0
        super().__init__(*arguments, **settings)

    def with_faults(self, loss: torch.Tensor, faults: dict[str, int]) -> torch.Tensor:
        """The loss of a micro-batch; NaN if any count is above 0, so that the step is skipped.

        Args:
            faults: How many values were not finite, by what they are. The same on all ranks.
        """
        self._faults.update({name: count for name, count in faults.items() if count})
        return loss * float("nan") if any(faults.values()) else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm, with the gradients dropped if it is not finite.

        Raises:
            GuardStop: It has not been for `max_skipped_steps` steps.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        faults, self._faults = self._faults, Counter()
        finite = norm is None or math.isfinite(float(norm))
        # A loss scaler looks for its scale by overflowing, and skips by itself.
        if finite or (self.accelerator.scaler is not None and not faults):
            self._skipped_in_a_row = 0
            return norm
        model.zero_grad()
        self._skipped += 1
        self._skipped_in_a_row += 1
        what = ", ".join(f"{name} ({count})" for name, count in faults.items()) or "gradient"
        step = self.state.global_step + 1
        if self.is_world_process_zero():
            logger.warning("step %d is skipped, not finite: %s", step, what)
        if self._skipped_in_a_row >= self.max_skipped_steps:
            last = next(iter(checkpoints(Path(cast(str, self.args.output_dir)))), None)
            told = (
                f"{self._skipped_in_a_row} steps in a row were skipped, the last one step {step}, not finite: {what}; "
                f"last checkpoint: {last or 'none'}"
            )
            raise GuardStop(told if self.is_world_process_zero() else "")
        return norm

    def log(self, logs, start_time=None):
        """With the number of steps that were skipped since the last log."""
        if "grad_norm" in logs:
            logs["guard/skipped_steps"], self._skipped = float(self._skipped), 0
        super().log(logs, start_time)


class SpikeGuard(TrainerCallback, ExportableState):
    """Warns of a loss or gradient norm far above those of the last logs. What it has seen is kept in checkpoints.

    Args:
        window: Logs that are compared with; it judges once half of them are there.
        sigmas: Standard deviations above their mean that count as a spike.
    """

    def __init__(self, window: int = 128, sigmas: float = 6.0):
        self.window, self.sigmas = window, sigmas
        self.seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}

    def state(self) -> dict:
        """For `ExportableState`: how to make this callback again."""
        return {"args": {"window": self.window, "sigmas": self.sigmas}, "attributes": {"seen": self.seen}}

    def spike(self, seen: list[float], value: float) -> bool:
        """Whether `value` is one; where all were equal, nothing says what is far."""
        if len(seen) < max(2, self.window // 2):
            return False
        spread = pstdev(seen)
        return spread > 0 and value > fmean(seen) + self.sigmas * spread

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint of a training without this guard has no place for it, and the Trainer looks there.
        cast(dict, state.stateful_callbacks).setdefault(type(self).__name__, self.state())

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, seen in self.seen.items():
            value = (logs or {}).get(name)
            if value is None or not math.isfinite(value):  # what is not finite is skipped and logged elsewhere
                continue
            if self.spike(seen, value) and state.is_world_process_zero:
                logger.warning(
                    "spike, step %d: %s %.4g is more than %g sigma above the last %d logs (mean %.4g, sigma %.2g)",
                    *(state.global_step, name, value, self.sigmas, len(seen), fmean(seen), pstdev(seen)),
                )
            seen.append(value)
            del seen[: -self.window]
