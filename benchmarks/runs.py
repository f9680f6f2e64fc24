"""Many runs of recipes beside each other: each a process of its own, started as a user starts it.

A *place* is where one run goes: environment variables (one thread of the CPU, a card of the machine, a port). There
are as many runs at a time as places. Runs whose stages are finished do nothing, so a measurement that was interrupted
goes on where it stopped, within a stage from its last checkpoint.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import NamedTuple

Place = dict[str, str]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Job(NamedTuple):
    """A run: recipe, name, seed, settings, the folder it goes to, and what python is to run it with."""

    recipe: str
    name: str
    seed: int
    settings: list[str]
    out: Path
    launch: tuple[str, ...] = ("-m", "siesta.rl.train")

    @property
    def folder(self) -> Path:
        return self.out / f"{self.name}-{self.seed}"


def settings(name: str, seed: int, out: Path) -> list[str]:
    """What every run of a seed shares. Seeds are far apart: an example depends on data.seed plus its index."""
    seeds = [f"seed={seed}", f"data.seed={seed * 10_000_000}"]
    return [*seeds, f"tracking.output_dir={out}", f"tracking.run={name}-{seed}"]


def run_one(job: Job, place: Place) -> int:
    """Run a recipe; what it prints goes to a log. Returns the exit code."""
    own = settings(job.name, job.seed, job.out)
    command = [sys.executable, *job.launch, job.recipe, *own, *job.settings]
    with Path(f"{job.folder}.log").open("a") as log:
        return subprocess.run(command, env=os.environ | place, stdout=log, stderr=log, check=False).returncode


def run_all(jobs: Sequence[Job], places: int | Sequence[Place], *, gap: float = 0) -> None:
    """Run jobs in as many processes as there are places; one that fails ends the measurement once all are through.

    Args:
        places: Their number, with a thread each, or the places themselves.
        gap: Seconds between two starts. What the first compiles, the others find in a cache.
    """
    free: Queue[Place] = Queue()
    for place in [ONE_THREAD] * places if isinstance(places, int) else places:
        free.put(place)
    starts = Lock()

    def run(job: Job) -> tuple[str, int]:
        with starts:
            place = free.get()
            time.sleep(0 if job is jobs[0] else gap)
        try:
            return job.folder.name, run_one(job, place)
        finally:
            free.put(place)

    failed = []
    with ThreadPoolExecutor(free.qsize()) as pool:
        for name, code in pool.map(run, jobs):
            print(f"{name}: {'done' if code == 0 else f'failed with exit code {code}'}", flush=True)
            failed += [name] if code else []
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed; see the logs")
