"""Checkpoints are whole or not there: killed saves, damaged files, full disks, pickles, and going on bit by bit."""

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from trl import SFTConfig
from trl.trainer.utils import RepeatSampler

from benchmarks.faults_injectors import at_call, flip, plant, raiser, resealed, truncate
from siesta.data.errors import CheckpointError
from siesta.rl import checkpoints, resumable
from siesta.rl.callbacks import HackAlarm, SampleFile
from siesta.rl.checkpoints import MANIFEST, UNFINISHED, check_intact, newest_intact, prune, seal
from siesta.rl.config import DeGRPOConfig
from siesta.rl.resumable import EpochOrder, EpochShuffle, only_data, train_on
from siesta.rl.signals import SignalStop, StopOnSignal, StopRequest
from siesta.rl.trainer import DeGRPOTrainer
from siesta.rl.warmup_trainer import SortedWarmupTrainer, WarmupTrainer
from tests.helpers import one_step, parameters, save_tiny_model, tiny_judge
from tests.test_trainer import dataset

GIB = 2**30
CLOCK = ("time/", "speed/", "step_time", "train_", "total_flos", "epoch")  # what depends on more than the training


class Seen(DeGRPOTrainer):
    """Keeps the answers of the rows it was asked to generate for, step by step."""

    prompts: list[tuple[int, list[str]]]

    def _generate_and_score_completions(self, inputs):
        self.prompts.append((self.state.global_step, [row["answer"] for row in inputs]))
        return super()._generate_and_score_completions(inputs)


def build(folder: Path, rows: Dataset | None = None, **settings: Any) -> Seen:
    """A trainer on a tiny model that saves every step; verdicts depend on nothing but the answer."""
    judge = tiny_judge()
    judge.verifiers["exact"] = lambda solution, answer: float(sum(map(ord, solution + answer)) % 3 == 0)
    fields: dict[str, Any] = one_step(folder) | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    model = str(save_tiny_model(folder / "model"))
    args = DeGRPOConfig(**(fields | settings))
    trainer = Seen(model=model, judge=judge, args=args, train_dataset=rows or dataset())
    trainer.prompts = []
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A trainer that has saved its first two steps."""
    trainer = build(tmp_path_factory.mktemp("trained"), max_steps=2)
    trainer.train()
    return trainer


@pytest.fixture
def stage(trained: Seen, tmp_path: Path) -> Path:
    """A copy of what it has left."""
    return Path(shutil.copytree(str(trained.args.output_dir), tmp_path / "stage"))


@pytest.fixture
def at_three(trained: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The trainer at a third step, about to save into `stage`."""
    monkeypatch.setattr(trained.args, "output_dir", str(stage))
    monkeypatch.setattr(trained.args, "save_total_limit", 2)
    monkeypatch.setattr(trained.state, "global_step", 3)
    monkeypatch.setattr(trained, "_sealed_step", 2)
    return trained


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


# ---- what a checkpoint is ------------------------------------------------------------------------------------------


def test_a_manifest_lists_every_file_with_its_size_and_hash(stage: Path) -> None:
    assert names(stage) == {"checkpoint-1", "checkpoint-2"}
    newest = stage / "checkpoint-2"
    content = json.loads((newest / MANIFEST).read_text())["content"]
    assert set(content["files"]) == {file.name for file in newest.iterdir()} - {MANIFEST}
    wanted = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert wanted | {"progress_0.pt"} <= set(content["files"])
    for name, entry in content["files"].items():
        whole = (newest / name).read_bytes()
        assert entry == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}, name
    assert content["processes"] == 1


def test_any_damage_to_any_file_is_named_and_the_older_checkpoint_taken(stage: Path) -> None:
    newest = stage / "checkpoint-2"
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for damage in (flip, truncate, Path.unlink):
            damage(file)
            said: list[str] = []
            assert newest_intact(stage, 1, said.append) == stage / "checkpoint-1", (file.name, damage)
            assert len(said) == 1
            assert said[0].startswith(f"{newest}: skipped, {file.name} is")
            file.write_bytes(whole)
    assert newest_intact(stage, 1, pytest.fail) == newest


