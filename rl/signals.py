"""SIGTERM and SIGINT: a training ends at its next optimizer step with a checkpoint; anything else ends at once.

The same command goes on afterwards, because a stage that was stopped does not count as finished. Exit code 143 for
SIGTERM, 130 for SIGINT.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import cast

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

from siesta.data.errors import Ending
from siesta.rl.checkpoints import checkpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun passes a signal on to processes that a terminal or SLURM has signalled as well.
REPEAT = 2.0  # seconds within which a second signal is the same one


class SignalStop(Ending):
    """A signal ended the run. Like KeyboardInterrupt no Exception: nothing on the way takes it for an error."""

    opening = "siesta: "

    def __init__(self, number: int, what: str):
        self.exit_code = 128 + number
        super().__init__(f"{signal.Signals(number).name}: {what}")


class StopRequest:
    """The signal that was received, 0 if none.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.received = 0
        self.training = False  # a training looks at `received` itself
        self._clock = clock
        self._since = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first one is kept for the training under way, the second one leaves at once.

        Raises:
            SignalStop: There is no training that could save.
        """
        if self.received:
            if self._clock() - self._since >= REPEAT:
                os._exit(128 + number)
            return
        self.received, self._since = number, self._clock()
        if not self.training:
            raise SignalStop(number, "stopped; the same command does the stage again")

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside, the signals come here. Of the main thread alone."""
        before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """Ends a training with a checkpoint at the first step whose end finds a signal on any rank."""

    def __init__(self, request: StopRequest):
        self.request = request
        self.cut_short = False  # of its last step: a checkpoint of it is none of a training that has come to its end

    def asked(self, args) -> int:
        """The signal that any rank has received, 0 if none. Collective."""
        own = torch.tensor([self.request.received], device=args.device)
        return int(cast(torch.Tensor, gather(own)).max())

    def on_train_begin(self, args, state, control, **kwargs):
        self.request.training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked(args):
            self.cut_short = not control.should_training_stop
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Raises SignalStop, so that nothing that would follow a whole training does."""
        self.request.training = False
        if number := self.asked(args):
            last = next(iter(checkpoints(Path(cast(str, args.output_dir)))), None)
            raise SignalStop(
                number, f"stopped at step {state.global_step}; the same command goes on from {last or 'the start'}"
            )
