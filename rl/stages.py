"""The stages of a run, in order: model, warm-up, RL, evaluation, export, report. Each reads what others left."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, cast

from datasets import Dataset
from transformers import PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

from siesta.data.errors import RecipeError
from siesta.data.prompts import messages
from siesta.data.schema import Example
from siesta.rl import policies
from siesta.rl.callbacks import CollapseGuard, HackAlarm, MetricsFile, SampleFile, ScreenLine, StepProgress, Validation
from siesta.rl.config import DeGRPOConfig, SleepConfig
from siesta.rl.context import Context, main_process
from siesta.rl.evaluate import print_states, print_table
from siesta.rl.export import export_checkpoint
from siesta.rl.generation import fixed_randomness
from siesta.rl.guards import GuardStop, SpikeGuard
from siesta.rl.launch import trainer_line
from siesta.rl.models import lora_config, make_model, save_model
from siesta.rl.modes import check_stage_ids
from siesta.rl.origin import read_origin
from siesta.rl.page import read_story
from siesta.rl.panels import Panels, final_panels
from siesta.rl.policies import Measurement
from siesta.rl.precision import default_device, mixed_by_default
from siesta.rl.quantize import quantization_config
from siesta.rl.report import write_report
from siesta.rl.resumable import ResumableTrainer, agreed, train_on
from siesta.rl.run import write_atomically
from siesta.rl.signals import StopOnSignal
from siesta.rl.sleep.factory import build_consolidator
from siesta.rl.sleep.state_trainer import StateTrainer
from siesta.rl.sleep.state_warmup import StateWarmupTrainer, with_contexts
from siesta.rl.sleep.states import evaluation
from siesta.rl.sleep.trainer import SleepTrainer
from siesta.rl.sleep.warmup import writer_rows
from siesta.rl.timing import Profile
from siesta.rl.tracking import start_trackers
from siesta.rl.trainer import DeGRPOTrainer
from siesta.rl.validation import validate
from siesta.rl.warmup import IGNORED, StopOnAccuracy, accuracy_by_level, check_gate, warmup_rows
from siesta.rl.warmup_trainer import SortedWarmupTrainer, WarmupTrainer

CHECKED_PROMPTS = 64


def trainer_settings(context: Context, stage: str, fields: dict) -> dict:
    """Settings that both trainers get, unless the recipe says otherwise."""
    settings = {
        "output_dir": str(context.path / stage),
        "run_name": f"{context.recipe.tracking.run}-{stage}",
        "seed": context.recipe.seed,
        "report_to": start_trackers(context.recipe.tracking, context.path),
        "disable_tqdm": True,
        "bf16": mixed_by_default(),
        "dataloader_pin_memory": default_device() == "cuda",
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,
    }
    return settings | fields


def model_arguments(context: Context) -> dict:
    """How both trainers load the model of the stage before."""
    section = context.recipe.model
    return {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code}


def rl_config(context: Context) -> DeGRPOConfig:
    """The recipe's `rl:` section as a config.

    Raises:
        RecipeError: TRL refuses a value or a combination.
    """
    recipe = context.recipe
    fields = trainer_settings(context, "rl", recipe.rl.trainer_fields())
    kind = DeGRPOConfig
    if context.writes_notes:
        # The recipe's groups are those of answers from the same notes.
        kind = partial(SleepConfig, sleeps=recipe.sleep.sleeps)
        fields["num_generations"] = recipe.sleep.sleeps * recipe.rl.setting("num_generations")
    try:
        config = kind(**fields)
    except ValueError as error:
        raise RecipeError(f"rl: {error}") from error
    config.model_init_kwargs = model_arguments(context)
    return config


def on_main(work: Callable[[Context], None]) -> Callable[[Context], None]:
    """`work` is done by the main process alone. The others wait for it, and end with it if it ends in a UserError."""

    @wraps(work)
    def stage(context: Context) -> None:
        agreed(lambda: work(context))

    return stage


@on_main
def model_stage(context: Context) -> None:
    """Build or fetch the model and give it the control tokens."""
    prepare = partial(build_consolidator, context.recipe.sleep) if context.trains_states else None
    with fixed_randomness(context.recipe.seed):
        make_model(context.recipe, context.path / "model", prepare)
    if origin := read_origin(context.path / "model"):
        context.say(f"model: {origin}, in {context.recipe.model.dtype}")


def warmup_stage(context: Context) -> None:
    """Teach every mode, then check that RL can start."""
    section = context.recipe.warmup
    if section.enabled:
        validation = context.examples("validation", section.check_items)
        trainer = warmup_trainer(context, validation)
        check_first_batch(context, trainer)
        train(context, trainer, "warmup")
        save_trained(context, trainer, "warmup")
    warmup_gate(context)


@on_main
def warmup_gate(context: Context) -> None:
    """Can RL start from what the warm-up has left?"""
    section = context.recipe.warmup
    context.tracker.begin("warm-up gate")
    model = context.load(context.start)
    measured = measure_taught(context, model, context.examples("validation", section.check_items))
    shares = ", ".join(
        f"P({name}) {share:.2f}" for name, share in zip(measured.modes, measured.mode_probs.mean(0), strict=True)
    )
    context.say(f"warm-up gate: mass {measured.mass.mean():.3f}, {shares}")
    context.say(f"warm-up gate: accuracy % by level: {accuracy_by_level(measured)}")
    check_gate(measured, section, context.modes)


def measure_taught(context: Context, model: Any, validation: list[Example]) -> Measurement:
    """What the warm-up is stopped by: every mode without a state, and how right sleep is if there is one."""
    measured = context.measure(model, validation, samples=1)
    return replace(measured, sleep_right=context.sleep_right(model, validation)) if context.sleeps else measured


def warmup_config(context: Context) -> SFTConfig:
    """The recipe's `warmup:` section as a config."""
    # max_length None: TRL would cut long rows without a word; the prompt limit has been checked.
    fields = {"save_strategy": "no", "max_length": None} | context.recipe.warmup.trainer_fields()
    fields.setdefault("ddp_timeout", context.recipe.rl.setting("ddp_timeout"))  # of the process group, which is there
    try:
        config = SFTConfig(**trainer_settings(context, "warmup", fields))
    except ValueError as error:
        raise RecipeError(f"warmup: {error}") from error
    config.model_init_kwargs = model_arguments(context)
    return config


