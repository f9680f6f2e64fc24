"""Checkpoint folders that are whole or not there, and how the newest one that is intact is found.

A checkpoint is written into `unfinished/checkpoint-N`, which nothing takes for a checkpoint. When all its files are on
the disk, `seal` lists their sizes and sha256 in `manifest.json` and renames the folder to `checkpoint-N`: a folder of
that name was complete when it got it, and the manifest tells whether it still is. Before a checkpoint is resumed from
every byte is hashed, and pickles that hold anything but data are refused unread.

`siesta.rl.resumable` is what trainers write and read by these functions.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import safe_globals

from siesta.data.errors import CheckpointError

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
PROGRESS = "progress_{rank}.pt"  # of each rank; see `siesta.rl.resumable`
HASHERS = 8  # threads; hashing releases the interpreter
ROOM = 1.2  # free space a save asks for, in sizes of a checkpoint
# What is unpickled on resume, DeepSpeed's states among it, and the plain records that those hold beside tensors.
PICKLES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "progress_*.pt", "global_step*/*.pt")
RECORDS = {
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
}
# A full disk in the words of those who write: safetensors, torch's older format, and its zip writer, which counts.
FULL = ("No space left on device", "Disk quota exceeded", "unexpected pos", "PytorchStreamWriter failed writing")


def step_of(checkpoint: Path) -> int | None:
    """N of a folder named `checkpoint-N`; None for any other."""
    prefix, _, number = checkpoint.name.partition("-")
    return int(number) if prefix == "checkpoint" and number.isdecimal() and checkpoint.is_dir() else None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a stage's folder, intact or not, newest first."""
    steps = {path: step_of(path) for path in folder.iterdir()} if folder.is_dir() else {}
    found = {path: step for path, step in steps.items() if step is not None}
    return sorted(found, key=lambda path: found[path], reverse=True)


# ---- writing -------------------------------------------------------------------------------------------------------


def seal(unfinished: Path, target: Path, processes: int) -> None:
    """Bring all files of a folder to the disk, list them in its manifest and move it to its place.

    Args:
        target: What lies there has been found damaged (see `newest_intact`) and goes away.
        processes: That wrote it.

    Raises:
        OSError: Nothing has been moved.
    """
    _write_manifest(unfinished, sorted(_files(unfinished)), processes)
    for path in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
        _sync(path)
    if target.exists():
        target.rename(unfinished.parent / "damaged")
    unfinished.rename(target)
    _sync(target.parent)
    shutil.rmtree(unfinished.parent)


def vouch(folder: Path) -> None:
    """Write a manifest of the files in a folder, not of those in folders below: `check_intact` goes by it."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    _write_manifest(folder, names, 1)


def _write_manifest(folder: Path, names: list[str], processes: int) -> None:
    """List files with size and sha256; they and the manifest are on the disk afterwards."""
    with ThreadPoolExecutor(HASHERS) as pool:
        entries = list(pool.map(lambda name: _entry(folder / name, sync=True), names))
    content = {"processes": processes, "files": dict(zip(names, entries, strict=True))}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"content": content, "sha256": _digest(content)}, indent=1))
    _sync(manifest)


def _files(folder: Path) -> Iterator[str]:
    """Names of all files below, as the manifest has them."""
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _entry(file: Path, *, sync: bool = False) -> dict[str, int | str]:
    """Size and hash of a file; `sync` brings it to the disk first."""
    with file.open("rb") as content:
        if sync:
            os.fsync(content.fileno())
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return {"bytes": content.tell(), "sha256": digest}


def _digest(content: dict) -> str:
    """Of the manifest itself: a manifest that has changed would blame the files."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder: Path, newest: Path, limit: int | None) -> None:
    """Remove checkpoints until `limit` are left; `newest`, just sealed, always stays.

    Those of later steps go first: they are what this run could not resume from. Each leaves its place in one move, so
    that a kill leaves no half of one there.
    """
    others = [path for path in checkpoints(folder) if path != newest]
    later = [path for path in others if (step_of(path) or 0) > (step_of(newest) or 0)]
    kept = [path for path in others if path not in later] + later
    for path in kept[limit - 1 :] if limit is not None and limit > 0 else ():
        going = folder / UNFINISHED
        going.mkdir(exist_ok=True)
        path.rename(going / path.name)
        shutil.rmtree(going)


