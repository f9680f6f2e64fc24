"""Licences of base models and data sets, as their own cards name them. What no card says is unknown, never guessed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCard, hf_hub_download
from yaml import YAMLError

from siesta.rl.origin import Origin

UNKNOWN = "unknown"
ANSWER = 5.0  # seconds that the hub has for a card; an export does not wait for it


@dataclass(frozen=True)
class Licence:
    """As in the metadata of a card: `name` is the hub's short one; the others belong to `other`."""

    name: str | None = None
    long_name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        if self.name is None:
            return f"licence {UNKNOWN}, its card cannot be had here or names none"
        return " ".join(part for part in (self.name, self.long_name, self.link) if part)


def licence_of(origin: Origin | None, kind: Literal["model", "dataset"] = "model") -> Licence:
    """Of a hub repository (a data set's origin has its name for a path), or of a folder that has a card."""
    if origin is None:
        return Licence()
    if kind == "model" and origin.revision is None:
        file = Path(origin.path) / "README.md"
        return read_licence(file) if file.is_file() else Licence()
    try:
        card = hf_hub_download(origin.path, "README.md", revision=origin.revision, repo_type=kind, etag_timeout=ANSWER)
    except (OSError, ValueError):  # no card, no connection, no access, no such name: the hub's errors are OSErrors
        return Licence()
    return read_licence(Path(card))


def read_licence(file: Path) -> Licence:
    """From the front matter of a card; none if it has none that can be read."""
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError):
        return Licence()
    names = data.to_dict()
    found = (names.get(key) for key in ("license", "license_name", "license_link"))
    return Licence(*(", ".join(own) if isinstance(own, list) else own if own is None else str(own) for own in found))
