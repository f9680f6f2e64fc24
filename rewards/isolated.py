"""Run a verifier in a process of its own that can be killed.

Symbolic mathematics on text a model wrote can take for ever, and a time limit by SIGALRM works only in the main
thread and not inside C code. Killing a process always works. The worker (`worker.py`) is kept between calls,
because importing sympy costs as much as hundreds of comparisons. It is replaced after it was killed or died.

This is a fence against accidents, not against malice: a verifier runs as the user, with the user's files and network.
One that executes what a model wrote belongs in a container.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import IO, Any, Self

import psutil

from siesta.data.credentials import without_credentials
from siesta.rewards.score import REASON_LENGTH, Unscorable, as_score

STARTUP_LIMIT = 60.0  # seconds for imports; generous: network file systems are slow, and it is paid once per worker
REPLY_LIMIT = 4096  # bytes; a worker's own replies are far shorter, so more is a verifier writing where it must not
GIB = 2**30
MEMORY = 8.0  # GiB of address space, which is more than what is used


def end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill the worker's whole process group and what has left it, and reap the worker."""
    if os.getpid() != owner:  # a forked copy of the parent that exits must not take the parent's worker along
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGSTOP)  # nothing is started between the look and the kill
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def wait_for(pipe: IO[bytes], event: int, deadline: float) -> int:
    """Wait until `pipe` is ready and return its descriptor. poll, because select fails on descriptors above 1023."""
    poller = select.poll()
    poller.register(pipe, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
    return pipe.fileno()


class Worker:
    """One worker process and the two pipes to it. `end()` kills it; so do garbage collection and interpreter exit."""

    def __init__(self, arguments: list[str], folder: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "siesta.rewards.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env=without_credentials(dict(os.environ)),
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        for pipe in (self.stdin, self.stdout):
            os.set_blocking(pipe.fileno(), False)  # a write, too, must give up at the deadline
        self.end = weakref.finalize(self, end_process, self.process, os.getpid())

    def exchange(self, message: bytes, limit: float) -> dict[str, Any]:
        """Send `message` (may be empty) and return the next reply; Unscorable if none comes within `limit` seconds."""
        deadline = time.monotonic() + limit
        wanted = "score" if message else "ready"  # or why there is none, "failed"
        reply = b""
        try:
            while message:
                message = message[os.write(wait_for(self.stdin, select.POLLOUT, deadline), message) :]
            while not reply.endswith(b"\n"):
                chunk = os.read(wait_for(self.stdout, select.POLLIN, deadline), 65536)
                if not chunk:
                    raise EOFError
                reply += chunk
                if len(reply) > REPLY_LIMIT:
                    raise Unscorable("the worker sent a garbled reply")
        except TimeoutError:
            raise Unscorable(f"timed out after {limit:g} s") from None
        except (BrokenPipeError, EOFError):
            self.end()
            raise Unscorable(f"the worker died (exit status {self.process.returncode})") from None
        try:
            content = json.loads(reply)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.keys() not in ({wanted}, {"failed"}):
            raise Unscorable("the worker sent a garbled reply")
        return content


class IsolatedVerifier:
    """The verifier at a dotted path, called in worker processes with `timeout` seconds for each call and `memory` GiB.

    Raises ValueError at once when the path cannot be imported. `example` is a (solution, answer) pair scored while a
    worker starts, for verifiers that import lazily. Calls from several threads run side by side in up to `workers`
    processes, the first of which is started now and the others when they are needed; further calls wait their turn.
    """

    def __init__(
        self,
        path: str,
        timeout: float,
        *,
        workers: int = 1,
        memory: float = MEMORY,
        example: tuple[str, str] | None = None,
    ):
        if not 0 < timeout < float("inf"):
            raise ValueError(f"verifier timeout must be a positive number of seconds, not {timeout}")
        if not 0 < memory < float("inf"):
            raise ValueError(f"verifier memory must be a positive number of GiB, not {memory}")
        self.path = path
        self.timeout = timeout
        self.workers = workers
        self._arguments = [str(int(memory * GIB)), path, *(example or ())]
        self._folder = os.getcwd()  # a worker started later imports the same modules, wherever the program is by then
        self._places = threading.BoundedSemaphore(workers)
        self._idle: list[Worker] = []
        try:
            self._idle.append(self._start())
        except Unscorable as error:
            raise ValueError(f"verifier {path!r} cannot be loaded: {error.reason}") from None

    def __call__(self, solution: str, answer: str) -> float:
        message = json.dumps({"solution": solution, "answer": answer}).encode() + b"\n"
        with self._places:
            worker = self._take()
            reply = self._exchange(worker, message, self.timeout)
            self._idle.append(worker)  # one that failed is not: its late reply must never answer the next call
        if "failed" in reply:
            raise Unscorable(str(reply["failed"])[:REASON_LENGTH])
        return as_score(reply["score"])

    def _take(self) -> Worker:
        """An idle worker, or a new one; one that died between two calls is no fault of this rollout."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.end()
        return self._start()

    def _start(self) -> Worker:
        worker = Worker(self._arguments, self._folder)
        reply = self._exchange(worker, b"", STARTUP_LIMIT)
        if "failed" in reply:
            worker.end()
            raise Unscorable(reply["failed"])
        return worker

    def _exchange(self, worker: Worker, message: bytes, limit: float) -> dict[str, Any]:
        try:
            return worker.exchange(message, limit)
        except BaseException:  # KeyboardInterrupt as well
            worker.end()
            raise

    def close(self) -> None:
        """End idle workers now instead of at interpreter exit. A later call would start a new one."""
        while self._idle:
            self._idle.pop().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
