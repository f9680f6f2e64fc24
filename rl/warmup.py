"""Supervised start with TRL's SFTTrainer: the model learns to answer in every mode before RL lets it choose.

Rows are prompt ids (data/prompts.py), a control token, a written response; only what follows the prompt carries loss.
`paired` shows each question in every mode, as Thinkless does; `cross` shows each question in one mode, drawn by
`shares` ("Demystifying Hybrid Thinking", arXiv 2510.12680, found modes to separate better). Training stops as soon as
the accuracies named in `warmup.stop` are reached, and a gate checks that RL can start at all.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from siesta.data.errors import DataError, UserError
from siesta.data.prompts import messages, prompt_ids, response_ids
from siesta.data.schema import Example
from siesta.rl.judge import Judge
from siesta.rl.modes import Mode, Modes
from siesta.rl.policies import Measurement
from siesta.rl.recipe import WRITER, WarmupSection

IGNORED = -100  # label of tokens without loss, as transformers defines it


class GateError(UserError):
    """The warmed-up model cannot be trained by RL."""


def warmup_rows(
    examples: Iterable[Example],
    judge: Judge,
    *,
    pairing: str,
    shares: dict[str, float] | None,
    instruction: str,
    seed: int,
    balanced: bool = False,
    own_only: bool = False,
) -> Dataset:
    """Rows of `input_ids` and `labels`.

    Args:
        pairing: `paired` or `cross`.
        shares: Weight of each mode under `cross`; equal by default.
        seed: Of the draw of modes.
        balanced: The control token carries loss in as many rows of each mode, so that a mode which is practised more
            is not chosen more.
        own_only: Draw among the modes that an example brings a response for, as rows of `warmup.responses` may lack
            some; otherwise such an example is an error.

    Raises:
        DataError: An example has no response for a mode it is shown in.
    """
    modes, tokenizer = judge.modes, judge.tokenizer
    rng = Random(seed)
    weight = mode_weights(modes, shares)
    rows, shown = [], []
    for example in examples:
        prompt = prompt_ids(tokenizer, messages(example, instruction))
        weights = [0.0 if own_only and not has_response(example, mode) else weight[mode.name] for mode in modes]
        for mode in list(modes) if pairing == "paired" else rng.choices(list(modes), weights):
            completion = [mode.token_id, *response_ids(tokenizer, written_response(example, mode))]
            labels = [IGNORED] * len(prompt) + completion
            rows.append({"input_ids": prompt + completion, "labels": labels})
            shown.append(mode.token_id)
    if balanced:
        for row, token in surplus(shown):
            rows[row]["labels"][rows[row]["labels"].index(token)] = IGNORED
    return Dataset.from_list(rows)


def surplus(shown: Sequence[int]) -> list[tuple[int, int]]:
    """Rows beyond the count of the rarest, as (row, what it shows): as many are left of each."""
    fewest = min(Counter(shown).values(), default=0)
    seen: Counter[int] = Counter()
    beyond = []
    for row, token in enumerate(shown):
        seen[token] += 1
        if seen[token] > fewest:
            beyond.append((row, token))
    return beyond


def mode_weights(modes: Modes, shares: dict[str, float] | None) -> dict[str, float]:
    """Weight of each mode when one is drawn: a mode that `shares` does not name has none."""
    return {mode.name: shares.get(mode.name, 0.0) if shares else 1.0 for mode in modes}


def has_response(example: Example, mode: Mode) -> bool:
    """Does the example bring a response for this mode, not just a solution to make one of?"""
    return mode.name in example.meta.get("responses", {})


def within_levels(examples: Sequence[Example], modes: Modes, max_level: dict[str, int]) -> list[Example]:
    """The examples without the responses of a mode above its highest level.

    Beyond what a mode can do at once a response is a guess, and to be taught to guess keeps it from learning where the
    answer can be read off: in notes, say, whose readers are taught apart from this (`responses_with_notes`).

    Args:
        max_level: Of some modes; the others are shown at every level.
    """
    kept = []
    for example in examples:
        shown = [mode for mode in modes if example.level <= max_level.get(mode.name, example.level)]
        shown = [mode for mode in shown if has_response(example, mode) or "solution" in example.meta]
        responses = {mode.name: written_response(example, mode) for mode in shown}
        kept.append(replace(example, meta=example.meta | {"responses": responses}))
    return kept


def teachable(
    examples: Sequence[Example], modes: Modes, *, pairing: str, shares: dict[str, float] | None, where: str
) -> list[Example]:
    """Examples with their own responses that can be shown: in every mode if `paired`, else in one that is drawn.

    Args:
        where: Names the file in messages.

    Raises:
        DataError: A mode is in no example, or no example is left.
    """
    drawn = [mode for mode in modes if mode_weights(modes, shares)[mode.name] > 0]
    for mode in drawn:
        if not any(has_response(example, mode) for example in examples):
            raise DataError(f"warmup.responses: {where}: no row has a response for mode {mode.name!r}")
    suits = all if pairing == "paired" else any
    chosen = [example for example in examples if suits(has_response(example, mode) for mode in drawn)]
    if not chosen:
        raise DataError(f"warmup.responses: {where}: no row has a response for every mode; use warmup.pairing: cross")
    return chosen


def written_response(example: Example, mode: Mode) -> str:
    """What the warm-up teaches as the response to an example in a mode: the data's own, or one made of its solution.

    A mode that works first shows the solution, then its marker and the answer; one that does not, the answer alone.

    Raises:
        DataError: The example has neither.
    """
    response = example.meta.get("responses", {}).get(mode.name)
    if response is not None:
        return response
    if "solution" not in example.meta:
        raise DataError(
            f"{example.id}: no response for mode {mode.name!r} to warm up on; map one with "
            f"data.columns.responses.{mode.name}, or worked solutions with data.columns.solution"
        )
    return worked(example.meta["solution"], shown_answer(example), mode)


def worked(work: str, answer: str, mode: Mode) -> str:
    """Work and answer as a response of `mode`: with its marker between them, or without the work if it has none."""
    return answer if mode.answer_after is None else f"{work}\n{mode.answer_after}\n{answer}"


def shown_answer(example: Example) -> str:
    """The reference as a response writes it: boxed for `math`, and out of its entry for `reasoning_gym`."""
    if example.verifier == "math":
        return f"\\boxed{{{example.answer}}}"
    return str(json.loads(example.answer)["answer"]) if example.verifier == "reasoning_gym" else example.answer


def accuracy(measured: Measurement, key: str) -> float:
    """Greedy accuracy of `mode` or, for `mode@level`, of that level alone; NaN if no item has the level. Of `sleep` it
    is `Measurement.sleep_right`.
    """
    if key == WRITER:
        return measured.sleep_right
    mode, _, level = key.partition("@")
    scores = measured.greedy_scores[:, measured.modes.index(mode)]
    chosen = scores[measured.levels == int(level)] if level else scores
    chosen = chosen[~np.isnan(chosen)]  # a failed verifier says nothing
    return float(np.mean(chosen)) if len(chosen) else float("nan")


def accuracy_by_level(measured: Measurement) -> str:
    """One line: greedy accuracy of each mode at each level, in per cent."""
    levels = np.unique(measured.levels)
    parts = []
    for mode in measured.modes:
        by_level = [accuracy(measured, f"{mode}@{level}") for level in levels]
        parts.append(f"{mode} " + " ".join(f"{100 * value:.0f}" for value in by_level))
    if not np.isnan(measured.sleep_right):
        parts.append(f"{WRITER} {100 * measured.sleep_right:.0f}")
    return " | ".join(parts)


class StopOnAccuracy(TrainerCallback):
    """Ends the warm-up as soon as every accuracy in `stop` is reached."""

    def __init__(self, measure_now, section: WarmupSection, say):
        self.measure_now, self.section, self.say = measure_now, section, say

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.section.check_every == 0:
            measured = self.measure_now(model)
            self.say(
                f"warm-up {state.global_step}/{state.max_steps} accuracy % by level: {accuracy_by_level(measured)}"
            )
            stop = self.section.stop
            if stop and all(accuracy(measured, key) >= floor for key, floor in stop.items()):
                control.should_training_stop = True


def check_gate(measured: Measurement, section: WarmupSection, modes: Modes) -> None:
    """Can RL start? Every mode must be sampled, and nearly all mass must lie on control tokens.

    Raises:
        GateError: With the number that failed and what to do.
    """
    mass = float(measured.mass.mean())
    if not mass >= section.min_mass:
        raise GateError(
            f"warm-up gate: mass on control tokens is {mass:.3f}, below warmup.min_mass {section.min_mass}; train "
            "longer (warmup.max_steps), raise warmup.learning_rate, or add warm-up data"
        )
    for mode, share in zip(modes, measured.mode_probs.mean(0), strict=True):
        if not share >= section.min_share:
            raise GateError(
                f"warm-up gate: mode {mode.name!r} has probability {share:.4f}, below warmup.min_share "
                f"{section.min_share}; give it a larger share of the warm-up data (warmup.shares)"
            )
    for key, floor in section.stop.items():
        reached = accuracy(measured, key)
        if not reached >= floor:
            raise GateError(
                f"warm-up gate: accuracy of {key} is {reached:.3f}, below warmup.stop {floor}; raise warmup.max_steps"
            )
