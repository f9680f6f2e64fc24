"""Further faults through the real command: numbers that are not finite, signals, full disks, models that bring code,
trackers that fail, credentials.
"""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import psutil
import torch

from benchmarks.faults_files import Stage
from benchmarks.faults_injectors import at_call, flip, plant, raiser, truncate
from benchmarks.faults_inputs import CANARY, refuse, setting
from benchmarks.faults_kills import STEP
from benchmarks.faults_process import Ended
from benchmarks.faults_row import Row, finished, one_line, refused, tracebacks
from siesta.rl import checkpoints
from siesta.rl.report import read_metrics
from siesta.rl.trainer import DeGRPOTrainer
from siesta.rl.warmup_trainer import WarmupTrainer

NAN = float("nan")
STOPPED = "siesta: stopped: "
# Made up, and in pieces so that no scanner takes them for real ones.
SECRETS = {
    "HF_TOKEN": "hf" + "_" + "Q7w8e9R0t1Y2u3I4o5P6a7S8d9F0g1H2j3",
    "WANDB_API_KEY": "c0ffee" * 6 + "1234",
    "OPENAI_API_KEY": "sk" + "-" + "proj-n0tARealKey4567890123456789012345678",
}


def own_lines(ended: Ended, *words: str) -> list[str]:
    """Lines of both streams that hold all of these words."""
    return [line for line in (ended.out + ended.err).splitlines() if all(word in line for word in words)]


# ---- numbers -------------------------------------------------------------------------------------------------------


def endless_rewards(stage: Stage, value: str) -> Row:
    """A table with a reward that is not finite: no step can be taken, and the run says so and ends."""
    name = f"reward{value}"
    ended = stage.start(name, f"modes.think.wrong={value}").end()
    last = ended.told[-1:]
    failures = tracebacks(ended) + one_line(last, [STOPPED, "steps in a row were skipped", "not finite: reward"])
    if ended.code != 3:
        failures.append(f"exit code {ended.code} instead of 3")
    told = last[0].removeprefix(STOPPED) if last else ""
    return Row(
        "numbers",
        f"rewards of {value[1:] if value[0] == '.' else value.replace('.', '')}",
        5,
        "nothing kept",
        message=told,
        failures=failures,
    )


def broken_loss(kind: type[DeGRPOTrainer] | type[WarmupTrainer], steps: tuple[int, ...]) -> Callable[[], None]:
    """Makes the loss of some steps NaN, and with it every gradient."""

    def inject() -> None:
        step = kind.training_step

        def training_step(self, *args, **kwargs):
            loss = step(self, *args, **kwargs)
            if self.state.global_step in steps:
                for parameter in self.model.parameters():
                    parameter.grad = None if parameter.grad is None else parameter.grad * NAN
            return loss

        kind.training_step = training_step

    return inject


def broken_gradients(stage: Stage, part: str, kind: type[DeGRPOTrainer] | type[WarmupTrainer]) -> Row:
    """Two steps with a gradient of NaN, not in a row: both are skipped, counted and named; the run ends."""
    name = f"gradient-{part}"
    ended = stage.start(name, inject=broken_loss(kind, (1, 3))).end()
    lines = own_lines(ended, "is skipped, not finite: ")
    failures = finished(ended)
    for step in (2, 4):
        failures += one_line([line for line in lines if line.startswith(f"step {step} is skipped")], ["gradient"])
    rows = read_metrics(stage.folder / name, part) if ended.code == 0 else []
    counted = sum(row.get("guard/skipped_steps", 0) for row in rows)
    if counted != 2:
        failures.append(f"{counted} skipped steps are counted, not 2")
    if ended.code == 0 and not finite_weights(stage.folder / name / part):
        failures.append("weights are not finite")
    lost = f"{counted:.0f} steps, counted"
    return Row("numbers", f"gradients of NaN in {part}", 2, lost, message=" / ".join(lines), failures=failures)


def finite_weights(folder: Path) -> bool:
    """Whether all weights of a model are numbers."""
    from safetensors.torch import load_file

    return all(bool(torch.isfinite(weight).all()) for weight in load_file(folder / "model.safetensors").values())


# ---- signals -------------------------------------------------------------------------------------------------------


