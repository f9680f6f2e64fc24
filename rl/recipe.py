"""A recipe is one YAML file: what to build, on which data, with which settings. It is checked in full before any work.

Unknown keys are errors, because a misspelt setting is a run that silently trains something else. The sections `warmup`
and `rl` also take every field of TRL's SFTConfig and GRPOConfig. `section.key=value` on the command line overrides.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from trl import SFTConfig

from siesta.data.credentials import credential_in, texts
from siesta.data.errors import RecipeError
from siesta.data.sources import check_level_weights
from siesta.rl.config import DeGRPOConfig
from siesta.rl.data_section import DataSection
from siesta.rl.sleep_section import STATES, SleepSection
from siesta.rl.teacher_section import TeacherSection

# Fields of the TRL configs that belong to the run as a whole.
ELSEWHERE = {
    "output_dir": "the run directory is tracking.output_dir / tracking.run",
    "run_name": "the run is called tracking.run",
    "report_to": "trackers are named in tracking.report_to",
    "push_to_hub": "the export stage makes what is published",
    "model_init_kwargs": "the model section says how the model is loaded",
    "chat_template_kwargs": "all stages share one template: set model.chat_template",
}

WRITER = "sleep"  # the key of `warmup.stop` for how right sleep is: notes, or answers from a state of tensors

MAX_INTERPOLATIONS = 24  # spread as badly as can be, these multiply a text by 3^8

RECIPES = Path(__file__).parent.parent / "recipes"


class Section(BaseModel):
    """Part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class Embedded(Section):
    """Size of the model that is built on the spot."""

    @model_validator(mode="after")
    def heads_fit(self) -> "Embedded":
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be a multiple of 2 * heads")
        return self

    layers: int = Field(default=3, ge=1)
    hidden_size: int = Field(default=128, ge=8)
    heads: int = Field(default=4, ge=1)
    init: float = Field(default=0.05, gt=0)


class ModelSection(Section):
    """Which model is trained: a path or hub name, or nothing for the embedded one."""

    path: str | None = None
    revision: str | None = None
    embedded: Embedded = Embedded()
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat_template: Path | None = None
    trust_remote_code: bool = False
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None


class ModeSection(Section):
    """One way to answer; see `siesta.rl.modes.Mode`."""

    token: str = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    correct: float = 1.0
    wrong: float = -1.0
    answer_after: str | None = None
    prior: float = Field(default=1.0, gt=0)