def lacking_room(folder: Path, size: float) -> str | None:
    """Why a checkpoint of `size` bytes should not be begun, or None if `ROOM` times that is free."""
    free = shutil.disk_usage(folder).free
    if free >= ROOM * size:
        return None
    return f"{free / 2**30:.2f} GiB are free and {ROOM * size / 2**30:.2f} GiB are needed ({ROOM} x its size)"


def disk_full(error: BaseException) -> bool:
    """Whether `error`, raised by a write, says that the disk or a quota is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, OSError | RuntimeError | SafetensorError) and any(text in str(error) for text in FULL)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_manifest(checkpoint: Path) -> dict:
    """`processes` that wrote a checkpoint, and `files`: name to `bytes` and `sha256`.

    Raises:
        CheckpointError: Without it, or with another than was written, nothing vouches for the folder.
    """
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{MANIFEST} is missing: not written to its end, or by a version without manifests")
    try:
        manifest = json.loads(file.read_text())
        content, digest = manifest["content"], manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is truncated or changed") from error
    if _digest(content) != digest:
        raise CheckpointError(f"{MANIFEST} is changed")
    return content


def check_intact(checkpoint: Path) -> None:
    """Raises CheckpointError with the first file that is missing, truncated, changed or holds more than data."""
    files = read_manifest(checkpoint)["files"]
    for name, entry in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "changed"
            raise CheckpointError(f"{name} is {kind}: {size} bytes instead of {entry['bytes']}")
    with ThreadPoolExecutor(HASHERS) as pool:
        for name, found in zip(files, pool.map(lambda name: _entry(checkpoint / name), files), strict=True):
            if found["sha256"] != files[name]["sha256"]:
                raise CheckpointError(f"{name} is changed: its sha256 is not that of {MANIFEST}")
    for pattern in PICKLES:
        for file in sorted(checkpoint.glob(pattern)):
            _check_pickle(file)


def _check_pickle(file: Path) -> None:
    """Raises CheckpointError if a file of torch.save names anything that is not data; the file is not unpickled."""
    try:
        with safe_globals():  # of numpy, as transformers allows them
            names = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))) - RECORDS
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file.name} is no file of torch.save") from error
    if names:
        raise CheckpointError(f"{file.name} is refused: it would run {', '.join(sorted(names))} when it is loaded")


def size_of(checkpoint: Path) -> int:
    """Bytes of all files below."""
    return sum((checkpoint / name).stat().st_size for name in _files(checkpoint))


def newest_intact(folder: Path, processes: int, say: Callable[[str], None]) -> Path | None:
    """Where a stage goes on: its newest checkpoint with every byte in place, None if it has no checkpoints.

    Args:
        folder: Of the stage. What a save that was killed has left in it is removed.
        processes: Of this run.
        say: Gets a line for what is removed and for each checkpoint that is skipped.

    Raises:
        CheckpointError: There are checkpoints and none is intact, or it was written by another number of processes, or
            without what a training goes on with.
    """
    left = folder / UNFINISHED
    if left.exists():
        say(f"{left}: removed, a save was interrupted: {', '.join(sorted(path.name for path in left.iterdir()))}")
        shutil.rmtree(left)
    found = checkpoints(folder)
    for checkpoint in found:
        try:
            check_intact(checkpoint)
        except CheckpointError as error:
            say(f"{checkpoint}: skipped, {error}")
            continue
        manifest = read_manifest(checkpoint)
        if PROGRESS.format(rank=0) not in manifest["files"]:
            raise CheckpointError(
                f"{checkpoint}: holds weights alone (save_only_model), and training cannot go on from these; delete "
                f"{folder} to start the stage anew"
            )
        wrote = manifest["processes"]
        if wrote != processes:
            raise CheckpointError(
                f"{checkpoint}: written by {wrote} process(es), this run has {processes}; launch {wrote}, or delete "
                f"{folder} to start the stage anew"
            )
        return checkpoint
    if found:
        raise CheckpointError(
            f"{folder}: none of its {len(found)} checkpoint(s) is intact; put one back from a copy, or delete "
            f"{folder} to start the stage anew"
        )
    return None