def signals(stage: Stage, number: signal.Signals, times: int) -> Row:
    """Stop at a random step, go on with the same command, compare."""
    rng = Random(number)
    row = Row("signals", number.name, times, "nothing", message="")
    seconds = []
    for i in range(times):
        name = f"{number.name}-{i}"
        part, last = ("rl", stage.steps) if i % 2 == 0 else ("warmup", 30)
        target = (part, str(rng.randrange(1, last - 1)))
        process = stage.start(name)
        process.until(lambda process=process, target=target: target in STEP.findall(process.printed))
        process.signal(number)
        ended = process.end()
        lines = [line for line in ended.told if line.startswith("siesta: ")]  # warnings about rewards stand before it
        row.failures += tracebacks(ended) + one_line(
            lines, [f"{number.name}: stopped at step ", f"{name}/{part}/checkpoint-"]
        )
        if ended.code != 128 + number or ended.told[-1:] != lines:
            row.failures.append(f"exit code {ended.code}, last line {ended.told[-1:]}")
        row.message = lines[0].removeprefix("siesta: ") if lines else ""
        again = stage.start(name)
        if again.until(lambda again=again: STEP.search(again.printed) is not None):
            seconds.append(again.age)
        row.failures += finished(again.end()) or stage.unlike(name)
    row.recovery = f"{max(seconds):.1f} s at most" if seconds else ""
    return row


# ---- disks ---------------------------------------------------------------------------------------------------------


