"""A verifier in its own process: whatever it does, the call ends, says why, and the next call works."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from siesta.rewards import isolated
from siesta.rewards.isolated import IsolatedVerifier
from siesta.rewards.score import Unscorable

ZOO = Path(__file__).parent
GENEROUS = 60.0


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[IsolatedVerifier]:
    monkeypatch.chdir(ZOO)
    with IsolatedVerifier("verifier_zoo.act", GENEROUS) as verifier:
        yield verifier


def assert_works(verifier: IsolatedVerifier) -> None:
    assert verifier("7", "7") == 1.0
    assert verifier("7", "8") == 0.0


@pytest.mark.parametrize(
    ("behaviour", "score"),
    [("bool", 1.0), ("half", 0.5), ("flood", 1.0), ("read stdin", 1.0), ("fork and return", 0.5)],
)
def test_scores(zoo: IsolatedVerifier, behaviour: str, score: float) -> None:
    assert zoo(behaviour, "") == score
    assert_works(zoo)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raise", "ZeroDivisionError: division by zero"),
        ("string", "returned str, not a number"),
        ("none", "returned NoneType, not a number"),
        ("nan", "returned nan, outside [0, 1]"),
        ("infinite", "returned inf, outside [0, 1]"),
        ("seven", "returned 7.0, outside [0, 1]"),
        ("negative", "returned -0.1, outside [0, 1]"),
        ("exit", "the worker died (exit status 3)"),
        ("sys.exit", "SystemExit: 4"),
        ("close every descriptor", "the worker died (exit status"),
    ],
)
def test_failures_are_named_and_do_not_last(zoo: IsolatedVerifier, behaviour: str, reason: str) -> None:
    with pytest.raises(Unscorable) as caught:
        zoo(behaviour, "")
    assert caught.value.reason.startswith(reason)
    assert_works(zoo)


def test_long_reasons_are_cut(zoo: IsolatedVerifier) -> None:
    with pytest.raises(Unscorable) as caught:
        zoo("shout", "")
    assert caught.value.reason.startswith("ValueError: much too long")
    assert len(caught.value.reason) == 200
    assert_works(zoo)


def test_hanging_is_ended(zoo: IsolatedVerifier) -> None:
    zoo.timeout = 0.5
    with pytest.raises(Unscorable, match=r"^timed out after 0\.5 s$"):
        zoo("hang", "")
    zoo.timeout = GENEROUS  # the limit of the good calls must not depend on how busy the machine is
    assert_works(zoo)


def test_forked_children_are_ended_too(zoo: IsolatedVerifier, tmp_path: Path) -> None:
    fifo = tmp_path / "held_open_by_the_verifier"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    zoo.timeout = 0.5
    with pytest.raises(Unscorable, match="timed out"):
        zoo("fork and hang", str(fifo))
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    events = poller.poll(GENEROUS * 1000)
    os.close(reader)
    assert events, "a process that the verifier forked is still alive"
    assert events[0][1] & select.POLLHUP
    zoo.timeout = GENEROUS
    assert_works(zoo)


def test_death_between_calls_is_not_blamed_on_the_next_rollout(zoo: IsolatedVerifier, tmp_path: Path) -> None:
    zoo("write id", str(tmp_path / "id"))
    worker = int((tmp_path / "id").read_text())
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    assert_works(zoo)


def test_interrupted_call_leaves_no_late_reply(zoo: IsolatedVerifier) -> None:
    """Control-C while the worker computes: the reply to that call must not be taken for the next one's."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            zoo("hang", "")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert_works(zoo)


def test_any_text_goes_through(zoo: IsolatedVerifier) -> None:
    for text in ("x" * 1_000_000, 'line\nbreak "quoted" \\ \0', "\ud800 lone surrogate", "ünï 数 🙂"):
        assert zoo(text, text) == 1.0
        assert zoo(text, text + ".") == 0.0


def test_threads_take_turns(zoo: IsolatedVerifier) -> None:
    pairs = [(str(i), str(i % 3)) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda pair: zoo(*pair), pairs))
    assert scores == [float(solution == answer) for solution, answer in pairs]


