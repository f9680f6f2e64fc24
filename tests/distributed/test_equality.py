"""Two processes take the step of one: uneven lengths, uneven modes, another split into passes, shared prompts."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from siesta.rl.checkpoints import check_intact, read_manifest
from tests.helpers import parameters, save_tiny_model, tiny_model

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


def launched(folder: Path, name: str, budget: int, launcher: list[str], *options: str) -> tuple[torch.Tensor, str]:
    """The weights after training, and what kind of training the processes say it was."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if "accelerate.commands.launch" not in launcher:  # its own setting; beside it this one turns DeepSpeed off
        environment["ACCELERATE_USE_CPU"] = "true"
    script = ["-m", "tests.distributed.train_tiny", str(folder), name, str(budget), *options]
    done = subprocess.run(  # much time: DeepSpeed compiles an extension when it is used for the first time
        [*launcher, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / f"{name}.pt", weights_only=True), done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and as `alone.pt` what one process makes of it in one pass a step."""
    folder = tmp_path_factory.mktemp("equality")
    save_tiny_model(folder / "model")
    weights, kind = launched(folder, "alone", 100_000, [sys.executable])
    assert kind == "NO 1"
    assert (weights - parameters(tiny_model())).abs().max() > 1e-2
    return folder


def assert_as_alone(folder: Path, weights: torch.Tensor) -> None:
    """Adam divides by the root of tiny second moments, which magnifies rounding; weights are of order 1."""
    alone = torch.load(folder / "alone.pt", weights_only=True)
    torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)


def assert_goes_on(folder: Path, name: str, launcher: list[str], weights: torch.Tensor) -> None:
    """Both ranks' part of the checkpoint after two of three steps is sealed, and leads to `weights` bit by bit."""
    checkpoint = folder / name / "checkpoint-2"
    check_intact(checkpoint)
    files = read_manifest(checkpoint)["files"]
    assert {f"{kind}_{rank}.{end}" for kind, end in (("rng_state", "pth"), ("progress", "pt")) for rank in (0, 1)} <= {
        *files
    }
    shutil.rmtree(folder / name / "checkpoint-3")
    resumed, _ = launched(folder, name, 60, launcher, "save", "resume")
    assert torch.equal(resumed, weights)


def test_two_ddp_processes_take_the_same_steps_as_one_and_go_on_from_a_checkpoint(folder: Path) -> None:
    weights, kind = launched(folder, "ddp", 60, TORCHRUN, "save")
    assert kind == "MULTI_CPU 2"
    assert_as_alone(folder, weights)
    assert_goes_on(folder, "ddp", TORCHRUN, weights)


def test_two_ddp_processes_that_share_prompts_take_the_same_steps_as_one_that_does_not(folder: Path) -> None:
    """Groups are gathered from both, and those that do not fit into 60 tokens are cut."""
    weights, kind = launched(folder, "shared", 60, TORCHRUN, "share")
    assert kind == "MULTI_CPU 2"
    assert_as_alone(folder, weights)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: DeepSpeed compiles an extension")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_zero_processes_take_the_same_steps_as_one_and_go_on(folder: Path, stage: int) -> None:
    file = folder / f"zero{stage}.yaml"
    file.write_text(LAUNCH.format(stage=stage, init=str(stage == 3).lower()))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    weights, kind = launched(folder, f"zero{stage}", 60, accelerate, "save")
    assert kind == "DEEPSPEED 2"
    assert_as_alone(folder, weights)
    assert_goes_on(folder, f"zero{stage}", accelerate, weights)
