"""What one rank meets, every rank acts on: a number that is not finite, a signal."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.distributed.test_equality import LAUNCH, ROOT, TORCHRUN
from tests.helpers import save_tiny_model


def guarded(folder: Path, launcher: list[str], **environment: str) -> list[list[str]]:
    """What each rank says, in parts."""
    save_tiny_model(folder / "model")
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*launcher, "-m", "tests.distributed.guarded_tiny", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=settings | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2 is skipped, not finite: log-probability (1)" in done.stderr
    return [file.read_text().split(" | ") for file in sorted(folder.glob("rank*.txt"))]


def check(ranks: list[list[str]], folder: Path, sharding: str) -> None:
    assert len(ranks) == 2
    for world, kind, stop, weights, _ in ranks:
        assert re.fullmatch(r"launch: 2 process\(es\) \(gloo\) on 2 x cpu", world)
        assert kind == f"sharding {sharding}, mixed precision no"
        assert stop.startswith("143 SIGTERM: stopped at step 3; the same command goes on from ")
        assert stop.endswith("checkpoint-3")
        assert weights == "kept True moved True"
    assert sorted(rank[4] for rank in ranks) == [
        "skipped [0.0, 1.0, 0.0] received 0",
        "skipped [0.0, 1.0, 0.0] received 15",
    ]
    assert (folder / "out" / "checkpoint-3" / "trainer_state.json").exists()


def test_two_ddp_processes_skip_and_stop_as_one(tmp_path: Path) -> None:
    check(guarded(tmp_path, TORCHRUN, ACCELERATE_USE_CPU="true"), tmp_path, "DDP")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: DeepSpeed compiles an extension")
def test_two_zero_processes_skip_and_stop_as_one(tmp_path: Path) -> None:
    """DeepSpeed steps inside its backward pass; it skips by itself, in stages 1 and 3 as well."""
    file = tmp_path / "zero.yaml"
    file.write_text(LAUNCH.format(stage=2, init="false"))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    check(guarded(tmp_path, accelerate), tmp_path, "ZeRO-2")