class TrainerSection(BaseModel):
    """A section that also takes every field of a TRL config: its own fields are declared, the rest checked by name."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    def trainer_fields(self) -> dict[str, Any]:
        """What goes to the TRL config."""
        return dict(self.__pydantic_extra__ or {})


class WarmupSection(TrainerSection):
    """Supervised start: both modes are taught before RL chooses between them."""

    enabled: bool = True
    responses: Path | None = Field(default=None, description="responses.jsonl of `siesta warmup-data`.")
    pairing: Literal["paired", "cross"] = "cross"
    shares: dict[str, float] | None = None
    balanced: bool = Field(default=False, description="Modes are chosen equally often, whatever their shares.")
    level_weights: dict[int, float] | None = Field(default=None, description="Of a task; those of `data` if not set.")
    max_level: dict[str, int] | None = Field(default=None, description="Of a mode, without a state.")
    length_power: float = Field(default=1.0, ge=0, le=1, description="A row weighs tokens ** this; 1: tokens alike.")
    check_every: int = Field(default=100, ge=1)
    check_items: int = Field(default=160, ge=1)
    stop: dict[str, float] = {}
    min_mass: float = Field(default=0.95, ge=0, le=1)
    min_share: float = Field(default=0.02, ge=0, le=1)


class GuardSection(Section):
    """When the mode policy counts as collapsed, and what happens then."""

    min_share: float = Field(default=0.01, ge=0, le=1)
    max_share: float = Field(default=0.99, ge=0, le=1)
    min_entropy: float = Field(default=0.05, ge=0)
    window: int = Field(default=20, ge=1)
    action: Literal["warn", "save", "stop"] = "save"


class RLSection(TrainerSection):
    """DeGRPO; the fields are those of `siesta.rl.config.DeGRPOConfig`."""

    enabled: bool = True
    guard: GuardSection = GuardSection()

    def setting(self, name: str) -> Any:
        """Value of a DeGRPOConfig field: the recipe's, or the config's default."""
        return self.trainer_fields().get(name, DeGRPOConfig.__dataclass_fields__[name].default)


class EvaluateSection(Section):
    """How the policies are measured."""

    items: int = Field(default=400, ge=1)
    samples: int = Field(default=8, ge=1)
    batch_size: int = Field(default=256, ge=1)
    resamples: int = Field(default=1000, ge=1)
    every: int = Field(default=0, ge=0, description="Validate during RL every so many steps; 0: never.")
    every_items: int = Field(default=160, ge=1)
    every_samples: int = Field(default=4, ge=1)
    before: bool = Field(default=True, description="Also measure the model that RL started from.")
    engine: Literal["generate", "vllm"] = Field(default="generate", description="Writes the final responses.")
    seed: int = 0


class ExportSection(Section):
    """The folder that is served."""

    enabled: bool = True
    dtype: Literal["float32", "bfloat16"] | None = None


class TrackingSection(Section):
    """Where the run goes and who watches it."""

    output_dir: Path = Path("outputs")
    run: str | None = None
    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = []
    project: str = "siesta"
    samples: int = Field(default=4, ge=0, description="Rollouts written to samples.jsonl at every log.")


class Recipe(Section):
    """A whole run."""

    seed: int = 0
    model: ModelSection = ModelSection()
    modes: dict[str, ModeSection]
    data: DataSection
    teachers: dict[str, TeacherSection] = {}
    sleep: SleepSection = SleepSection()
    warmup: WarmupSection = WarmupSection()
    rl: RLSection = RLSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()
    tracking: TrackingSection = TrackingSection()

    @field_validator("modes", mode="before")
    @classmethod
    def without_dropped(cls, modes: Any) -> Any:
        """`short: null` drops a mode of the base."""
        return {name: mode for name, mode in modes.items() if mode is not None} if isinstance(modes, dict) else modes

    @property
    def run_dir(self) -> Path:
        return self.tracking.output_dir / str(self.tracking.run)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A file, or the name of a shipped recipe (`quickstart`).
        overrides: `section.key=value`, value in YAML; a mapping replaces the one in the file.

    Raises:
        RecipeError: One line with the file and the path of the key.
    """
    file = find_recipe(path)
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"override {override!r} is not of the form section.key=value")
    try:
        written = read_recipe(file)
        for override in overrides:
            key = override.partition("=")[0]
            # Replaces, mappings too: merged, `warmup.stop={}` would change nothing.
            OmegaConf.update(written, key, OmegaConf.select(OmegaConf.from_dotlist([override]), key), merge=False)
        check_interpolations(written)
        content = OmegaConf.to_container(written, resolve=True)
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        OSError,
        ValueError,
    ) as error:  # ValueError: 5,000 digits, bad UTF-8
        raise RecipeError(f"{file}: {' '.join(str(error).split())}") from error
    except TypeError as error:  # what OmegaConf raises where a list meets a mapping
        raise RecipeError(f"{file}: {error}, in an override: {' '.join(overrides)}") from error
    if fault := credential_in(content):  # first, so that no other message repeats it
        raise RecipeError(f"{file}: {fault}")
    try:
        recipe = Recipe.model_validate(content)
        recipe.warmup = check_trainer_section("warmup", recipe.warmup, SFTConfig)
        recipe.rl = check_trainer_section("rl", recipe.rl, DeGRPOConfig)
    except ValidationError as error:
        raise RecipeError(f"{file}: {describe(error)}") from error
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error
    check_modes(file, recipe)
    recipe.tracking.run = recipe.tracking.run or file.stem
    return recipe


