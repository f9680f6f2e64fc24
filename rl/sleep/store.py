"""States on disk: one safetensors file a context, and a manifest that says what made them and what each cost.

    states/manifest.jsonl  <hash of an id>.safetensors ...

The first line of the manifest is what every state depends on: mechanism and settings, and a hash of the model. Each
further line is one context, written after its state; so a sleep that was killed loses the context in hand, and goes
on to the same bytes. A state is believed only if its file has the hash of its line.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.rl.run import write_atomically
from siesta.rl.sleep.protocol import SleepCost
from siesta.rl.sleep.tensors import Tensors, joined
from siesta.rl.sleep_section import BELONGS, TRAINING, SleepSection

FORMAT = 1
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Entry:
    """A line of the manifest.

    Args:
        id: Of the context.
        file: Of its state, in the folder.
        sha256: Of the file.
        context: SHA-256 of the text.
        tokens, flops, bytes: What its sleep cost, see `SleepCost`.
    """

    id: str
    file: str
    sha256: str
    context: str
    tokens: int
    flops: float
    bytes: int


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def identity(section: SleepSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What all states of a folder depend on: mechanism, passes, its settings but those of training, the model."""
    named = [name for name, mechanisms in BELONGS.items() if section.mechanism in mechanisms and name not in TRAINING]
    own = {name: vars(section)[name] for name in named}
    about = {"format": FORMAT, "mechanism": section.mechanism, "passes": section.passes}
    return about | own | {"model": model_digest(model, tokenizer)}


def model_digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the weights, the shape and the tokenizer; where a model lies and who saved it do not count."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key not in ("transformers_version", "architectures", "dtype")
    }
    shared = [config, sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    found.update(json.dumps(shared, sort_keys=True, default=str).encode())
    return found.hexdigest()


class StateStore:
    """A folder of states, to be read or to be gone on with.

    Args:
        folder: Made by `begin`.
        about: See `identity`.

    Raises:
        DataError: It is no folder of states, its states were made otherwise, or a line of its manifest is broken.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.manifest = folder, folder / MANIFEST
        if not self.manifest.is_file():
            raise DataError(f"{folder}: no states here ({MANIFEST} is missing); siesta sleep makes them")
        # A line that a kill has torn has no end.
        lines = self.manifest.read_text(encoding="utf-8").split("\n")[:-1]
        rows = [self._row(line, number) for number, line in enumerate(lines, start=1)]
        for name, now in about.items():
            before = rows[0].get(name) if rows else None
            if before != now:
                raise DataError(
                    f"{folder}: its states were made with {name} {before}, this is {now}; use recipe and model as "
                    "they were, or sleep again into another folder"
                )
        self.entries: dict[str, Entry] = {}
        for number, row in enumerate(rows[1:], start=2):
            if row.keys() != Entry.__dataclass_fields__.keys():
                raise DataError(f"{self.manifest}, row {number}: not the line of a state; sleep again")
            if row["id"] in self.entries:
                raise DataError(f"{self.manifest}, row {number}: id {row['id']!r} stands there twice; sleep again")
            self.entries[row["id"]] = Entry(**row)

    def _row(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.manifest}, row {number}: not JSON: {error.msg}; sleep again") from error
        if not isinstance(row, dict):
            raise DataError(f"{self.manifest}, row {number}: an object is expected; sleep again")
        return row

    @classmethod
    def begin(cls, folder: Path, about: dict[str, Any]) -> "StateStore":
        """Make the folder, or go on in it; a state whose file is gone is forgotten, to be made again.

        Raises:
            DataError: The folder holds something else, or see above.
        """
        manifest = folder / MANIFEST
        if not manifest.exists():
            if folder.exists() and (not folder.is_dir() or any(left.suffix != ".part" for left in folder.iterdir())):
                raise DataError(f"{folder}: holds other things; --out names a new or empty folder")
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(manifest, json.dumps(about) + "\n")
        store = cls(folder, about)
        store.entries = {name: entry for name, entry in store.entries.items() if (folder / entry.file).is_file()}
        kept = "".join(json.dumps(row) + "\n" for row in [about, *map(asdict, store.entries.values())])
        if kept != manifest.read_text(encoding="utf-8"):
            write_atomically(manifest, kept)
        return store

    def add(self, name: str, context: str, tensors: Tensors, cost: SleepCost) -> None:
        """Keep the state of one context, called `name`: tensors of first axis 1, and what it cost."""
        data = save({key: part.detach().cpu().contiguous() for key, part in tensors.items()})
        file = f"{digest(name.encode())[:24]}.safetensors"
        part = self.folder / f"{file}.part"
        part.write_bytes(data)
        part.replace(self.folder / file)
        entry = Entry(
            name, file, digest(data), digest(context.encode()), cost.tokens[0], cost.flops[0], cost.state_bytes[0]
        )
        with self.manifest.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(entry)) + "\n")
        self.entries[name] = entry

    def load(self, names: Sequence[str]) -> Tensors:
        """Tensors of these contexts in order, one below the other.

        Raises:
            DataError: A state is missing, truncated or altered.
        """
        return joined([load(self._read(self.entries[name])) for name in names])

    def _read(self, entry: Entry) -> bytes:
        file = self.folder / entry.file
        again = f"delete it and run siesta sleep again (context {entry.id!r})"
        if not file.is_file():
            raise DataError(f"{file}: this state is gone; run siesta sleep again (context {entry.id!r})")
        data = file.read_bytes()
        if digest(data) != entry.sha256:
            raise DataError(f"{file}: truncated or altered since it was written; {again}")
        return data
