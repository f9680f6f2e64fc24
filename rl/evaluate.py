"""Evaluation: every item answered in every mode, greedily and sampled, and every policy priced on those answers.

The stage `evaluate` of a run and the command `siesta eval` (`siesta.rl.checkpoint_eval`) both measure with this.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from siesta.data.prompts import end_id, messages, pad_id, prompt_ids
from siesta.data.schema import Example
from siesta.rewards.hacking import FLAGS
from siesta.rewards.verifiers import solution_part
from siesta.rl.generation import Writer, complete, mode_policy
from siesta.rl.judge import Judge
from siesta.rl.modes import Mode
from siesta.rl.policies import Measurement
from siesta.rl.voting import ballot_number

# Decoding, responses of each mode, and `judged` of them.
Keeper = Callable[[str, Sequence[list[list[int]]], list[dict[str, np.ndarray]]], None]


def measure(
    model: PreTrainedModel,
    judge: Judge,
    examples: Sequence[Example],
    *,
    instruction: str,
    samples: int,
    temperature: float,
    batch_size: int,
    write: Writer | None = None,
    advance: Callable[[int], None] = lambda count: None,
    keep: Keeper | None = None,
) -> Measurement:
    """Answer every example in every mode, once greedily and `samples` times at `temperature`.

    The mode policy always comes from a forward pass of `model`. A rollout whose verifier failed is left out of its
    item's mean; without any scorable rollout the mean is NaN.

    Args:
        write: Has `model`'s weights and writes in its place; None is `generate`.
        advance: Is told how many responses are done since the last time, of (1 + samples) for each item and mode.
        keep: See `measurement`.
    """
    tokenizer, modes = judge.tokenizer, judge.modes
    prompts = [prompt_ids(tokenizer, messages(example, instruction)) for example in examples]
    settings: dict[str, Any] = {"batch_size": batch_size, "pad_id": pad_id(tokenizer)}
    log_policy, mass = mode_policy(model, prompts, modes, temperature=temperature, device=model.device, **settings)
    own = partial(complete, model, eos_id=end_id(tokenizer), advance=advance, **settings)

    def respond(mode: Mode, repeats: int, heat: float | None) -> list[list[int]]:
        asked = [prompt for prompt in prompts for _ in range(repeats)]
        if write is None:
            return own(asked, mode, temperature=heat)
        responses = write(asked, mode, temperature=heat)
        advance(len(responses))
        return responses

    bounds = {"samples": samples, "temperature": temperature}
    return measurement(judge, examples, log_policy, mass, respond, keep=keep, **bounds)


def measurement(
    judge: Judge,
    examples: Sequence[Example],
    log_policy: torch.Tensor,
    mass: torch.Tensor,
    respond: Callable[[Mode, int, float | None], list[list[int]]],
    *,
    samples: int,
    temperature: float,
    keep: Keeper | None = None,
) -> Measurement:
    """Forced rollouts of every example, whatever it is read from.

    Args:
        log_policy, mass: log pi(m given x), (I, M), and the mass on control tokens, (I,).
        respond: Responses in a mode, so many of each example one behind the other, at a temperature or greedy.
        keep: Gets the responses of `greedy`, then those of `sampled`, with what they came to.
    """
    modes = judge.modes

    def answered(repeats: int, heat: float | None) -> list[dict[str, np.ndarray]]:
        written = [respond(mode, repeats, heat) for mode in modes]
        outcomes = judged(judge, written, examples, repeats)
        if keep is not None:
            keep("greedy" if heat is None else "sampled", written, outcomes)
        return outcomes

    greedy, sampled = answered(1, None), answered(samples, temperature)

    def means(outcomes: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        return np.stack([np.nanmean(outcome[name], axis=1) for outcome in outcomes], axis=1)  # (I, M)

    return Measurement(
        modes=modes.names,
        levels=np.array([example.level for example in examples]),
        mode_probs=log_policy.exp().double().numpy(),
        mass=mass.double().numpy(),
        greedy_scores=means(greedy, "scores"),
        greedy_tokens=means(greedy, "tokens"),
        sampled_scores=means(sampled, "scores"),
        sampled_tokens=means(sampled, "tokens"),
        sampled_rewards=means(sampled, "rewards"),
        truncated=means(sampled, "truncated"),
        hacks={
            name: {flag: float(outcome[flag].mean()) for flag in FLAGS}
            for name, outcome in zip(modes.names, sampled, strict=True)
        },
        unscorable=int(sum(np.isnan(outcome["scores"]).sum() for outcome in [*greedy, *sampled])),
        drawn_scores=np.stack([outcome["scores"] for outcome in sampled], axis=1),
        drawn_answers=np.stack([outcome["answers"] for outcome in sampled], axis=1),
    )


def judged(
    judge: Judge, written: Sequence[list[list[int]]], examples: Sequence[Example], repeats: int
) -> list[dict[str, np.ndarray]]:
    """What the responses of each mode came to, (I, repeats) each: scores, tokens, rewards, truncated, answers (their
    numbers, see `siesta.rl.voting.ballot_number`) and the flags.

    Args:
        written: Responses of each mode, `repeats` for each example.
    """
    items = [place for place in range(len(examples)) for _ in range(repeats)]
    own = [mode for mode in judge.modes for _ in items]
    raised = judge.hacks(own, [ids for responses in written for ids in responses], items * len(written))
    known: list[dict[str, int]] = [{} for _ in examples]
    outcomes = []
    for column, (mode, responses) in enumerate(zip(judge.modes, written, strict=True)):
        hacks = raised[column * len(items) : (column + 1) * len(items)]
        names, answers = [examples[i].verifier for i in items], [examples[i].answer for i in items]
        scores = judge.score(mode, responses, names, answers)
        tokens = [len(response) for response in responses]
        rewards = [
            np.nan if score is None else judge.reward(mode, score, n, found)
            for score, n, found in zip(scores, tokens, hacks, strict=True)
        ]
        cut = [response[-1] != end_id(judge.tokenizer) for response in responses]
        solutions = [solution_part(judge.text(response), mode.answer_after) for response in responses]
        given = [ballot_number(text, known[i]) for i, text in zip(items, solutions, strict=True)]
        columns = {"scores": scores, "tokens": tokens, "rewards": rewards, "truncated": cut, "answers": given}
        columns |= {flag: [flag in found for found in hacks] for flag in FLAGS}
        outcomes.append({name: np.array(values, dtype=float).reshape(-1, repeats) for name, values in columns.items()})
    return outcomes


def print_table(
    result: dict, title: str, *, decoding: str = "greedy", only: Sequence[str] = (), console: Console | None = None
) -> None:
    """One decoding of `policies.table` as a rich table: a row a policy (of `only`), the last mode's share by level."""
    rows = result[decoding]
    last = list(rows["free"]["shares"])[-1]
    levels = list(rows["free"]["levels"])
    view = Table(
        title=title, caption=f"{result['items']} items, {decoding}; brackets: 95 % bootstrap interval over items"
    )
    view.add_column("policy", no_wrap=True)
    timed = "milliseconds" in rows["free"]
    for name in ("accuracy %", "tokens", *(["ms"] if timed else []), f"{last} %", "regret"):
        view.add_column(name, justify="right", no_wrap=True)
    if len(levels) > 1:
        view.add_column(f"{last} % at level {levels[0]} to {levels[-1]}", no_wrap=True)
    for name, row in rows.items():
        if only and name not in only:
            continue
        low, high = row["interval"]["accuracy"]
        shares = " ".join(f"{100 * row['levels'][level]['shares'][last]:.0f}" for level in levels)
        view.add_row(
            name,
            f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            f"{row['tokens']:.1f}",
            *([f"{row['milliseconds']:.1f}"] if timed else []),
            f"{100 * row['shares'][last]:.0f}",
            f"{row['regret']:.3f}",
            *([shares] if len(levels) > 1 else []),
            style="bold" if name == "free" else "",
        )
    (console or Console(width=None if sys.stdout.isatty() else 120)).print(view)


