"""Two ranks without a launcher, of which the second is lost in its second step; one import for all of them.

    lost_rank.py FOLDER CASE...

FOLDER holds `model`. For each case two processes are forked, which write what they say to FOLDER/CASE/RANK.txt; their
exit codes go to FOLDER/CASE/codes.json. Cases: `killed`, `stopped` (and killed when the first rank has gone, as a
launcher would), `signalled`, the same after a SIGTERM to the first, as torchrun sends to those whom NCCL does not tell
of a death; `asleep` in its reward; `full`, its disk in the second save, and `full_zero`, the same under ZeRO-2.
"""

import errno
import json
import os
import signal
import socket
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from siesta.data.errors import UserError
from siesta.rl.config import DeGRPOConfig
from siesta.rl.heartbeat import RankLost
from siesta.rl.resumable import train_on
from siesta.rl.signals import StopRequest
from siesta.rl.trainer import DeGRPOTrainer
from tests.helpers import one_step, tiny_judge
from tests.test_trainer import dataset

# `ddp_timeout` in seconds, of the cases that wait for it; so much that no rank of a busy machine is lost by chance.
TIMEOUT, LONG, COMPILING = 20, 60, 600  # DeepSpeed compiles an extension when it is used for the first time
LOST = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "signalled": signal.SIGSTOP}


class Losing(DeGRPOTrainer):
    """Its last rank is lost while the second step's rewards are due."""

    case: str
    judge: Any

    def _save_rng_state(self, output_dir):
        if self.case.startswith("full") and self.state.global_step == 2 and self.accelerator.is_last_process:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super()._save_rng_state(output_dir)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.state.global_step == 1 and self.accelerator.is_last_process:
            if self.case == "asleep":
                self.judge.verifiers["exact"] = lambda solution, answer: time.sleep(600)
                self.reward_function._begun = {}  # so that the main thread verifies
            elif self.case in LOST:
                if self.case == "signalled":
                    os.kill(int(os.environ["FIRST"]), signal.SIGTERM)
                os.kill(os.getpid(), LOST[self.case])
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def train(folder: Path, case: str) -> int:
    """What `siesta train` does with a training; its exit code."""
    settings: dict[str, Any] = {"max_steps": 3, "num_generations": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"per_device_train_batch_size": 8, "output_dir": str(folder / case)}
    settings["ddp_timeout"] = {"stopped": TIMEOUT, "asleep": TIMEOUT, "full_zero": COMPILING}.get(case, LONG)
    if case == "full_zero":
        settings["deepspeed"] = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    judge = tiny_judge()
    args = DeGRPOConfig(**(one_step(folder) | settings))
    trainer = Losing(model=str(folder / "model"), judge=judge, args=args, train_dataset=dataset())
    trainer.case, trainer.judge = case, judge
    request = StopRequest()
    request.training = True  # the first signal is kept
    try:
        with request.handled():
            train_on(trainer, folder / case, print)
    except RankLost as lost:
        print(f"siesta: error: {lost}", file=sys.stderr)
        return 4
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def start(folder: Path, case: str, rank: int, port: int) -> int:
    """Fork a rank; its process id. FIRST names that of rank 0."""
    if process := os.fork():
        os.environ["FIRST"] = os.environ["FIRST"] if rank else str(process)
        return process
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)} | ({"ACCELERATE_USE_CPU": "true"} if case != "full_zero" else {})
    said = folder / case / f"{rank}.txt"
    said.parent.mkdir(exist_ok=True)
    with said.open("w") as out, redirect_stderr(out):
        code = train(folder, case)
    os._exit(code)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def main(folder: Path, *cases: str) -> None:
    ports = {case: free_port() for case in cases}
    ranks = {case: [start(folder, case, rank, ports[case]) for rank in (0, 1)] for case in cases}
    for case, (first, second) in ranks.items():
        codes = [os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])]
        if case in ("stopped", "signalled"):
            os.kill(second, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
        (folder / case / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