def full_disk(stage: Stage) -> list[Row]:
    """The disk becomes full in the middle of a save, and there is no room before one; both for a while."""

    def in_a_save() -> None:
        full = raiser(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        torch.save = at_call(8, torch.save, full)

    def before_a_save() -> None:
        calls = iter(range(10**6))
        real = shutil.disk_usage
        nothing = SimpleNamespace(total=1, used=1, free=0)
        checkpoints.shutil.disk_usage = lambda folder: nothing if next(calls) in (3, 4) else real(folder)

    rows = []
    for what, inject, times, words in (
        ("the disk becomes full in a save", in_a_save, 1, "the disk is full"),
        ("no room for a save, twice", before_a_save, 2, "GiB are needed"),
    ):
        name = what.replace(" ", "-").replace(",", "")
        ended = stage.start(name, inject=inject).end()
        lines = own_lines(ended, "CHECKPOINT NOT WRITTEN", words)
        failures = finished(ended) or stage.unlike(name)
        if len(lines) != times:
            failures.append(f"{len(lines)} lines instead of {times}")
        rows.append(
            Row("disks", what, times, f"{times} checkpoint{'s' * (times > 1)}", message=lines[0] if lines else "")
        )
        rows[-1].failures = failures
    return rows


# ---- code from outside ---------------------------------------------------------------------------------------------


def code_in_models(folder: Path, model: Path) -> list[Row]:
    """Copies of a model that would run code when they are loaded."""
    rows = []
    for place, name in enumerate(("pytorch_model.bin", "config.json", "tokenizer_config.json")):
        own = folder / str(place)
        own.mkdir(parents=True)
        files = {file.name: file.read_bytes() for file in model.iterdir()}
        files[name] = poisoned(name, files.get(name, b"{}"), own / CANARY)
        files["code.py"] = f"import os\nos.mkdir({CANARY!r})\n".encode()
        if name == "pytorch_model.bin":
            del files["model.safetensors"]
        case = setting(f"code in `{name}` of a model", "model.path=bad", "model.path: bad")
        case = case._replace(files={f"bad/{file}": content for file, content in files.items()})
        rows.append(refuse("code from outside", case, own))
    return rows


def poisoned(name: str, content: bytes, canary: Path) -> bytes:
    """A file of a model with code in it."""
    if name == "pytorch_model.bin":
        file = canary.with_name("pickle")
        plant(file, canary)
        return file.read_bytes()
    own = {
        "config.json": {"auto_map": {"AutoConfig": "code.Own"}, "model_type": "own"},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"},
    }[name]
    return json.dumps(json.loads(content) | own).encode()


# ---- trackers and credentials --------------------------------------------------------------------------------------


def wandb_away(stage: Stage) -> Row:
    """wandb has a key and no server; and the keys in the environment stand in none of the run's files."""

    def inject() -> None:
        os.environ.pop("WANDB_MODE", None)
        os.environ.update(SECRETS | {"WANDB_BASE_URL": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"})

    ended = stage.start("away", "tracking.report_to=[wandb]", inject=inject).end()
    lines = own_lines(ended, "wandb: 127.0.0.1 cannot be reached")
    failures = (finished(ended) or stage.unlike("away")) + one_line(lines, ["offline files"])
    for file in (path for path in (stage.folder / "away").rglob("*") if path.is_file()):
        found = [name for name, secret in SECRETS.items() if secret.encode() in file.read_bytes()]
        failures += [f"{file.name} holds {name}" for name in found]
    failures += [f"{name} is printed" for name, secret in SECRETS.items() if secret in ended.out + ended.err]
    what = "wandb's server cannot be reached; three credentials in the environment"
    return Row("trackers", what, 1, "nothing", message=lines[0] if lines else "", failures=failures)


def wandb_killed(stage: Stage) -> Row:
    """SIGKILL to wandb's own process in the middle of RL."""

    def inject() -> None:
        os.environ["WANDB_MODE"] = "offline"

    process = stage.start("killed", "tracking.report_to=[wandb]", inject=inject)
    process.until(lambda: ("rl", "2") in STEP.findall(process.printed))
    services = [child for child in psutil.Process(process.pid).children(recursive=True) if "wandb" in child.name()]
    for service in services:
        service.kill()
    ended = process.end()
    lines = [line for line in ended.told if line.startswith("wandb is given up")]
    failures = (finished(ended) or stage.unlike("killed")) + one_line(lines, ["metrics.jsonl is complete"])
    if not services:
        failures.append("wandb had no process to kill")
    return Row(
        "trackers",
        "wandb's process is killed",
        1,
        "what wandb had",
        message=" / ".join(lines),
        failures=failures,
    )


def credentials(folder: Path) -> list[Row]:
    """Credentials in a recipe: refused, and not repeated."""
    rows = []
    for place, (override, key) in enumerate(
        (
            (f"rl.hub_token={SECRETS['HF_TOKEN']}", "rl.hub_token"),
            (f"tracking.project=by-{SECRETS['OPENAI_API_KEY']}", "tracking.project"),
            ("data.train.path=https://me:hunter2hunter2@host/rows.jsonl", "data.train.path"),
        )
    ):
        row = refuse("credentials", setting(f"a credential in `{key}`", override, key), folder / str(place))
        secrets = [*SECRETS.values(), "hunter2hunter2"]
        row.failures += ["the credential is repeated" for secret in secrets if secret in row.message]
        rows.append(row)
    return rows


def changed_settings(stage: Stage) -> Row:
    """A run that was interrupted is started with other settings."""
    stage.copy("changed")
    ended = stage.start("changed", "rl.learning_rate=0.5").end()
    failures = refused(ended, ["changed: stage 'rl' was made with another rl", "tracking.run="])
    told = ended.told[0].removeprefix("siesta: error: ") if ended.told else ""
    return Row("configuration", "other settings for a run that has begun", message=told, failures=failures)


def spoil(file: Path) -> None:
    """One bit of a text becomes what no text holds."""
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0x80
    file.write_bytes(content)


# File of a run directory, what happens to it, words of the line.
RUN_FILES = (
    ("stages.json", truncate, "stages.json: damaged"),
    ("started.json", truncate, "started.json: damaged"),
    ("metrics.jsonl", spoil, ": damaged; remove the line"),
    ("samples.jsonl", spoil, ": damaged; remove the line"),
    ("model/config.json", truncate, "model: config.json is truncated"),
    ("model/tokenizer.json", flip, "model: tokenizer.json is changed"),
    ("warmup/model.safetensors", truncate, "warmup: model.safetensors is truncated"),
    ("warmup/model.safetensors", flip, "warmup: model.safetensors is changed"),
    ("warmup/config.json", Path.unlink, "warmup: config.json is missing"),
)


def damaged_runs(stage: Stage) -> list[Row]:
    """Files of a run directory outside of checkpoints, damaged when the run was killed in RL."""
    rows = []
    for file, damage, words in RUN_FILES:
        what = {truncate: "cut off", flip: "one bit changed", spoil: "one bit changed", Path.unlink: "removed"}[damage]
        name = f"run-{len(rows)}"
        damage(stage.copy(name) / file)
        ended = stage.run(name)
        told = ended.told[0].removeprefix("siesta: error: ") if ended.told else ""
        rows.append(Row("run directory", f"`{file}` of a run: {what}", message=told, failures=refused(ended, [words])))
    return rows


def further(folder: Path, times: int = 3) -> list[Row]:
    """All rows of this page's part; `times` for each signal."""
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage(folder / "stage", 6)
    rows = [endless_rewards(stage, value) for value in (".nan", "-.inf")]
    rows += [broken_gradients(stage, "warmup", WarmupTrainer), broken_gradients(stage, "rl", DeGRPOTrainer)]
    rows += [signals(stage, number, times) for number in (signal.SIGTERM, signal.SIGINT)]
    rows += full_disk(stage) + code_in_models(folder / "models", stage.folder / "undisturbed" / "model")
    rows += [wandb_away(stage), wandb_killed(stage), *credentials(folder / "credentials"), changed_settings(stage)]
    rows += damaged_runs(stage)
    return rows
