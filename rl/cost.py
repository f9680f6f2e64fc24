"""What each stage of a run has cost: seconds, and joules where the GPUs count them. Kept in `cost.json`.

    {"rl": {"seconds": 412.0, "parts": 2, "killed": 0, "joules": 118400.0, "gpus": 1, "unmeasured": null, ...}}

Energy is the difference of the counters that NVIDIA's driver keeps of each GPU (all that runs on it is counted, the
rest of the machine is not). Where they cannot be read the reason stands in their place: nothing is estimated. A stage
that goes on later adds to its entry; a part that was killed could not write its own, so it is counted as killed.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from siesta.data.errors import CheckpointError

FILE = "cost.json"


@dataclass(frozen=True)
class Energy:
    """Counters of the GPUs of this host's ranks.

    Args:
        joules: Since the driver was loaded, all of them together; None: they cannot be read.
        gpus: How many.
        unmeasured: Why they cannot be read, or which GPUs are not among them.
    """

    joules: float | None
    gpus: int = 0
    unmeasured: str | None = None


def read_energy() -> Energy:
    """The counters as they stand. Only the first host's of several can be read from there."""
    if not torch.cuda.is_available():
        return Energy(None, unmeasured="there is no CUDA device")
    if find_spec("pynvml") is None:
        return Energy(None, unmeasured="nvidia-ml-py is not installed")
    nvml = import_module("pynvml")
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    gpus = min(local, torch.cuda.device_count())
    try:
        nvml.nvmlInit()
        # By their names: torch and the driver may number the GPUs differently (CUDA_VISIBLE_DEVICES).
        names = [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in range(gpus)]
        counted = [nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByUUID(name)) for name in names]
    except nvml.NVMLError as error:  # a GPU before Volta, a slice of a GPU, a driver that does not answer
        return Energy(None, unmeasured=f"the driver does not tell: {error}")
    elsewhere = f"the GPUs of {world - local} ranks on other hosts are not counted" if world > local else None
    return Energy(sum(counted) / 1000, gpus, elsewhere)


@dataclass(frozen=True)
class Cost:
    """Of a stage.

    Args:
        parts: Starts that came to an end, in order or with an error.
        killed: Starts that did not; what they cost is not known.
        joules, gpus, unmeasured: See `Energy`; None as soon as one part could not be measured.
        open: A part is under way.
    """

    seconds: float = 0.0
    parts: int = 0
    killed: int = 0
    joules: float | None = 0.0
    gpus: int = 0
    unmeasured: str | None = None
    open: bool = False

    def begun(self) -> "Cost":
        """A part begins."""
        return replace(self, killed=self.killed + self.open, open=True)

    def ended(self, seconds: float, before: Energy, after: Energy) -> "Cost":
        """That part is over."""
        known = None not in (self.joules, before.joules, after.joules)
        return replace(
            self,
            seconds=self.seconds + seconds,
            parts=self.parts + 1,
            joules=(self.joules or 0.0) + (after.joules or 0.0) - (before.joules or 0.0) if known else None,
            gpus=max(self.gpus, after.gpus),
            unmeasured=self.unmeasured or before.unmeasured or after.unmeasured,
            open=False,
        )


def read_costs(run: Path) -> dict[str, Cost]:
    """Stage -> its cost; nothing of a run that was made before costs were kept.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = run / FILE
    if not file.exists():
        return {}
    try:
        return {stage: Cost(**own) for stage, own in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged; delete it, the run itself does not need it") from error


@contextmanager
def charged(
    run: Path,
    stage: str,
    write: Callable[[Path, str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    energy: Callable[[], Energy] = read_energy,
) -> Iterator[None]:
    """What is done inside is charged to the stage. On the main process only.

    Args:
        write: Writes a file whole or not at all.
        clock, energy: Of the tests.
    """

    def keep(cost: Cost) -> Cost:
        costs = read_costs(run) | {stage: cost}
        write(run / FILE, json.dumps({name: asdict(own) for name, own in costs.items()}, indent=1) + "\n")
        return cost

    cost = keep(read_costs(run).get(stage, Cost()).begun())
    start, before = clock(), energy()
    try:
        yield
    finally:
        keep(cost.ended(clock() - start, before, energy()))
