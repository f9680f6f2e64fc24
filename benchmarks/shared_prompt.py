"""B4: the training pass with each prompt computed once per group, over lengths of prompts and responses.

    python -m benchmarks.shared_prompt --shape 0.6b --out speed/b4_0.6b.json    # one CUDA device
    python -m benchmarks.shared_prompt --cpu

All arms are ours and differ in one setting: rows packed without sharing (the default), the same attention as the
shared arm without sharing, and shared. `ideal` is the ratio of tokens, G (P + R) / (P + G R): what sharing could bring
if time followed tokens.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import cast

import torch

from benchmarks import shapes
from benchmarks.timing import environment, measure, write_json
from benchmarks.train_pass import agreement, gradient, siesta_gradients, with_step
from siesta.rl.trainer import DeGRPOTrainer


def trainer(options: argparse.Namespace, device: str, attention: str, share: bool, group: int) -> DeGRPOTrainer:
    """Ours with one attention, on the same weights every time."""
    settings = shapes.common_settings(Path(tempfile.mkdtemp()), device, options.rollouts, options.rollouts)
    settings |= {"gradient_checkpointing": False, "bf16": device == "cuda", "num_generations": group}
    more = {"token_budget": options.budget, "attention": attention, "share_prompts": share}
    return shapes.siesta_trainer(shapes.build(options.shape, torch.float32, device), settings, **more)


def batch_of_groups(prompt: int, response: int, group: int, options: argparse.Namespace, device: str) -> dict:
    """Groups of rollouts of about `response` tokens, each with a prompt of its own."""
    draw = torch.Generator().manual_seed(options.seed)
    spread = torch.empty(options.rollouts).uniform_(0.7, 1.3, generator=draw)
    lengths = (spread * response).long().clamp(min=2).tolist()
    vocabulary = shapes.SHAPES[options.shape].vocab_size
    control = shapes.judge(4095).modes.token_ids
    batch = shapes.rollout_batch(lengths, prompt, vocabulary, control, device, options.seed)
    batch["prompt_ids"] = batch["prompt_ids"][::group].repeat_interleave(group, dim=0)
    return batch


def compare(options: argparse.Namespace, trainers: dict[str, DeGRPOTrainer], sizes: tuple[int, int, int]) -> dict:
    """Times of one point of the grid, and the agreement of the shared gradient with the default one."""
    prompt, response, group = sizes
    device = "cpu" if options.cpu else "cuda"
    batch = batch_of_groups(prompt, response, group, options, device)
    gradients = {}
    for name in ("default", "shared"):
        siesta_gradients(trainers[name], batch)
        gradients[name] = gradient(cast(torch.nn.Module, trainers[name].model))
    row: dict = {"prompt": prompt, "response": response, "group": group}
    row["agreement"] = agreement(gradients["shared"], gradients["default"])
    row["ideal"] = group * (prompt + response) / (prompt + group * response)
    arms = {
        name: with_step(trainer, lambda trainer=trainer: siesta_gradients(trainer, batch))
        for name, trainer in trainers.items()
    }
    row["arms"] = measure(arms, warmups=options.warmups, repeats=options.repeats, device=device)
    for name, arm in row["arms"].items():
        arm["speed_up"] = row["arms"]["default"]["median"] / arm["median"]
        print(
            f"P {prompt} R {response} G {group} {name:9s} {arm['median']:.3f} s [{arm['low']:.3f}, {arm['high']:.3f}] "
            f"{arm['speed_up']:.2f}x of {row['ideal']:.2f}x, pass {arm['pass_gib']:.1f} GiB",
            flush=True,
        )
    print(f"  gradients {row['agreement']}", flush=True)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="a tiny model and a tenth of the lengths on the CPU")
    parser.add_argument("--shape", default="0.6b", choices=list(shapes.SHAPES))
    parser.add_argument("--prompts", nargs="+", type=int, default=[200, 1000, 4000])
    parser.add_argument("--responses", nargs="+", type=int, default=[150, 256, 2500])
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    device = "cpu" if options.cpu else "cuda"
    shared = "sdpa" if options.cpu else "flex"
    if options.cpu:
        options.shape = "tiny"
        options.prompts, options.responses = ([n // 10 for n in grid] for grid in (options.prompts, options.responses))
    rows = []
    for group in options.groups:
        arms = {"default": ("auto", False), "unshared": (shared, False), "shared": (shared, True)}
        if options.cpu:
            del arms["unshared"]  # it is the default there
        trainers = {name: trainer(options, device, *arm, group) for name, arm in arms.items()}
        for prompt, response in itertools.product(options.prompts, options.responses):
            rows.append(compare(options, trainers, (prompt, response, group)))
            if options.out:
                write_json(options.out, {"settings": vars(options), "environment": environment(device), "rows": rows})


if __name__ == "__main__":
    main()
