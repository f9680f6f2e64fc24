"""One arm of the Rule 110 benchmark: train the hybrid at some N, measure it on held-out rows, write one JSON.

    python -m benchmarks.rule110_arm '{"depths": [8], "passes": 4, "rate": 4e-3, "seed": 0, "steps": 500}' \\
      --out docs/results/rule110/here.json

Cross-entropy on the 4 labels alone, its gradient through all passes and windows. Forward and backward pass are one
CUDA graph over compiled blocks; Muon (matrices, scaled as in arXiv 2502.16982) and AdamW (the rest) run while it is
busy. Arms of one seed start from the same weights and see the same rows in the same order, whatever their N.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch.nn import functional as F

from benchmarks import rule110_rows
from benchmarks.rule110_model import Hybrid, Shape, States
from benchmarks.rule110_rows import Rows, centred, to_bits
from benchmarks.timing import environment, synchronize, write_json
from siesta.data.errors import DataError, UserError
from siesta.data.tasks.rule110 import DEPTHS, QUERIES

P = ParamSpec("P")
R = TypeVar("R")
FRESH = 10_000  # seed of the rows that are measured; of the train split, new draws
BLIND = 2  # places of a window of `think` that lack a left neighbour, see `Hybrid.written`


@dataclass(frozen=True)
class Sizes:
    """What all arms share: the model, contexts a step, held-out contexts, steps of RL."""

    shape: Shape = field(default_factory=Shape)
    batch: int = 512
    held_out: int = 16384
    warmup: int = 100
    rl_steps: int = 100


FULL = Sizes()
TINY = Sizes(Shape(bits=8, width=16, heads=2, inner=16), batch=16, held_out=64, warmup=2, rl_steps=2)


@dataclass(frozen=True)
class Arm:
    """What one arm trains.

    Args:
        depths: t; of several, each context has one of them.
        passes: N.
        rate: Learning rate of Muon.
        seed: Of the weights and of the rows.
        steps: Optimizer steps.
        modes: Also taught to think, and then trained with RL to choose (`rule110_modes`).
    """

    depths: tuple[int, ...]
    passes: int
    rate: float
    seed: int
    steps: int
    modes: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        kind = "modes" if self.modes else f"t{self.depths[0]}"
        return f"{kind}_n{self.passes}_lr{self.rate:g}_s{self.seed}_{self.steps}"


def bit_loss(logits: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of bits (...) under the bit outputs of logits (..., OUTPUTS); the control tokens take no part."""
    return F.cross_entropy(logits[..., :2].flatten(0, -2), bits.flatten())


def loss_of(model: Hybrid, batch: Rows, passes: int, modes: bool) -> torch.Tensor:
    """Loss of a batch. With `modes`, also of recalling a row from the state and of writing the row after another."""
    size = model.shape.bits
    states = model.sleep(to_bits(batch.rows, size), batch.depth, passes)
    loss = bit_loss(model.answer(states), batch.labels)
    if modes:
        read = batch.rows.gather(1, batch.which[:, None])[:, 0]
        loss = loss + bit_loss(model.recalled(states, batch.which), centred(read, size))
        written = model.written(states, batch.which, centred(batch.shown, size))
        loss = loss + bit_loss(written[:, BLIND:], centred(batch.next, size)[:, BLIND:])
    return loss


