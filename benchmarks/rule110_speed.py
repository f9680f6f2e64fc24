"""Milliseconds of the Rule 110 hybrid, alone on the card: a training step and sleep grow with N, waking does not.

    python -m benchmarks.rule110_speed --passes 1 2 4 --out docs/results/rule110/speed.json

On a GPU each is one CUDA graph over compiled blocks, so that what is timed is the card and not Python. The step is the
forward and backward pass; the optimizers come on top and are alike for all N. Wake is one window that asks all four
rows: of a whole batch (throughput) and of one context (latency).
"""

from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks import rule110_rows
from benchmarks.rule110_arm import FULL, TINY, Sizes, as_graph, command_line, gradients, prepared, save
from benchmarks.rule110_model import Hybrid
from benchmarks.rule110_rows import to_bits
from benchmarks.timing import environment, measure


def still(run: Callable[[], torch.Tensor], model: Hybrid, device: str) -> Callable[[], torch.Tensor]:
    """A function without gradients, as a graph on a GPU."""

    def bare() -> torch.Tensor:
        with torch.no_grad():
            return run()

    return as_graph(bare, model) if device == "cuda" else bare


def timed(model: Hybrid, passes: int, sizes: Sizes, device: str, depth: int) -> dict[str, dict[str, float]]:
    """Seconds of each piece at N passes."""
    rows = rule110_rows.make(sizes.batch, sizes.shape.bits, [depth], "train", 0).map(lambda part: part.to(device))
    bits = to_bits(rows.rows, sizes.shape.bits)
    with torch.no_grad():
        states = model.sleep(bits, rows.depth, passes)
    one = [state[:1].clone() for state in states]
    runs = {
        "sleep": lambda: model.sleep(bits, rows.depth, passes)[-1],
        "wake": lambda: model.answer(states),
        "wake_one": lambda: model.answer(one),
    }
    pieces = {name: still(run, model, device) for name, run in runs.items()}
    pieces["train"] = gradients(model, rows, passes, modes=False)
    return measure(pieces, warmups=2, repeats=10 if device == "cuda" else 2, device=device)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = command_line((__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", nargs="+", type=int, default=[1, 2, 4])
    options = parser.parse_args(arguments)
    sizes, device = (TINY if options.tiny else FULL), "cpu" if options.cpu else "cuda"
    model = prepared(sizes, 0, device)
    content = {str(n): timed(model, n, sizes, device, depth=8) for n in options.passes}
    shape = asdict(sizes.shape) | {"state_bytes": sizes.shape.state_bytes, "kv_bytes": sizes.shape.kv_bytes}
    weights = sum(weight.numel() for weight in model.parameters())
    found = {"passes": content, "batch": sizes.batch, "shape": shape, "parameters": weights}
    save(options.out, found | {"environment": environment(device)})


if __name__ == "__main__":
    main()