def test_without_an_intact_one_a_line_says_what_to_do(stage: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        truncate(stage / name / "model.safetensors")
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoint.*delete .* to start the stage anew") as error:
        newest_intact(stage, 1, said.append)
    assert "\n" not in str(error.value)
    assert ["truncated" in line for line in said] == [True, True]
    assert newest_intact(stage / "nothing", 1, pytest.fail) is None


def test_a_folder_without_a_manifest_is_not_taken(stage: Path) -> None:
    """What a version without manifests wrote, or somebody copied in part."""
    (stage / "checkpoint-10").mkdir()
    shutil.copy(stage / "checkpoint-2" / "trainer_state.json", stage / "checkpoint-10")
    said: list[str] = []
    assert newest_intact(stage, 1, said.append) == stage / "checkpoint-2"
    assert f"{MANIFEST} is missing" in said[0]


def test_another_number_of_processes_is_refused(stage: Path) -> None:
    with pytest.raises(CheckpointError, match=r"written by 1 process\(es\), this run has 2; launch 1, or delete"):
        newest_intact(stage, 2, pytest.fail)


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(tmp_path: Path) -> None:
    build(tmp_path, save_only_model=True).train()
    again = build(tmp_path, save_only_model=True)
    with pytest.raises(CheckpointError) as error:
        train_on(again, tmp_path / "out", pytest.fail)
    assert str(error.value) == (
        f"{tmp_path}/out/checkpoint-1: holds weights alone (save_only_model), and training cannot go on from these; "
        f"delete {tmp_path}/out to start the stage anew"
    )


def aged(checkpoint: Path, *lost: str) -> None:
    """Make a checkpoint one of a version that did not remember something: names, from the outside inwards."""
    file = checkpoint / "progress_0.pt"
    progress = torch.load(file, weights_only=True)
    inner = progress
    for name in lost[:-1]:
        inner = inner[name]
    del inner[lost[-1]]
    torch.save(progress, file)
    resealed(checkpoint)


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (["ended"], "ended"),
        (["judged"], "judged"),
        (["callbacks", "HackAlarm", "raised"], "HackAlarm.raised"),
        (["callbacks"], "HackAlarm.raised, callbacks"),
    ],
)
def test_a_checkpoint_of_another_version_is_named(stage: Path, tmp_path: Path, lost: list[str], told: str) -> None:
    def resumed() -> Seen:
        trainer = build(tmp_path, max_steps=2, output_dir=str(stage))
        trainer.add_callback(HackAlarm(0.5, {}))
        return trainer

    newest = stage / "checkpoint-2"
    progress = torch.load(newest / "progress_0.pt", weights_only=True)
    torch.save(progress | {"callbacks": {"HackAlarm": {"raised": []}}}, newest / "progress_0.pt")
    resealed(newest)
    train_on(resumed(), stage, pytest.fail)  # of this version
    aged(newest, *lost)
    with pytest.raises(CheckpointError) as error:
        train_on(resumed(), stage, pytest.fail)
    assert str(error.value) == (
        f"{newest}: written by another version of siesta (progress_0.pt lacks {told}), and training cannot go on from "
        f"it; delete {stage} to start the stage anew, or give the run another name (tracking.run=NAME)"
    )


# ---- saves that do not end -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing runs after it that a real kill would not allow: the tests look at the disk alone."""


def kill() -> None:
    raise Killed


