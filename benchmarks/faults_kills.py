"""SIGKILL at random moments of a run that saves: does it always go on, and does it end as if nothing had happened?

For every seed the undisturbed run comes first. Then the same command is started, killed, started again, until it
has come to its end, and both runs are compared. Moments are drawn from `random.Random(seed)`:

- One start in ten is killed in its start: at a moment uniform over the undisturbed seconds from the process's start to
  its first step (checks, model, loading; imports as well where the interpreter is a new one).
- The others are killed at work: `KILLS` moments uniform over the undisturbed seconds from the first step to the end of
  the run, in order; a process is killed when it has worked as long as lies between its moment and the one before,
  counted from its first new step. So every process makes progress, and every run ends.

Some of the processes are new interpreters, the others are forked (see `benchmarks.faults_process`).
"""

import json
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from benchmarks.faults_equal import differences
from benchmarks.faults_process import Process
from benchmarks.faults_row import Row
from siesta.data.errors import CheckpointError
from siesta.rl.checkpoints import UNFINISHED, check_intact, checkpoints, step_of

KILLS = 12  # at work, of a run
IN_START = 0.1  # share of the starts that are killed before their first step
FRESH_STARTS, FRESH = 0.3, 0.04  # share of new interpreters among them, and among the others
# The recipe `smoke` with a model of 21 kB, a checkpoint at every step (two in the warm-up), two of them kept, every
# rollout in samples.jsonl, and a price of tokens, so that answers are told apart although all are wrong.
SETTINGS = [
    "model.embedded={layers: 1, hidden_size: 16, heads: 2}",
    "data.train_size=400",
    "warmup={max_steps: 30, per_device_train_batch_size: 32, gradient_checkpointing: false, learning_rate: 2.0e-3, "
    "check_every: 10, check_items: 16, min_mass: 0.0, logging_steps: 1, save_strategy: steps, save_steps: 2, "
    "save_total_limit: 2}",
    "rl.max_steps=24",
    "rl.per_device_train_batch_size=16",
    "rl.save_steps=1",
    "rl.save_total_limit=2",
    "rl.logging_steps=1",
    "rl.price_per_token=0.02",
    "evaluate={items: 16, samples: 2, resamples: 100, every: 8, every_items: 16, every_samples: 2}",
    "tracking.samples=32",
]
STEP = re.compile(r"^(warmup|rl) ([1-9]\d*)/\d+ \(", re.MULTILINE)
BEHIND = "== evaluate"


@dataclass
class Kill:
    """One kill: where the process was, what was lost, what the next start made of it."""

    seed: int
    fresh: bool
    planned: str  # start or work
    at: float  # seconds after the start
    place: str = ""  # start, save, training or other: model, gate, evaluation, export, report
    stage: str = ""
    lost_steps: int = 0  # that were finished and have to be done again
    faults: list[str] = field(default_factory=list)


def last_step(printed: str) -> tuple[str, int] | None:
    """Stage and number of the last step that was logged."""
    found = STEP.findall(printed)
    return (found[-1][0], int(found[-1][1])) if found else None


def stage_of(printed: str) -> str:
    """The stage a process was in."""
    found = re.findall(r"^== (\w+)$", printed, re.MULTILINE)
    return found[-1] if found else ""


def place_of(run: Path, printed: str) -> str:
    """Where a process was when it was killed; what a save leaves shows that it was in one."""
    stage = stage_of(printed)
    if stage in ("warmup", "rl"):
        if (run / stage / UNFINISHED).exists():
            return "save"
        begun = printed.rpartition(f"== {stage}")[2]
        if STEP.search(begun) and not (run / stage / "model.safetensors").exists():
            return "training"
    return "start" if not STEP.search(printed) and stage in ("", "model", "warmup", "rl") else "other"


def newest(run: Path, stage: str) -> int:
    """Step of the newest checkpoint of a stage, 0 without one."""
    return next((step_of(path) or 0 for path in checkpoints(run / stage)), 0)


def damaged(run: Path) -> list[str]:
    """Checkpoints that a kill has left and that are not whole."""
    found = []
    for stage in ("warmup", "rl"):
        for checkpoint in checkpoints(run / stage):
            try:
                check_intact(checkpoint)
            except CheckpointError as error:
                found.append(f"{checkpoint.name}: {error}")
    return found