def warmup_trainer(context: Context, validation) -> WarmupTrainer:
    """SFTTrainer on two-mode rows."""
    recipe, section = context.recipe, context.recipe.warmup
    rows = warmup_rows(
        context.taught_examples,
        context.judge,
        pairing=section.pairing,
        shares=section.shares,
        instruction=recipe.data.instruction,
        seed=recipe.seed,
        balanced=section.balanced,
        own_only=section.responses is not None or section.max_level is not None,
    )
    if context.writes_notes:
        # Behind the readers' rows: the first batch is checked against their prompts.
        rows = Dataset.from_list(rows.to_list() + writer_rows(context.warmup_examples, context.notes()))
    config = warmup_config(context)
    kind: Any = SortedWarmupTrainer if context.writes_notes else WarmupTrainer
    if context.trains_states:
        rows = with_contexts(rows, context.taught_behind[1])
        kind = partial(StateWarmupTrainer, way=context.way, passes=recipe.sleep.passes)
    trainer = kind(
        model=context.trainable(context.path / "model"),
        args=config,
        train_dataset=rows,
        processing_class=context.tokenizer,
        quantization_config=quantization_config(recipe.model),
        peft_config=lora_config(recipe.model.lora, train_embeddings=True),
    )
    trainer.max_skipped_steps = recipe.rl.setting("max_skipped_steps")
    trainer.length_power = section.length_power
    line = trainer.pack_if_possible(recipe.rl.setting("attention"), compiled=recipe.rl.setting("compile_layers"))
    if line is not None:
        context.say(f"warm-up: {line}")
    trainer.add_callback(
        StopOnAccuracy(lambda model: measure_taught(context, model, validation), section, context.say)
    )
    watch(context, trainer, "warmup", {"loss": "loss", "mean_token_accuracy": "token accuracy"})
    return trainer


