"""Launch files as accelerate reads them, and launches that are not what they were asked to be."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from siesta.data.errors import LaunchError
from siesta.rl.launch import Launch, check_processes, check_sharding, launch_of, sharding_of, trainer_line
from siesta.rl.train import main

FOLDER = Path(__file__).parents[1] / "recipes" / "accelerate"
FILES = {
    "cpu": (DistributedType.NO, None, None),
    "gpu": (DistributedType.NO, None, "bf16"),
    "ddp": (DistributedType.MULTI_GPU, None, "bf16"),
    "zero1": (DistributedType.DEEPSPEED, "ZeRO-1", "bf16"),
    "zero2": (DistributedType.DEEPSPEED, "ZeRO-2", "bf16"),
    "zero3": (DistributedType.DEEPSPEED, "ZeRO-3", "bf16"),
    "fsdp2": (DistributedType.FSDP, "FSDP2", "bf16"),
    "multinode": (DistributedType.MULTI_GPU, None, "bf16"),
}


def launched(file: Path, *flags: str) -> dict[str, str]:
    """The environment that `accelerate launch` of this file would hand on; torchrun adds WORLD_SIZE to it."""
    flags = ("--main_process_port", "0", *flags)  # a port that is free here
    parsed: Any = launch_command_parser().parse_args(["--config_file", str(file), *flags, "-m", "siesta.rl.train"])
    parsed, _, _ = _validate_launch_command(parsed)
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(parsed)[1]
    if parsed.use_fsdp or parsed.multi_gpu:
        return prepare_multi_gpu_env(parsed)
    return prepare_simple_launcher_cmd_env(parsed)[1]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what a launcher of these tests has set."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_", "SLURM_", "PMI_", "OMPI_", "MV2_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# ---- files ---------------------------------------------------------------------------------------------------------


def test_every_launch_file_is_known_here() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("bare")
def test_a_launch_file_says_what_it_is_for(name: str) -> None:
    kind, sharding, precision = FILES[name]
    file = FOLDER / f"{name}.yaml"
    assert load_config_from_file(str(file)).distributed_type == kind
    launch = launch_of(launched(file))
    assert (launch.sharding, launch.mixed_precision) == (sharding, precision)
    assert launch.processes == 1, "a file of one process promises no more; of the others torchrun counts them"
    assert file.read_text().startswith("# ")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("kind", ["'NO'", "MULTI_CPU"])
def test_a_file_of_two_cpu_processes_that_starts_one_is_found_out(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "two.yaml"
    text = (FOLDER / "cpu.yaml").read_text()
    file.write_text(text.replace("num_processes: 1", "num_processes: 2").replace("'NO'", kind))
    launch = launch_of(launched(file))
    assert (launch.processes, launch.source) == (2, "MASTER_ADDR")
    with pytest.raises(LaunchError, match="MASTER_ADDR stands for several processes, this run has 1"):
        check_processes(launch, 1, 0)


def test_the_slurm_template_starts_a_launcher_on_every_node(tmp_path: Path) -> None:
    """With stand-ins for the commands that are not here; the launcher prints what it was given."""
    stubs = {
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "scontrol": "echo node7; echo node8",
        "accelerate": 'echo "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "40001", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    slurm |= {"SLURM_GPUS_PER_NODE": "h100:8", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / "slurm.sbatch"), "hop", "rl.tau=0.3", "data.columns={query: q}"]
    done = subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        launcher = line.split()
        assert launcher.pop(0) == "launch"
        parsed: Any = launch_command_parser().parse_args(launcher)
        assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, rank)
        assert (parsed.main_process_ip, parsed.main_process_port, parsed.same_network) == ("node7", 20001, True)
        assert Path(parsed.config_file).name == "multinode.yaml"
        assert parsed.training_script == "siesta.rl.train"
        assert line.endswith("hop rl.tau=0.3 data.columns={query: q}")


# ---- what was asked for against what is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, Launch(1, "", None, None)),
        (
            {"WORLD_SIZE": "1", "MASTER_ADDR": "a", "ACCELERATE_MIXED_PRECISION": "no"},
            Launch(1, "WORLD_SIZE", None, None),
        ),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, Launch(4, "WORLD_SIZE", None, None)),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": ""}, Launch(2, "SLURM_STEP_NUM_TASKS", None, None)),
        ({"MASTER_ADDR": "a"}, Launch(1, "", None, None)),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, Launch(1, "", "ZeRO-2", None)),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            Launch(1, "", "ZeRO", None),
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Launch(1, "", "FSDP2", None)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, Launch(1, "", None, "bf16")),
    ],
)
def test_what_an_environment_asks_for(environment: dict[str, str], asked: Launch) -> None:
    assert launch_of(environment) == asked


def test_fewer_processes_than_asked_for_are_refused() -> None:
    asked = Launch(4, "WORLD_SIZE", None, None)
    check_processes(asked, 4, 0)
    check_processes(Launch(2, "SLURM_STEP_NUM_TASKS", None, None), 16, 1)  # one task a node, eight processes each
    for processes in (1, 2, 3):
        with pytest.raises(LaunchError, match=f"WORLD_SIZE stands for 4 processes, this run has {processes}"):
            check_processes(asked, processes, 0)


def test_one_process_does_not_take_several_gpus() -> None:
    check_processes(Launch(1, "", None, None), 1, 1)
    with pytest.raises(LaunchError, match="one process sees 4 GPUs"):
        check_processes(Launch(1, "", None, None), 1, 4)


@pytest.mark.parametrize(
    ("asked", "in_force", "fits"),
    [
        (None, "DDP", True),
        (None, "ZeRO-2", True),  # from a recipe's own `deepspeed` key
        ("ZeRO-2", "ZeRO-2", True),
        ("ZeRO", "ZeRO-3", True),
        ("FSDP2", "FSDP2", True),
        ("FSDP", "FSDP2", True),
        ("FSDP", "DDP", False),
        ("ZeRO-3", "ZeRO-2", False),
        ("ZeRO-2", "DDP", False),
        ("ZeRO", "none", False),
        ("FSDP2", "DDP", False),
        ("FSDP2", "FSDP1", False),
    ],
)
def test_sharding_is_the_one_asked_for(asked: str | None, in_force: str, fits: bool) -> None:
    launch = Launch(2, "WORLD_SIZE", asked, None)
    if fits:
        check_sharding(launch, in_force, "no")
        return
    with pytest.raises(LaunchError, match=f"{asked} was asked for, {in_force} is in force"):
        check_sharding(launch, in_force, "no")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("keys", "asked"), [({"deepspeed": "ds.json"}, "ZeRO"), ({"fsdp": True}, "FSDP")])
def test_what_a_recipe_asks_for_is_in_force_too(keys: dict[str, Any], asked: str) -> None:
    """ACCELERATE_USE_CPU turns DeepSpeed off without a word."""
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2, mixed_precision="no")
    trainer: Any = SimpleNamespace(args=SimpleNamespace(deepspeed=None, fsdp=False), accelerator=accelerator)
    assert trainer_line(trainer) == "sharding DDP, mixed precision no"
    trainer.args = SimpleNamespace(**({"deepspeed": None, "fsdp": False} | keys))
    with pytest.raises(LaunchError, match=f"{asked} was asked for, DDP is in force"):
        trainer_line(trainer)


def test_mixed_precision_is_the_one_asked_for() -> None:
    check_sharding(Launch(1, "", None, "bf16"), "none", "bf16")
    check_sharding(Launch(1, "", None, None), "none", "bf16")
    with pytest.raises(LaunchError, match="mixed_precision bf16 was asked for, fp16 is in force"):
        check_sharding(Launch(1, "", None, "bf16"), "none", "fp16")


@pytest.mark.parametrize(
    ("kind", "processes", "name"),
    [
        (DistributedType.NO, 1, "none"),
        (DistributedType.MULTI_CPU, 2, "DDP"),
        (DistributedType.MULTI_GPU, 1, "none"),
        (DistributedType.DEEPSPEED, 2, "ZeRO-3"),
        (DistributedType.FSDP, 2, "FSDP2"),
    ],
)
def test_sharding_has_a_name(kind: DistributedType, processes: int, name: str) -> None:
    state = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}}),
        fsdp_plugin=SimpleNamespace(fsdp_version=2),
    )
    accelerator: Any = SimpleNamespace(distributed_type=kind, num_processes=processes, state=state)
    assert sharding_of(accelerator) == name


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        # As torchrun on a machine without GPUs, without ACCELERATE_USE_CPU: processes that never meet.
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE stands for 2 processes, this run has 1"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS stands for 3 processes, this run has 1"),
    ],
)
def test_a_quieter_run_does_not_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["smoke", f"tracking.output_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("bare")
def test_a_trainer_that_is_not_sharded_as_asked_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    small = ["model.embedded={layers: 1, hidden_size: 16, heads: 2}", "data.train_size=100", "evaluate.items=4"]
    assert main(["smoke", f"tracking.output_dir={tmp_path}", *small]) == 2
    out, err = capsys.readouterr()
    assert "launch: 1 process(es) on 1 x cpu" in out
    assert "FSDP2 was asked for, none is in force" in err
    assert not list(tmp_path.glob("*/warmup/*.safetensors"))
