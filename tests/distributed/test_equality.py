"""Two processes take the steps of one and go on from a checkpoint bit by bit: DDP, FSDP2, ZeRO-1 to 3.

A launch costs many times what it does, so that every case of a kind of sharding is in one (`train_tiny`), and so is
going on from its checkpoints, in forked processes.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from siesta.rl.checkpoints import check_intact, read_manifest
from tests.distributed import fsdp_on_cpu
from tests.distributed.lost_rank import free_port
from tests.distributed.train_tiny import RESUMED, STEPS
from tests.helpers import parameters, save_tiny_model, tiny_model
from tests.test_checkpoints import without_clock
from tests.test_sleep_trainer import save_embedded, uneven_judge

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LAUNCH = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{zero_stage: {stage}, zero3_init_flag: {init}, gradient_clipping: 1.0e+9,
  offload_optimizer_device: none, offload_param_device: none, deepspeed_multinode_launcher: standard}}
num_machines: 1
num_processes: 2
mixed_precision: 'no'
use_cpu: true
main_process_port: 0
"""
needs_deepspeed = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: DeepSpeed compiles an extension"),
]
KINDS = ["ddp", "fsdp2", *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3))]


def launch(folder: Path, name: str, launcher: list[str], *options: str) -> dict[str, Any]:
    """Start `train_tiny`; what it writes of the trainings: case -> outcome."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if "accelerate.commands.launch" not in launcher:  # its own setting; beside it this one turns DeepSpeed off
        environment |= {"ACCELERATE_USE_CPU": "true"} | (fsdp_on_cpu.ENVIRONMENT if name == "fsdp2" else {})
    script = ["-m", "tests.distributed.train_tiny", str(folder), name, *options]
    done = subprocess.run(  # much time: DeepSpeed compiles an extension when it is used for the first time
        [*launcher, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return outcomes_of(folder, name)


def outcomes_of(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def launcher(folder: Path, kind: str) -> list[str]:
    """The command that starts two processes."""
    if kind in ("ddp", "fsdp2"):
        return TORCHRUN
    file = folder / f"{kind}.yaml"
    file.write_text(LAUNCH.format(stage=kind[-1], init=str(kind == "zero3").lower()))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    save_tiny_model(folder / "model")
    save_embedded(folder / "embedded" / "model", uneven_judge())
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process makes of the model, in one pass a step."""
    outcomes = launch(folder, "alone", [sys.executable])
    assert outcomes["kind"] == "NO 1"
    for case in STEPS:
        assert (outcomes[case]["weights"] - parameters(tiny_model())).abs().max() > 1e-3, case
    return outcomes


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def several(folder: Path, kind: str) -> dict[str, Any]:
    """What two make of it."""
    outcomes = launch(folder, kind, launcher(folder, kind), str(free_port()))
    assert outcomes["kind"] == {"ddp": "MULTI_CPU 2", "fsdp2": "FSDP 2"}.get(kind, "DEEPSPEED 2")
    return outcomes


def test_two_processes_take_the_steps_of_one(alone: dict[str, Any], several: dict[str, Any]) -> None:
    """Weights are of order 1. Adam divides by the root of tiny second moments, which magnifies rounding; so gradients,
    up to 7, are those of equal weights in the first step alone.
    """
    for case in STEPS:
        one, two = alone[case], several[case]
        torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6, msg=case)
        losses = [torch.tensor([row["loss"] for row in run["logs"] if "loss" in row]) for run in (one, two)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0, msg=case)
        assert len(losses[0]) == len(one["gradients"]) == len(two["gradients"])
        for step, (gradient, own) in enumerate(zip(one["gradients"], two["gradients"], strict=True)):
            assert gradient.abs().max() > 0.1
            torch.testing.assert_close(own, gradient, rtol=0, atol=1e-5 if step else 1e-6, msg=f"{case}, {step}")


def test_the_cases_are_what_they_are_called(alone: dict[str, Any], several: dict[str, Any]) -> None:
    first = {case: alone[case]["logs"][0] for case in STEPS}
    assert first["uneven"]["mode/think/share"] == 4 / 16
    assert first["uneven"]["completions/min_length"] < first["uneven"]["completions/max_length"]
    # Three of four micro-batches of three steps, all of rank 1 among them.
    assert several["empty"]["empty"] == [3, 6]
    assert not any(sum(several[case]["empty"]) for case in STEPS if case != "empty")
    gradients = [alone[case]["gradients"][0] for case in ("uneven", "empty", "reused")]
    assert (gradients[0] - gradients[1]).abs().max() > 0.1, "negative control: other rollouts, another gradient"
    assert (gradients[0] - gradients[2]).abs().max() > 0.1, "negative control"


def test_a_resumed_run_is_the_undisturbed_one_bit_by_bit(folder: Path, kind: str, several: dict[str, Any]) -> None:
    """Weights, logs, and the rows of each rank, from a checkpoint in the middle of six steps."""
    resumed = outcomes_of(folder, f"{kind}-resume")
    for case in RESUMED:
        checkpoint = folder / kind / case / "checkpoint-3"
        check_intact(checkpoint)
        parts = {f"{part}_{rank}.{end}" for part, end in (("rng_state", "pth"), ("progress", "pt")) for rank in (0, 1)}
        assert parts <= {*read_manifest(checkpoint)["files"]}, case
        one, two = several[case], resumed[case]
        assert torch.equal(two["weights"], one["weights"]), case
        rows = [without_clock(run["logs"])[:-1] for run in (one, two)]  # the last one is of the end
        assert rows[1] == rows[0], case
        assert len(rows[0]) == 3
        later = [[entry for entry in rank if entry[0] >= 3] for rank in one["prompts"]]
        assert two["prompts"] == later, case
        assert all(later), case


def test_every_epoch_of_a_warmup_shows_every_row_once(several: dict[str, Any]) -> None:
    """On two ranks, of which one draws numbers that the other one does not; two steps are an epoch."""
    for case in ("warmup", "sorted warmup"):
        epochs = [
            [row for rank in several[case]["prompts"] for step, rows in rank if step // 2 == epoch for row in rows]
            for epoch in range(3)
        ]
        assert [len(set(rows)) for rows in epochs] == [len(rows) for rows in epochs] == [8, 8, 8], case
        assert epochs[0] != epochs[1] != epochs[2], case