def check_first_batch(context: Context, trainer: SFTTrainer) -> None:
    """Prove on a real batch of the warm-up that the ids before the loss are those of data/prompts.py."""
    count = min(CHECKED_PROMPTS, len(context.taught_examples))
    rows = [cast(Dataset, trainer.train_dataset)[i] for i in range(count)]
    batch = trainer.data_collator(rows)
    found = []
    for ids, labels, row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), rows, strict=True):
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        start -= ids[start] not in context.modes.token_ids  # a control token without loss: `warmup.balanced`
        assert ids[start] in context.modes.token_ids, row
        found.append(ids[:start])
    shown = len(context.modes) if context.recipe.warmup.pairing == "paired" else 1
    expected = [ids for ids in context.prompts(context.taught_examples[:count]) for _ in range(shown)][:count]
    check_stage_ids("warm-up", expected, found)


def train(context: Context, trainer: ResumableTrainer, stage: str) -> None:
    """Train, from the stage's newest intact checkpoint if there is one."""
    train_on(trainer, context.path / stage, context.say)


def save_trained(context: Context, trainer: Trainer, stage: str) -> None:
    """Leave a whole model in the stage's folder; a LoRA adapter is kept beside it and merged."""
    folder = context.path / stage
    if context.recipe.model.lora is None:
        trainer.save_model(str(folder))
        return
    trainer.save_model(str(folder / "adapter"))
    if main_process():
        save_model(context.load(folder / "adapter", "cpu"), context.tokenizer, folder)


def watch(context: Context, trainer: Trainer, stage: str, columns: dict[str, str]) -> None:
    """Screen line, metrics.jsonl, signals and spikes for a trainer; says how it is sharded.

    Raises:
        LaunchError: Not as the launcher was asked to.
    """
    context.say(f"{stage}: {trainer_line(trainer)}")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsFile(context.path / "metrics.jsonl", stage))
    trainer.add_callback(ScreenLine(stage, columns, context.say))
    trainer.add_callback(StepProgress(stage, context.tracker))
    trainer.add_callback(SpikeGuard())
    trainer.add_callback(StopOnSignal(context.stop))


def rl_dataset(context: Context) -> Dataset:
    """Rows of `prompt`, `answer` and `verifier`; for sleep of `context` and `query` as well."""
    columns = ("answer", "verifier", "context", "query") if context.sleeps else ("answer", "verifier")
    return Dataset.from_list(
        [
            {"prompt": messages(example, context.recipe.data.instruction)}
            | {column: vars(example)[column] for column in columns}
            for example in context.rl_examples
        ]
    )


