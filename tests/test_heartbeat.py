"""Who is lost, by hand-made records and a hand-moved clock; and two ranks of which one is really lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from siesta.rl.checkpoints import newest_intact
from siesta.rl.heartbeat import Beat, Heartbeat, Ranks, place
from tests.helpers import save_tiny_model

ROOT = Path(__file__).parents[1]
LIMIT = 10.0


class Clock:
    """Two or more ranks that beat every second unless they are told not to."""

    def __init__(self, ranks: int):
        self.now = 0.0
        self.beats = [Beat(0, 5, False, f"rank {rank} at work") for rank in range(ranks)]
        self.ranks = Ranks(LIMIT, self.beats, self.now)

    def second(self, *, silent: int | None = None, **changes: Any) -> tuple[list[int], str]:
        """A second later. `changes`: r0, r1, ... -> points passed, and whether it waits."""
        self.now += 1.0
        for rank, beat in enumerate(self.beats):
            passed, waits = changes.get(f"r{rank}", (beat.passed, beat.waits))
            if rank != silent:
                self.beats[rank] = Beat(beat.number + 1, passed, waits, beat.doing)
        self.ranks.see(self.beats, self.now)
        return self.ranks.fault(self.now)


def first_fault(clock: Clock, seconds: int, **changes: Any) -> tuple[int, list[int], str] | None:
    """The second of the first fault, who, and the line."""
    for second in range(1, seconds + 1):
        lost, line = clock.second(**(changes if second == 1 or "silent" in changes else {}))
        if lost:
            return second, lost, line
    return None


def test_a_silent_rank_is_lost_after_the_limit() -> None:
    assert first_fault(Clock(3), 30, silent=1) == (
        10,
        [1],
        "rank 1: no sign of life for 10 s; it was last rank 1 at work, 10 s ago",
    )


def test_the_rank_that_has_passed_fewer_points_holds_up_the_others() -> None:
    fault = first_fault(Clock(3), 30, r0=(7, True), r1=(7, False))  # with NCCL a waiting rank does not look like one
    assert fault is not None
    assert fault[:2] == (11, [2]), "the others wait since the first second"
    assert fault[2] == "rank 2: stalled, the other ranks wait for it; it was last rank 2 at work, 11 s ago"


def test_time_is_counted_from_when_the_others_wait() -> None:
    """All write a rollout of a minute, and one of them is done first."""
    clock = Clock(2)
    assert not any(clock.second()[0] for _ in range(60))
    fault = first_fault(clock, 30, r0=(6, True))
    assert fault is not None
    assert fault[:2] == (11, [1])


def test_where_all_have_passed_as_many_it_is_the_one_that_does_not_wait() -> None:
    fault = first_fault(Clock(3), 30, r0=(5, True), r2=(5, True))
    assert fault is not None
    assert fault[:2] == (11, [1]), "the others wait since the first second"


@pytest.mark.parametrize(
    "changes",
    [
        {},  # all of them write a long rollout
        {"r0": (6, True), "r1": (6, True), "r2": (6, True)},  # the backend's own timeout is for that
    ],
)
def test_nobody_is_lost_where_no_one_is_waited_for(changes: dict[str, Any]) -> None:
    assert first_fault(Clock(3), 60, **changes) is None


def test_a_slow_rank_that_moves_is_not_lost() -> None:
    clock = Clock(2)
    clock.second(r0=(9, True))
    for passed in range(6, 9):  # one point in nine seconds
        assert not any(clock.second()[0] for _ in range(8))
        assert not clock.second(r1=(passed, False))[0]


def test_where_a_thread_is_and_whether_it_waits() -> None:
    def in_module(name: str | None, call: Callable[[], Any]) -> Callable[[], Any]:
        """A function that calls another one and stands in a module of that name, or in none, as compiled code does."""
        scope: dict[str, Any] = {"call": call} | ({"__name__": name} if name else {})
        exec("def function():\n    return call()", scope)
        return scope["function"]

    def here() -> tuple[str, bool]:
        return place(sys._current_frames()[threading.get_ident()])

    reward = in_module("siesta.rewards.reward", here)
    assert here() == ("", False)
    assert in_module("siesta.rl.trainer", reward)() == ("siesta.rewards.reward.function:2", False), "the innermost"
    gather = in_module("torch.distributed.distributed_c10d", here)
    assert in_module("siesta.rl.trainer", gather)() == ("siesta.rl.trainer.function:2", True)
    assert in_module("siesta.rl.trainer", in_module(None, here))() == ("siesta.rl.trainer.function:2", False)


def test_one_process_has_no_heart() -> None:
    with Heartbeat(Path(), 100) as heartbeat:
        assert "heartbeat" not in [thread.name for thread in threading.enumerate()]
        assert heartbeat.gone() is None


# ---- two ranks -----------------------------------------------------------------------------------------------------

HAS_DEEPSPEED = find_spec("deepspeed") is not None and shutil.which("g++") is not None
CASES = {
    "killed": ([4, -9], r"rank 1: gone, it was killed or has failed; it was last in step [12] \("),  # a beat ago
    "stopped": ([4, -9], r"rank 1: no sign of life for 16 s; it was last in step [12] \("),
    "signalled": (
        [4, -9],
        r"rank 1: no sign of life for 20 s, and a signal to end; it was last in step [12] \(",
    ),
    "asleep": (
        [4, 4],
        r"rank 1: stalled, the other ranks wait for it; it was last in step 2 \(verify\) at siesta\.rewards\.reward\.",
    ),
}


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left in each case, of which the second was lost."""
    folder = tmp_path_factory.mktemp("lost")
    save_tiny_model(folder / "model")
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    cases = [*CASES, "full", *(["full_zero"] if HAS_DEEPSPEED else [])]
    command = [sys.executable, "-m", "tests.distributed.lost_rank", str(folder), *cases]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def said_by(lost: Path, case: str, rank: int) -> str:
    return (lost / case / f"{rank}.txt").read_text()


