"""The model card: what was trained, on which data, how, at what cost, and what it scored, with intervals.

Everything stands in the run's files; what is not there is said to be unknown, never made up. The front matter is the
hub's own metadata (huggingface_hub's `ModelCardData`), so that it shows results, base model, data sets and licence.
"""

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from siesta.rl.cost import Cost, read_costs
from siesta.rl.licences import UNKNOWN, licence_of
from siesta.rl.origin import Origin, read_origin
from siesta.rl.recipe import Recipe

RECIPE_FILE = "siesta_recipe.yaml"  # not recipe.yaml: that is what a run directory is known by
DATA_FILE = "data.json"
PACKAGES = ("siesta-rl", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
# Settings without which the numbers cannot be understood; the recipe has them all.
WARMUP_KEYS = ("pairing", "max_steps", "learning_rate")
RL_KEYS = (
    "mode_objective",
    "mode_sampling",
    "advantage",
    "alpha",
    "tau",
    "beta",
    "price_per_token",
    "learning_rate",
    "max_steps",
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "temperature",
)


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Args:
        checkpoint: The folder whose weights are exported.
        final: Whether these are the weights that the run's evaluation measured.
        results: evaluation.json, if the run has one.
        sizes: data.json, if the run has one: items of each split, and how many were left out as overlap.
        licence: Of the model itself, as the user has named it.
    """

    recipe: Recipe
    checkpoint: Path
    final: bool
    origin: Origin | None
    results: dict | None
    sizes: dict | None
    costs: dict[str, Cost]
    licence: str | None = None

    @property
    def result(self) -> dict | None:
        """The last evaluation, if it is one of these weights."""
        return self.results[list(self.results)[-1]] if self.results and self.final else None


def gather(run: Path, recipe: Recipe, checkpoint: Path, licence: str | None = None) -> Facts:
    """Read the run's files.

    Raises:
        CheckpointError: cost.json is damaged.
    """
    last = run / ("rl" if recipe.rl.enabled else "warmup" if recipe.warmup.enabled else "model")

    def content(name: str) -> dict | None:
        file = run / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    final = checkpoint.resolve() == last.resolve()
    origin = read_origin(run / "model")
    found = content("evaluation.json"), content(DATA_FILE), read_costs(run)
    return Facts(recipe, checkpoint, final, origin, *found, licence)


# ---- what the hub reads --------------------------------------------------------------------------------------------


def sources(recipe: Recipe) -> dict[str, str]:
    """Split -> where its items come from: a task, families, a file or a data set of the hub."""
    data = recipe.data
    if data.train is None:
        name = f"task {data.task}" if data.task else f"reasoning-gym: {', '.join(data.families or [])}"
        return dict.fromkeys(("train", "validation", "test"), f"{name}, generated")
    assert data.test is not None  # the recipe has checked it
    own = {"train": data.train, "validation": data.validation or data.train, "test": data.test}
    return {
        split: f"{source.path}, split {source.split}" if is_hub(source.path) else f"file {Path(source.path).name}"
        for split, source in own.items()
    }


def is_hub(path: str) -> bool:
    """Whether a source's path is the name of a data set on the hub; see `siesta.data.sources.read_rows`."""
    return Path(path).suffix not in (".jsonl", ".json", ".parquet")


def hub_datasets(recipe: Recipe) -> dict[str, str | None]:
    """Names of the hub's data sets in the recipe -> revision."""
    named = (recipe.data.train, recipe.data.validation, recipe.data.test)
    return {source.path: source.revision for source in named if source is not None and is_hub(source.path)}


def eval_results(facts: Facts) -> list[EvalResult]:
    """Accuracy, tokens and regret of the free choice and of every forced mode, as the hub's model index has them."""
    if facts.result is None:
        return []
    test = sources(facts.recipe)["test"]
    hub = facts.recipe.data.test is not None and is_hub(facts.recipe.data.test.path)
    kind = facts.recipe.data.test.path if hub and facts.recipe.data.test else "siesta"
    found = []
    for decoding in ("greedy", "sampled"):
        for policy, row in facts.result[decoding].items():
            if policy != "free" and not policy.startswith("always-"):
                continue
            for name, unit in (("accuracy", "accuracy"), ("tokens", "tokens per answer")):
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="answering with a choice of mode",
                        dataset_type=kind,
                        dataset_name=test,
                        dataset_split="test",
                        metric_type=name,
                        metric_name=f"{unit}, {policy}, {decoding}",
                        metric_value=round(row[name], 4),
                        metric_args={"interval_95": [round(bound, 4) for bound in row["interval"][name]]},
                    )
                )
    return found


