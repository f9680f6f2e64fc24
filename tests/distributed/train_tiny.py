"""Three steps of DeGRPO on given rollouts, in however many processes it is launched; writes the weights.

    train_tiny.py FOLDER NAME TOKEN_BUDGET [share] [save] [resume]

With `share`, the rollouts of a group share their prompt. With `save`, the second step leaves a checkpoint in
FOLDER/NAME; with `resume` as well, training goes on from the newest one there.

FOLDER holds `model`. Rollouts depend on the step and the prompt's place in the whole batch alone, so that any number
of processes trains on the same ones; their lengths differ.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from siesta.rl.config import DeGRPOConfig
from siesta.rl.resumable import train_on
from tests.given import GivenRollouts
from tests.helpers import parameters, tiny_judge
from tests.test_trainer import dataset

ROLLOUTS = 16


class BeginsAtTwo(TrainerCallback):
    """A training that began at 0 would come to the same end."""

    def on_train_begin(self, args, state, control, **kwargs):
        assert state.global_step == 2


def main(folder: Path, name: str, budget: int, *options: str) -> None:
    judge = tiny_judge()
    judge.verifiers["exact"] = lambda solution, answer: float(sum(map(ord, solution + answer)) % 3 == 0)
    args = DeGRPOConfig(
        output_dir=str(folder / name),
        num_generations=4,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        save_strategy="steps" if "save" in options else "no",
        save_steps=2,
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        token_budget=budget,
        share_prompts="share" in options,
        optim="adamw_torch",
    )
    args.per_device_train_batch_size = ROLLOUTS // args.world_size
    args.generation_batch_size = ROLLOUTS
    args.steps_per_generation = 1
    trainer = GivenRollouts(model=str(folder / "model"), judge=judge, args=args, train_dataset=dataset())
    if "resume" in options:
        trainer.add_callback(BeginsAtTwo())
        train_on(trainer, folder / name, print)
    else:
        trainer.train()
    model = cast(torch.nn.Module, trainer.accelerator.unwrap_model(trainer.model))
    whole = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed  # pyright: ignore[reportMissingImports]

        whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with whole:
        weights = parameters(model).clone()
    if trainer.accelerator.is_main_process:
        torch.save(weights, folder / f"{name}.pt")
        print(f"{trainer.accelerator.distributed_type.value} {trainer.accelerator.num_processes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