def codes_of(lost: Path, case: str) -> list[int]:
    return json.loads((lost / case / "codes.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_lost_rank_ends_the_run_with_its_name_and_leaves_the_checkpoint(lost: Path, case: str) -> None:
    codes, line = CASES[case]
    folder = lost / case
    assert codes_of(lost, case) == codes
    (said,) = [text for text in said_by(lost, case, 0).splitlines() if text.startswith("siesta: ")]
    checkpoint = folder / "checkpoint-1"
    pattern = rf"siesta: error: {line}.*; the same command goes on from {re.escape(str(checkpoint))}"
    assert re.fullmatch(pattern, said), said
    assert "siesta: " not in said_by(lost, case, 1), "one rank tells"
    assert newest_intact(folder, 2, lambda text: None) == checkpoint


def test_a_full_disk_of_one_rank_costs_all_the_checkpoint_and_no_more(lost: Path) -> None:
    assert codes_of(lost, "full") == [0, 0]
    assert "CHECKPOINT NOT WRITTEN, step 2: " in said_by(lost, "full", 0)
    assert "CHECKPOINT NOT WRITTEN" not in said_by(lost, "full", 1)
    left = {path.name for path in (lost / "full").glob("checkpoint-*")}
    assert left == {"checkpoint-1", "checkpoint-3"}
    assert newest_intact(lost / "full", 2, pytest.fail) == lost / "full" / "checkpoint-3"


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed and g++")
def test_ranks_that_save_together_end_when_the_disk_of_one_is_full(lost: Path) -> None:
    """The others wait for it in DeepSpeed's save."""
    assert codes_of(lost, "full_zero") == [4, 2]
    assert "rank 1: gone, it was killed or has failed; it was last in step " in said_by(lost, "full_zero", 0)
    assert "the disk is full ([Errno 28] No space left on device); ranks that save together cannot go on" in said_by(
        lost, "full_zero", 1
    )
    said: list[str] = []
    assert newest_intact(lost / "full_zero", 2, said.append) == lost / "full_zero" / "checkpoint-1"
    assert "a save was interrupted" in said[0]
