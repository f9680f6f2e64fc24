"""A rank that dies or stalls ends a training within its timeout, with the rank's name.

In a collective every rank waits for every other one. What waits learns at best that a connection broke, and after
`ddp_timeout` that it has waited in vain, but not for whom. So a thread of each rank writes a record into the process
group's store many times a timeout: that it lives, how many points of the training its main thread has passed (the same
points on every rank), whether it stands in torch.distributed, and where it is. From all records each rank sees

- who is *silent*: killed, stopped, or its host is gone;
- who is *behind*: others have passed a point that it has not come to; or all have passed as many, and it does not wait
  where others do.

One that stays so for four fifths of the timeout, before the process group's own is over, ends the run on all ranks
with exit code 4. They leave from the thread: nothing else gets a main thread out of a collective.

With gloo a collective fails when a rank dies. With NCCL it hangs on, and torchrun, which has seen the death, ends the
others: a signal, and 30 seconds later a kill. The signal does not reach a main thread in a collective, so the thread
looks for it; a silent rank is then lost earlier, while there is time to tell.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from transformers import TrainerCallback

from siesta.data.errors import Ending
from siesta.rl.checkpoints import checkpoints

EXIT_CODE = 4
SHARE = 0.8  # of `ddp_timeout`
BEATS = 40  # in that time
SLOWEST = 2.0  # seconds from beat to beat
SIGNALLED = 20.0  # seconds of silence, at most, where a signal has come: of the 30 before the kill
GONE = 5  # beats that do not come, after a collective has failed; torchrun leaves 30 seconds for telling who it is


class RankLost(Ending, Exception):
    """A rank died or stalled: exit code 4. Without text on ranks that leave the telling to another one."""

    exit_code = EXIT_CODE


@dataclass(frozen=True)
class Beat:
    """A record of a rank.

    Args:
        number: Another one in each beat.
        passed: Points of the training that the main thread has passed.
        waits: Whether it stands in torch.distributed.
        doing: Where it is, for people.
    """

    number: int
    passed: int
    waits: bool
    doing: str


class Ranks:
    """What a rank knows of all of them, itself included, by its own clock.

    Args:
        limit: Seconds without a beat, or without a move, that make a rank lost.
        beats: The first of each rank.
        now: Seconds that only grow.
    """

    def __init__(self, limit: float, beats: Sequence[Beat], now: float):
        self.limit, self.beats = limit, list(beats)
        self.beaten, self.moved = [now] * len(beats), [now] * len(beats)

    def see(self, beats: Sequence[Beat], now: float) -> None:
        """Take note of the latest records."""
        for rank, (old, new) in enumerate(zip(self.beats, beats, strict=True)):
            if new.number != old.number:
                self.beaten[rank] = now
            if (new.passed, new.waits) != (old.passed, old.waits):
                self.moved[rank] = now
        self.beats = list(beats)

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks without a beat for so long."""
        return [rank for rank, since in enumerate(self.beaten) if now - since >= seconds]

    def behind(self, now: float) -> list[int]:
        """Ranks that the others have waited for so long; none where nobody waits, or all do."""
        if not all(now - since >= self.limit for since in self.moved):  # one that moves does not wait
            return []
        fewest = min(beat.passed for beat in self.beats)
        late = [rank for rank, beat in enumerate(self.beats) if beat.passed == fewest]
        if len(late) == len(self.beats):
            late = [rank for rank, beat in enumerate(self.beats) if not beat.waits]
        return late if len(late) < len(self.beats) else []

    def fault(self, now: float) -> tuple[list[int], str]:
        """Ranks that are lost, and a line about them; nobody and nothing if all is well."""
        if silent := self.silent(now, self.limit):
            return silent, self.line(silent, f"no sign of life for {self.limit:.0f} s", now)
        late = self.behind(now)
        return late, self.line(late, "stalled, the other ranks wait for it", now) if late else ""

    def line(self, lost: Sequence[int], what: str, now: float) -> str:
        """Who is lost, why, and what each was last doing."""
        return "; ".join(
            f"rank {rank}: {what}; it was last {self.beats[rank].doing}, {now - self.moved[rank]:.0f} s ago"
            for rank in lost
        )


