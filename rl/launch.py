"""What the launcher asked for, what the processes really are, and an error where the two differ.

`accelerate launch` hands its file on as environment variables, and much of it can get lost without a word: two CPU
processes become one, FSDP on a CPU becomes plain data parallelism, processes that were not joined into a group train
one model each in the same folder. A run that is quieter than asked costs days, so it does not start.

What can be compared (accelerate 1.15): the number of processes (`WORLD_SIZE`, or what SLURM and MPI count; for a
launcher that starts one process where the file says several, only that it was several), DeepSpeed and its ZeRO stage
unless they come from a DeepSpeed file, FSDP and its version, mixed precision. `mixed_precision: no` is also what
`accelerate launch` says when it was not told, so it asks for nothing.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from transformers import Trainer, TrainingArguments

from siesta.data.errors import LaunchError

# How many processes there are, as torchrun, a SLURM step and the MPIs put it.
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """What the environment asks for.

    Args:
        processes: At least so many.
        source: The variable that says so.
        sharding: `ZeRO-2`, `FSDP2` and the like; `ZeRO`, `FSDP` if more is in a file; None if not asked.
        mixed_precision: `bf16`, `fp16`, `fp8`; None if not asked.
    """

    processes: int
    source: str
    sharding: str | None
    mixed_precision: str | None


def launch_of(environment: Mapping[str, str]) -> Launch:
    """Read the variables that launchers set."""
    counts = {name: int(environment[name]) for name in COUNTS if environment.get(name)}
    if "WORLD_SIZE" not in counts and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        # `accelerate launch` of a single process, with a meeting point for others: num_processes was above 1.
        counts["MASTER_ADDR"] = 2
    source = max(counts, key=lambda name: counts[name], default="")
    sharding = None
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        of_file = "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment
        sharding = "ZeRO" if of_file else f"ZeRO-{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    elif environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        sharding = f"FSDP{environment.get('FSDP_VERSION', '1')}"
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return Launch(counts.get(source, 1), source, sharding, None if precision == "no" else precision)


def check_processes(launch: Launch, processes: int, visible_gpus: int) -> None:
    """Compare the processes of the run with those that were asked for.

    Args:
        launch: What was asked for.
        processes: Of the process group.
        visible_gpus: That transformers would spread the batches of one process over; 0 or 1 if it would not.

    Raises:
        LaunchError: Some are missing, or one process would use several GPUs.
    """
    if processes < launch.processes:
        several = "several" if launch.source == "MASTER_ADDR" else str(launch.processes)
        raise LaunchError(
            f"launch: {launch.source} stands for {several} processes, this run has {processes}; on a CPU start them "
            "with `ACCELERATE_USE_CPU=true torchrun --nproc-per-node N -m siesta.rl.train`, on GPUs with a file of "
            f"recipes/accelerate, or for one process unset {launch.source} and set num_processes: 1"
        )
    if visible_gpus > 1:
        raise LaunchError(
            f"launch: one process sees {visible_gpus} GPUs and would split its batches over them; start a process a "
            "GPU (recipes/accelerate/ddp.yaml), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )


def sharding_of(accelerator: Accelerator) -> str:
    """What is in force: `ZeRO-2`, `FSDP2` and the like, `DDP` (whole copies), `none` for one process."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = cast(Any, accelerator.state.deepspeed_plugin)
        return f"ZeRO-{plugin.deepspeed_config['zero_optimization']['stage']}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP{cast(Any, accelerator.state.fsdp_plugin).fsdp_version}"
    return "DDP" if accelerator.num_processes > 1 else "none"


def check_sharding(launch: Launch, sharding: str, precision: str) -> None:
    """Compare sharding and mixed precision of a trainer with what was asked for.

    Raises:
        LaunchError: Something asked for is not in force.
    """
    asked = launch.sharding
    if asked is not None and not (sharding == asked or (asked in ("ZeRO", "FSDP") and sharding.startswith(asked))):
        raise LaunchError(
            f"launch: {asked} was asked for, {sharding} is in force; FSDP and ZeRO need GPUs that the processes can "
            "see (ZeRO also works on a CPU without ACCELERATE_USE_CPU)"
        )
    if launch.mixed_precision not in (None, precision):
        raise LaunchError(
            f"launch: mixed_precision {launch.mixed_precision} was asked for, {precision} is in force; let the file "
            "and bf16 or fp16 in the recipe's warmup: and rl: say the same"
        )


def world_line(args: TrainingArguments) -> str:
    """Check the processes of the run; the line that says how many, how they talk and on what.

    Args:
        args: Of a stage: making them has set up the process group. Collective: every rank calls this.

    Raises:
        LaunchError: See `check_processes`.
    """
    state = PartialState()
    check_processes(launch_of(os.environ), state.num_processes, args.n_gpu)
    device = cast(torch.device, state.device)
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    devices = Counter(gather_object([own]))
    backend = f" ({state.backend})" if state.backend else ""
    on = ", ".join(f"{count} x {name}" for name, count in devices.items())
    return f"launch: {state.num_processes} process(es){backend} on {on}"


def trainer_line(trainer: Trainer) -> str:
    """Check what a trainer's accelerator came to; the line that says it.

    Raises:
        LaunchError: See `check_sharding`.
    """
    sharding, precision = sharding_of(trainer.accelerator), trainer.accelerator.mixed_precision
    launch = launch_of(os.environ)
    if launch.sharding is None:  # a recipe has keys for it as well
        own = "ZeRO" if trainer.args.deepspeed else "FSDP" if trainer.args.fsdp else None
        launch = replace(launch, sharding=own)
    check_sharding(launch, sharding, precision)
    return f"sharding {sharding}, mixed precision {precision}"
