"""Does a longer sleep help, and when? Rule 110 at N = 1, 2, 4 passes, at equal tokens and at equal compute.

    python -m benchmarks.rule110 --jobs 3 --minutes 14            # all arms on one card, then the page
    python -m benchmarks.rule110 --plan                           # the arms and their estimated seconds, runs nothing
    python -m benchmarks.rule110 --cpu --tiny --jobs 2            # a minute or two on two cores, learns nothing
    python -m benchmarks.rule110 --tables                         # the page alone, from what is finished

For each depth t: every N at every learning rate of a small grid, seed 0; then, at the rate with the lowest loss on
validation rows, each N with the other seeds, and N = 1 trained for as many passes over windows as N = 4 took ("equal
compute"), later as N = 2 took. Arms with modes learn several depths and to think, and end with RL on the mode.

Each arm is a process and one JSON; finished arms are skipped, so the same command goes on where it stopped. An arm is
left out if it is estimated not to end within `--minutes`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from os import environ
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from threading import Lock

from benchmarks.rule110_arm import Arm
from benchmarks.rule110_tables import DOCS, read_results, validation_loss, write_page
from benchmarks.runs import ONE_THREAD, Place
from benchmarks.timing import write_json

START = 10  # seconds until an arm trains; of several at a time, one starts while others train
MIXTURE = (1, 2, 4, 8, 10)  # t of the arms with modes; what `think` writes is exact up to t = 11 for 24 bits


@dataclass(frozen=True)
class Grid:
    """Steps of every N at equal tokens, and the learning rates to choose from."""

    steps: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Schedule:
    """What is measured: a grid a depth, in order of importance; N; seeds; the arms with modes."""

    depths: dict[int, Grid]
    passes: tuple[int, ...] = (1, 2, 4)
    seeds: tuple[int, ...] = (0, 1)
    mixture: tuple[int, ...] = MIXTURE
    mixture_steps: int = 600


FULL = Schedule(
    {
        8: Grid(400, (2e-3, 4e-3, 8e-3)),
        12: Grid(600, (2e-3, 4e-3)),
        16: Grid(1500, (2e-3,)),
        32: Grid(10_000, (2e-3,)),
    },
)
TINY = Schedule({1: Grid(4, (2e-3, 4e-3))}, (1, 2), (0,), (1, 2), 4)


def window_passes(passes: int) -> int:
    """Passes over windows in a step: N over each of the four of the context, one over the query's."""
    return 4 * passes + 1


def estimate(arm: Arm) -> float:
    """Seconds of an arm on one H200: 3.4 ms a pass over a batch of windows, 2 ms a step for the optimizers, what is
    measured at the end, and RL."""
    passes = window_passes(arm.passes) + 2 * arm.modes
    return 3 + 10 * arm.modes + arm.steps * (3.4 * passes + 2) / 1000


def grid(schedule: Schedule, depth: int) -> list[Arm]:
    """Every N at every rate, first seed."""
    found = schedule.depths[depth]
    return [Arm((depth,), n, rate, schedule.seeds[0], found.steps) for rate in found.rates for n in schedule.passes]


def chosen(schedule: Schedule, depth: int, results: dict[str, dict]) -> dict[int, Arm]:
    """N -> the arm of the grid whose loss on validation rows is lowest; N without a finished arm are left out."""
    finished = [arm for arm in grid(schedule, depth) if arm.name in results]
    # Of equal keys the last one stands: the lowest loss.
    ordered = sorted(finished, key=lambda arm: validation_loss(results[arm.name], depth), reverse=True)
    best = {arm.passes: arm for arm in ordered}
    return {n: best[n] for n in schedule.passes if n in best}


