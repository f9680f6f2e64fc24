"""The process in which a verifier runs: python -m siesta.rewards.worker BYTES package.module.function [EXAMPLE]

Only `isolated.IsolatedVerifier` starts it, as the leader of its own session. One JSON line comes in per call and
one goes out; the first line out is {"ready": true} or {"failed": reason}. JSON, not pickle, so nothing that arrives
can run as code.

A verifier may print, read standard input, fork or hang, and none of that may disturb the conversation. So the pipes
move to private descriptors that spawned programs do not inherit, and descriptors 0 to 2 become /dev/null. An
EXAMPLE, a solution and an answer, is scored once before "ready": what the verifier imports or compiles at its first
call is paid for there.

The process may map BYTES of memory, as may each that it starts; beyond that an allocation raises MemoryError. What a
verifier starts during a call ends with the call, or thousands of calls would fill the machine. What it starts while it
is imported, or in that first call, may stay.
"""

import ctypes
import importlib
import json
import os
import queue
import resource
import signal
import sys
import threading
from contextlib import suppress
from typing import BinaryIO

from siesta.rewards.score import Unscorable, Verifier, guarded, reason_of

PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


def claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the parent on private descriptors, with 0, 1 and 2 pointing to /dev/null from here on."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    return requests, replies


def load(path: str) -> Verifier:
    """The function at a dotted path."""
    module, _, name = path.rpartition(".")
    verifier: Verifier = getattr(importlib.import_module(module), name)
    if not callable(verifier):
        raise TypeError(f"{path} is not callable")
    return verifier


def collect(requests: BinaryIO, inbox: queue.SimpleQueue[bytes]) -> None:
    """Thread: queue the requests, and end everything when the parent closes the pipe or is gone.

    It reads beside the main thread because a verifier that hangs would never get to see the end of the pipe, and would
    outlive a killed run. Children that the verifier forked are in the same process group and go with it.
    """
    for line in requests:
        inbox.put(line)
    os.killpg(0, signal.SIGKILL)


def limit_memory(size: int) -> None:
    """Cap this process's address space, and that of each it starts, at `size` bytes, or at what is allowed anyway."""
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    size = size if allowed == resource.RLIM_INFINITY else min(size, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def adopt_orphans() -> None:
    """Become the parent of every process below whose own parent ends, so that none gets out of reach by that."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def started_since(kept: set[int]) -> set[int]:
    """Ids of the processes below this one, without the children in `kept` and what is below those."""
    try:  # costs next to nothing where there are no children, which is the rule
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    import psutil

    found: set[int] = set()
    for child in psutil.Process().children():
        if child.pid not in kept:
            with suppress(psutil.NoSuchProcess):
                found |= {child.pid, *(below.pid for below in child.children(recursive=True))}
    return found


def end_strays(kept: set[int]) -> None:
    """Kill and reap the processes below this one that are not in `kept`, and those that they start meanwhile."""
    while strays := started_since(kept):
        for stray in strays:
            with suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)
        for stray in strays:
            with suppress(ChildProcessError):  # not ours yet: it comes to us when its parent is gone
                os.waitpid(stray, 0)


def send(replies: BinaryIO, message: dict[str, object]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")


def main(memory: str, path: str, *example: str) -> None:
    requests, replies = claim_pipes()
    limit_memory(int(memory))
    adopt_orphans()
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=collect, args=(requests, inbox), daemon=True).start()
    if os.getcwd() not in sys.path:  # `-m` puts it there, unless PYTHONSAFEPATH is set
        sys.path.insert(0, os.getcwd())
    try:
        verifier = guarded(load(path))
        if example:
            verifier(*example)
    except (Exception, SystemExit) as error:  # SystemExit: a script without a main guard
        send(replies, {"failed": error.reason if isinstance(error, Unscorable) else reason_of(error)})
        return
    send(replies, {"ready": True})
    own_id, kept = os.getpid(), started_since(set())
    while True:
        request = json.loads(inbox.get())
        try:
            reply: dict[str, object] = {"score": verifier(request["solution"], request["answer"])}
        except Unscorable as error:
            reply = {"failed": error.reason}
        if os.getpid() != own_id:  # a child that the verifier forked came back too: it must not answer a second time
            os._exit(0)
        end_strays(kept)
        send(replies, reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
