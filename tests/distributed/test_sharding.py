"""Inside `unsharded`, ranks that run a model unequally often do not wait for each other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from siesta.rl.sharding import parameter_groups, unsharded
from tests.helpers import tiny_model

ROOT = Path(__file__).parents[2]


def test_forward_passes_gather_nothing_inside_and_everything_before_and_after() -> None:
    """Two layers and the rest: three parts. A second rank that gathered thrice as often would wait for the first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*launch, "-m", "tests.distributed.uneven_passes"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert seen == 2 * [{"once": 3, "inside": 0, "same": True, "again": 3, "sharded": True}]


def test_a_model_in_one_piece_is_left_alone() -> None:
    model = tiny_model()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with unsharded(model), torch.no_grad():
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    ("state", "groups"),
    [
        ({"_fsdp_param_groups": ["a", "b"]}, ["a", "b"]),
        ({"_fsdp_param_group": "a"}, ["a"]),
        ({"_fsdp_param_group": None}, []),
    ],
)
def test_groups_of_a_part_in_every_torch_that_is_allowed(state: dict, groups: list) -> None:
    part: Any = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(**state))
    assert parameter_groups(part) == groups