def read_recipe(file: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """The sections of a file over those of its `base`, if it names one: each key of a section replaces the base's.

    Args:
        above: The files whose base this one is.

    Raises:
        RecipeError: The base is missing, or names a file above it.
    """
    if file.resolve() in above:
        raise RecipeError(f"{file}: base: this recipe is, in the end, based on itself")
    # OmegaConf reads with a safe YAML loader: a recipe cannot construct Python objects.
    written = OmegaConf.load(file)
    if not isinstance(written, DictConfig):
        raise RecipeError(f"{file}: a recipe is a mapping of sections, this is a list")
    name = written.pop("base", None)
    if name is None:
        return written
    beside = file.parent / f"{name}.yaml"
    try:
        base = read_recipe(beside if beside.is_file() else find_recipe(name), (*above, file.resolve()))
    except RecipeError as error:
        raise RecipeError(f"{file}: base: {error}") from error
    for section, content in written.items():
        if isinstance(content, DictConfig) and isinstance(base.get(section), DictConfig):
            for key in content:
                base[section][key] = content[key]
        else:
            base[section] = content
    return base


def check_interpolations(written: DictConfig) -> None:
    """Raises OmegaConfBaseException if a few lines of `${...}` could become a text without bound: they multiply."""
    count = sum(text.count("${") for _, text in texts(OmegaConf.to_container(written, resolve=False)))
    if count > MAX_INTERPOLATIONS:
        raise OmegaConfBaseException(f"{count} interpolations ${{...}}, at most {MAX_INTERPOLATIONS}")


def find_recipe(path: str | Path) -> Path:
    """A file as given, or a shipped recipe by name."""
    file, shipped = Path(path), RECIPES / f"{path}.yaml"
    for candidate in (file, shipped):
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    raise RecipeError(f"{file}: no such recipe; give a YAML file or one of: {names}")


def check_trainer_section(name: str, section: Any, config: type) -> Any:
    """Check the pass-through keys of a section against the fields of a TRL config, and give values their field's type.

    YAML reads `1e-6` and "true" as text in places; the field's annotation says what was meant.
    """
    hints = get_type_hints(config)
    known = {f.name for f in dataclasses.fields(config) if f.init}
    for key, value in section.trainer_fields().items():
        if key in ELSEWHERE:
            raise RecipeError(f"{name}.{key}: not a setting of this section: {ELSEWHERE[key]}")
        if key not in known:
            raise RecipeError(unknown_key(f"{name}.{key}", key, known | set(type(section).model_fields)))
        try:
            section.__pydantic_extra__[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            hint = "; quote the word, YAML reads no, yes, on and off as booleans" if isinstance(value, bool) else ""
            raise RecipeError(f"{name}.{key}: {error.errors()[0]['msg']}, got {value!r}{hint}") from error
    return section


def check_modes(file: Path, recipe: Recipe) -> None:
    """At least one mode, each with its own token; other sections name only these."""
    if not recipe.modes:
        raise RecipeError(f"{file}: modes: at least one mode is needed")
    tokens = [mode.token for mode in recipe.modes.values()]
    if len(set(tokens)) < len(tokens):
        raise RecipeError(f"{file}: modes: two modes share a control token")
    if recipe.sleep.mechanism == "notes" and recipe.sleep.token in tokens:
        raise RecipeError(f"{file}: sleep.token: {recipe.sleep.token} is a mode's control token")
    if recipe.warmup.shares and recipe.warmup.pairing == "paired":
        raise RecipeError(f"{file}: warmup.shares: paired rows show every mode equally; use pairing: cross")
    named: dict[str, dict] = {
        "warmup.shares": recipe.warmup.shares or {},
        "warmup.max_level": recipe.warmup.max_level or {},
        "warmup.stop": recipe.warmup.stop,
        "teachers": recipe.teachers,
    }
    written = {WRITER} if recipe.sleep.mechanism in ("notes", *STATES) else set()
    for section, keys in named.items():
        known = set(recipe.modes) | (written if section == "warmup.stop" else set())
        for key in keys:
            if key not in known and key.split("@")[0] not in recipe.modes:
                raise RecipeError(f"{file}: " + unknown_key(f"{section}.{key}", key, known))
    for key in recipe.warmup.stop:
        if "@" in key and not key.partition("@")[2].isdigit():
            raise RecipeError(f"{file}: warmup.stop.{key}: after @ stands a level, a whole number")
    if recipe.warmup.level_weights is not None:
        if recipe.data.task is None:
            raise RecipeError(f"{file}: warmup.level_weights: belongs to a `data.task`")
        check_level_weights("warmup.level_weights", recipe.data.task, recipe.warmup.level_weights)
    shares = recipe.warmup.shares or dict.fromkeys(recipe.modes, 1.0)
    if min(shares.values()) < 0 or not sum(shares.values()) > 0:
        raise RecipeError(f"{file}: warmup.shares: shares are at least 0, and one is more")
    if recipe.warmup.length_power != 1 and recipe.sleep.mechanism in STATES:
        raise RecipeError(f"{file}: warmup.length_power: rows behind a state of {recipe.sleep.mechanism} know 1 alone")
    if recipe.warmup.max_level:
        if recipe.warmup.pairing == "paired":
            raise RecipeError(f"{file}: warmup.max_level: paired rows show every mode; use pairing: cross")
        if not any(share > 0 for name, share in shares.items() if name not in recipe.warmup.max_level):
            raise RecipeError(f"{file}: warmup.max_level: one mode that is shown has to be shown at every level")


def unknown_key(path: str, key: str, known: set[str]) -> str:
    """Message for a key that nobody knows, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(sorted(known)[:12])}"
    return f"{path}: unknown key{hint}"


def describe(error: ValidationError) -> str:
    """The first fault of a recipe in one line: path of the key, what is wrong, what was meant."""
    # A misspelt key also makes the right one missing; the misspelling says more.
    fault = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in fault["loc"][:-1]:
            section = section_type(section, part)
        known = {field.alias or name for name, field in section.model_fields.items()}
        return unknown_key(path, str(fault["loc"][-1]), known)
    got = "" if fault["type"] == "missing" else f", got {fault['input']!r}"
    return f"{path}: {fault['msg']}{got}"


def section_type(section: type[BaseModel], key: Any) -> type[BaseModel]:
    """Model class behind `key` of a section; a mapping such as `modes` hands on the class of its values."""
    if key not in section.model_fields:
        return section
    annotation = section.model_fields[key].annotation
    candidates = [annotation, *get_args(annotation)]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))
