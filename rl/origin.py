"""Where a model comes from: a folder, a GGUF file, an adapter, a hub repository. Found before weights are read.

A hub name stands for its repository at one commit. The commit is looked up once and written into the run, and a run
that goes on uses the recorded one: tokenizer, template and weights never come from two states of a repository.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from transformers import PreTrainedConfig

from siesta.data.errors import ModelError
from siesta.rl.memory import empty_model
from siesta.rl.recipe import Recipe

RECORD = "origin.json"
ADAPTER = "adapter_config.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Origin:
    """A model as `from_pretrained` finds it.

    Args:
        path: Folder or hub name of config and weights.
        revision: Commit of a hub repository; None for a folder.
        gguf_file: Name of the one file in `path` that holds config, tokenizer and packed weights.
        adapter: Folder of an adapter that is merged into the model.
    """

    path: str
    revision: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None

    @property
    def place(self) -> dict[str, str]:
        """The keyword arguments of `from_pretrained` beside `path`."""
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {name: value for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        parts = [self.path, self.gguf_file and f"/{self.gguf_file}", self.revision and f" at commit {self.revision}"]
        return "".join(part for part in parts if part) + (f" with adapter {self.adapter}" if self.adapter else "")


def recipe_origin(recipe: Recipe) -> Origin | None:
    """Origin of the recipe's model; None for the embedded one. A run in progress keeps the commit it began with.

    Raises:
        ModelError: There is no such model, or it cannot be reached.
    """
    section = recipe.model
    if section.path is None:
        return None
    begun = read_origin(recipe.run_dir / "model")
    if begun is not None and begun.revision is not None and begun.path == section.path:
        return begun
    return find_origin(section.path, section.revision)


def write_origin(origin: Origin, folder: Path) -> None:
    """Leave the origin beside the model that was made from it."""
    (folder / RECORD).write_text(json.dumps(asdict(origin), indent=1) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """The origin that `write_origin` left in `folder`, if any."""
    file = folder / RECORD
    return Origin(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def find_origin(path: str, revision: str | None = None, key: str = "model.path") -> Origin:
    """Look `path` up: a `.gguf` file, a folder, or else a hub name.

    Args:
        revision: Branch, tag or commit of a hub repository.
        key: What errors call `path`.

    Raises:
        ModelError: One line that names `key` and `path`.
    """
    place = Path(path)
    is_file = place.suffix == ".gguf"
    if revision is not None and (is_file or place.is_dir()):
        raise ModelError(f"model.revision: {revision}: {path} is no hub repository and has no revisions; remove it")
    if is_file:
        if not place.is_file():
            raise ModelError(f"{key}: {path}: no such file; paths are relative to the working directory")
        if find_spec("gguf") is None:
            raise ModelError(f"{key}: {path}: reading it needs the package gguf; pip install 'siesta-rl[gguf]'")
        return Origin(str(place.parent), gguf_file=place.name)
    if not place.is_dir():
        return Origin(path, revision=hub_commit(path, revision, key))
    if (place / ADAPTER).is_file():
        return adapter_origin(place, key)
    if not (place / "config.json").is_file():
        raise ModelError(f"{key}: {path}: no model in this folder (config.json is missing)")
    pickles = sorted(file.name for pattern in PICKLES for file in place.glob(pattern))
    if pickles and not any(place.glob("*.safetensors")):
        raise ModelError(
            f"{key}: {path}: its weights are a pickle ({pickles[0]}), which can run code when it is read, so it is "
            "not; get them as safetensors"
        )
    return Origin(path)


@cache
def hub_commit(name: str, revision: str | None, key: str = "model.path") -> str:
    """Commit of a hub repository: the one that `revision` stands for now, or when it was cached.

    Raises:
        ModelError: One line for each of: no name of a repository, no such repository, no such revision, no model in
            it, no access, no connection.
    """
    line = f"{key}: {name}: no such folder here, and"
    try:
        file = hf_hub_download(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{line} not the name of a hub repository (owner/name) either") from error
    except GatedRepoError as error:
        raise ModelError(f"{line} the hub asks for a licence to be accepted; do so there, and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision: {revision}: {name} has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{line} the hub has no such model; check the spelling (private: set HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{line} the hub cannot be reached (or is switched off) and has not been asked for it before; check name "
            "and connection, or give a local folder"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"{line} the hub's repository of this name holds no config.json, so no model of transformers; download an "
            "adapter or a GGUF file first and give its path"
        ) from error
    except OSError as error:  # any other answer of the hub
        raise ModelError(f"{line} the hub refuses: {' '.join(str(error).split())[:200]}") from error
    return Path(file).parent.name  # <cache>/models--owner--name/snapshots/<commit>/config.json


def adapter_origin(folder: Path, key: str = "model.path") -> Origin:
    """An adapter's base, with the adapter to be merged into it.

    Raises:
        ModelError: The folder is no LoRA adapter with safetensors, or its base cannot be found.
    """
    settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA" or not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{key}: {folder}: only LoRA adapters with adapter_model.safetensors can be merged")
    name = settings.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{key}: {folder}: {ADAPTER} names no base model (base_model_name_or_path)")
    base = find_origin(name, settings.get("revision"), f"{key}: {folder}: its base model")
    if base.adapter is not None:
        raise ModelError(f"{key}: {folder}: its base model {name} is an adapter, too; merge that one first")
    return Origin(base.path, base.revision, base.gguf_file, adapter=str(folder))


def check_adapter(origin: Origin, config: PreTrainedConfig) -> None:
    """Prove from shapes alone that an adapter was made for the base model it names. peft would skip what it misses.

    Args:
        config: Of the base model.

    Raises:
        ModelError: Names adapter, base and the first tensor that does not fit.
    """
    if origin.adapter is None:
        return
    shapes = {name: list(p.shape) for name, p in empty_model(config).named_parameters(remove_duplicate=False)}
    with safe_open(Path(origin.adapter) / "adapter_model.safetensors", framework="pt") as file:
        for tensor in file.keys():  # noqa: SIM118  not a mapping
            module, _, part = tensor.removeprefix("base_model.model.").partition(".lora_")
            weight = f"{module}.weight" if part else module
            if weight not in shapes:
                fault = f"it adapts {weight}, which that model lacks"
            elif not fits(file.get_slice(tensor).get_shape(), part, shapes[weight]):
                fault = f"{tensor} is {file.get_slice(tensor).get_shape()}, {weight} is {shapes[weight]}"
            else:
                continue
            raise ModelError(
                f"model.path: {origin.adapter}: made for another base model than the one it names, {origin.path}: "
                f"{fault}; point base_model_name_or_path in its {ADAPTER} at the right one"
            )


def fits(shape: list[int], part: str, weight: list[int]) -> bool:
    """Whether a tensor of an adapter belongs to a weight.

    Args:
        shape: Of the tensor.
        part: What its name has behind `lora_`: A.weight (r, in) or B.weight (out, r) of a linear layer, embedding_A
            (r, rows) or embedding_B (columns, r) of an embedding, magnitude_vector (out,); empty for a whole weight.
        weight: Shape of the weight, (out, in) or (rows, columns).
    """
    match part.removesuffix(".weight"):
        case "A":
            return shape[1] == weight[1]
        case "B" | "magnitude_vector":
            return shape[0] == weight[0]
        case "embedding_A":
            return shape[1] == weight[0]
        case "embedding_B":
            return shape[0] == weight[1]
        case _:
            return shape == weight
