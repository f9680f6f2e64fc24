"""Trackers, decided before anything is initialised: wandb goes online only if a key is there, else to offline files.

A failed online start cannot be turned into an offline one in the same process, so there is no try-and-see.
"""

import importlib.util
import netrc
import os
from pathlib import Path

from siesta.data.errors import RecipeError
from siesta.rl.recipe import TrackingSection

WANDB_HOST = "api.wandb.ai"


def has_wandb_key() -> bool:
    """Whether wandb would find a key, in the environment or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(WANDB_HOST) is not None
    except (FileNotFoundError, netrc.NetrcParseError):  # as wandb does
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
        os.environ.setdefault("WANDB_MODE", "online" if has_wandb_key() else "offline")
        os.environ.setdefault("WANDB_DIR", str(run_dir))
        os.environ.setdefault("WANDB_PROJECT", section.project)
    if "trackio" in section.report_to:
        os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))
    if "tensorboard" in section.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir / "tensorboard"))
    return list(section.report_to)