def rl_stage(context: Context) -> None:
    """DeGRPO from the warmed-up model; goes on from the last checkpoint if there is one."""
    recipe = context.recipe
    if not recipe.rl.enabled:
        return
    guard = CollapseGuard(recipe.rl.guard, context.modes.names)
    kind: Any = DeGRPOTrainer
    if context.writes_notes:
        kind = partial(SleepTrainer, sleep=context.notes(context.temperature))
    elif context.trains_states:
        kind = partial(StateTrainer, way=context.way, sleep_section=recipe.sleep)
    trainer = kind(
        model=context.trainable(context.start),
        judge=context.judge,
        args=rl_config(context),
        train_dataset=rl_dataset(context),
        quantization_config=quantization_config(recipe.model),
        peft_config=lora_config(recipe.model.lora, train_embeddings=not recipe.warmup.enabled),
        callbacks=[guard, HackAlarm(recipe.rl.setting("hack_alarm"), context.judge.hack_prices)],
    )
    context.say(trainer.passes.line)
    if trainer.method.profile:
        trainer.add_callback(Profile(context.path / "rl" / "profile"))
    sample = context.rl_examples[:CHECKED_PROMPTS]
    found, _, _ = trainer._tokenize_prompts([messages(example, recipe.data.instruction) for example in sample])
    check_stage_ids("rollout", context.prompts(sample), found)
    shares = {f"mode/{name}/prob": f"P({name})" for name in context.modes.names}
    columns = {"rollout/reward": "reward", "rollout/accuracy": "accuracy", "rollout/tokens": "tokens", **shares}
    watch(context, trainer, "rl", columns | {"mode/mass": "mass", "validation/regret": "validation regret"})
    if recipe.evaluate.every:
        validation = context.examples("validation", recipe.evaluate.every_items)
        panels = Panels("wandb" in recipe.tracking.report_to)
        measure_now = partial(validate, context, trainer, validation, panels)
        trainer.add_callback(Validation(trainer, recipe.evaluate.every, measure_now))
    take = partial(trainer.reward_function.samples, recipe.tracking.samples)
    trainer.add_callback(SampleFile(context.path / "samples.jsonl", take, "wandb" in recipe.tracking.report_to))
    train(context, trainer, "rl")
    save_trained(context, trainer, "rl")
    if guard.fired_at is not None and recipe.rl.guard.action == "stop":
        told = f"collapse guard stopped the run at step {guard.fired_at}: {guard.reason}"
        raise GuardStop(told if main_process() else "")


@on_main
def evaluate_stage(context: Context) -> None:
    """Price every policy on the test items, before and after RL, and print the table."""
    section = context.recipe.evaluate
    examples = context.examples("test", section.items)
    trained = context.recipe.rl.enabled
    folders = {"before": context.start} if section.before or not trained else {}
    folders |= {"after": context.path / "rl"} if trained else {}
    results = {}
    for name, folder in folders.items():
        bootstrap = {"resamples": section.resamples, "seed": section.seed}
        context.tracker.begin(f"evaluate, {name} RL")
        model = context.load(folder)
        if context.sleeps:
            states = context.slept(model, examples)
            measured = context.measure_states(model, states, section.samples)
            results[name] = evaluation(measured, states, **bootstrap)
            continue
        responses = len(examples) * len(context.modes) * (1 + section.samples)
        context.tracker.begin(f"evaluate, {name} RL", responses, tenths=False)
        with context.writer(folder, examples) as write:
            told = context.tracker.advance
            measured = context.measure(model, examples, samples=section.samples, write=write, advance=told)
        results[name] = policies.table(measured, **bootstrap)
    write_atomically(context.path / "evaluation.json", json.dumps(results, indent=1) + "\n")
    show_evaluation(context)
    Panels("wandb" in context.recipe.tracking.report_to).show(lambda: final_panels(read_story(context.path)))


def show_evaluation(context: Context) -> None:
    """Print the tables of evaluation.json."""
    if main_process():
        results = json.loads((context.path / "evaluation.json").read_text())
        last = list(results)[-1]
        if context.sleeps:
            for name, result in results.items():
                print_states(result, f"{context.recipe.tracking.run}: {name} RL")
            return
        if len(results) > 1:
            print_table(results["before"], f"{context.recipe.tracking.run}: before RL", only=["free"])
        print_table(results[last], f"{context.recipe.tracking.run}: {last} RL")
        context.say(policies.hack_line(results[last]["hacks"]))


@on_main
def export_stage(context: Context) -> None:
    """The folder that is served."""
    section = context.recipe.export
    if section.enabled:
        trained = context.path / "rl" if context.recipe.rl.enabled else context.start
        export_checkpoint(trained, context.path / "export", run=context.path, dtype=section.dtype)


@on_main
def report_stage(context: Context) -> None:
    """report.md with the curves and the table."""
    write_report(context.path)


STAGES = {
    "model": model_stage,
    "warmup": warmup_stage,
    "rl": rl_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
    "report": report_stage,
}