def place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is: the innermost function of siesta, with its line; and whether it is in torch.distributed."""
    where, waits = "", False  # a training is always called by siesta
    while frame is not None:
        module = frame.f_globals.get("__name__", "")  # code that torch.compile has made has none
        waits = waits or module.startswith("torch.distributed")
        if not where and module.startswith("siesta."):
            where = f"{module}.{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return where, waits


class Heartbeat(TrainerCallback):
    """The thread of this rank. Nothing happens in a run of one process.

    Args:
        folder: Of the stage, for its last checkpoint.
        timeout: `ddp_timeout`, in seconds.
        leave: Ends the process; the tests have another one.
    """

    def __init__(self, folder: Path, timeout: float, leave: Callable[[int], None] = os._exit):
        self.folder, self.limit, self.leave = folder, SHARE * timeout, leave
        self.interval = min(SLOWEST, self.limit / BEATS)
        self.passed, self.doing = 0, "at the start"
        self._step = 0
        self._main = threading.get_ident()
        self._stop, self._due = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    # ---- where the main thread is ----------------------------------------------------------------------------------

    def reach(self, what: str) -> None:
        """The main thread passes a point that every rank passes."""
        self.passed += 1
        self.doing = f"in step {self._step + 1} ({what})"

    def on_step_begin(self, args, state, control, **kwargs):
        self._step = state.global_step
        self.reach("begin")
        self._due.set()  # the last record of a rank that is gone then names its last step, however short steps are

    def on_substep_end(self, args, state, control, **kwargs):
        self.reach("micro-batch")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.reach("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self.reach("end")

    # ---- the thread ------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Heartbeat":
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._rank = torch.distributed.get_rank()
            self._keys = [f"siesta/beat/{rank}" for rank in range(torch.distributed.get_world_size())]
            # A connection of its own: the main thread's is taken while that waits.
            self._store = cast(Any, torch.distributed.distributed_c10d._get_default_store()).clone()
            self._store.set_timeout(timedelta(seconds=self.limit))
            self._beat()
            torch.distributed.barrier()  # now the store has a record of this training from everyone
            self._ranks = Ranks(self.limit, self._records(), time.monotonic())
            self._told, self._teller = socket.socketpair()
            self._teller.setblocking(False)
            self._told_before = signal.set_wakeup_fd(self._teller.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join()
            signal.set_wakeup_fd(self._told_before)
            self._told.close()
            self._teller.close()

    def _beat(self) -> None:
        where, waits = place(sys._current_frames()[self._main])
        beat = Beat(time.monotonic_ns(), self.passed, waits, f"{self.doing} at {where}")
        self._store.set(self._keys[self._rank], json.dumps(asdict(beat)))

    def _records(self) -> list[Beat]:
        return [Beat(**json.loads(record)) for record in self._store.multi_get(self._keys)]

    def _run(self) -> None:
        while True:
            self._due.wait(self.interval)
            self._due.clear()
            if self._stop.is_set():
                return
            try:
                self._beat()
                self._ranks.see(self._records(), time.monotonic())
            except RuntimeError as error:  # of the store; a rank that ends in order stops its thread before
                self._end([0], f"the store of the ranks does not answer, rank 0 or its host is gone ({error})")
                return
            lost, line = self._fault(time.monotonic())
            if lost:
                self._end(lost, line)
                return

    def _fault(self, now: float) -> tuple[list[int], str]:
        """See `Ranks.fault`; who is silent is lost earlier where this process has been signalled."""
        patience = min(SIGNALLED, self.limit)
        signalled = bool(select.select([self._told], [], [], 0)[0])  # never read, so it stays there
        if signalled and (silent := self._ranks.silent(now, patience)):
            return silent, self._ranks.line(silent, f"no sign of life for {patience:.0f} s, and a signal to end", now)
        return self._ranks.fault(now)

    def _end(self, lost: Sequence[int], line: str) -> None:
        """Leave, on every rank; one of them tells why."""
        if self._tells(lost):
            print(f"siesta: error: {self._advice(line)}", file=sys.stderr, flush=True)
        time.sleep(GONE * self.interval)  # a rank that leaves breaks the connections of one that has not seen why
        self.leave(EXIT_CODE)

    def _tells(self, lost: Sequence[int]) -> bool:
        return self._rank == min((rank for rank in range(len(self._keys)) if rank not in lost), default=self._rank)

    def _advice(self, line: str) -> str:
        last = next(iter(checkpoints(self.folder)), None)
        return f"{' '.join(line.split())}; the same command goes on from {last or 'the start of the stage'}"

    def gone(self) -> RankLost | None:
        """After a collective has failed: the rank whose end has broken it, if one is gone. Takes some beats."""
        if self._thread is None:
            return None
        deadline = time.monotonic() + 2 * GONE * self.interval
        while time.monotonic() < deadline:
            silent = self._ranks.silent(time.monotonic(), GONE * self.interval)
            if silent:
                line = self._ranks.line(silent, "gone, it was killed or has failed", time.monotonic())
                return RankLost(self._advice(line) if self._tells(silent) else "")
            time.sleep(self.interval)
        return None
