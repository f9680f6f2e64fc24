"""Trainings on a tiny model, in however many processes they are launched; writes what they came to.

    train_tiny.py FOLDER NAME [PORT]

FOLDER holds `model` and `embedded/model`, which knows the sleep token. FOLDER/NAME.pt gets the kind of the processes
and what `Outcome` has of every case. Those of `STEPS` are on given rollouts, which depend on the step and the prompt's
place in the whole batch alone, so that any number of processes trains on the same ones. Those of `RESUMED` write their
own rollouts and leave a checkpoint in the middle. From copies of those checkpoints they are done again, in processes
that are forked for it, have seen nothing of the first time and meet at PORT, for FOLDER/NAME-resume.pt. Without a PORT
`STEPS` alone are done.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig

from siesta.rl.config import DeGRPOConfig
from siesta.rl.resumable import train_on
from siesta.rl.sleep.trainer import SleepTrainer
from siesta.rl.trainer import DeGRPOTrainer
from siesta.rl.warmup_trainer import SortedWarmupTrainer, WarmupTrainer
from tests.distributed import fsdp_on_cpu
from tests.given import GivenRollouts
from tests.helpers import one_step, tiny_judge
from tests.test_sleep_trainer import build, uneven_judge
from tests.test_trainer import dataset

# Case -> settings of one process and, over them, of several: other passes, ranks and micro-batches, the same steps.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uneven": ({}, {"token_budget": 60}),
    "shared": ({}, {"token_budget": 60, "share_prompts": True}),
    "accumulated": ({}, {"token_budget": 60, "gradient_accumulation_steps": 2}),
    "reused": ({"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1, "max_steps": 5}, {"token_budget": 60}),
    # One unit for two ranks of two micro-batches each: three of the four are empty.
    "empty": ({"rollouts": 4}, {"share_prompts": True, "gradient_accumulation_steps": 2}),
}
# Six steps and a checkpoint after three, in the second epoch and between two logs.
RESUMED: dict[str, dict[str, Any]] = {
    "epochs": {},
    "window": {"num_iterations": 2, "steps_per_generation": 2},
    "adapter": {"lora": True},
    "warmup": {"kind": WarmupTrainer},
    "sorted warmup": {"kind": SortedWarmupTrainer},
    "notes": {"kind": SleepTrainer, "beta": 0.1},
}


@dataclass
class Outcome:
    """What a training came to.

    Args:
        logs: Rows of the log.
        gradients: Of each step, flat.
        weights: Of the end, flat.
        empty: Micro-batches of each rank without a rollout of their own.
        prompts: Of each rank: step and answers of the rows it wrote rollouts for, or ids of its batches.
    """

    logs: list[dict] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    weights: torch.Tensor | None = None
    empty: list[int] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)


class Given(GivenRollouts):
    """Modes are given as well: any number of rollouts of a group in each, none of some. Keeps gradients."""

    gradients: list[torch.Tensor]
    empty: int

    def _plan_modes(self, prompt_ids):
        plan = super()._plan_modes(prompt_ids)
        first = self.accelerator.process_index * len(prompt_ids)
        draws = [1000 * self.state.global_step + first + place for place in range(len(prompt_ids))]
        return replace(plan, modes=torch.tensor([int(draw * 7 % 10 < 2) for draw in draws]))

    def _compute_loss(self, model, inputs):
        self.empty += not inputs["kl_weights"].any()
        return super()._compute_loss(model, inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.is_deepspeed_enabled:  # it steps inside its backward pass
            engine = cast(Any, model)
            with stepping(engine, lambda: self.gradients.append(full_gradient(engine.module))):
                return super().training_step(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        if not self.is_deepspeed_enabled:
            self.gradients.append(torch.cat([whole(cast(torch.Tensor, p.grad)).flatten() for p in model.parameters()]))
        return super()._get_grad_norm(model, grad_norm)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of all ranks, if FSDP2 shares it out. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def stepping(engine: Any, before: Any) -> Iterator[None]:
    """Inside, `before` is called in front of each of the engine's steps."""
    step = engine.step

    def observed(*args: Any, **kwargs: Any) -> Any:
        before()
        return step(*args, **kwargs)

    engine.step = observed
    try:
        yield
    finally:
        del engine.step