class Trial:
    """Runs of one seed, in a folder of its own."""

    def __init__(self, folder: Path, seed: int, settings: Sequence[str]):
        self.folder, self.seed, self.settings = folder, seed, settings
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self.starts = 0
        self.recoveries: list[tuple[bool, float]] = []  # of each restart that came to a new step: fresh, seconds
        self._expected: tuple[str, int] | None = None  # stage and step that the next process has to go on with
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def start(self, name: str, *, fresh: bool) -> Process:
        """Start the command for the run `name`."""
        self.starts += 1
        own = [f"seed={self.seed}", f"data.seed={self.seed * 10_000_000}", f"tracking.run={name}"]
        arguments = ["smoke", "tracking.output_dir=.", *self.settings, *own]
        return Process(arguments, self.folder, self.folder / f"{name}-{self.starts}", fresh=fresh)

    def undisturbed(self, *, fresh: bool) -> tuple[float, float]:
        """Seconds from the start to the first step, and from there to the end."""
        process = self.start("undisturbed", fresh=fresh)
        process.until(lambda: STEP.search(process.printed) is not None)
        first = process.age
        ended = process.end()
        if ended.code != 0:
            raise RuntimeError(f"{process.prefix}: exit code {ended.code}: {ended.err}")
        return first, process.age - first

    def disturb(self, first: dict[bool, float], work: float, kills: int, rng: Random) -> None:
        """Start the command until it ends, with at most `kills` kills at work and those in a start on top.

        Args:
            first: Seconds from the start to the first step, of a new interpreter (True) and of a forked process.
            work: Seconds from the first step to the end.
        """
        moments = sorted(rng.uniform(0, work) for _ in range(kills))
        gaps = [b - a for a, b in zip([0.0, *moments], moments, strict=False)]
        code: int | None = None
        while code is None:
            in_start = bool(gaps) and rng.random() < IN_START
            fresh = rng.random() < (FRESH_STARTS if in_start else FRESH) and True in first
            gap = rng.uniform(0, first[fresh]) if in_start else gaps.pop(0) if gaps else None
            code = self.attempt(gap, in_start=in_start, fresh=fresh)
        if code != 0:
            self.faults.append(f"exit code {code}")
            return
        self.faults += differences(self.folder / "run", self.folder / "undisturbed")

    def attempt(self, gap: float | None, *, in_start: bool, fresh: bool) -> int | None:
        """One start; kills it after `gap` seconds. The exit code, None if it was killed."""
        process = self.start("run", fresh=fresh)
        seen: list[float] = []

        def works() -> bool:
            if seen or STEP.search(process.printed) or BEHIND in process.printed:
                seen.append(process.age)
            return bool(seen)

        alive = process.until(lambda: process.age >= gap) if in_start and gap is not None else process.until(works)
        if not in_start and gap is not None and alive:
            due = process.age + gap
            alive = process.until(lambda: process.age >= due)
        if gap is not None and alive:
            process.signal(signal.SIGKILL)
        ended = process.end()
        if self.kills and seen and STEP.search(process.printed):
            self.recoveries.append((fresh, round(seen[0], 3)))
        faults = self.went_on(process.printed, ended.err)
        if ended.code != -signal.SIGKILL:
            self.faults += faults
            return ended.code
        kill = Kill(self.seed, fresh, "start" if in_start else "work", round(process.age, 3))
        self.kills.append(self.look(kill, process.printed, faults))
        return None

    def went_on(self, printed: str, err: str) -> list[str]:
        """What is wrong with how a process went on from the kill before it, if it came so far."""
        found = ["a traceback"] if "Traceback" in err else []
        found += [line for line in printed.splitlines() if ": skipped," in line]
        own = STEP.search(printed)
        if own and self._expected is not None:
            first = own[1], int(own[2])
            ended = [("rl", 1)] if self._expected[0] == "warmup" else []  # it may have come to its last step
            if first not in (self._expected, *ended):
                found.append(f"went on at {first}, not {self._expected}")
        return found

    def look(self, kill: Kill, printed: str, faults: list[str]) -> Kill:
        """What a kill has left on the disk."""
        run = self.folder / "run"
        kill.place, kill.stage = place_of(run, printed), stage_of(printed)
        kill.faults = faults + damaged(run)
        if kill.stage in ("warmup", "rl"):
            step = newest(run, kill.stage)
            last = last_step(printed.rpartition(f"== {kill.stage}")[2])
            kill.lost_steps = max(0, last[1] - step) if last is not None else 0
            self._expected = (kill.stage, step + 1)
        return kill


