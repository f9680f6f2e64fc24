"""What both trainers add to transformers' checkpoints, so that a run that was interrupted goes on bit by bit.

The seams, held by tests/test_trl_contract.py:

- `_save_checkpoint`: all ranks write into an unfinished folder (see `_get_output_dir`), the main process seals it.
  transformers' own rotation sees that folder alone and removes nothing; ours follows the seal.
- `_save_rng_state`, `_load_rng_state`: the last thing each rank writes and the last it reads before its first step.
  Beside the generators stand what transformers and TRL would start anew: sums and metrics since the last log,
  callbacks (`StatefulCallback`), the rollouts in use.
- `_prepare_for_training`: where DeepSpeed unpickles; it is made to load data only.
- `_run_epoch`: transformers takes a step after every resume. A training that had come to its end when its last
  checkpoint was written takes none.

Without evaluation inside the trainer there is no best checkpoint, whose path transformers would take from the folder.
"""

import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count
from trl.trainer.utils import RepeatSampler

from siesta.data.errors import CheckpointError, Ending
from siesta.rl import checkpoints
from siesta.rl.checkpoints import UNFINISHED
from siesta.rl.generation import replaced
from siesta.rl.heartbeat import Heartbeat, RankLost
from siesta.rl.signals import StopOnSignal

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StatefulCallback(TrainerCallback):
    """A callback whose memory is part of a checkpoint.

    Not transformers' `ExportableState`: that puts a new object in the place of the one the stage holds and asks.
    """

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts of such."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` has given."""
        raise NotImplementedError


class EpochOrder(Sampler[int]):
    """Rows in the order of an epoch whatever came before. TRL's RepeatSampler draws one order after the other, so that
    a run resumed in its second epoch would see the order of the first again.

    Args:
        rows: Draws from `order`, or is it.
        order: Starts anew from its seed.
        epoch: The number of the epoch that begins.
    """

    def __init__(self, rows: Sampler[int], order: RepeatSampler, epoch: Callable[[], int]):
        self.rows, self.order, self.epoch = rows, order, epoch

    def __iter__(self) -> Iterator[int]:
        if self.order.shuffle:
            self.order.generator.manual_seed(cast(int, self.order.seed))
            for _ in range(self.epoch()):
                torch.randperm(self.order.num_samples, generator=self.order.generator)
        return iter(self.rows)

    def __len__(self) -> int:
        return len(cast(Sized, self.rows))


class EpochShuffle(Sampler[int]):
    """Rows shuffled anew in each epoch, by its number and the seed alone: the same on every rank, whatever numbers
    that has drawn in between, and in a run resumed in a later epoch. The order is that of accelerate's
    SeedableRandomSampler, which must be told the epoch: a sampler around it does not.

    Args:
        rows: How many.
        seed: Of the first epoch; each later one counts it up.
        epoch: The number of the epoch that begins.
    """

    def __init__(self, rows: int, seed: int, epoch: Callable[[], int]):
        self.rows, self.seed, self.epoch = rows, seed, epoch

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(torch.randperm(self.rows, generator=draw).tolist())

    def __len__(self) -> int:
        return self.rows


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every rank. An error that it ends in there ends all of them, and the
    main one tells it.
    """
    result: list[Any] = [None]
    failure: Exception | None = None
    if PartialState().is_main_process:
        try:
            result = [work()]
        except Exception as error:  # raised below, when the others know
            failure = error
            result = [type(error)() if isinstance(error, Ending) else RankLost()]
    broadcast_object_list(result)
    if failure is not None:
        raise failure
    if isinstance(result[0], Ending):
        raise result[0]
    return result[0]


def held(progress: dict[str, Any]) -> set[str]:
    """Names of what `_progress` has given, those in the memory of each callback among them."""
    callbacks: dict[str, dict[str, Any]] = progress.get("callbacks", {})
    return {*progress, *(f"{callback}.{name}" for callback, state in callbacks.items() for name in state)}


@contextmanager
def only_data() -> Iterator[None]:
    """torch.load builds tensors and plain containers and runs nothing, whatever its caller has asked for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def train_on(trainer: "ResumableTrainer", folder: Path, say: Callable[[str], None]) -> None:
    """Train, from the newest intact checkpoint in `folder` if there is one.

    Raises:
        CheckpointError: See `newest_intact`; or a file of the checkpoint holds something else than data.
        RankLost: Another rank is gone.
    """
    processes = PartialState().num_processes
    checkpoint = agreed(lambda: checkpoints.newest_intact(folder, processes, say))
    heartbeat = Heartbeat(folder, trainer.args.ddp_timeout)
    trainer.reached = heartbeat.reach
    trainer.add_callback(heartbeat)
    with heartbeat:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{checkpoint}: a file in it holds something else than data and was not loaded; delete the folder to "
                "go on from an older one"
            ) from error
        except RuntimeError as error:  # perhaps of a collective
            if (lost := heartbeat.gone()) is not None:
                raise lost from error
            raise
    trainer.remove_callback(heartbeat)


