"""B1 and B2: one training pass of TRL's GRPOTrainer and of ours over the same rollouts, for several shares of short.

    python -m benchmarks.train_pass --shape 0.6b --out speed/b1_0.6b.json      # one CUDA device
    python -m benchmarks.train_pass --cpu                                       # a tiny model, minutes on two cores

A pass is forward, backward and optimizer step over 64 rollouts. Both trainers get the same padded generation batch and
split it their own way; stock TRL in the micro-batches, of those offered, in which it is fastest. The equivalence row
compares their gradients, and their log-probabilities with an fp32 model with eager attention.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from benchmarks import shapes
from benchmarks.timing import environment, measure, write_json
from siesta.rl.passes import with_prompts
from siesta.rl.spread import select
from siesta.rl.timing import model_flops, peak_flops
from siesta.rl.trainer import DeGRPOTrainer

CHECKED_ROWS = 8  # of the log-probability comparison


def stock_gradients(trainer: GRPOTrainer, batch: dict, micro: int) -> None:
    """Forward and backward as GRPOTrainer does: equal rows, padded to the longest of the generation batch."""
    number = len(batch["prompt_ids"]) // micro
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


def with_step(trainer: GRPOTrainer, gradients: Callable[[], None]) -> Callable[[], None]:
    """The whole pass, optimizer included."""
    cast(torch.nn.Module, trainer.model).train()
    optimizer = trainer.create_optimizer()

    def run() -> None:
        gradients()
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


def best_micro(trainer: GRPOTrainer, batch: dict, sizes: list[int], device: str) -> int:
    """The rows of a micro-batch in which stock TRL is fastest, of those that fit into memory."""
    seconds = {}
    for micro in sizes:
        try:
            run = {"stock": lambda micro=micro: stock_gradients(trainer, batch, micro)}
            seconds[micro] = measure(run, warmups=1, repeats=2, device=device)["stock"]["median"]
        except torch.OutOfMemoryError:
            print(f"stock: {micro} rows of a micro-batch do not fit", flush=True)
        cast(torch.nn.Module, trainer.model).zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"stock: seconds by rows of a micro-batch {seconds}", flush=True)
    return min(seconds, key=lambda micro: seconds[micro])


def logps(trainer: GRPOTrainer, batch: dict) -> torch.Tensor:
    """Log-probabilities of the response tokens of a batch, flat, as the trainer computes them."""
    ids, mask = with_prompts(batch)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad(), trainer.compute_loss_context_manager():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, batch_size=1)[0]
    return found[:, 1:][batch["completion_mask"][:, 1:].bool()].float()


def exact_logps(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """The same in fp32 with eager attention, row by row, without padding."""
    model.set_attn_implementation("eager")
    rows = []
    for i in range(len(batch["prompt_ids"])):
        row = select(batch, [i])
        ids, response = with_prompts(row)[0], row["completion_ids"][0, 1:]
        with torch.no_grad():
            scores = model(input_ids=ids, logits_to_keep=len(response) + 1).logits[0, :-1].log_softmax(-1)
        rows.append(scores.gather(1, response[:, None])[:, 0])
    return torch.cat(rows)


def gaps(trainers: dict[str, GRPOTrainer], batch: dict, shape: str, device: str) -> dict[str, dict[str, float]]:
    """Mean and largest difference of log-probabilities to the exact ones, over a few rows of all lengths."""
    lengths = batch["completion_mask"].sum(1)
    order = lengths.argsort().tolist()
    some = select(batch, order[:: max(1, len(order) // CHECKED_ROWS)])
    expected = exact_logps(shapes.build(shape, torch.float32, device), some)
    found = {}
    for name, trainer in trainers.items():
        gap = (logps(trainer, some) - expected).abs()
        found[name] = {"mean": gap.mean().item(), "max": gap.max().item()}
    return found


def make_trainers(options: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[GRPOTrainer, DeGRPOTrainer]:
    """Both trainers on the same weights. Neither checkpoints; peaks with checkpointing are in `benchmarks.memory`."""
    folder = Path(tempfile.mkdtemp())
    autocast = dtype == torch.float32 and not options.full_precision and device == "cuda"
    fixed = {"gradient_checkpointing": False, "bf16": autocast}
    common = shapes.common_settings(folder, device, options.rollouts, options.rollouts) | fixed
    more = {"token_budget": options.budget, "attention": options.attention, "compile_layers": options.compile}
    stock = shapes.stock_trainer(shapes.build(options.shape, dtype, device), common)
    own = shapes.build(options.shape, dtype, device)
    if options.liger:
        with_liger(own)
    return stock, shapes.siesta_trainer(own, common, **more)


def with_liger(model: PreTrainedModel) -> None:
    """Norms, rotary positions and gated units by liger-kernel. Some of it is patched for every model of the process,
    so this is for `--arms siesta`. The output layer stays as it is: both arms have TRL's fused head.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    apply(cross_entropy=False, fused_linear_cross_entropy=False, model=model)


