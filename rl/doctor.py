"""What this machine has, what a run on it will use, and what is missing: `siesta doctor`.

Nothing is downloaded and no server is asked. Exit code 1: a package that siesta needs is missing or too old.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from siesta.data.errors import RecipeError
from siesta.rl.attention import choose_backend
from siesta.rl.console import quiet_libraries
from siesta.rl.machine import check_engine
from siesta.rl.precision import default_device, mixed_by_default
from siesta.rl.tracking import has_wandb_key

GIB = 2**30
NAME = "siesta-rl"
DEVELOPERS = "dev"  # the extra that only those who change siesta need
GOOD, ABSENT, WRONG = "ok", "-", "missing"


@dataclass(frozen=True)
class Finding:
    """A line of the table: GOOD, ABSENT (something optional is not there) or WRONG."""

    topic: str
    state: str
    text: str


def packages(requirements: Sequence[str], versions: dict[str, str]) -> Iterator[Finding]:
    """The packages of siesta's own metadata against what is installed.

    Args:
        requirements: As in `importlib.metadata.requires`; those of an extra are optional.
        versions: Canonical name -> version of what is installed.
    """
    for requirement in map(Requirement, requirements):
        extra = next((value for value in _extras(requirement) if value != DEVELOPERS), None)
        if extra is None and requirement.marker is not None:
            continue
        found = versions.get(canonicalize_name(requirement.name))
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            yield Finding("package", GOOD, f"{requirement.name} {found}")
            continue
        what = "is not installed" if found is None else f"{found} is installed, {requirement.specifier} is needed"
        target = f"'{NAME}[{extra}]'" if extra else f"'{requirement}'"
        state = ABSENT if extra and found is None else WRONG
        yield Finding("package", state, f"{requirement.name} {what}: pip install {target}")


def _extras(requirement: Requirement) -> Iterator[str]:
    """Extras that a requirement belongs to, read off its marker."""
    if requirement.marker is not None:
        names = importlib.metadata.metadata(NAME).get_all("Provides-Extra") or []
        yield from (name for name in names if requirement.marker.evaluate({"extra": name}))


def machine() -> Iterator[Finding]:
    """Processor, memory, GPUs and disk."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    yield Finding("machine", GOOD, f"{cores} cores, {memory.total / GIB:.0f} GiB of memory, {platform.platform()}")
    for number in range(torch.cuda.device_count()):
        own = torch.cuda.get_device_properties(number)
        text = f"GPU {number}: {own.name}, {own.total_memory / GIB:.0f} GiB, capability {own.major}.{own.minor}"
        yield Finding("machine", GOOD, text)
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        yield Finding("machine", ABSENT, f"no GPU ({why}): training and evaluation run on the CPU")
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield Finding("machine", GOOD, f"{free:.0f} GiB free on the disk of this folder, where outputs/ goes")


def use() -> Iterator[Finding]:
    """What a run will use here."""
    device, gpus = default_device(), torch.cuda.device_count()
    dtype = torch.bfloat16 if mixed_by_default() else torch.float32
    yield Finding("training", GOOD, f"on {device}, computing in {str(dtype).removeprefix('torch.')}")
    yield Finding("training", GOOD, choose_backend("auto", device, dtype)[1])
    launch = "cpu.yaml" if gpus == 0 else "ddp.yaml, or zero2.yaml, zero3.yaml, fsdp2.yaml for larger models"
    launcher = "siesta train RECIPE" if gpus == 1 else f"accelerate launch --config_file recipes/accelerate/{launch}"
    yield Finding("training", GOOD, launcher)
    try:
        check_engine("rl.use_vllm", "use_vllm: false")
        yield Finding("rollouts", GOOD, "vLLM can be used: rl.use_vllm=true rl.vllm_mode=colocate")
    except RecipeError as error:
        yield Finding("rollouts", ABSENT, f"by generate; {error}")
    wandb = (
        "online, a key was found" if has_wandb_key() else "no key: offline files in the run directory (wandb login)"
    )
    yield Finding("tracking", GOOD, f"wandb {wandb}; metrics.jsonl always")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    yield Finding("hub", GOOD, "HF_HUB_OFFLINE is set: only what is cached can be loaded" if offline else "online")


def findings() -> list[Finding]:
    """All that there is to say."""
    versions: dict[str, str] = {canonicalize_name(own.name): own.version for own in importlib.metadata.distributions()}
    requirements = importlib.metadata.requires(NAME) or []
    python = Finding("python", GOOD, f"{platform.python_version()} ({sys.executable}), {NAME} {versions[NAME]}")
    return [python, *machine(), *use(), *packages(requirements, versions)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="siesta doctor", description="What this machine has, and what is missing.")
    parser.parse_args(arguments)
    quiet_libraries()
    found = findings()
    table = Table(box=None, show_header=False, pad_edge=False)
    colours = {GOOD: "green", ABSENT: "yellow", WRONG: "red"}
    before = ""
    for own in found:
        table.add_row(
            own.topic if own.topic != before else "", f"[{colours[own.state]}]{own.state}[/]", escape(own.text)
        )
        before = own.topic
    Console(highlight=False).print(table)
    return int(any(own.state == WRONG for own in found))