PHASES = {
    "nothing is written": (resumable.ResumableTrainer, "_begin", 1),
    "folder made": (Trainer, "save_model", 1),
    "model written": (Trainer, "_save_optimizer_and_scheduler", 1),
    "optimizer written": (torch, "save", 3),
    "generators written": (torch, "save", 5),
    "all files written": (checkpoints, "seal", 1),
    "some files on the disk": (checkpoints, "_entry", 3),
    "manifest written": (checkpoints, "_sync", 1),
    "before the rename": (Path, "rename", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_a_save_leaves_the_older_checkpoints(
    at_three: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    owner, name, number = PHASES[phase]
    monkeypatch.setattr(owner, name, at_call(number, getattr(owner, name), kill))
    with pytest.raises(Killed):
        at_three._save_checkpoint(at_three.model, None)
    monkeypatch.undo()
    assert names(stage) - {UNFINISHED} == {"checkpoint-1", "checkpoint-2"}
    began = (stage / UNFINISHED).exists()
    assert began == (phase != "nothing is written")
    said: list[str] = []
    assert newest_intact(stage, 1, said.append) == stage / "checkpoint-2"
    assert [("removed, a save was interrupted" in line) for line in said] == [True] * began
    assert names(stage) == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("after", ["prune", "shutil.rmtree"])
def test_a_kill_behind_the_rename_leaves_the_new_checkpoint(
    at_three: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    owner = checkpoints if after == "prune" else checkpoints.shutil
    real = getattr(owner, after.removeprefix("shutil."))
    monkeypatch.setattr(owner, after.removeprefix("shutil."), at_call(1 if after == "prune" else 2, real, kill))
    with pytest.raises(Killed):
        at_three._save_checkpoint(at_three.model, None)
    monkeypatch.undo()
    assert newest_intact(stage, 1, lambda line: None) == stage / "checkpoint-3"


def test_a_kill_in_the_removal_of_an_old_one_leaves_no_half_of_it(
    at_three: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half would count as a checkpoint, be hashed at the next start and be told as damaged."""

    def half(folder: Path, **settings: Any) -> None:
        if (found := list(folder.rglob("model.safetensors"))) and not (folder / "checkpoint-3").exists():
            found[0].unlink()
            raise Killed
        real(folder, **settings)

    real = shutil.rmtree
    monkeypatch.setattr(checkpoints.shutil, "rmtree", half)
    with pytest.raises(Killed):
        at_three._save_checkpoint(at_three.model, None)
    monkeypatch.undo()
    assert names(stage) == {"checkpoint-2", "checkpoint-3", UNFINISHED}
    for name in ("checkpoint-2", "checkpoint-3"):
        check_intact(stage / name)
    assert newest_intact(stage, 1, lambda line: None) == stage / "checkpoint-3"
    assert names(stage) == {"checkpoint-2", "checkpoint-3"}


def test_sigkill_in_the_middle_of_a_write(at_three: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(torch, "save", at_call(2, torch.save, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        at_three._save_checkpoint(at_three.model, None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert (stage / UNFINISHED / "checkpoint-3" / "model.safetensors").exists()
    assert newest_intact(stage, 1, lambda line: None) == stage / "checkpoint-2"
    assert names(stage) == {"checkpoint-1", "checkpoint-2"}


# ---- retention -----------------------------------------------------------------------------------------------------


def test_old_checkpoints_go_when_the_new_one_is_sealed(
    at_three: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = []
    monkeypatch.setattr(checkpoints, "seal", lambda *settings: (there.append(names(stage)), seal(*settings)))
    at_three._save_checkpoint(at_three.model, None)
    assert there == [{"checkpoint-1", "checkpoint-2", UNFINISHED}]
    assert names(stage) == {"checkpoint-2", "checkpoint-3"}
    check_intact(stage / "checkpoint-3")


@pytest.mark.parametrize(
    ("limit", "left"), [(None, {4, 5, 9, 10}), (0, {4, 5, 9, 10}), (3, {4, 5, 9}), (2, {5, 9}), (1, {9})]
)
def test_later_checkpoints_go_first_and_the_new_one_never(tmp_path: Path, limit: int | None, left: set[int]) -> None:
    """checkpoint-10 was found damaged, training went on from 5 and came to 9."""
    for step in (4, 5, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, tmp_path / "checkpoint-9", limit)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


def test_a_damaged_checkpoint_of_the_same_step_gives_way(
    at_three: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate(stage / "checkpoint-2" / "optimizer.pt")
    monkeypatch.setattr(at_three.state, "global_step", 2)
    monkeypatch.setattr(at_three, "_sealed_step", 1)
    at_three._save_checkpoint(at_three.model, None)
    assert names(stage) == {"checkpoint-1", "checkpoint-2"}
    assert newest_intact(stage, 1, pytest.fail) == stage / "checkpoint-2"


# ---- full disks ----------------------------------------------------------------------------------------------------

FULL_DISK = {
    "python": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "torch, older format": RuntimeError("write(): fd 3 failed with No space left on device"),
}


@pytest.mark.parametrize(
    ("place", "words"), [("optimizer", words) for words in FULL_DISK] + [("seal", "python"), ("seal", "quota")]
)
def test_a_disk_that_becomes_full_costs_the_new_checkpoint_only(
    at_three: Seen,
    stage: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    words: str,
) -> None:
    owner, name = (torch, "save") if place == "optimizer" else (checkpoints, "_entry")
    monkeypatch.setattr(owner, name, at_call(2, getattr(owner, name), raiser(FULL_DISK[words])))
    with caplog.at_level(logging.WARNING):
        at_three._save_checkpoint(at_three.model, None)
    lines = [record.getMessage() for record in caplog.records if record.name == "siesta.rl.resumable"]
    assert len(lines) == 1
    assert lines[0].startswith("CHECKPOINT NOT WRITTEN, step 3: ")
    assert "the disk is full" in lines[0]
    assert names(stage) == {"checkpoint-1", "checkpoint-2"}


def test_other_errors_of_a_write_are_not_taken_for_a_full_disk(at_three: Seen, monkeypatch) -> None:
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(torch, "save", at_call(2, torch.save, raiser(broken)))
    with pytest.raises(OSError, match="Input/output error"):
        at_three._save_checkpoint(at_three.model, None)


def test_ranks_that_save_together_do_not_wait_for_one_whose_disk_is_full(at_three: Seen, monkeypatch) -> None:
    monkeypatch.setattr(at_three, "is_deepspeed_enabled", True)
    monkeypatch.setattr(at_three, "args", SimpleNamespace(world_size=2, output_dir="out"))
    with pytest.raises(CheckpointError, match=r"^out: the disk is full .* free some space and run again$"):
        at_three._if_full(FULL_DISK["python"])


def test_free_space_is_asked_for_before_anything_is_written(
    at_three: Seen, stage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(file.stat().st_size for file in (stage / "checkpoint-2").iterdir() if file.name != MANIFEST)
    for spare, written in ((-1, False), (1, True)):
        monkeypatch.setattr(
            checkpoints.shutil, "disk_usage", lambda folder, spare=spare: SimpleNamespace(free=1.2 * size + spare)
        )
        at_three._save_checkpoint(at_three.model, None)
        assert (stage / "checkpoint-3").exists() == written
        assert not (stage / UNFINISHED).exists()
    assert "GiB are needed (1.2 x its size)" in caplog.text


def test_the_first_checkpoint_is_estimated_from_weights_and_moments(at_three: Seen, monkeypatch) -> None:
    monkeypatch.setattr(at_three, "_sealed_step", 0)
    count = len(parameters(cast(torch.nn.Module, at_three.model)))
    assert at_three._expected_bytes(Path()) == count * (4 + 2 * 4)  # all float32


def test_a_run_trains_on_when_a_save_fails(tmp_path: Path, trained: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, max_steps=2)
    monkeypatch.setattr(torch, "save", at_call(2, torch.save, raiser(FULL_DISK["torch"])))
    trainer.train()
    assert names(tmp_path / "out") - {"runs"} == {"checkpoint-2"}
    assert torch.equal(*(parameters(cast(torch.nn.Module, one.model)) for one in (trainer, trained)))


# ---- pickles -------------------------------------------------------------------------------------------------------

LOADED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "progress_0.pt")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", LOADED)
def test_code_in_a_checkpoint_does_not_run(stage: Path, tmp_path: Path, name: str, raw: bool) -> None:
    canary, file = tmp_path / "canary", stage / "checkpoint-2" / name
    plant(file, canary, raw=raw)
    newest = resealed(stage / "checkpoint-2")
    shutil.rmtree(stage / "checkpoint-1")
    said: list[str] = []
    with pytest.raises(CheckpointError, match="none of its 1 checkpoint"):
        newest_intact(stage, 1, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"{newest}: skipped, {name} is ")
    # Not even by whoever does not look first.
    with only_data(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not canary.exists()
    if not raw:
        torch.load(file, weights_only=False)  # the gadget is one
        assert canary.exists()


@pytest.mark.parametrize("name", LOADED)
def test_the_trainer_itself_loads_data_only(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    canary = tmp_path / "canary"
    trainer = build(tmp_path, max_steps=3)
    plant(stage / "checkpoint-2" / name, canary)
    monkeypatch.setattr(checkpoints, "check_intact", lambda checkpoint: None)
    with pytest.raises(CheckpointError, match=r"checkpoint-2: a file in it holds something else than data"):
        train_on(trainer, stage, pytest.fail)
    assert not canary.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# ---- going on ------------------------------------------------------------------------------------------------------

WINDOWS: dict[str, dict[str, Any]] = {
    "second epoch": {},
    "between two logs": {"logging_steps": 2},
    "rollouts used twice": {"num_iterations": 2, "steps_per_generation": 2},
}


def without_clock(logs: list[dict]) -> list[dict]:
    """Everything that was logged, without what a clock or the end of the training says."""
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in logs]


def rows_of(trainer: Trainer) -> list[dict]:
    """Of a trainer's own log."""
    return without_clock(trainer.state.log_history)


def sampled(trainer: DeGRPOTrainer, file: Path) -> Path:
    """Have the trainer write samples into `file`."""
    trainer.add_callback(SampleFile(file, lambda: trainer.reward_function.samples(4), to_wandb=False))
    return file


def assert_equal(one: Any, other: Any, where: str) -> None:
    """Bit by bit, in whatever containers."""
    if isinstance(one, dict):
        assert list(one) == list(other), where
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other or one != one, where


@pytest.mark.parametrize("window", WINDOWS)
def test_a_resumed_run_is_the_undisturbed_one_bit_by_bit(tmp_path: Path, window: str) -> None:
    """Six steps of two prompts, of four in the data; from a checkpoint after three, in the middle of everything."""
    settings = WINDOWS[window] | {"max_steps": 6, "lr_scheduler_type": "linear"}
    straight = build(tmp_path / "straight", dataset(4), **settings)
    files = [sampled(straight, tmp_path / "straight.jsonl"), tmp_path / "resumed.jsonl"]
    straight.train()
    stage = tmp_path / "stage"
    shutil.copytree(tmp_path / "straight" / "out" / "checkpoint-3", stage / "checkpoint-3")
    resumed = build(tmp_path, dataset(4), **(settings | {"output_dir": str(stage)}))
    # The interrupted run came two steps further than its checkpoint, and into the middle of a row.
    lines = files[0].read_text().splitlines(keepends=True)
    files[1].write_text("".join(line for line in lines if json.loads(line)["step"] <= 5) + lines[-1][:9])
    sampled(resumed, files[1])
    train_on(resumed, stage, pytest.fail)
    assert files[0].read_text() == files[1].read_text()
    assert torch.equal(*(parameters(cast(torch.nn.Module, one.model)) for one in (straight, resumed)))
    ends = [folder / "checkpoint-6" for folder in (tmp_path / "straight" / "out", stage)]
    assert (ends[0] / "model.safetensors").read_bytes() == (ends[1] / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(end / name, weights_only=True) for end in ends)
        assert_equal(one, other, name)
    assert rows_of(straight)[:-1] == rows_of(resumed)[:-1]
    assert rows_of(straight)[:-1]
    later = [entry for entry in straight.prompts if entry[0] >= 3]
    assert later == resumed.prompts
    assert len(later) == (1 if window == "rollouts used twice" else 3)


class StopsAt(TrainerCallback):
    """Ends a training before its last step, as an accuracy or a guard does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("by_callback", [False, True])
def test_a_training_that_had_come_to_its_end_takes_no_further_step(tmp_path: Path, by_callback: bool) -> None:
    """Killed behind its last checkpoint, before the stage was finished; transformers would take a step more."""
    settings: dict[str, Any] = {"max_steps": 3 if by_callback else 2}
    trainers = []
    for _ in range(2):
        trainers.append(build(tmp_path, **settings))
        trainers[-1].add_callback(StopsAt(2))
        train_on(trainers[-1], tmp_path / "out", pytest.fail)
    assert [trainer.state.global_step for trainer in trainers] == [2, 2]
    assert trainers[1].prompts == []
    assert torch.equal(*(parameters(cast(torch.nn.Module, one.model)) for one in trainers))


def test_the_checkpoint_that_a_training_goes_on_from_may_be_removed_in_it(tmp_path: Path) -> None:
    """Epochs of two steps, one checkpoint is kept."""
    settings: dict[str, Any] = {"save_total_limit": 1, "max_steps": 6}
    first = build(tmp_path, dataset(4), **settings)
    first.add_callback(StopOnSignal(request := StopRequest()))
    request.received = signal.SIGTERM
    with pytest.raises(SignalStop):
        train_on(first, tmp_path / "out", pytest.fail)
    again = build(tmp_path, dataset(4), **settings)
    train_on(again, tmp_path / "out", pytest.fail)
    assert names(tmp_path / "out") - {"runs"} == {"checkpoint-6"}


def test_a_training_that_a_signal_cut_short_goes_on(tmp_path: Path) -> None:
    request = StopRequest()
    first = build(tmp_path, max_steps=2)
    first.add_callback(StopOnSignal(request))
    request.received = signal.SIGTERM
    with pytest.raises(SignalStop):
        train_on(first, tmp_path / "out", pytest.fail)
    again = build(tmp_path, max_steps=2)
    train_on(again, tmp_path / "out", pytest.fail)
    assert [trainer.state.global_step for trainer in (first, again)] == [1, 2]


def test_the_order_of_an_epoch_depends_on_its_number_alone() -> None:
    def repeated() -> RepeatSampler:
        return RepeatSampler(cast(Any, range(20)), mini_repeat_count=2, batch_size=4, seed=3)

    straight = repeated()
    orders = [list(straight) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for epoch in (2, 0, 1):
        order = repeated()
        assert list(EpochOrder(order, order, lambda epoch=epoch: epoch)) == orders[epoch]
    assert list(repeated()) != orders[1]  # what a run resumed in its second epoch would see


def test_an_epoch_is_shuffled_as_by_the_library_by_its_number_alone() -> None:
    library = SeedableRandomSampler(cast(Any, range(20)), data_seed=3)
    orders = [list(library) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for epoch in (2, 0, 1):
        torch.rand(epoch)
        assert list(EpochShuffle(20, 3, lambda epoch=epoch: epoch)) == orders[epoch]


@pytest.mark.parametrize("kind", [WarmupTrainer, SortedWarmupTrainer])
def test_a_resumed_warmup_is_the_undisturbed_one(tmp_path: Path, kind: type[WarmupTrainer]) -> None:
    rows = Dataset.from_list([{"prompt": f"{n} +1 =", "completion": f" {n}" * (n % 3 + 1)} for n in range(8)])
    save_tiny_model(tmp_path / "model")
    settings = one_step(tmp_path) | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    trainers = []
    for name in ("straight", "resumed"):
        args = SFTConfig(**(settings | {"output_dir": str(tmp_path / name), "per_device_train_batch_size": 4}))
        trainers.append(kind(model=str(tmp_path / "model"), args=args, train_dataset=rows))
        train_on(trainers[-1], tmp_path / name, pytest.fail)
        if name == "straight":
            shutil.copytree(tmp_path / name / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert torch.equal(*(parameters(cast(torch.nn.Module, one.model)) for one in trainers))
    straight, resumed = map(rows_of, trainers)
    assert straight[:-1] == resumed[:-1]
    assert straight[1]["num_tokens"] > straight[0]["num_tokens"] > 0


def test_without_the_rollouts_in_use_a_resumed_run_would_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WINDOWS["rollouts used twice"] | {"max_steps": 4}
    straight = build(tmp_path / "straight", dataset(4), **settings)
    straight.train()
    stage = tmp_path / "stage"
    shutil.copytree(tmp_path / "straight" / "out" / "checkpoint-3", stage / "checkpoint-3")
    resumed = build(tmp_path, dataset(4), **(settings | {"output_dir": str(stage)}))
    monkeypatch.setattr(resumed, "_go_on", lambda progress: None)
    train_on(resumed, stage, pytest.fail)
    assert not torch.equal(*(parameters(cast(torch.nn.Module, one.model)) for one in (straight, resumed)))