def longer(arm: Arm, passes: int) -> Arm:
    """The arm of N = 1 trained for as much compute as the same steps take at another N."""
    return replace(arm, steps=arm.steps * window_passes(passes) // window_passes(1))


def other_seeds(schedule: Schedule, best: dict[int, Arm]) -> list[Arm]:
    """The chosen arms with the other seeds."""
    return [replace(arm, seed=seed) for seed in schedule.seeds[1:] for arm in best.values()]


def equal_compute(schedule: Schedule, best: dict[int, Arm], passes: Sequence[int]) -> list[Arm]:
    """N = 1 at the compute of some other N, each with every seed."""
    return [longer(replace(best[1], seed=seed), n) for n in passes if 1 in best for seed in schedule.seeds]


def with_modes(schedule: Schedule, best: dict[int, Arm], seed: int) -> list[Arm]:
    """The arms with modes of a seed, at the rates chosen at the first depth."""
    return [Arm(schedule.mixture, n, arm.rate, seed, schedule.mixture_steps, True) for n, arm in best.items()]


def waves(schedule: Schedule, folder: Path) -> Iterator[list[Arm]]:
    """The arms, the more important first, in lists each of which needs the results of those before it."""
    *between, most = (n for n in schedule.passes if n > 1)
    first: dict[int, Arm] = {}
    arms: list[Arm] = []
    later: list[Arm] = []
    for i, depth in enumerate(schedule.depths):
        yield arms + grid(schedule, depth)
        best = chosen(schedule, depth, read_results(folder))
        first = first or best
        arms = other_seeds(schedule, best) + equal_compute(schedule, best, [most])
        later += equal_compute(schedule, best, between)
        if i > 0:
            arms, later = arms + later, []
        arms += [arm for seed in schedule.seeds[i : i + 1] for arm in with_modes(schedule, first, seed)]
    yield arms + later


@dataclass
class Budget:
    """Seconds of the whole measurement, and what of them is given away. Arms on one card take turns on it."""

    seconds: float
    cards: int = 1
    given: float = 0.0
    start: float = field(default_factory=time.monotonic)
    lock: Lock = field(default_factory=Lock)

    def catch_up(self) -> None:
        """Put what was estimated right, at a moment when no arm runs."""
        self.given = self.cards * (time.monotonic() - self.start)

    def take(self, seconds: float) -> bool:
        """Whether an arm of so many seconds still fits; if it does, they are its own."""
        with self.lock:
            fits = max(self.given / self.cards, time.monotonic() - self.start) + seconds <= self.seconds
            self.given += seconds if fits else 0.0
            return fits


def run_process(module: str, arguments: Sequence[str], file: Path, logs: Path, place: Place) -> int:
    """One process of this benchmark; what it prints goes to a log. Returns its exit code."""
    command = [sys.executable, "-m", module, *arguments, "--out", str(file)]
    with (logs / f"{file.stem}.log").open("w") as log:
        return subprocess.run(command, env=environ | place, stdout=log, stderr=log, check=False).returncode


def run_wave(
    arms: Sequence[Arm], places: Sequence[Place], budget: Budget, folder: Path, extra: list[str]
) -> list[str]:
    """Run arms in as many processes as there are places. Returns the names of those that failed."""
    budget.catch_up()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    free: Queue[Place] = Queue()
    for place in places:
        free.put(place)

    def run(arm: Arm) -> str | None:
        file = folder / f"{arm.name}.json"
        if file.exists():
            return None
        place = free.get()
        try:
            if not budget.take(estimate(arm) + START * budget.cards / len(places)):
                print(f"{arm.name}: left out, {estimate(arm):.0f} s no longer fit into --minutes", flush=True)
                return None
            code = run_process("benchmarks.rule110_arm", [json.dumps(asdict(arm)), *extra], file, logs, place)
        finally:
            free.put(place)
        print(f"{arm.name}: {'done' if code == 0 else f'failed with exit code {code}'}", flush=True)
        return arm.name if code else None

    with ThreadPoolExecutor(len(places)) as pool:
        return [name for name in pool.map(run, arms) if name]


def measure(schedule: Schedule, options: argparse.Namespace, folder: Path) -> None:
    """Speed alone on a card, then wave after wave.

    Raises:
        SystemExit: An arm failed; the others are through.
    """
    extra = [*(["--cpu"] if options.cpu else []), *(["--tiny"] if options.tiny else [])]
    cards: list[Place] = [ONE_THREAD] if options.cpu else [{"CUDA_VISIBLE_DEVICES": str(i)} for i in options.gpus]
    places = [place | ONE_THREAD for _ in range(options.jobs) for place in cards]
    budget = Budget(60 * options.minutes, len(cards))
    failed = []
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    speed = folder / "speed.json"
    if not speed.exists():  # first, so that it is alone and the arms find its compiled blocks in the cache
        arguments = ["--passes", *map(str, schedule.passes), *extra]
        failed += (
            ["speed"] if run_process("benchmarks.rule110_speed", arguments, speed, folder / "logs", cards[0]) else []
        )
    for arms in waves(schedule, folder):
        failed += run_wave(arms, places, budget, folder, extra)
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed; see {folder / 'logs'}")


def show_plan(schedule: Schedule) -> None:
    """Print every arm with its estimated seconds, as if all rates of a grid were equally good."""
    arms: list[Arm] = []
    with TemporaryDirectory() as folder:
        for wave in waves(schedule, Path(folder)):
            arms += wave
            for arm in wave:
                alike = {str(t): {"slept": {"loss": 0.0}} for t in arm.depths}
                write_json(Path(folder) / f"{arm.name}.json", {"arm": asdict(arm), "validation": alike})
    for arm in arms:
        print(f"{estimate(arm):6.0f}  {arm.name}")
    print(
        f"{sum(map(estimate, arms)):6.0f}  seconds of one H200, and {START} for each start, of which --jobs hides most"
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--jobs", type=int, default=1, help="arms at a time on each card; while one starts, others train"
    )
    parser.add_argument("--minutes", type=float, default=14, help="of the whole measurement")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a schedule that says nothing, to see that all of it runs")
    parser.add_argument(
        "--out", type=Path, help="folder with sleep_rule110.md and rule110/; docs/results, or outputs/rule110 if tiny"
    )
    parser.add_argument("--plan", action="store_true", help="print the arms and their estimated seconds, run nothing")
    parser.add_argument("--tables", action="store_true", help="write the page, run nothing")
    options = parser.parse_args(arguments)
    schedule = TINY if options.tiny else FULL
    if options.plan:
        return show_plan(schedule)
    out = options.out or (Path("outputs/rule110") if options.tiny else DOCS)
    try:
        if not options.tables:
            measure(schedule, options, out / "rule110")
    finally:  # what is finished is shown even if an arm failed
        write_page(out)


if __name__ == "__main__":
    main()
