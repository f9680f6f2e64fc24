"""What watches a training: screen line, progress, metrics.jsonl, samples.jsonl, validation, guard, hack alarm."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from siesta.data.errors import CheckpointError
from siesta.rl.console import Tracker
from siesta.rl.recipe import GuardSection
from siesta.rl.resumable import StatefulCallback
from siesta.rl.run import write_atomically
from siesta.rl.tracking import STEP, attempt
from siesta.rl.trainer import DeGRPOTrainer

logger = logging.getLogger(__name__)


def jsonable(value: object) -> object:
    """JSON has no NaN; it is written as text so that it shows and every reader can parse the line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def drop_rows(file: Path, dropped: Callable[[dict], bool]) -> None:
    """Rewrite a file of JSON lines without some of its rows, and without a last line that a killed run has torn.

    Raises:
        CheckpointError: A line is damaged; names it.
    """
    if not file.exists():
        return
    kept = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            text = line.decode()
            row = json.loads(text)
        except ValueError as error:  # bytes that are not UTF-8 among them
            raise CheckpointError(f"{file}, line {number}: damaged; remove the line") from error
        if not dropped(row):
            kept.append(text)
    write_atomically(file, "".join(line + "\n" for line in kept))


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl, whatever tracker is used beside it."""

    def __init__(self, file: Path, stage: str):
        self.file, self.stage = file, stage

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what will be logged again: rows beyond the step from which training goes on, and the summary."""
        if state.is_world_process_zero:
            done = state.global_step or -1  # a training that starts anew logs its step 0 again
            drop_rows(
                self.file,
                lambda row: row["stage"] == self.stage and (row["step"] > done or "train_runtime" in row),
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            row = {"stage": self.stage, "step": state.global_step, "time": round(time.time(), 3)}
            row |= {name: jsonable(value) for name, value in (logs or {}).items()}
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


class ScreenLine(TrainerCallback):
    """One plain line per log, readable in a terminal and in a file."""

    def __init__(self, stage: str, columns: dict[str, str], say: Callable[[str], None]):
        self.stage, self.columns, self.say = stage, columns, say
        self.started = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = [f"{label} {logs[key]:.4g}" for key, label in self.columns.items() if logs and key in logs]
        if state.is_world_process_zero and values:
            seconds = time.monotonic() - self.started
            self.say(f"{self.stage} {state.global_step}/{state.max_steps} ({seconds:.0f} s): " + ", ".join(values))


class StepProgress(TrainerCallback):
    """Tells how far a training has come, where its logs are not word enough."""

    def __init__(self, stage: str, tracker: Tracker):
        self.stage, self.tracker = stage, tracker

    def on_train_begin(self, args, state, control, **kwargs):
        self.tracker.begin(self.stage, state.max_steps, state.global_step, tenths=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.tracker.advance()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.tracker.heard()


class SampleFile(TrainerCallback):
    """A few rollouts with their rewards at every log, in samples.jsonl and as a wandb table."""

    def __init__(self, file: Path, take: Callable[[], list[dict]], to_wandb: bool):
        self.file, self.take, self.to_wandb = file, take, to_wandb
        self.written = 0  # the step of the last rows; a training's summary is another log of its last step

    def on_train_begin(self, args, state, control, **kwargs):
        """As `MetricsFile`: the steps that follow are sampled again."""
        self.written = state.global_step
        if state.is_world_process_zero:
            drop_rows(self.file, lambda row: row["step"] > state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        rows = self.take()
        if not state.is_world_process_zero or not rows or state.global_step == self.written:
            return
        self.written = state.global_step
        with self.file.open("a", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps({"step": state.global_step, **row}, ensure_ascii=False) + "\n")
        if self.to_wandb:
            import wandb

            cells: list[Any] = [[str(v) for v in row.values()] for row in rows]
            self.to_wandb = attempt(
                "the table of samples in wandb",
                lambda: wandb.log(
                    {"samples": wandb.Table(columns=list(rows[0]), data=cells), STEP: state.global_step}
                ),
            )


class Validation(TrainerCallback):
    """Prices the policies on validation items every so many steps; the numbers join the trainer's next log."""

    def __init__(self, trainer: DeGRPOTrainer, every: int, measure_now: Callable[[], dict[str, float]]):
        self.trainer, self.every, self.measure_now = trainer, every, measure_now

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.log(self.measure_now())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            for name, value in self.measure_now().items():
                self.trainer._metrics["train"][name].append(value)
            control.should_log = True


class CollapseGuard(StatefulCallback):
    """Warns, saves and, if the recipe says so, stops when the mode policy has collapsed for a whole window of logs.

    Collapsed means: the mean probability of a mode lies outside [min_share, max_share], or the entropy of the mean
    mode policy lies under min_entropy. The entropy of single prompts is not judged: a policy that is sure on every
    prompt, of one mode here and of another there, is what training is for. Rollout shares are not judged either: a
    plan that forces modes keeps them level whatever the policy does.
    """

    def __init__(self, section: GuardSection, modes: list[str]):
        self.section, self.modes = section, modes
        self.faults: deque[str | None] = deque(maxlen=section.window)
        self.fired_at: int | None = None
        self.reason = ""

    def state_dict(self) -> dict:
        """The faults of the last logs, and whether it has fired."""
        return {"faults": list(self.faults), "fired_at": self.fired_at, "reason": self.reason}

    def load_state_dict(self, state: dict) -> None:
        self.faults = deque(state["faults"], maxlen=self.section.window)
        self.fired_at, self.reason = state["fired_at"], state["reason"]

    def on_step_end(self, args, state, control, **kwargs):
        """A training that it has stopped stays stopped when the run is started again."""
        if self.fired_at is not None and self.section.action == "stop":
            control.should_training_stop = True

    def fault(self, logs: dict[str, float]) -> str | None:
        """What is wrong with one log, or None; a mode that is the only one cannot be lost."""
        if len(self.modes) == 1:
            return None
        for mode in self.modes:
            share = logs[f"mode/{mode}/prob"]
            if not self.section.min_share <= share <= self.section.max_share:
                return f"P({mode}) = {share:.4f} is outside [{self.section.min_share}, {self.section.max_share}]"
        entropy = logs["mode/entropy_mean_policy"]
        if not entropy >= self.section.min_entropy:
            return f"mode entropy {entropy:.4f} is under {self.section.min_entropy}"
        return None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "mode/entropy_mean_policy" not in logs:
            return
        self.faults.append(self.fault(logs))
        if self.fired_at is None and len(self.faults) == self.section.window and all(self.faults):
            self.fired_at, self.reason = state.global_step, self.faults[-1] or ""
            if state.is_world_process_zero:
                told = "collapse guard, step %d, %d logs in a row: %s"
                logger.warning(told, state.global_step, self.section.window, self.reason)
            if self.section.action in ("save", "stop"):
                control.should_save = True
            if self.section.action == "stop":
                control.should_training_stop = True


class HackAlarm(StatefulCallback):
    """Says loudly that many rollouts of a mode raise a flag of `siesta.rewards.hacking`, once each time their share
    comes to the threshold. Whether a price follows is for the recipe; here somebody is told to read samples.jsonl.
    """

    def __init__(self, threshold: float, prices: Mapping[str, float]):
        self.threshold, self.prices = threshold, prices
        self.raised: set[str] = set()

    def state_dict(self) -> dict:
        """What it has told already."""
        return {"raised": sorted(self.raised)}

    def load_state_dict(self, state: dict) -> None:
        self.raised = set(state["raised"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, share in (logs or {}).items():
            if not key.startswith("hack/"):
                continue
            _, flag, mode = key.split("/")
            if share >= self.threshold and key not in self.raised and state.is_world_process_zero:
                logger.warning(
                    "REWARD HACK? step %d: %.0f %% of the rollouts of mode %s show %s (price %g); see samples.jsonl, "
                    "and rl.hack_prices to make it cost something",
                    state.global_step,
                    100 * share,
                    mode,
                    flag,
                    self.prices.get(flag, 0.0),
                )
            (self.raised.add if share >= self.threshold else self.raised.discard)(key)
