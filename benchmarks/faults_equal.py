"""Are two runs the same, bit by bit, apart from what a clock says?"""

import json
from pathlib import Path
from typing import Any

import torch

from siesta.rl.checkpoints import MANIFEST, checkpoints

# Names of metrics that a clock decides, or that are about the steps of one process alone (transformers' summary).
CLOCKS = ("time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "train_loss")
CLOCK_GROUPS = ("time/", "speed/")
WEIGHTS = ("warmup/model.safetensors", "rl/model.safetensors", "export/model.safetensors")
# Compared by content without clocks; `training_args.bin` names the folder of the run.
BY_CONTENT = ("trainer_state.json", "progress_0.pt")
NOT_COMPARED = (MANIFEST, "training_args.bin")


def without_clocks(content: Any) -> Any:
    """Nested containers without the entries that a clock decides, tensors as lists."""
    if isinstance(content, dict):
        return {
            key: without_clocks(value)
            for key, value in content.items()
            if not (isinstance(key, str) and (key in CLOCKS or key.startswith(CLOCK_GROUPS)))
        }
    if isinstance(content, list | tuple):
        return [without_clocks(value) for value in content]
    return content.tolist() if isinstance(content, torch.Tensor) else content


def read_rows(file: Path) -> list[dict]:
    """Rows of a .jsonl file. Raises ValueError where a line is torn."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def read_content(file: Path) -> Any:
    """A file of `BY_CONTENT`."""
    content = json.loads(file.read_text()) if file.suffix == ".json" else torch.load(file, weights_only=True)
    return without_clocks(content)


def same_checkpoint(one: Path, other: Path) -> list[str]:
    """What differs between two checkpoints: weights, optimizer, schedule, generators, progress."""
    names = {str(file.relative_to(end)) for end in (one, other) for file in end.rglob("*") if file.is_file()}
    found = []
    for name in sorted(names - set(NOT_COMPARED)):
        read = read_content if name in BY_CONTENT else Path.read_bytes
        if not (one / name).exists() or not (other / name).exists() or read(one / name) != read(other / name):
            found.append(f"{one.parent.name}/{one.name}/{name} differs")
    return found


def differences(run: Path, reference: Path, stages: tuple[str, ...] = ("warmup", "rl")) -> list[str]:
    """What differs between a run and the undisturbed one, a line each; none if they are equal bit by bit.

    Weights of every stage, the last checkpoint of every stage, rows of metrics.jsonl, prompts and rollouts of
    samples.jsonl in their order, the evaluation.
    """
    found = []
    for name in (*WEIGHTS, "evaluation.json"):
        files = [folder / name for folder in (run, reference)]
        if files[1].exists() and (not files[0].exists() or files[0].read_bytes() != files[1].read_bytes()):
            found.append(f"{name} differs")
    for stage in stages:
        own, other = (next(iter(checkpoints(folder / stage)), None) for folder in (run, reference))
        if own is None or other is None or own.name != other.name:
            found.append(f"{stage}: its last checkpoint is {own and own.name}, not {other and other.name}")
        else:
            found += same_checkpoint(own, other)
    for name in ("metrics.jsonl", "samples.jsonl"):
        own, other = (without_clocks(read_rows(folder / name)) for folder in (run, reference))
        unlike = [
            f"{name}, row {i}: {_unlike(a, b)}" for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b
        ]
        found += unlike[:3]
        if len(own) != len(other):
            found.append(f"{name} has {len(own)} rows, not {len(other)}")
    return found


def _unlike(own: dict, other: dict) -> str:
    names = [name for name in own | other if own.get(name) != other.get(name)]
    return f"step {own.get('step')}, {', '.join(names[:3])} differ"
