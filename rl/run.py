"""A run directory: where stages leave their results, and which of them are finished.

    outputs/<run>/recipe.yaml  model/  warmup/  rl/  evaluation.json  export/  report.md  metrics.jsonl
                  stages.json  data.json  cost.json

A stage that finished is skipped when the same recipe runs again. If the settings it depends on have changed since, the
run stops and says so: silently keeping the old result, or throwing it away, would both be a surprise. The same holds
when a file of a model that a finished stage has left is not the one that it was: each such folder has a manifest.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState

from siesta.data.errors import CheckpointError, RecipeError
from siesta.rl import checkpoints
from siesta.rl.cost import charged
from siesta.rl.recipe import Recipe, dump_recipe
from siesta.rl.resumable import agreed

# The sections each stage depends on, itself and by way of the stages before it.
DEPENDS = {
    "model": ("seed", "model", "modes", "sleep"),
    "warmup": ("data", "warmup"),
    "rl": ("rl",),
    "evaluate": ("evaluate",),
    "export": ("export",),
    "report": (),
}
MODELS = ("model", "warmup", "rl")  # stages that leave a model in a folder of their name


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


class Run:
    """The directory of a run and the record of its finished stages."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.path = recipe.run_dir
        self.record = self.path / "stages.json"
        self._intact: set[str] = set()  # stages whose models are known to be what they were

    def prepare(self) -> None:
        """Make the directory and write the resolved recipe into it.

        Raises:
            RecipeError: That is not possible: a file is in the way, the disk cannot be written.
        """
        agreed(self._make)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "recipe.yaml", dump_recipe(self.recipe))
        except OSError as error:
            raise RecipeError(
                f"tracking.output_dir: the run directory {self.path} cannot be written: {error.strerror}"
            ) from error

    def finished(self) -> dict[str, dict[str, str]]:
        """Finished stages with the fingerprints of the sections they were made from."""
        return self._read("stages.json")

    def _read(self, name: str) -> dict[str, dict[str, str]]:
        file = self.path / name
        try:
            return json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            raise CheckpointError(
                f"{file}: damaged; put it back from a copy, or delete {self.path} to make the run again"
            ) from error

    def check_models(self) -> None:
        """Hash what finished stages have left, once in a process; a run of before the manifests is taken as it is.

        Raises:
            CheckpointError: A file is missing, truncated or changed.
        """
        for stage in MODELS:
            folder = self.path / stage
            if stage in self._intact or stage not in self.finished() or not (folder / checkpoints.MANIFEST).exists():
                continue
            try:
                checkpoints.check_intact(folder)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{folder}: {error}; put it back from a copy, or delete {self.path} to make the run again"
                ) from error
            self._intact.add(stage)

    def prints(self, stage: str) -> dict[str, str]:
        """Fingerprint of every section that `stage` depends on."""
        content = self.recipe.model_dump(mode="json")
        names = list(DEPENDS)
        sections = [section for name in names[: names.index(stage) + 1] for section in DEPENDS[name]]
        return {
            name: hashlib.sha256(json.dumps(content[name], sort_keys=True).encode()).hexdigest() for name in sections
        }

    def check(self) -> None:
        """Refuse to continue a run whose finished stages were made with other settings.

        Raises:
            RecipeError: Names the stage and the section that changed.
        """
        # A stage that was interrupted goes on from its checkpoint, so that counts as well; without one it starts anew.
        begun = self._read("started.json").items()
        resumable = {stage: prints for stage, prints in begun if any((self.path / stage).glob("checkpoint-*"))}
        for stage, made_from in (self.finished() | resumable).items():
            changed = [name for name, value in self.prints(stage).items() if made_from.get(name) != value]
            if changed:
                raise RecipeError(
                    f"{self.path}: stage {stage!r} was made with another {' and '.join(changed)!s}; give this run a "
                    f"name of its own (tracking.run=...) or delete {self.path} to make it again"
                )

    def stage(self, name: str, work: Callable[[], None]) -> bool:
        """Do `work` unless the stage is finished; record it. True if it was done now.

        Raises:
            CheckpointError: What an earlier stage has left is damaged.
        """
        if name in self.finished():
            return False
        # What a stage leaves when it is interrupted (checkpoints) was made with these settings, too.
        agreed(self.check_models)
        if PartialState().is_main_process:
            write_atomically(self.path / "started.json", json.dumps({name: self.prints(name)}) + "\n")
        with charged(self.path, name, write_atomically) if PartialState().is_main_process else nullcontext():
            work()
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            if name in MODELS and (self.path / name).is_dir():
                checkpoints.vouch(self.path / name)
                self._intact.add(name)
            write_atomically(self.record, json.dumps(self.finished() | {name: self.prints(name)}, indent=1) + "\n")
        PartialState().wait_for_everyone()
        return True
