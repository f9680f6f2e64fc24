"""Small ways to break things, shared by the table of faults and by tests."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from siesta.rl.checkpoints import UNFINISHED, seal


def flip(file: Path, rng: Random | None = None) -> None:
    """Change one bit: at a random place, or in the middle."""
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content)) if rng is not None else 8 * (len(content) // 2)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(file: Path, rng: Random | None = None) -> None:
    """Cut the end off: at a random place, or one byte."""
    size = file.stat().st_size
    os.truncate(file, rng.randrange(size) if rng is not None else size - 1)


class Gadget:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def plant(file: Path, canary: Path, *, raw: bool = False) -> None:
    """Put a gadget in the place of a file, as torch writes files, or as a plain pickle."""
    if raw:
        file.write_bytes(pickle.dumps(Gadget(canary), protocol=2))
    else:
        torch.save(Gadget(canary), file)


def resealed(checkpoint: Path) -> Path:
    """Somebody who can change a file can write a manifest that fits."""
    unfinished = checkpoint.parent / UNFINISHED / checkpoint.name
    unfinished.parent.mkdir()
    checkpoint.rename(unfinished)
    seal(unfinished, checkpoint, 1)
    return checkpoint


def unfinish(run: Path, stage: str) -> None:
    """A run as if killed in a stage: nothing of it but checkpoints, and nothing of later ones."""
    record = json.loads((run / "stages.json").read_text())
    names = list(record)
    stages = {name: record[name] for name in names[: names.index(stage)]}
    (run / "stages.json").write_text(json.dumps(stages))
    (run / "started.json").write_text(json.dumps({stage: record[stage]}))
    for name in ("evaluation.json", "report.md", f"{stage}/model.safetensors"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "export", ignore_errors=True)


def at_call(number: int, function: Callable, strike: Callable) -> Callable:
    """`function`, which at its n-th call strikes instead."""
    calls = iter(range(1, 10**6))

    def called(*args: Any, **kwargs: Any) -> Any:
        return strike() if next(calls) == number else function(*args, **kwargs)

    return called


def raiser(error: Exception) -> Callable[[], None]:
    """A function that raises `error`."""

    def strike() -> None:
        raise error

    return strike