def compare(options: argparse.Namespace, share: float, stock: GRPOTrainer, ours: DeGRPOTrainer, device: str) -> dict:
    """Times, memory and agreement at one share of short."""
    lengths = shapes.completion_lengths(share, options.rollouts, options.seed, options.scale)
    model = cast(PreTrainedModel, ours.model)
    batch = shapes.rollout_batch(
        lengths, options.prompt, model.config.vocab_size, ours.modes.token_ids, device, options.seed
    )
    row: dict = {"share_short": share, "backend": ours.passes.line}
    arms = {}
    if "stock" in options.arms:
        row["micro"] = micro = best_micro(stock, batch, options.micro, device)
        stock_gradients(stock, batch, micro)
        expected = gradient(cast(torch.nn.Module, stock.model))
        siesta_gradients(ours, batch)
        row["agreement"] = agreement(gradient(model), expected)
        row["logp_gap"] = gaps({"stock": stock, "siesta": ours}, batch, options.shape, device)
        arms["stock"] = with_step(stock, lambda: stock_gradients(stock, batch, micro))
    arms["siesta"] = with_step(ours, lambda: siesta_gradients(ours, batch))
    models = [cast(torch.nn.Module, trainer.model) for trainer in (stock, ours)]
    kept = [{key: value.cpu().clone() for key, value in each.state_dict().items()} for each in models]
    row["arms"] = measure(arms, warmups=options.warmups, repeats=options.repeats, device=device)
    for each, weights in zip(models, kept, strict=True):
        each.load_state_dict(weights)  # the next share starts from the same ones
    flops = model_flops(model.config, [options.prompt + length for length in lengths], sum(lengths))
    row |= {"tokens": sum(lengths) + options.prompt * len(lengths), "longest": max(lengths), "flops": flops}
    for arm in row["arms"].values():
        arm["tokens_per_second"] = row["tokens"] / arm["median"]
        arm["mfu"] = flops / arm["median"] / (peak_flops(torch.device(device), torch.bfloat16) or float("nan"))
    return row


def command_line() -> argparse.Namespace:
    """All settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU, in minutes")
    parser.add_argument("--shape", default="0.6b", choices=list(shapes.SHAPES))
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.9, 0.8, 0.5, 0.0])
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--micro", nargs="+", type=int, default=[8], help="rows of a micro-batch offered to stock TRL")
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"], help="of weights")
    parser.add_argument("--full-precision", action="store_true", help="float32 without autocast")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="ours without compiled layers")
    parser.add_argument("--liger", action="store_true", help="ours with liger-kernel's layers; for --arms siesta")
    parser.add_argument("--arms", nargs="+", default=["stock", "siesta"])
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    if options.cpu:
        options.shape, options.dtype, options.scale, options.prompt = "tiny", "float32", 0.1, 20
    return options


def main() -> None:
    """Compare at every share."""
    options = command_line()
    device = "cpu" if options.cpu else "cuda"
    stock, ours = make_trainers(options, device, dtype_of(options.dtype))
    rows = []
    for share in options.shares:
        rows.append(compare(options, share, stock, ours, device))
        report(rows[-1])
        if options.out:  # after each: a run that is cut short keeps what it has
            write_json(options.out, {"settings": vars(options), "environment": environment(device), "rows": rows})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def report(row: dict) -> None:
    """One line per arm."""
    for name, arm in row["arms"].items():
        print(
            f"short {row['share_short']:.1f} {name:7s} {arm['median']:.3f} s [{arm['low']:.3f}, {arm['high']:.3f}] "
            f"{arm['tokens_per_second']:,.0f} tokens/s, MFU {arm['mfu']:.3f}, pass {arm['pass_gib']:.1f} GiB",
            flush=True,
        )
    if len(row["arms"]) == 2:
        stock, ours = (row["arms"][name]["median"] for name in ("stock", "siesta"))
        print(f"short {row['share_short']:.1f} speed-up {stock / ours:.2f}x, gradients {row['agreement']}", flush=True)
        print(f"  log-probabilities off exact ones: {row['logp_gap']}", flush=True)
    print(f"  {row['backend']}", flush=True)


if __name__ == "__main__":
    main()
