"""B1 and B2: one training pass of TRL's GRPOTrainer and of ours over the same rollouts, for several shares of short.

    python -m benchmarks.train_pass --shape 0.6b --shares 1 0.9 0.8 0.5 0        # one CUDA device
    python -m benchmarks.train_pass --cpu                                        # a tiny model, minutes on two cores

A pass is forward, backward and optimizer step over 64 rollouts. Both trainers get the same padded generation batch and
split it their own way. The equivalence row compares their gradients, and log-probabilities with an fp32 eager model.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from benchmarks import shapes
from benchmarks.timing import environment, measure, write_json
from siesta.rl.timing import model_flops, peak_flops
from siesta.rl.trainer import DeGRPOTrainer


def stock_gradients(trainer: GRPOTrainer, batch: dict) -> None:
    """Forward and backward as GRPOTrainer does: equal rows, padded to the longest of the generation batch."""
    number = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = number
    for part in split_tensor_dict(batch, number):
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, part)
        trainer.accelerator.backward(loss)


def siesta_gradients(trainer: DeGRPOTrainer, batch: dict) -> None:
    """Forward and backward of ours, the deal into passes included."""
    for part in trainer.passes.deal(batch, seed=0):
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, part)
        trainer.accelerator.backward(loss)


def step_of(trainer: GRPOTrainer, gradients: Callable, batch: dict) -> Callable[[], None]:
    """The whole pass, optimizer included."""
    cast(torch.nn.Module, trainer.model).train()
    optimizer = trainer.create_optimizer()

    def run() -> None:
        gradients(trainer, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients as one vector on the CPU; taken away from the model."""
    parts = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def agreement(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Cosine and relative L2 distance, summed in float64."""
    dot = norm = other = distance = 0.0
    for a, b in zip(found.split(2**24), expected.split(2**24), strict=True):
        a, b = a.double(), b.double()
        dot, norm, other = dot + (a @ b).item(), norm + (a @ a).item(), other + (b @ b).item()
        distance += ((a - b) @ (a - b)).item()
    return {"cosine": dot / (norm * other) ** 0.5, "relative_l2": (distance / other) ** 0.5}


def logps(trainer: GRPOTrainer, batch: dict) -> torch.Tensor:
    """Log-probabilities of the response tokens of a batch, flat."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, batch_size=1)[0]
    return found[:, 1:][batch["completion_mask"][:, 1:].bool()].float()


def compare(options: argparse.Namespace, share: float, device: str, dtype: torch.dtype) -> dict:
    """Times, memory and agreement at one share of short."""
    lengths = shapes.completion_lengths(share, options.rollouts, options.seed, options.scale)
    model = shapes.build(options.shape, dtype, device)
    folder = Path(tempfile.mkdtemp())
    # Neither checkpoints: at these sizes stock is faster without it.
    fixed = {"gradient_checkpointing": False, "bf16": dtype == torch.float32 and not options.full_precision}
    fixed["bf16"] = fixed["bf16"] and device == "cuda"
    common = shapes.common_settings(folder, device, options.rollouts, options.micro) | fixed
    stock = shapes.stock_trainer(model, common)
    other = shapes.build(options.shape, dtype, device)
    ours_settings = shapes.common_settings(folder, device, options.rollouts, options.rollouts) | fixed
    budget = {"token_budget": options.budget, "attention": options.attention, "compile_layers": options.compile}
    ours = shapes.siesta_trainer(other, ours_settings, **budget)
    batch = shapes.rollout_batch(
        lengths, options.prompt, model.config.vocab_size, ours.modes.token_ids, device, options.seed
    )
    stock_gradients(stock, batch)
    expected = gradient(model)
    siesta_gradients(ours, batch)
    row = {"share_short": share, "agreement": agreement(gradient(other), expected), "backend": ours.passes.line}
    del expected
    arms = {"stock": step_of(stock, stock_gradients, batch), "siesta": step_of(ours, siesta_gradients, batch)}
    arms = {name: arm for name, arm in arms.items() if name in options.arms}
    row["arms"] = measure(arms, warmups=options.warmups, repeats=options.repeats, device=device)
    tokens = sum(lengths) + options.prompt * len(lengths)
    flops = model_flops(model.config, [options.prompt + length for length in lengths], sum(lengths))
    for arm in row["arms"].values():
        arm["tokens_per_second"] = tokens / arm["median"]
        arm["mfu"] = flops / arm["median"] / (peak_flops(torch.device(device), torch.bfloat16) or float("nan"))
    row |= {"tokens": tokens, "longest": max(lengths), "flops": flops}
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU, in minutes")
    parser.add_argument("--shape", default="0.6b", choices=list(shapes.SHAPES))
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.9, 0.8, 0.5, 0.0])
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--micro", type=int, default=8, help="rows of a micro-batch of stock TRL")
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"], help="of weights")
    parser.add_argument("--full-precision", action="store_true", help="float32 without autocast")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="ours without compiled layers")
    parser.add_argument("--arms", nargs="+", default=["stock", "siesta"])
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    device = "cpu" if options.cpu else "cuda"
    if options.cpu:
        options.shape, options.dtype, options.scale, options.prompt = "tiny", "float32", 0.1, 20
    rows = []
    for share in options.shares:
        rows.append(compare(options, share, device, dtype_of(options.dtype)))
        report(rows[-1])
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if options.out:
        settings = {key: str(value) for key, value in vars(options).items()}
        write_json(options.out, {"settings": settings, "environment": environment(device), "rows": rows})


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def report(row: dict) -> None:
    """One line per arm."""
    for name, arm in row["arms"].items():
        print(
            f"short {row['share_short']:.1f} {name:7s} {arm['median']:.3f} s [{arm['low']:.3f}, {arm['high']:.3f}] "
            f"{arm['tokens_per_second']:,.0f} tokens/s, MFU {arm['mfu']:.3f}, peak {arm['peak_gib']:.1f} GiB",
            flush=True,
        )
    if len(row["arms"]) == 2:
        stock, ours = (row["arms"][name]["median"] for name in ("stock", "siesta"))
        print(f"short {row['share_short']:.1f} speed-up {stock / ours:.2f}x, gradients {row['agreement']}", flush=True)
    print(f"  {row['backend']}", flush=True)


if __name__ == "__main__":
    main()
