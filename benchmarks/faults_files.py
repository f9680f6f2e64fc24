"""Damaged checkpoints: is every damage to every file found, named, and the older checkpoint taken?

A run leaves a checkpoint at every step. Each but the first is then damaged in another way: one file, one bit of it
changed or its end cut off, both at a random place, or the file gone. The run is started again: it has to name all
damages, go on from the first checkpoint, and end as the undisturbed run did.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from benchmarks.faults_equal import differences
from benchmarks.faults_injectors import flip, plant, resealed, truncate, unfinish
from benchmarks.faults_kills import SETTINGS, STEP
from benchmarks.faults_process import Ended, Process
from benchmarks.faults_row import Row, finished, one_line, refused, untouched
from siesta.rl.checkpoints import checkpoints

PLAIN = ["rl.save_total_limit=null", "evaluate.every=0", "tracking.samples=1"]
LOADED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "progress_0.pt")
# One process with sharded optimizer states, as `accelerate launch` with a file of recipes/accelerate asks for it.
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
}


def remove(file: Path, rng: Random) -> None:
    """The file is gone."""
    file.unlink()


# What a line may call it. A manifest vouches for the files and for itself; one of another length is changed, too.
DAMAGES: dict[str, tuple[Callable[[Path, Random], None], tuple[str, ...]]] = {
    "one bit changed": (flip, ("is changed", "is truncated or changed")),
    "cut off": (truncate, ("is truncated",)),
    "removed": (remove, ("is missing",)),
}


class Stage:
    """An undisturbed run of a recipe, and copies of it that were killed just before the end of RL."""

    def __init__(self, folder: Path, steps: int, *settings: str, sharded: bool = False):
        self.folder, self.steps, self.sharded = folder, steps, sharded
        self.arguments = ["smoke", "tracking.output_dir=.", *SETTINGS, *PLAIN, f"rl.max_steps={steps}", *settings]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ended = self.run("undisturbed")
        if ended.code != 0:
            raise RuntimeError(f"{folder}: exit code {ended.code}: {ended.err}")

    def start(self, name: str, *settings: str, inject: Callable[[], object] = lambda: None) -> Process:
        """Start the run `name`; `inject` as in `Process`."""

        def injected() -> None:
            os.environ.update(ZERO if self.sharded else {})
            inject()

        arguments = [*self.arguments, f"tracking.run={name}", *settings]
        return Process(arguments, self.folder, self.folder / f"{name}-printed", inject=injected)

    def run(self, name: str) -> Ended:
        """Start the run `name` and wait for its end."""
        return self.start(name).end()

    def copy(self, name: str) -> Path:
        """The run as a kill before the end of RL leaves it, as the run `name`."""
        run = self.folder / name
        shutil.copytree(self.folder / "undisturbed", run)
        text = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(text.replace("run: undisturbed", f"run: {name}"))
        unfinish(run, "rl")
        return run

    def unlike(self, name: str) -> list[str]:
        """What differs between the run `name` and the undisturbed one."""
        return differences(self.folder / name, self.folder / "undisturbed")

    def files(self) -> list[str]:
        """Names of all files of a checkpoint, its manifest among them."""
        newest = checkpoints(self.folder / "undisturbed" / "rl")[0]
        return sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())


def in_step(file: str, step: int) -> str:
    """A file's name in the checkpoint of a step: DeepSpeed's folder has it in its name."""
    return re.sub(r"^global_step\d+", f"global_step{step}", file)


def damage(stage: Stage, name: str, plan: list[tuple[str, str]], seed: int) -> list[tuple[str, str, list[str]]]:
    """Damage all checkpoints but the first of a copy, start it again and judge: file, damage, failures of each.

    Args:
        plan: File and damage for one checkpoint after the other.
    """
    rng = Random(seed)
    run = stage.copy(name)
    if len(plan) >= stage.steps:
        raise ValueError(f"{len(plan)} damages need {len(plan) + 1} checkpoints, there are {stage.steps}")
    found = checkpoints(run / "rl")[::-1]
    for checkpoint in found[len(plan) + 1 :]:
        shutil.rmtree(checkpoint)
    pairs = [
        (path, in_step(file, place), kind)
        for place, (path, (file, kind)) in enumerate(zip(found[1:], plan, strict=False), start=2)
    ]
    for checkpoint, file, kind in pairs:
        DAMAGES[kind][0](checkpoint / file, rng)
    ended = stage.run(name)
    lines = [line for line in ended.out.splitlines() if ": skipped, " in line]
    judged = []
    for checkpoint, file, kind in pairs:
        own = [line for line in lines if f"/{checkpoint.name}: skipped, " in line]
        failures = one_line(own, [f"skipped, {file} "])  # in that very checkpoint
        if own and not any(words in own[0] for words in DAMAGES[kind][1]):
            failures.append(f"not called by its name: {own[0]}")
        judged.append((re.sub(r"^global_step\d+", "global_stepN", file), kind, failures))
    whole = finished(ended) or stage.unlike(name)
    first = STEP.search(ended.out)
    if first is None or first.groups() != ("rl", "2"):
        whole.append(f"did not go on from checkpoint-1: {first and first.group()}")
    return [*judged, ("", "", whole)]


def damaged_files(
    stage: Stage, seeds: int, kinds: Sequence[str] = tuple(DAMAGES), starts: tuple[str, ...] = ("",)
) -> list[Row]:
    """A row for every file of a checkpoint, over several seeds of where it is damaged, and one for the runs after it.

    Args:
        starts: Of the names of the files that are damaged.
    """
    plan = [(file, kind) for file in stage.files() if file.startswith(starts) for kind in kinds]
    judged = [entry for seed in range(seeds) for entry in damage(stage, f"damaged-{seed}", plan, seed)]
    rows = []
    for file in dict.fromkeys(name for name, _, _ in judged):
        own = [failures for name, _, failures in judged if name == file]
        row = Row("files", f"`{file}`: {', '.join(kinds)}" if file else "the runs after all of these", len(own))
        row.lost = "steps since the older one" if file else "steps since checkpoint-1"
        row.message = "checkpoint-N: skipped, FILE is changed / truncated / missing" if file else "equal bit by bit"
        row.failures = [failure for failures in own for failure in failures]
        rows.append(row)
    return rows


def none_left(stage: Stage) -> Row:
    """Every checkpoint is damaged: the run does not start anew in silence."""
    run = stage.copy("none-left")
    for i, checkpoint in enumerate(checkpoints(run / "rl")):
        truncate(checkpoint / "model.safetensors", Random(i))
    ended = stage.run("none-left")
    failures = refused(ended, ["none-left/rl: none of its", "put one back from a copy, or delete"])
    told = ended.told[0].removeprefix("siesta: error: ") if ended.told else ""
    return Row("files", "all checkpoints damaged", lost="nothing more", message=told, failures=failures)


def gadgets(stage: Stage) -> list[Row]:
    """Code in the files that are unpickled, under a manifest that fits: refused unread."""
    rows = []
    for file in LOADED:
        name = f"gadget-{file.partition('.')[0]}"
        canary = stage.folder / f"canary-{name}"
        run = stage.copy(name)
        newest = run / "rl" / f"checkpoint-{stage.steps}"
        plant(newest / file, canary)
        resealed(newest)
        ended = stage.run(name)
        lines = [line for line in ended.out.splitlines() if ": skipped, " in line]
        failures = one_line(lines, [f"{newest.name}: skipped, {file} is refused: it would run"]) + finished(ended)
        failures += untouched(canary) + (stage.unlike(name) if ended.code == 0 else [])
        told = lines[0].partition("/rl/")[2] if lines else ""
        rows.append(Row("code from outside", f"a pickle that runs code as `{file}`", lost="1 step", message=told))
        rows[-1].failures = failures
    return rows


def sharded_files(folder: Path, seeds: int) -> list[Row]:
    """Rows of what DeepSpeed writes beside the files of transformers.

    Raises:
        RuntimeError: It has written no folder of its own: the rows would say nothing about it.
    """
    stage = Stage(folder, 16, "warmup.max_steps=2", sharded=True)
    if not any(name.startswith("global_step") for name in stage.files()):
        raise RuntimeError(f"{folder}: no global_step folder among {stage.files()}; was DeepSpeed used?")
    return damaged_files(stage, seeds, starts=("global_step", "latest", "zero_to"))
