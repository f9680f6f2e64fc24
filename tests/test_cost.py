"""What stages have cost, by a clock and counters that are moved by hand."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from siesta.data.errors import CheckpointError
from siesta.rl import cost
from siesta.rl.cost import Cost, Energy, charged, read_costs, read_energy
from siesta.rl.run import write_atomically


class Meter:
    """Seconds and joules that the work itself uses up."""

    def __init__(self, unmeasured: str | None = None) -> None:
        self.seconds, self.joules, self.unmeasured = 100.0, 5000.0, unmeasured

    def work(self, run: Path, seconds: float, joules: float, error: BaseException | None = None) -> None:
        with charged(run, "rl", write_atomically, clock=lambda: self.seconds, energy=self.energy):
            self.seconds += seconds
            self.joules += joules
            if error is not None:
                raise error

    def energy(self) -> Energy:
        return Energy(None if self.unmeasured else self.joules, 2, self.unmeasured)


def test_parts_of_a_stage_add_up_and_an_error_is_charged_too(tmp_path: Path) -> None:
    meter = Meter()
    with pytest.raises(KeyboardInterrupt):
        meter.work(tmp_path, 10, 300, KeyboardInterrupt())
    meter.work(tmp_path, 5, 100)
    assert read_costs(tmp_path) == {"rl": Cost(seconds=15, parts=2, joules=400, gpus=2)}


def test_a_part_that_was_killed_is_counted_and_not_guessed(tmp_path: Path) -> None:
    left = Cost(seconds=7.0, parts=1, joules=20.0, gpus=2, open=True)
    (tmp_path / cost.FILE).write_text(json.dumps({"rl": asdict(left)}))
    Meter().work(tmp_path, 5, 100)
    assert read_costs(tmp_path)["rl"] == Cost(seconds=12, parts=2, killed=1, joules=120, gpus=2)


def test_a_part_without_a_counter_leaves_the_whole_unmeasured(tmp_path: Path) -> None:
    Meter().work(tmp_path, 5, 100)
    Meter("no device").work(tmp_path, 5, 100)
    found = read_costs(tmp_path)["rl"]
    assert (found.joules, found.unmeasured, found.seconds) == (None, "no device", 10)
    Meter().work(tmp_path, 5, 100)
    assert read_costs(tmp_path)["rl"].joules is None, "what is missing stays missing"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"rl": {"weeks": 3}}'):
        (tmp_path / cost.FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"cost.json: damaged; delete it"):
            read_costs(tmp_path)


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_energy() == Energy(None, unmeasured="there is no CUDA device")


class NVMLError(Exception):
    """Of the stand-in."""


def with_driver(monkeypatch: pytest.MonkeyPatch, counters: dict[str, int], **environment: str) -> None:
    """Two GPUs, and a driver that has these counters in millijoules."""

    def counter(name: str) -> int:
        if name not in counters:
            raise NVMLError("Not Supported")
        return counters[name]

    driver: Any = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=counter,
        NVMLError=NVMLError,
    )
    monkeypatch.setattr(cost, "find_spec", lambda name: object())
    monkeypatch.setattr(cost, "import_module", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"id-{number}"))
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_counters_are_those_of_the_gpus_that_ranks_use(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"GPU-id-0": 3000, "GPU-id-1": 500}
    with_driver(monkeypatch, both)
    assert read_energy() == Energy(3.0, 1), "one process uses one"
    with_driver(monkeypatch, both, LOCAL_WORLD_SIZE="2", WORLD_SIZE="2")
    assert read_energy() == Energy(3.5, 2)
    with_driver(monkeypatch, both, LOCAL_WORLD_SIZE="2", WORLD_SIZE="6")
    assert read_energy() == Energy(3.5, 2, "the GPUs of 4 ranks on other hosts are not counted")


def test_a_driver_that_does_not_tell_and_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, {})
    assert read_energy() == Energy(None, unmeasured="the driver does not tell: Not Supported")
    monkeypatch.setattr(cost, "find_spec", lambda name: None)
    assert read_energy() == Energy(None, unmeasured="nvidia-ml-py is not installed")
