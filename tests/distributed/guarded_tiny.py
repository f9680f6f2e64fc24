"""Steps of DeGRPO in which the last rank alone meets what a guard is for; each rank prints what it saw.

    guarded_tiny.py FOLDER

FOLDER holds `model`. Step 2: an old log-probability of the last rank is -inf. Step 3: the last rank receives SIGTERM.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from siesta.rl.config import DeGRPOConfig
from siesta.rl.launch import trainer_line, world_line
from siesta.rl.signals import SignalStop, StopOnSignal, StopRequest
from tests.given import GivenRollouts
from tests.helpers import one_step, parameters, tiny_judge
from tests.test_trainer import dataset


class Faulty(GivenRollouts):
    """The last rank's first response token had probability 0 when it was written."""

    def _pass_loss(self, scores, inputs):
        old = scores.per_token_logps.detach().clone()
        if self.state.global_step == 1 and self.accelerator.is_last_process:
            old[0, 1] = -torch.inf
        return super()._pass_loss(scores, {**inputs, "old_per_token_logps": old})


class Weights(TrainerCallback):
    """The weights after each step; a signal to the last rank in the third."""

    def __init__(self, last: bool):
        self.last, self.after = last, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        whole: Any = nullcontext()
        if is_deepspeed_zero3_enabled():
            import deepspeed  # pyright: ignore[reportMissingImports]

            whole = deepspeed.zero.GatheredParameters(list(cast(torch.nn.Module, model).parameters()))
        with whole:
            self.after.append(parameters(cast(torch.nn.Module, model)).clone())
        if state.global_step == 3 and self.last:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    judge = tiny_judge()
    judge.verifiers["exact"] = lambda solution, answer: float(sum(map(ord, solution + answer)) % 3 == 0)
    settings: dict[str, Any] = {"max_steps": 5, "num_generations": 4, "optim": "adamw_torch", "max_grad_norm": 1e9}
    args = DeGRPOConfig(**(one_step(folder) | settings))
    args.per_device_train_batch_size = 8
    args.generation_batch_size = 8 * args.world_size
    args.steps_per_generation = 1
    said = [world_line(args)]
    trainer = Faulty(model=str(folder / "model"), judge=judge, args=args, train_dataset=dataset())
    said.append(trainer_line(trainer))
    request, weights = StopRequest(), Weights(trainer.accelerator.is_last_process)
    trainer.add_callback(weights)
    trainer.add_callback(StopOnSignal(request))
    with request.handled():
        try:
            trainer.train()
        except SignalStop as stop:
            said.append(f"{stop.exit_code} {stop}")
    first, second, third = weights.after
    said.append(f"kept {torch.equal(first, second)} moved {not torch.equal(second, third)}")
    skipped = [row["guard/skipped_steps"] for row in trainer.state.log_history if "grad_norm" in row]
    said.append(f"skipped {skipped} received {request.received}")
    (folder / f"rank{args.process_index}.txt").write_text(" | ".join(said))  # one stream would mix up the ranks


if __name__ == "__main__":
    main(Path(sys.argv[1]))
