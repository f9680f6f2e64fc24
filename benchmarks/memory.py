"""B2: peak memory of a training pass and the estimate of `--dry-run` against it; the longest rollout that fits.

    python -m benchmarks.memory --shapes 0.6b 1.5b --out speed/b2.json                # one CUDA device
    python -m benchmarks.memory --shapes 0.6b --longest --out speed/b2_longest.json   # the search in its place

Peaks are those of the device's allocator with one trainer alive: weights, gradients, optimizer states, activations.
Both trainers get rows of equal length, so neither pads, and as many of them in a pass.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from trl import GRPOTrainer

from benchmarks import shapes
from benchmarks.timing import environment, write_json
from benchmarks.train_pass import siesta_gradients, stock_gradients, with_step
from siesta.rl.memory import estimate
from siesta.rl.trainer import DeGRPOTrainer

PROMPT = 200
MOST = 2**21  # tokens of a pass that is searched for


def make(arm: str, shape: str, rows: int, length: int, dtype: torch.dtype, **fixed: Any) -> GRPOTrainer:
    """A trainer that takes `rows` rollouts of `length` tokens in one pass."""
    settings = shapes.common_settings(Path(tempfile.mkdtemp()), "cuda", 8, 8)
    settings |= {"bf16": dtype == torch.float32, "per_device_train_batch_size": rows, "num_generations": min(rows, 8)}
    if rows == 1:
        settings |= {"per_device_train_batch_size": 2, "num_generations": 2}  # a group needs two; the batch has one
    model = shapes.build(shape, dtype, "cuda")
    if arm == "stock":
        trainer: GRPOTrainer = shapes.stock_trainer(model, settings | fixed)
    else:
        trainer = shapes.siesta_trainer(model, settings | fixed, token_budget=rows * length)
    if trainer.args.gradient_checkpointing:  # `train` would do it, and nothing here calls that
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer


def peak(trainer: GRPOTrainer, shape: str, rows: int, length: int) -> float:
    """GiB at the peak of the second training step over `rows` rollouts of `length` tokens."""
    config = shapes.SHAPES[shape]
    control = shapes.judge(4095).modes.token_ids
    batch = shapes.rollout_batch([length - PROMPT] * rows, PROMPT, config.vocab_size, control, "cuda", 0)
    if isinstance(trainer, DeGRPOTrainer):
        step = with_step(trainer, lambda: siesta_gradients(trainer, batch))
    else:
        step = with_step(trainer, lambda: stock_gradients(trainer, batch, rows))
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def clean() -> None:
    """Give everything back that nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()


def measured(arm: str, shape: str, rows: int, length: int, dtype: torch.dtype, **fixed: Any) -> float | None:
    """Peak GiB of one trainer, built for it; None if it does not fit."""
    try:
        return peak(make(arm, shape, rows, length, dtype, **fixed), shape, rows, length)
    except torch.OutOfMemoryError:
        return None
    finally:
        clean()


def longest(arm: str, shape: str, dtype: torch.dtype, start: int, rounds: int) -> int:
    """Tokens of the longest single rollout whose step fits without checkpointing: doubling, then halving the interval.

    Args:
        rounds: The result is exact to the last power of two that fits, over 2 ** rounds.
    """
    # One for all lengths: to compile takes longer than to measure.
    trainer = make(arm, shape, 1, MOST, dtype, gradient_checkpointing=False)

    def fit(length: int) -> bool:
        began = time.monotonic()
        try:
            found = peak(trainer, shape, 1, length)
        except torch.OutOfMemoryError:
            found = None
        said = "does not fit" if found is None else f"{found:.1f} GiB"
        print(f"{arm} {shape} {length:,} tokens: {said} ({time.monotonic() - began:.0f} s)", flush=True)
        cast(torch.nn.Module, trainer.model).zero_grad(set_to_none=True)
        clean()
        return found is not None

    fits, fails = 0, start
    while fit(fails):
        fits, fails = fails, 2 * fails
    for _ in range(rounds):
        middle = (fits + fails) // 2
        if fit(middle):
            fits = middle
        else:
            fails = middle
    return fits


def equal_content(shape: str, length: int, rows: int) -> list[dict]:
    """Both trainers over the same rows, with and without checkpointing, and the estimate for ours."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for checkpointing in (False, True):
            row = {"shape": shape, "weights": str(dtype), "checkpointing": checkpointing, "tokens": rows * length}
            for arm in ("stock", "siesta"):
                row[arm] = measured(arm, shape, rows, length, dtype, gradient_checkpointing=checkpointing)
            args = cast(DeGRPOTrainer, make("siesta", shape, rows, length, dtype)).method
            args.gradient_checkpointing = checkpointing
            row["estimate"] = estimate(shapes.SHAPES[shape], args, dtype).total / 2**30
            clean()
            found.append(row)
            print(row, flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["0.6b", "1.5b"], choices=list(shapes.SHAPES))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--longest", action="store_true", help="search the longest rollout that fits instead")
    parser.add_argument("--start", type=int, default=16_384, help="length where that search begins")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    result: dict = {"settings": vars(options), "environment": environment("cuda"), "peaks": [], "longest": []}
    for shape in options.shapes:
        if options.longest:
            fits = {arm: longest(arm, shape, torch.float32, options.start, 3) for arm in ("siesta", "stock")}
            result["longest"].append({"shape": shape} | fits)
            print(result["longest"][-1], flush=True)
        else:
            result["peaks"] += equal_content(shape, options.length, options.rows)
        if options.out:  # after each shape: a search takes minutes
            write_json(options.out, result)


if __name__ == "__main__":
    main()