def as_graph(run: Callable[[], torch.Tensor], model: Hybrid) -> Callable[[], torch.Tensor]:
    """A function as one CUDA graph, captured once and replayed with every call, which overwrites the result before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            run()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()  # so that the graph writes gradients and does not add to them
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def gradients(model: Hybrid, batch: Rows, passes: int, modes: bool) -> Callable[[], torch.Tensor]:
    """A function that puts the gradients for what `batch` holds at the time into the model, and returns the loss."""

    def run() -> torch.Tensor:
        loss = loss_of(model, batch, passes, modes)
        loss.backward()
        return loss.detach()

    def anew() -> torch.Tensor:
        model.zero_grad()
        return run()

    return as_graph(run, model) if batch.rows.is_cuda else anew


def optimizers(model: Hybrid, rate: float) -> list[torch.optim.Optimizer]:
    """Muon at `rate` for the matrices of the blocks, AdamW at 1e-3 for all else."""
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    known = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in known]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def train(model: Hybrid, arm: Arm, sizes: Sizes, device: str) -> dict:
    """Train as the module says: constant rate behind a linear warm-up, the last fifth linear to 0.

    Returns:
        Mean loss of each eighth of the run, and milliseconds a step.
    """
    count = arm.steps * sizes.batch
    rows = rule110_rows.make(count, sizes.shape.bits, arm.depths, "train", arm.seed)
    steps = rows.map(lambda part: part.unflatten(0, (arm.steps, sizes.batch)).to(device))
    batch = steps.map(lambda part: part[0].clone())
    compute = gradients(model, batch, arm.passes, arm.modes)
    both = optimizers(model, arm.rate)
    losses = torch.zeros(arm.steps, device=device)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
    synchronize(device)
    start = time.perf_counter()
    for step in range(arm.steps):
        for name, part in vars(batch).items():
            part.copy_(vars(steps)[name][step])
        losses[step] = compute()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, (step + 1) / sizes.warmup, (arm.steps - step) / (0.2 * arm.steps))
        for optimizer, rates in zip(both, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            optimizer.step()
    synchronize(device)
    seconds = time.perf_counter() - start
    eighths = [part.mean().item() for part in losses.tensor_split(min(8, len(losses)))]
    return {"losses": eighths, "ms_a_step": 1000 * seconds / arm.steps}


CONTROLS: dict[str, Callable[[States], States]] = {
    "slept": lambda states: states,
    "zeroed": lambda states: [torch.zeros_like(state) for state in states],
    "shuffled": lambda states: [state.roll(1, 0) for state in states],  # every context gets another one's
}


def without_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose blocks run as they are: compiled code is made for training and would be made anew for this."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return run


@without_gradients
def evaluate(model: Hybrid, rows: Rows, passes: int, batch: int) -> dict[str, dict]:
    """Accuracy of `short` on rows of the model's device, by depth, with the state and with its controls.

    Returns:
        t -> control -> `each` (answers that are right), `all` (contexts whose four are) and `loss`; `majority` is the
        control that always gives the more frequent answer of these rows.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in CONTROLS}
    size = model.shape.bits
    for part in range(0, len(rows), batch):
        some = rows.map(lambda tensor, part=part: tensor[part : part + batch])
        states = model.sleep(to_bits(some.rows, size), some.depth, passes)
        for name, change in CONTROLS.items():
            found[name].append(model.answer(change(states))[..., :2].float())
    result = {}
    for index in rows.depth.unique().tolist():
        mine = rows.depth == index
        labels = rows.labels[mine]
        guess = torch.full_like(labels, int(labels.float().mean() > 0.5))
        scores = {"majority": score(guess == labels)}
        for name, parts in found.items():
            logits = torch.cat(parts)[mine]
            scores[name] = score(logits.argmax(-1) == labels) | {"loss": bit_loss(logits, labels).item()}
        result[str(DEPTHS[index])] = scores
    return result


def score(right: torch.Tensor) -> dict[str, float]:
    """Accuracy of answers (contexts, 4)."""
    return {"each": right.float().mean().item(), "all": right.all(-1).float().mean().item()}


def prepared(sizes: Sizes, seed: int, device: str) -> Hybrid:
    """The model of a seed on its device, compiled where there is a GPU."""
    torch.set_float32_matmul_precision("high")
    model = Hybrid(sizes.shape, seed).to(device)
    if device == "cuda":
        model.compile()
    return model


def run(arm: Arm, sizes: Sizes, device: str) -> dict:
    """Train an arm and measure it: what its JSON holds."""
    start = time.perf_counter()
    model = prepared(sizes, arm.seed, device)
    content: dict = {"arm": asdict(arm) | {"name": arm.name}, "training": train(model, arm, sizes, device)}
    content["tokens"] = arm.steps * sizes.batch * QUERIES * (sizes.shape.bits + 1)
    for split in ("train", "validation", "test"):
        rows = rule110_rows.make(sizes.held_out, sizes.shape.bits, arm.depths, split, seed=FRESH)
        content[split] = evaluate(model, rows.map(lambda part: part.to(device)), arm.passes, sizes.batch)
    if arm.modes:
        from benchmarks.rule110_modes import learn_modes  # it builds on this module

        content["modes"] = learn_modes(model, arm, sizes, device)
    content |= {"sizes": asdict(sizes), "environment": environment(device)}
    return content | {"seconds": time.perf_counter() - start}


def command_line(description: str) -> argparse.ArgumentParser:
    """What every process of this benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see that all of it runs")
    return parser


def read_arm(text: str) -> Arm:
    """An arm from JSON.

    Raises:
        DataError: It is not JSON, or its keys are not an arm's.
    """
    try:
        fields = json.loads(text)
        return Arm(**fields | {"depths": tuple(fields["depths"])})
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise DataError(f"arm {text}: {error}; give {', '.join(Arm.__dataclass_fields__)} as JSON") from None


def save(file: Path, content: dict) -> None:
    """Write JSON that is there as a whole or not at all."""
    part = file.with_suffix(".part")
    write_json(part, content)
    part.replace(file)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = command_line((__doc__ or "").splitlines()[0])
    parser.add_argument("arm", help="JSON of an Arm")
    options = parser.parse_args(arguments)
    try:
        arm = read_arm(options.arm)
        save(options.out, run(arm, TINY if options.tiny else FULL, "cpu" if options.cpu else "cuda"))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
