"""B6: seconds of a whole training step by phase, over group sizes and response caps.

    python -m benchmarks.step_time --shape 0.6b --out speed/b6_0.6b.json    # one CUDA device, colocated vLLM
    python -m benchmarks.step_time --cpu                                     # `generate` and a tiny model

Half of each group is `short` (up to 120 tokens), half `think` (up to the cap); random weights hardly ever end a
response before its cap. One trainer, and with it one engine, makes all steps; weights are synchronised in every step.
"""

import argparse
import itertools
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.end_to_end import make_judge, prompts, save_model
from benchmarks.timing import environment, synchronize, write_json
from siesta.rl.config import DeGRPOConfig
from siesta.rl.modes import Modes
from siesta.rl.trainer import DeGRPOTrainer

SHORT = 120
PHASES = ("mode_plan", "rollout", "verify", "old_logps", "prepare", "forward_backward", "optimizer")


def make_trainer(options: argparse.Namespace) -> DeGRPOTrainer:
    """The trainer that makes all steps, with our default objective."""
    folder, device = Path(tempfile.mkdtemp()), "cpu" if options.cpu else "cuda"
    tokenizer = save_model(options.shape, device, folder / "model")
    most = options.prompts * max(options.groups)  # TRL's engine works on no more rollouts at a time
    settings: dict[str, Any] = shapes.common_settings(folder / "out", device, most, most) | {"bf16": not options.cpu}
    if not options.cpu:
        longest = options.prompt + 1 + max(options.caps)
        settings |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": options.vllm_share}
        settings |= {"vllm_max_model_length": longest + 1}
    args = DeGRPOConfig(
        **settings,
        token_budget=options.budget,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
    )
    data = prompts(8, options.prompt, 0.5, len(tokenizer), control=False)
    return DeGRPOTrainer(model=str(folder / "model"), judge=make_judge(tokenizer), args=args, train_dataset=data)


def step(trainer: DeGRPOTrainer, inputs: list[dict]) -> dict[str, float]:
    """One optimizer step as the Trainer makes it; seconds and tokens by phase."""
    model, phases = cast(torch.nn.Module, trainer.model), trainer.phases
    with phases("prepare"):
        batch = trainer._generate_and_score_completions(inputs)
        parts = trainer.passes.deal(batch, seed=trainer.state.global_step)
    with phases("forward_backward"):
        for part in parts:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, part)
            trainer.accelerator.backward(loss)
    with phases("optimizer"):
        cast(torch.optim.Optimizer, trainer.optimizer).step()
        cast(torch.optim.Optimizer, trainer.optimizer).zero_grad(set_to_none=True)
    trainer.state.global_step += 1  # weights are synchronised when it moves
    return phases.collect(1)


def sweep(trainer: DeGRPOTrainer, group: int, cap: int, options: argparse.Namespace) -> dict:
    """Median seconds by phase at one group size and cap."""
    device = "cpu" if options.cpu else "cuda"
    short, think = trainer.modes
    trainer.modes = Modes([replace(short, max_tokens=min(SHORT, cap)), replace(think, max_tokens=cap)])
    trainer.group = trainer.num_generations = group
    words = prompts(options.prompts, options.prompt, 0.5, shapes.SHAPES[options.shape].vocab_size, control=False)
    inputs = [dict(row) for row in words for _ in range(group)]
    rows = []
    for repeat in range(options.warmups + options.repeats):
        synchronize(device)
        found = step(trainer, inputs)
        if repeat >= options.warmups:
            rows.append(found)
    median: dict[str, Any] = {key: statistics.median(row.get(key, 0.0) for row in rows) for key in rows[-1]}
    quartiles = statistics.quantiles([row["time/step"] for row in rows], n=4, method="inclusive")
    result = {"group": group, "cap": cap, "rollouts": len(inputs), "low": quartiles[0], "high": quartiles[2]} | median
    shares = " ".join(f"{phase} {result.get(f'time/{phase}', 0.0):.3f}" for phase in PHASES)
    print(f"G {group} cap {cap}: {result['time/step']:.3f} s ({shares})", flush=True)
    return result


def fit(rows: list[dict]) -> dict[str, float]:
    """Seconds of a step as a + b * cap + c * trained tokens, by least squares, and the variance that explains."""
    terms = np.array([[1.0, row["cap"], row["tokens/forward_backward"]] for row in rows])
    seconds = np.array([row["time/step"] for row in rows])
    found, *_ = np.linalg.lstsq(terms, seconds, rcond=None)
    left = ((terms @ found - seconds) ** 2).sum() / max(((seconds - seconds.mean()) ** 2).sum(), 1e-12)
    return {"a": float(found[0]), "b": float(found[1]), "c": float(found[2]), "explained": float(1 - left)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="a tiny model, `generate`, short caps")
    parser.add_argument("--shape", default="0.6b", choices=list(shapes.SHAPES))
    parser.add_argument("--groups", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--caps", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--prompt", type=int, default=199, help="tokens of a prompt")
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--vllm-share", type=float, default=0.3)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    if options.cpu:
        options.shape, options.prompt, options.caps = "tiny", 20, [8, 32, 128]
    trainer = make_trainer(options)
    trainer.create_optimizer()
    cast(torch.nn.Module, trainer.model).train()
    rows = []
    for cap, group in itertools.product(options.caps, options.groups):
        rows.append(sweep(trainer, group, cap, options))
        if options.out:
            content = {"settings": vars(options), "environment": environment("cpu" if options.cpu else "cuda")}
            write_json(options.out, content | {"rows": rows, "fit": fit(rows)})
    print(fit(rows))


if __name__ == "__main__":
    main()