def full_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Of all ranks, gathered from wherever DeepSpeed keeps its parts."""
    from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]

    return torch.cat([cast(torch.Tensor, safe_get_full_grad(p)).flatten().clone() for p in model.parameters()])


class SeesRows(DeGRPOTrainer):
    """Keeps which rows this rank was asked to write rollouts for."""

    prompts: list[Any]

    def _generate_and_score_completions(self, inputs):
        self.prompts.append((self.state.global_step, [row["answer"] for row in inputs]))
        return super()._generate_and_score_completions(inputs)


class SeesContexts(SeesRows, SleepTrainer):
    """The same of a trainer that writes notes first."""


class SeesBatches(Trainer):
    """Keeps the batches of this rank, and draws numbers on the main one alone, as a validation does."""

    prompts: list[Any]

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.accelerator.is_main_process:
            torch.rand(3)
        self.prompts.append((self.state.global_step, inputs["input_ids"][:, 0].tolist()))
        return super().training_step(model, inputs, num_items_in_batch)


class BeginsAtThree(TrainerCallback):
    """A training that began at 0 would come to the same end."""

    def on_train_begin(self, args, state, control, **kwargs):
        assert state.global_step == 3


def by_sum(solution: str, answer: str) -> float:
    """A verdict that depends on nothing but response and answer."""
    return float(sum(map(ord, solution + answer)) % 3 == 0)


def judge() -> Any:
    """Gives such verdicts."""
    made = tiny_judge()
    made.verifiers["exact"] = by_sum
    return made


def config(folder: Path, rollouts: int, **settings: Any) -> DeGRPOConfig:
    """For so many rollouts a generation batch, over all processes and micro-batches."""
    fields: dict[str, Any] = {
        "num_generations": 4,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
    }
    fields |= {"max_grad_norm": 1e9, "optim": "adamw_torch"}
    args = DeGRPOConfig(**(one_step(folder) | fields | settings))
    steps = settings.get("steps_per_generation") or args.gradient_accumulation_steps
    args.per_device_train_batch_size = rollouts // args.world_size // steps
    args.generation_batch_size, args.steps_per_generation = rollouts, steps
    return args


def whole_weights(trainer: Trainer) -> torch.Tensor:
    """Collective."""
    model = cast(torch.nn.Module, trainer.accelerator.unwrap_model(trainer.model))
    gathered: Any = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed  # pyright: ignore[reportMissingImports]

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        return torch.cat([whole(p.detach()).flatten() for p in model.parameters()]).clone()


def take_steps(folder: Path, name: str, case: str) -> Outcome:
    """Three steps of a case on given rollouts, or five."""
    alone, several = STEPS[case]
    settings = {"rollouts": 16} | alone | (several if name != "alone" else {})
    args = config(folder / name / case, **settings)
    print(f"== {name} {case}", flush=True)
    trainer = Given(model=str(folder / "model"), judge=judge(), args=args, train_dataset=dataset())
    trainer.gradients, trainer.empty = [], 0
    trainer.train()
    empty = gather_object([trainer.empty])
    return Outcome(trainer.state.log_history, trainer.gradients, whole_weights(trainer), empty=empty)


def trainer_of(folder: Path, case: str, out: Path) -> Any:
    """A trainer that saves after three of its six steps, all in the middle of something."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2} | RESUMED[case]
    settings |= {"output_dir": str(out), "lr_scheduler_type": "linear", "max_grad_norm": 1e9}
    kind = settings.pop("kind", None)
    if kind is SleepTrainer:
        return sleeper(folder / "embedded", settings)
    if kind:
        # The first id of a row tells which one it is.
        rows = Dataset.from_list([{"prompt": f"{n} +1 =", "completion": f" {n}" * (n % 3 + 1)} for n in range(8)])
        settings["per_device_train_batch_size"] = 4 // torch.distributed.get_world_size()
        seen: Any = type("SeenWarmup", (SeesBatches, kind), {})
        return seen(model=str(folder / "model"), args=SFTConfig(**(one_step(folder) | settings)), train_dataset=rows)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2) if settings.pop("lora", False) else None
    args = config(folder, 8, **settings)
    return SeesRows(model=str(folder / "model"), judge=judge(), args=args, train_dataset=dataset(4), peft_config=lora)


def sleeper(folder: Path, settings: dict[str, Any]) -> SeesContexts:
    """Two contexts a rank, of which one is slept on."""
    made = uneven_judge()
    made.verifiers["exact"] = by_sum
    return cast(SeesContexts, build(folder, sleep={"stateless": 0.5}, kind=SeesContexts, judge=made, **settings))


def interrupted(folder: Path, name: str, case: str, *, resume: bool) -> Outcome:
    """The whole training, or its second half from a copy of its checkpoint."""
    straight = folder / name / case
    out = folder / name / f"{case}-resume" if resume else straight
    print(f"== {name} {case}", flush=True)
    trainer = trainer_of(folder, case, out)
    trainer.prompts = []
    if resume:
        trainer.add_callback(BeginsAtThree())
        if trainer.accelerator.is_main_process:
            shutil.copytree(straight / "checkpoint-3", out / "checkpoint-3")
        trainer.accelerator.wait_for_everyone()
    train_on(trainer, out, print)
    prompts = gather_object([trainer.prompts])
    return Outcome(trainer.state.log_history, [], whole_weights(trainer), prompts=prompts)


def train(folder: Path, name: str, port: str | None) -> None:
    """All cases from their beginning."""
    done = {case: asdict(take_steps(folder, name, case)) for case in STEPS}
    if port:
        done |= {case: asdict(interrupted(folder, name, case, resume=False)) for case in RESUMED}
    write(done, folder / f"{name}.pt")


def go_on(folder: Path, name: str, port: str) -> None:
    """The cases that left a checkpoint, from there."""
    # In torchrun's store the addresses of the processes before would still be found.
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    done = {case: asdict(interrupted(folder, name, case, resume=True)) for case in RESUMED}
    write(done, folder / f"{name}-resume.pt")


def write(done: dict[str, Any], file: Path) -> None:
    """The main process writes what was done, and in which kind of processes."""
    state = AcceleratorState()
    if state.is_main_process:
        torch.save(done | {"kind": f"{state.distributed_type.value} {state.num_processes}"}, file)


def main(folder: Path, name: str, port: str | None = None) -> None:
    fsdp_on_cpu.allow()
    for part in [train, go_on] if port else [train]:
        if child := os.fork():  # before anything but imports
            if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                sys.exit(f"{name}: {part.__name__} has ended with {code}")
        else:
            part(folder, name, port)
            return  # and ends as any process does


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
