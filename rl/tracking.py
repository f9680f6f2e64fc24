"""Trackers, decided before anything is initialised: wandb goes online only if there is a key and its server answers,
else to offline files. A failed online start cannot be turned into an offline one in the same process.

A tracker is a witness of the run, not a part of it: one that fails is given up with one line, and training goes on.
metrics.jsonl is written beside it in any case.
"""

import importlib.util
import logging
import netrc
import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from siesta.data.errors import RecipeError
from siesta.rl.recipe import TrackingSection

logger = logging.getLogger(__name__)

WANDB_SERVER = "https://api.wandb.ai"
CONNECT_LIMIT = 5.0  # seconds
PORTS = {"http": 80, "https": 443}
FINISH_LIMIT = "120"  # seconds that wandb has to send what is left of a stage; its files hold it in any case
STEP = "train/global_step"  # what wandb draws everything over
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def attempt(what: str, work: Callable[[], object]) -> bool:
    """Do what training can do without. False, and one line that names `what`, if it fails."""
    try:
        work()
    except Exception as error:  # whatever a tracker raises: its own errors, those of sockets, pipes and disks
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        logger.warning("%s is given up: %s; the run goes on, metrics.jsonl is complete", what, reason)
        return False
    return True


EVENTS = ("on_train_begin", "on_log", "on_save", "on_train_end")  # those that a training fires


def steady(name: str, kind: type[TrainerCallback]) -> type[TrainerCallback]:
    """A tracker's callback of transformers that falls silent when the tracker fails, instead of ending the run."""

    def guarded(event: str) -> Callable[..., None]:
        def call(self, *args, **kwargs):
            if not self.given_up:
                self.given_up = not attempt(name, lambda: getattr(kind, event)(self, *args, **kwargs))

        return call

    return type(f"Steady{kind.__name__}", (kind,), {"given_up": False, **{event: guarded(event) for event in EVENTS}})


class StageRun(WandbCallback):
    """Each stage is a wandb run of its own, in the group of the recipe's run: transformers' callback would go on in
    the run of the stage before, with steps that begin again at 0.

    A metric called `group/name` keeps its name, so that wandb's sections are our groups; others become `train/name`.
    """

    opened: ClassVar[str | None] = None  # id of the run that a stage of this process has opened

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        before = self._wandb.run
        if not self._initialized and before is not None and before.id == StageRun.opened:
            self._wandb.finish()
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if before is None or before is not self._wandb.run:
            StageRun.opened = None if self._wandb.run is None else self._wandb.run.id

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if not self._initialized:
            self.setup(args, state, model)
        found = dict(logs or {})
        for name in [name for name in SUMMARY if name in found]:
            cast(Any, self._wandb.run).summary[name] = found.pop(name)
        curves = {name if "/" in name else f"train/{name}": value for name, value in found.items()}
        self._wandb.log(curves | {STEP: state.global_step})


STEADY = {
    "wandb": steady("wandb", StageRun),
    "tensorboard": steady("tensorboard", TensorBoardCallback),
    "trackio": steady("trackio", TrackioCallback),
}


def wandb_server() -> str:
    """Address of the server that wandb would talk to."""
    return os.environ.get("WANDB_BASE_URL", WANDB_SERVER)


def has_wandb_key() -> bool:
    """Whether wandb would find a key, in the environment or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(urlsplit(wandb_server()).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):  # as wandb does
        return False


@cache
def answers(server: str) -> bool:
    """Whether something listens at the address `server`, or at the proxy on the way to it."""
    place = urlsplit(server)
    proxy = getproxies().get(place.scheme)
    if proxy is not None and not proxy_bypass(place.hostname or ""):
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        with socket.create_connection((place.hostname, place.port or PORTS[place.scheme]), CONNECT_LIMIT):
            return True
    except OSError as error:
        logger.warning("wandb: %s cannot be reached (%s); it writes offline files into the run", place.hostname, error)
        return False


def start_trackers(section: TrackingSection, run_dir: Path) -> list[str]:
    """Set the environment the trackers read and return their names for `report_to`.

    Raises:
        RecipeError: A named tracker is not installed.
    """
    for name in section.report_to:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"tracking.report_to: {name} is not installed; pip install 'siesta-rl[{name}]'")
    if "wandb" in section.report_to:
        if "WANDB_MODE" not in os.environ:
            os.environ["WANDB_MODE"] = "online" if has_wandb_key() and answers(wandb_server()) else "offline"
        os.environ.setdefault("WANDB_DIR", str(run_dir))
        os.environ.setdefault("WANDB_PROJECT", section.project)
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_LIMIT)
        if section.run is not None:
            os.environ.setdefault("WANDB_RUN_GROUP", section.run)
    if "trackio" in section.report_to:
        os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))
    if "tensorboard" in section.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir / "tensorboard"))
    for name in section.report_to:
        integration_utils.INTEGRATION_TO_CALLBACK[name] = STEADY[name]
    return list(section.report_to)