def test_secrets_stay_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ZOO)
    hidden = ["WANDB_API_KEY", "hf_token", "AWS_SECRET_ACCESS", "DB_PASSWORD"]
    for name in [*hidden, "SIESTA_PLAIN"]:
        monkeypatch.setenv(name, "value")
    with IsolatedVerifier("verifier_zoo.act", GENEROUS) as verifier:
        assert [verifier("variable is set", name) for name in hidden] == [0.0] * 4
        assert verifier("variable is set", "SIESTA_PLAIN") == 1.0


def test_a_later_worker_starts_in_the_same_folder(zoo: IsolatedVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    zoo.close()
    assert_works(zoo)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module.verify", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("verifier_zoo.no_such_function", "AttributeError: .* has no attribute 'no_such_function'"),
        ("verifier_zoo.not_callable", "TypeError: verifier_zoo.not_callable is not callable"),
    ],
)
def test_bad_paths_are_reported_when_built(monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.chdir(ZOO)
    with pytest.raises(ValueError, match=f"^verifier '{path}' cannot be loaded: {reason}$"):
        IsolatedVerifier(path, GENEROUS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys\nsys.exit('not a module')\n", "SystemExit: not a module"),
        ("import os\nos._exit(5)\n", r"the worker died \(exit status 5\)"),
        ("def verify(\n", "SyntaxError: .*"),
    ],
)
def test_modules_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str
) -> None:
    (tmp_path / "broken_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be loaded: {reason}$"):
        IsolatedVerifier("broken_module.verify", GENEROUS)


def test_an_import_that_never_ends_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "endless_module.py").write_text("while True:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(isolated, "STARTUP_LIMIT", 0.5)
    with pytest.raises(ValueError, match=r"cannot be loaded: timed out after 0\.5 s"):
        IsolatedVerifier("endless_module.verify", GENEROUS)


def test_starting_does_not_count_against_the_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Importing and the first call take three times the limit here; the calls that count take none of it."""
    module = "import time\nend = time.monotonic() + {s}\nwhile time.monotonic() < end:\n    pass\n"
    lazy = "def verify(solution, answer):\n    import slow_module\n    return True\n"
    (tmp_path / "slow_module.py").write_text(module.format(s=1.5))
    (tmp_path / "lazy_module.py").write_text(lazy)
    monkeypatch.chdir(tmp_path)
    with IsolatedVerifier("lazy_module.verify", 0.5, example=("1", "1")) as verifier:
        assert verifier("1", "1") == 1.0
    with IsolatedVerifier("lazy_module.verify", 0.5) as verifier, pytest.raises(Unscorable, match="timed out"):
        verifier("1", "1")  # negative control: without the example the first call pays


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_timeout_must_be_positive_and_finite(timeout: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        IsolatedVerifier("verifier_zoo.act", timeout)


def test_worker_ends_with_the_interpreter(tmp_path: Path) -> None:
    program = (
        "from siesta.rewards.isolated import IsolatedVerifier\n"
        "verifier = IsolatedVerifier('verifier_zoo.act', 60)\n"
        f"verifier('write id', {str(tmp_path / 'id')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ZOO, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "id").read_text()), 0)


def test_a_forked_copy_that_exits_leaves_the_worker_alone(tmp_path: Path) -> None:
    """Data loaders fork the trainer; at their exit they run its clean-up too."""
    program = (
        "import os, sys\n"
        "from siesta.rewards.isolated import IsolatedVerifier\n"
        "verifier = IsolatedVerifier('verifier_zoo.act', 60)\n"
        "verifier('write id', sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "verifier('write id', sys.argv[2])\n"
    )
    first, second = tmp_path / "first", tmp_path / "second"
    subprocess.run([sys.executable, "-c", program, str(first), str(second)], cwd=ZOO, check=True)
    assert first.read_text() == second.read_text()


def test_worker_ends_when_its_pipe_closes_even_while_it_hangs() -> None:
    """What a parent killed by SIGKILL leaves behind: a closed pipe and a worker in the middle of a call."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "siesta.rewards.worker", str(2**33), "verifier_zoo.act"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ZOO,
        start_new_session=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert json.loads(worker.stdout.readline()) == {"ready": True}
    worker.stdin.write(b'{"solution": "hang", "answer": ""}\n')
    worker.stdin.close()
    assert worker.wait(timeout=GENEROUS) == -signal.SIGKILL
    assert worker.stdout.read() == b""
    worker.stdout.close()