def front_matter(facts: Facts) -> str:
    """YAML between two lines of dashes. The licence of a base model is not that of what was made of it."""
    hub = facts.origin is not None and facts.origin.revision is not None
    found = eval_results(facts)
    data = ModelCardData(
        model_name=str(facts.recipe.tracking.run),
        base_model=facts.origin.path if hub and facts.origin else None,
        datasets=list(hub_datasets(facts.recipe)) or None,
        license=facts.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["siesta", "degrpo", "grpo", "trl", "adaptive-thinking"],
        eval_results=found or None,
    )
    return f"---\n{data.to_yaml()}\n---"


# ---- what people read ----------------------------------------------------------------------------------------------


def model_card(facts: Facts) -> str:
    """The whole card."""
    parts = [
        front_matter(facts),
        *about(facts),
        *evaluation(facts),
        *data(facts),
        *training(facts),
        *cost(facts),
        *licences(facts),
        "## Versions",
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    ]
    return "\n\n".join(parts) + "\n"


def about(facts: Facts) -> Iterator[str]:
    """What the model is, and its modes."""
    recipe = facts.recipe
    base = facts.origin or recipe.model.path or "an embedded model, built from scratch"
    yield f"# {recipe.tracking.run}"
    yield (
        f"Trained with siesta from {base}; these are the {'final' if facts.final else facts.checkpoint.name} weights "
        "of the run. The first token of every answer is a control token that names its mode; the chat template ends "
        "right before it, and the model chooses."
    )
    rows = [
        [name, f"`{mode.token}`", f"{mode.max_tokens:,}", f"{mode.correct:g}", f"{mode.wrong:g}"]
        for name, mode in recipe.modes.items()
    ]
    yield markdown(["mode", "control token", "most tokens", "reward if right", "if wrong"], rows)
    yield "`modes.json` has the same for servers: `vllm serve` where siesta is installed, `siesta chat`, transformers."


def evaluation(facts: Facts) -> Iterator[str]:
    """Numbers with their intervals."""
    yield "## Evaluation"
    if facts.results is None:
        yield "Not evaluated."
    elif facts.result is None:
        yield "These weights were not evaluated: the run's evaluation is of its final ones."
    else:
        yield f"On {facts.result['items']} test items that training has not seen ({sources(facts.recipe)['test']})."
        for decoding in ("greedy", "sampled"):
            yield markdown_table(facts.result, decoding)
        if "states" in facts.result:
            yield "The tables above are with the whole context; by the state of the sleep, free choice:"
            yield state_table(facts.result)


def data(facts: Facts) -> Iterator[str]:
    """Where items come from, how many, and whether training has seen those that were measured."""
    yield "## Data"
    sizes = facts.sizes or {}
    where = sources(facts.recipe)
    rows = [[split, source, f"{sizes[split]:,}" if split in sizes else UNKNOWN] for split, source in where.items()]
    yield markdown(["split", "source", "items"], rows)
    if facts.recipe.data.unseen_share and {"rl", "warmup"} <= sizes.keys():
        yield f"Of the training items RL asked {sizes['rl']:,}; the warm-up was taught on {sizes['warmup']:,} others."
    if facts.recipe.data.train is None:
        yield "Overlap: none. An item's text decides its split, so that none stands in two."
    elif "overlap" in sizes:
        yield (
            f"Overlap: {sizes['overlap']:,} training items also stood in an evaluation set (same text, capitals and "
            "white space aside); they were left out of training. Paraphrases, and what the base model has seen, were "
            "not looked for."
        )
    else:
        yield "Overlap: training items with the text of an evaluation item are left out; how many is not recorded."
    if facts.recipe.warmup.responses is not None:
        yield f"The warm-up was taught on collected responses ({Path(facts.recipe.warmup.responses).name})."


