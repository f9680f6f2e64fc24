"""responses.jsonl: every response of an evaluation, as text, with what it came to.

A line is an item of a checkpoint:

    {"checkpoint", "id", "level", "query", "answer", "probs": {mode: p}, "mass",
     "greedy": {mode: [response]}, "sampled": {mode: [response, ...]}}

and a response is `{"text", "score", "reward", "tokens", "truncated", "hacks"}`; score and reward are null where the
verifier failed.
"""

import json
from collections.abc import Sequence

import numpy as np

from siesta.data.schema import Example
from siesta.rewards.hacking import FLAGS
from siesta.rl.judge import Judge
from siesta.rl.policies import Measurement


class ResponseRows:
    """A `Keeper` of `siesta.rl.evaluate` that turns the responses of one checkpoint into lines."""

    def __init__(self, judge: Judge, examples: Sequence[Example]):
        self.judge = judge
        self.examples = examples
        self._rows: list[dict[str, dict[str, list[dict]]]] = [{} for _ in examples]

    def __call__(
        self, decoding: str, written: Sequence[list[list[int]]], outcomes: list[dict[str, np.ndarray]]
    ) -> None:
        """Keep the responses of each mode, as many for each example as the outcomes have columns."""
        for mode, responses, outcome in zip(self.judge.modes, written, outcomes, strict=True):
            repeats = outcome["scores"].shape[1]
            for i, row in enumerate(self._rows):
                own = [self._response(responses[i * repeats + k], outcome, i, k) for k in range(repeats)]
                row.setdefault(decoding, {})[mode.name] = own

    def _response(self, ids: list[int], outcome: dict[str, np.ndarray], i: int, k: int) -> dict:
        judged = {
            name: None if np.isnan(outcome[f"{name}s"][i, k]) else float(outcome[f"{name}s"][i, k])
            for name in ("score", "reward")
        }
        flags = [flag for flag in FLAGS if outcome[flag][i, k]]
        own = {"tokens": len(ids), "truncated": bool(outcome["truncated"][i, k]), "hacks": flags}
        return {"text": self.judge.text(ids)} | judged | own

    def lines(self, checkpoint: str, measured: Measurement) -> str:
        """The rows as text, one a line."""
        rows = []
        for example, probs, mass, kept in zip(
            self.examples, measured.mode_probs, measured.mass, self._rows, strict=True
        ):
            known = {name: vars(example)[name] for name in ("id", "query", "answer")}
            policy = {"probs": dict(zip(measured.modes, probs.tolist(), strict=True)), "mass": float(mass)}
            rows.append({"checkpoint": checkpoint} | known | {"level": example.level} | policy | kept)
        return "".join(json.dumps(row) + "\n" for row in rows)
