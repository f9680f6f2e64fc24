"""Verifiers that behave badly, for test_isolated.py and test_hostile.py: imported by dotted path from this folder.

The solution names the behaviour, so that one worker can be led from a bad call straight to a good one.
"""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def hang(answer: str) -> float:
    while True:
        pass


def fork_and_hang(answer: str) -> float:
    """Parent and child keep the FIFO `answer` open for writing, so its reader sees when both are gone."""
    os.open(answer, os.O_WRONLY)
    os.fork()
    signal.pause()
    return 1.0


def fork_and_return(answer: str) -> float:
    """The child finishes first and takes the verifier's way back into the worker."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return 0.5
    return 0.25


def flood(answer: str) -> float:
    """50 MB through every way out of a process, then an answer."""
    chunk = "x" * 999 + "\n"
    for _ in range(25_000):
        print(chunk, end="")
    for _ in range(50):
        os.write(1, b"y" * 250_000)
        os.write(2, b"z" * 250_000)
    subprocess.run([sys.executable, "-c", "print('{\"score\": 0.0}')"], check=True)
    return 1.0


def shout(answer: str) -> float:
    raise ValueError("much too long " * 100_000)


def write_id(answer: str) -> float:
    with open(answer, "w") as file:
        file.write(str(os.getpid()))
    return 1.0


def hang_in_c(answer: str) -> float:
    """Neither another thread nor a signal handler of this process gets a turn again."""
    return float(sum(itertools.repeat(0)))


HOLD = "import os, signal, sys; os.open(sys.argv[1], os.O_WRONLY); print(flush=True); signal.pause()"


def leave_children(answer: str) -> float:
    """Returns while a child, one in a session of its own and one whose parent is gone hold the FIFO `answer` open."""
    command = [sys.executable, "-c", HOLD, answer]
    for own_session in (False, True):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=own_session)
        assert child.stdout is not None
        child.stdout.readline()
    if os.fork() == 0:
        orphan = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert orphan.stdout is not None
        orphan.stdout.readline()
        os._exit(0)
    os.wait()
    return 1.0


def leave_children_and_hang(answer: str) -> float:
    leave_children(answer)
    return hang_in_c(answer)


def write_everywhere(answer: str) -> float:
    """`answer` on every descriptor there is, the pipe to the parent among them."""
    for descriptor in range(3, 32):
        with suppress(OSError):
            os.write(descriptor, answer.encode())
    return 1.0


def write_for_ever(answer: str) -> float:
    while True:
        write_everywhere("x" * 1000)


def allocate(answer: str) -> float:
    return float(len(bytearray(int(answer))) > 0)


def chaos(solution: str, answer: str) -> Any:
    """One of several misdeeds, by the solution; half of the calls are answered."""
    place = sum(solution.encode())
    deeds = ("raise", "exit", "none", "nan", "huge", "list", "sys.exit", "shout")
    return place % 4 == 0 if place % 2 == 0 else BEHAVIOURS[deeds[place // 2 % len(deeds)]](answer)


BEHAVIOURS: dict[str, Callable[[str], Any]] = {
    "hang": hang,
    "fork and hang": fork_and_hang,
    "fork and return": fork_and_return,
    "flood": flood,
    "shout": shout,
    "hang in C": hang_in_c,
    "leave children": leave_children,
    "leave children and hang": leave_children_and_hang,
    "write everywhere": write_everywhere,
    "write for ever": write_for_ever,
    "allocate": allocate,
    "huge": lambda answer: 10**400,
    "list": lambda answer: [1.0, 1.0],
    "raise": lambda answer: 1 / 0,
    "write id": write_id,
    "exit": lambda answer: os._exit(3),
    "sys.exit": lambda answer: sys.exit(4),
    "string": lambda answer: "1.0",
    "none": lambda answer: None,
    "nan": lambda answer: float("nan"),
    "infinite": lambda answer: float("inf"),
    "seven": lambda answer: 7.0,
    "negative": lambda answer: -0.1,
    "bool": lambda answer: True,
    "half": lambda answer: 0.5,
    "read stdin": lambda answer: float(sys.stdin.read() == ""),
    "variable is set": lambda answer: answer in os.environ,
    "close every descriptor": lambda answer: os.closerange(3, 100),
}


def act(solution: str, answer: str) -> Any:
    """The behaviour that `solution` names, or plain equality."""
    return BEHAVIOURS[solution](answer) if solution in BEHAVIOURS else solution == answer


def by_answer(solution: str, answer: str) -> float:
    """The behaviour that a row's answer `behaviour|argument|answer` names, or plain equality."""
    behaviour, _, rest = answer.partition("|")
    return BEHAVIOURS[behaviour](rest.rpartition("|")[0]) if rest else float(solution == answer)


not_callable = 3