def training(facts: Facts) -> Iterator[str]:
    """The recipe, and what of it is needed to read the numbers."""
    recipe = facts.recipe
    yield "## Training"
    yield f"The whole recipe: [{RECIPE_FILE}]({RECIPE_FILE}); `siesta train {RECIPE_FILE}` runs it."
    rows = [["seed", recipe.seed], ["model.dtype", recipe.model.dtype], ["sleep.mechanism", recipe.sleep.mechanism]]
    if recipe.model.lora is not None:
        rows.append(["model.lora", json.dumps(recipe.model.lora)])
    if recipe.warmup.enabled:
        own = vars(recipe.warmup) | recipe.warmup.trainer_fields()
        rows += [[f"warmup.{key}", own[key]] for key in WARMUP_KEYS if key in own]
    if recipe.rl.enabled:
        rows += [[f"rl.{key}", recipe.rl.setting(key)] for key in RL_KEYS]
    yield markdown(["setting", "value"], [[f"`{key}`", f"{value}"] for key, value in rows])


def cost(facts: Facts) -> Iterator[str]:
    """Time and energy of each stage."""
    yield "## Time and energy"
    if not facts.costs:
        yield "Not recorded."
        return
    rows = []
    for stage, own in facts.costs.items():
        if own.parts == 0:
            continue
        energy = "not measured" if own.joules is None else f"{own.joules / 3600:.2f} Wh on {own.gpus} GPU(s)"
        least = f" and {own.killed} killed start(s), not counted" if own.killed else ""
        time = f"{own.seconds:.0f} s" if own.seconds < 100 else f"{own.seconds / 60:.1f} min"
        rows.append([stage, time + least, energy])
    yield markdown(["stage", "time", "energy of the GPUs"], rows)
    reasons = list(dict.fromkeys(own.unmeasured for own in facts.costs.values() if own.unmeasured))
    if reasons:
        yield f"Energy: {'; '.join(reasons)}. Nothing is estimated."
    else:
        yield "Energy is the difference of the driver's counters: whole GPUs, without processors, memory and cooling."


def licences(facts: Facts) -> Iterator[str]:
    """What is known of them; nothing is concluded from it."""
    yield "## Licence"
    named = facts.licence or "not named by those who trained it"
    lines = [f"This model: {named}."]
    if facts.origin is None and facts.recipe.model.path is None:
        lines.append("Base model: none, its weights were made from scratch.")
    else:
        lines.append(f"Base model: {licence_of(facts.origin)}.")
    for name, revision in hub_datasets(facts.recipe).items():
        lines.append(f"Data set {name}: {licence_of(Origin(name, revision), 'dataset')}.")
    if facts.recipe.data.train is None:
        maker = "reasoning-gym" if facts.recipe.data.families else "siesta"
        lines.append(f"Data: generated by {maker} (Apache-2.0).")
    elif not hub_datasets(facts.recipe):
        lines.append("Data: files; their licence is unknown.")
    yield "\n".join(f"- {line}" for line in lines)


# ---- tables --------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; a bar in a cell would end it."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def with_interval(row: dict, name: str, digits: int, scale: float = 1.0) -> str:
    """A number of a policy and its interval."""
    low, high = (f"{scale * bound:.{digits}f}" for bound in row["interval"][name])
    return f"{scale * row[name]:.{digits}f} [{low}, {high}]"


def markdown_table(result: dict, decoding: str = "greedy") -> str:
    """One decoding of `policies.table` in Markdown."""
    rows = result[decoding]
    last = list(rows["free"]["shares"])[-1]
    levels = list(rows["free"]["levels"]) if len(rows["free"]["levels"]) > 1 else []
    header = ["policy", "accuracy %", "tokens", f"{last} %", "regret", *(f"{last} % L{level}" for level in levels)]
    cells = [
        [
            name,
            with_interval(row, "accuracy", 1, 100),
            with_interval(row, "tokens", 1),
            f"{100 * row['shares'][last]:.0f}",
            with_interval(row, "regret", 3),
            *(f"{100 * row['levels'][level]['shares'][last]:.0f}" for level in levels),
        ]
        for name, row in rows.items()
    ]
    note = f"{result['items']} items, {decoding} decoding; brackets: 95 % bootstrap interval over items."
    return f"{markdown(header, cells)}\n\n{note}"


def state_table(result: dict) -> str:
    """The free choice behind every state of a sleep, greedy; see `siesta.rl.sleep.states`."""
    last = list(result["greedy"]["free"]["shares"])[-1]
    rows = [
        [
            state,
            with_interval(own["greedy"]["free"], "accuracy", 1, 100),
            with_interval(own["greedy"]["free"], "tokens", 2),
            f"{100 * own['greedy']['free']['shares'][last]:.0f}",
        ]
        for state, own in {"none": result, **result["states"]}.items()
    ]
    return markdown(["state", "accuracy %", "tokens", f"{last} %"], rows)