class ResumableTrainer(Trainer):
    """A Trainer with whole checkpoints. Stands before TRL's trainer among the bases."""

    reached: Callable[[str], None] = staticmethod(lambda point: None)  # called at points that every rank passes
    _folder: Path | None = None  # where a checkpoint is being written
    _sealed_step = 0

    # ---- save ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._folder is None else str(self._folder)

    def _save_checkpoint(self, model, trial):
        """Write, seal, then remove old ones; if the disk is full, leave no trace, say so and go on.

        Raises:
            CheckpointError: The disk became full on one of several ranks that write together.
        """
        folder, step = Path(cast(str, self.args.output_dir)), self.state.global_step
        if step == self._sealed_step:  # asked for twice, by the end of an epoch and by a callback
            return
        lacking = agreed(lambda: self._begin(folder))
        if lacking is None:
            failure = None
            try:
                with replaced(self, "_folder", folder / UNFINISHED):
                    super()._save_checkpoint(model, trial)
            except (OSError, RuntimeError, SafetensorError) as error:
                failure = self._if_full(error)
            failures = [line for line in gather_object([failure]) if line is not None]
            lacking = failures[0] if failures else agreed(lambda: self._seal(folder, step))
        if lacking is None:
            self._sealed_step = step
        elif self.is_world_process_zero():
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            logger.warning(
                "CHECKPOINT NOT WRITTEN, step %d: %s: %s. Training goes on, older checkpoints stay; free some space",
                step,
                folder,
                lacking,
            )

    def _begin(self, folder: Path) -> str | None:
        """Make room for a save; why there is none, or None."""
        folder.mkdir(parents=True, exist_ok=True)
        lacking = checkpoints.lacking_room(folder, self._expected_bytes(folder))
        if lacking is None:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            (folder / UNFINISHED).mkdir()
        return lacking

    def _expected_bytes(self, folder: Path) -> float:
        """Of the next checkpoint: as many as the last one, or weights and both moments of AdamW."""
        if self._sealed_step:
            return checkpoints.size_of(folder / f"checkpoint-{self._sealed_step}")
        model = cast(torch.nn.Module, self.model)
        trained = get_model_param_count(model, trainable_only=True)
        kept = trained if isinstance(model, PeftModel) else get_model_param_count(model)
        size = next(model.parameters()).dtype.itemsize
        if self.is_deepspeed_enabled:  # weights for itself and for others, float32 weights beside the moments
            return 2 * kept * size + 12 * trained
        return kept * size + 2 * trained * size

    def _if_full(self, error: Exception) -> str:
        """`error` as a line, if it says that the disk is full and the other ranks do not wait for this one."""
        if not checkpoints.disk_full(error):
            raise error
        line = f"the disk is full ({' '.join(str(error).split())})"
        if self.args.world_size > 1 and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise CheckpointError(
                f"{self.args.output_dir}: {line}; ranks that save together cannot go on, older checkpoints stay: free "
                "some space and run again"
            ) from error
        return line

    def _seal(self, folder: Path, step: int) -> str | None:
        """Move the new checkpoint to its place and remove old ones; why that was not possible, or None."""
        target = folder / f"checkpoint-{step}"
        try:
            checkpoints.seal(folder / UNFINISHED / target.name, target, self.args.world_size)
        except OSError as error:
            if not checkpoints.disk_full(error):
                raise
            return f"the disk is full ({error})"
        checkpoints.prune(folder, target, self.args.save_total_limit)
        return None

    def _epoch(self) -> int:
        """Epochs that are behind this step."""
        return int(self.state.epoch or 0)

    # ---- what a checkpoint holds beside transformers' files ---------------------------------------------------------

    def _progress_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / checkpoints.PROGRESS.format(rank=self.args.process_index)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        torch.save(self._progress(), self._progress_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._go_on(self._read_progress(checkpoint))

    def _read_progress(self, checkpoint: str | Path) -> dict[str, Any]:
        """What `_progress` was when the checkpoint was written, its tensors on the CPU.

        Raises:
            CheckpointError: Something that this version writes is not there.
        """
        file = self._progress_file(checkpoint)
        progress = torch.load(file, map_location="cpu", weights_only=True)
        if lacking := ", ".join(sorted(held(self._progress()) - held(progress))):
            raise CheckpointError(
                f"{checkpoint}: written by another version of siesta ({file.name} lacks {lacking}), and training "
                f"cannot go on from it; delete {file.parent.parent} to start the stage anew, or give the run another "
                "name (tracking.run=NAME)"
            )
        return progress

    def _progress(self) -> dict[str, Any]:
        """What this rank has to remember, as plain containers and tensors."""
        return {
            "callbacks": {type(callback).__name__: callback.state_dict() for callback in self._stateful()},
            "ended": self._ended(),
            "loss": cast(torch.Tensor, self._tr_loss).clone(),
            "logged_step": self._globalstep_last_logged,
            "metrics": dict(cast(Any, self)._metrics["train"]),
        }

    def _go_on(self, progress: dict[str, Any]) -> None:
        """Take up what `_progress` has given, its tensors on the CPU, in front of the first step."""
        for callback in self._stateful():
            callback.load_state_dict(progress["callbacks"][type(callback).__name__])
        self._tr_loss += progress["loss"].to(self.args.device)
        self._globalstep_last_logged = progress["logged_step"]
        cast(Any, self)._metrics["train"].update(progress["metrics"])

    def _run_epoch(self, *args, **kwargs):
        checkpoint = kwargs["resume_from_checkpoint"]
        first = kwargs["epoch"] == kwargs["epochs_trained"]  # later the checkpoint may have been removed
        if first and checkpoint is not None and self._had_ended(checkpoint):
            self._load_rng_state(checkpoint)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _ended(self) -> bool:
        """Whether this step is the training's last one, by the number of steps or by a callback; a signal only
        interrupts it."""
        cut_short = (each.cut_short for each in self.callback_handler.callbacks if isinstance(each, StopOnSignal))
        return self.control.should_training_stop and not any(cut_short)

    def _had_ended(self, checkpoint: str) -> bool:
        """What `_ended` was when the checkpoint was written."""
        return self._read_progress(checkpoint)["ended"]

    def _stateful(self) -> list[StatefulCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, StatefulCallback)]

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        names = [name.rpartition(".") for name in checkpoints.RECORDS] if self.is_deepspeed_enabled else []
        records = [getattr(import_module(module), name) for module, _, name in names]
        with only_data(), torch.serialization.safe_globals(cast(Any, records)):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