def run_trial(
    folder: Path, seed: int, kills: int, settings: Sequence[str], fresh_first: float | None
) -> dict[str, Any]:
    """The undisturbed run of a seed and the killed one.

    Args:
        fresh_first: Seconds from the start of a new interpreter to its first step; None if there is none.
    """
    trial = Trial(folder / str(seed), seed, settings)
    first, work = trial.undisturbed(fresh=False)
    starts = {False: first} if fresh_first is None else {False: first, True: fresh_first}
    trial.disturb(starts, work, kills, Random(seed))
    content = {"seed": seed, "first": first, "work": work, "starts": trial.starts, "faults": trial.faults}
    return content | {"recoveries": trial.recoveries, "kills": [asdict(kill) for kill in trial.kills]}


def fresh_start(folder: Path, settings: Sequence[str]) -> float:
    """Seconds from the start of a new interpreter to its first step; and is its run the one of a forked process?

    Raises:
        RuntimeError: It is not, so forked processes say nothing.
    """
    trial = Trial(folder / "fresh", 0, settings)
    first, _ = trial.undisturbed(fresh=True)
    trial.start("forked", fresh=False).end()
    if found := differences(trial.folder / "forked", trial.folder / "undisturbed"):
        raise RuntimeError(f"a forked process is no stand-in for a new interpreter: {found}")
    return first


def run_kills(
    folder: Path, total: int, *, kills: int = KILLS, settings: Sequence[str] = SETTINGS, fresh: bool = True
) -> dict[str, Any]:
    """Kill until `total` kills are done; what has been done stays in `folder` and is not done again.

    Args:
        fresh: Some processes are new interpreters.
    """
    trials: list[dict[str, Any]] = []
    first = once(folder / "first.json", lambda: fresh_start(folder, settings)) if fresh else None
    while (done := sum(len(trial["kills"]) for trial in trials)) < total:
        seed = len(trials)
        own = min(kills, total - done)
        trial = once(folder / f"{seed}.json", lambda seed=seed, own=own: run_trial(folder, seed, own, settings, first))
        trials.append(trial)
        now = f"{done + len(trial['kills'])} of {total}"
        print(f"seed {seed}: {len(trial['kills'])} kills, {now}; {faults_of(trial) or 'equal bit by bit'}", flush=True)
    return {"fresh_first": first, "trials": trials}


def faults_of(trial: dict[str, Any]) -> list[str]:
    """Everything that did not hold in a trial."""
    return trial["faults"] + [fault for kill in trial["kills"] for fault in kill["faults"]]


PLACES = {
    "save": "in a save (`unfinished/` is there)",
    "training": "in training, between saves",
    "start": "in a start, before its first step",
    "other": "between or after the trainings: gate, next trainer, evaluation, export, report",
}


def kill_rows(found: dict[str, Any]) -> list[Row]:
    """A row for every place that a kill may hit, one for recovery, one for what the runs came to."""
    trials = found["trials"]
    kills = [kill for trial in trials for kill in trial["kills"]]
    rows = []
    for place, what in PLACES.items():
        own = [kill for kill in kills if kill["place"] == place]
        lost = [kill["lost_steps"] for kill in own] or [0]
        row = Row("kills", f"SIGKILL {what}", len(own), f"steps: {fmean(lost):.2f} in the mean, {max(lost)} at most")
        row.message = "the same command goes on from the newest checkpoint, which is whole"
        row.failures = [fault for kill in own for fault in kill["faults"]]
        rows.append(row)
    ends = Row("kills", "all together: the end of each run", len(kills), "nothing in the end")
    ends.message = f"{len(trials)} runs, {sum(trial['starts'] for trial in trials)} starts, equal bit by bit"
    ends.failures = [f"seed {trial['seed']}: {fault}" for trial in trials for fault in trial["faults"]]
    for fresh, name in ((False, "forked"), (True, "new interpreter")):
        seconds = [took for trial in trials for new, took in trial["recoveries"] if new == fresh]
        if seconds:
            ends.recovery += f"{'; ' * bool(ends.recovery)}{name}: {median(seconds):.1f} s, {max(seconds):.1f} at most"
    return [*rows, ends]


def once(file: Path, work: Callable[[], Any]) -> Any:
    """What `work` returns, kept in a file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(work(), indent=1))
    return json.loads(file.read_text())
