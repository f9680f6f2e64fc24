"""B3 without vLLM: rollouts by `generate`, stock TRL against ours, at the same lengths in both.

    python -m benchmarks.rollouts --shape 0.6b --scale 0.1 --out speed/b3_0.6b.json    # one CUDA device
    python -m benchmarks.rollouts --cpu

Groups of ten rollouts, eight of them `short`. A logits processor ends every response at a length that its prompt and
its control token decide, in both arms. Stock TRL keeps a row in the batch until the longest has ended; ours reads a
prompt once per group, generates the modes apart and drops rows that have ended. B3 with vLLM is part of
`benchmarks.end_to_end --plain`.
"""

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks import shapes
from benchmarks.timing import environment, measure, write_json
from siesta.rl.generation import replaced
from siesta.rl.rollout import ModePlan

GROUP, SHORT = 10, 8


class EndAt(LogitsProcessor):
    """Forces the end of sequence after as many response tokens as `lengths` has for the prompt and the control token.

    Args:
        lengths: By last prompt token and control token.
        eos_id: Forced then, and impossible before.
    """

    def __init__(self, lengths: dict[tuple[int, int], int], eos_id: int):
        self.lengths = lengths
        self.eos_id = eos_id
        self.control = torch.tensor(sorted({control for _, control in lengths}))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        control = self.control.to(input_ids.device)
        place = torch.isin(input_ids, control).int().argmax(dim=1)
        scores[:, control] = -torch.inf
        scores[:, self.eos_id] = -torch.inf
        for row, at in enumerate(place.tolist()):
            key = (int(input_ids[row, at - 1]), int(input_ids[row, at]))
            if input_ids.shape[1] - at >= self.lengths[key]:
                scores[row] = -torch.inf
                scores[row, self.eos_id] = 0
        return scores


def schedule(options: argparse.Namespace, control: list[int], vocabulary: int) -> tuple[list[list[int]], dict]:
    """Prompts of different last tokens, and the response length of each in each mode, the end of sequence included."""
    draw = random.Random(options.seed)
    prompts, lengths = [], {}
    for i in range(options.prompts):
        words = [draw.randrange(max(control) + 1, vocabulary) for _ in range(options.prompt - 1)]
        prompts.append([*words, 64 + i])
        lengths[64 + i, control[0]] = max(2, int(draw.gauss(120, 40) * options.scale))
        lengths[64 + i, control[1]] = max(4, int(draw.gauss(2500, 600) * options.scale))
    return prompts, lengths


def command_line() -> argparse.Namespace:
    """All settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="a tiny model and a tenth of the lengths")
    parser.add_argument("--shape", default="0.6b", choices=list(shapes.SHAPES))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1.0, help="of response lengths")
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    if options.cpu:
        options.shape, options.prompt, options.scale = "tiny", 20, 0.1
    return options


def main() -> None:
    """Time both arms."""
    options = command_line()
    device = "cpu" if options.cpu else "cuda"
    rollouts = GROUP * options.prompts
    settings: dict[str, Any] = shapes.common_settings(Path(tempfile.mkdtemp()), device, rollouts, rollouts)
    settings |= {"bf16": device == "cuda", "num_generations": GROUP, "gradient_checkpointing": False}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    stock = shapes.stock_trainer(shapes.build(options.shape, dtype, device), settings)
    ours = shapes.siesta_trainer(shapes.build(options.shape, dtype, device), settings)
    control = ours.modes.token_ids
    prompts, lengths = schedule(options, control, shapes.SHAPES[options.shape].vocab_size)
    columns = ([0] * SHORT + [1] * (GROUP - SHORT)) * options.prompts
    rows = [prompt for prompt in prompts for _ in range(GROUP)]
    share = torch.full((rollouts, 2), 0.5)
    ours._plan_modes = lambda prompt_ids: ModePlan(torch.tensor(columns), share, share[:, 0], share[:, 0])
    ours._examples = [{"answer": "", "verifier": "exact"}] * rollouts
    ends = LogitsProcessorList([EndAt(lengths, cast(int, ours._tokenizer.eos_token_id))])
    expected = [lengths[row[-1], control[column]] for row, column in zip(rows, columns, strict=True)]

    def run(trainer: Any, prompt_ids: list[list[int]], opened: int) -> None:
        generate = partial(trainer.model.generate, logits_processor=ends)
        with replaced(trainer.model, "generate", generate):
            written = trainer._generate_single_turn(prompt_ids, None, {}, GROUP)[0]
        assert [len(row) - opened for row in written] == expected

    with_control = [[*row, control[column]] for row, column in zip(rows, columns, strict=True)]
    arms = {"stock": lambda: run(stock, with_control, 0), "siesta": lambda: run(ours, rows, 1)}
    found = measure(arms, warmups=options.warmups, repeats=options.repeats, device=device)
    for name, arm in found.items():
        arm["tokens_per_second"] = sum(expected) / arm["median"]
        print(f"{name}: {arm['median']:.2f} s [{arm['low']:.2f}, {arm['high']:.2f}] {arm['tokens_per_second']:,.0f}/s")
    needed = sum(expected) / (rollouts * max(expected))
    print(f"speed-up {found['stock']['median'] / found['siesta']['median']:.2f}x, rows needed {needed:.2f}")
    if options.out:
        content = {"settings": vars(options), "environment": environment(device), "arms": found, "needed": needed}
        write_json(options.out, content)


if __name__ == "__main__":
    main()