def print_states(result: dict, title: str, *, console: Console | None = None) -> None:
    """What a state is worth: a row for each state and policy, the share of the last mode, and costs of a query."""
    states = {"none": result, **result["states"]}
    last = list(result["greedy"]["free"]["shares"])[-1]
    sleep = result["sleep"]
    view = Table(
        title=title,
        caption=f"{result['items']} items of {sleep['contexts']} contexts, greedy; brackets: 95 % bootstrap interval "
        f"over contexts. {what_sleep_left(sleep)}",
    )
    for name in ("state", "policy", "accuracy %", "tokens", f"{last} %", f"P({last}) %"):
        view.add_column(name, no_wrap=True)
    for state, own in states.items():
        for policy in [name for name in own["greedy"] if name.startswith("always-")] + ["free"]:
            row, low_high = own["greedy"][policy], own["greedy"][policy]["interval"]["accuracy"]
            view.add_row(
                state,
                policy,
                f"{100 * row['accuracy']:.1f} [{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]",
                f"{row['tokens']:.2f}",
                f"{100 * row['shares'][last]:.0f}",
                f"{100 * own['sampled'][policy]['shares'][last]:.0f}",
                style="bold" if policy == "free" else "",
            )
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    console.print(view)
    without = sleep["without"][0]
    for price, row in sleep["costs"].items():
        each = ", ".join(f"{cost[0]:.2f} at {m}" for m, cost in row.items() if m != "break_even")
        line = f"cost of a query, sleep token at {price}: {each} queries a context; {without:.2f} without sleep"
        console.print(f"{line}; break-even at {row['break_even'][0]:.1f} queries")


def what_sleep_left(sleep: dict) -> str:
    """One sentence on the states of an evaluation."""
    if "note_tokens" in sleep:
        return f"Notes of {sleep['note_tokens'][0]:.1f} tokens, {sleep['kept_tokens'][0]:.1f} kept"
    return f"States of {sleep['state_bytes'][0]:,.0f} bytes, {sleep['sleep_tokens'][0]:.1f} tokens computed in sleep"
