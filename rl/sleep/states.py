"""What a state is worth at wake: every policy with its own notes, without any, and with two controls.

A state that helps because it is there, and not for what it says, would help as well if it were another context's
(`shuffled`) or empty (`zeroed`). Pure numpy behind `states_of`; I items, contexts are what is resampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from siesta.data.schema import Example
from siesta.rl.policies import Measurement, choices, interval, per_item, resampled_means, table
from siesta.rl.sleep.notes import NotesSleep, note_tokens, rows_right
from siesta.rl.sleep.warmup import distinct

STATES = ("none", "own", "shuffled", "zeroed")
QUERIES = (1, 2, 4, 8)  # of one context, that share the cost of its sleep
PRICES = (0.1, 1.0)  # of a sleep token, in wake tokens


class Slept(Protocol):
    """What sleep on the contexts of I examples came to, whatever the states are.

    `contexts` is the number of each example's context, `tokens` what was computed or written in its sleep, and
    `numbers` what the table says of the states, (I,) each.
    """

    @property
    def contexts(self) -> np.ndarray: ...

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def numbers(self) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class States:
    """Examples as wake sees them in each state, and what their sleep came to.

    Args:
        examples: State -> the I examples.
        contexts: Number of each example's context, (I,).
        tokens: Written on each example's context, (I,).
        kept: Tokens of the state that each example is read with under `own`, (I,).
        rows_right: Share of the taught rows in each example's notes, (I,); NaN where none are taught.
    """

    examples: dict[str, list[Example]]
    contexts: np.ndarray
    tokens: np.ndarray
    kept: np.ndarray
    rows_right: np.ndarray

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """What the table says of the states, (I,) each."""
        return {"rows_right": self.rows_right, "note_tokens": self.tokens, "kept_tokens": self.kept}


def states_of(sleep: NotesSleep, model: PreTrainedModel, examples: Sequence[Example]) -> States:
    """Sleep on every context once; `shuffled` has the notes on the next context."""
    asked = distinct(examples)
    place = {example.context: i for i, example in enumerate(asked)}
    contexts = np.array([place[example.context] for example in examples])
    out = sleep.sleep(model, list(place), passes=sleep.section.passes)
    texts = out.state.texts
    written = [sleep.text(ids) for ids in out.actions[-1].completion_ids]
    right = [
        rows_right(text, example.meta["notes"]) if "notes" in example.meta else np.nan
        for text, example in zip(written, asked, strict=True)
    ]

    def read(notes: Callable[[int], str]) -> list[Example]:
        return [sleep.reader(example, notes(i)) for example, i in zip(examples, contexts, strict=True)]

    return States(
        examples={
            "none": list(examples),
            "own": read(lambda i: texts[i]),
            "shuffled": read(lambda i: texts[(i + 1) % len(texts)]),
            "zeroed": read(lambda i: ""),
        },
        contexts=contexts,
        tokens=np.array(note_tokens(out.actions))[contexts],
        kept=np.array([len(sleep.tokenizer.encode(text, add_special_tokens=False)) for text in texts])[contexts],
        rows_right=np.array(right)[contexts],
    )


def by_context(measured: Measurement, states: Slept) -> Measurement:
    """The same, to be resampled by context: the queries of one depend on each other."""
    return replace(measured, contexts=states.contexts)


def free_choice(measured: Measurement) -> dict[str, np.ndarray]:
    """Accuracy, tokens and share of the last mode of the likelier mode's greedy response, (I,) each."""
    choice = choices(measured, greedy=True)["free"]
    values = per_item(measured, choice, greedy=True)
    return {"accuracy": values["accuracy"], "tokens": values["tokens"], "last_mode": choice[:, -1]}


def estimate(values: np.ndarray, contexts: np.ndarray, *, resamples: int, seed: int) -> list[float]:
    """Mean and 95 % interval."""
    return [float(np.nanmean(values)), *interval(values, resamples=resamples, seed=seed, clusters=contexts)]


def against_none(measured: dict[str, Measurement], states: Slept, **bootstrap: int) -> dict[str, dict]:
    """For each state: accuracy, tokens and share of the last mode less those without a state, item by item; mean and
    95 % interval each.
    """
    base = free_choice(measured["none"])
    return {
        state: {
            name: estimate(value - base[name], states.contexts, **bootstrap)
            for name, value in free_choice(own).items()
        }
        for state, own in measured.items()
        if state != "none"
    }


def query_costs(
    wake: np.ndarray, without: np.ndarray, sleep: np.ndarray, contexts: np.ndarray, **bootstrap: int
) -> dict[str, dict]:
    """Cost of a query in wake tokens: the answer's, and its share of the sleep's.

    Args:
        wake: Tokens of each answer from the state, (I,).
        without: Tokens of each answer without one, (I,).
        sleep: Tokens written on each item's context, (I,).
        bootstrap: resamples, seed.

    Returns:
        Price of a sleep token -> m -> wake + price sleep / m, mean and 95 % interval, and `break_even`: the m from
        which sleep is the cheaper way, price sleep / (without - wake); infinite where wake saves nothing.
    """
    saved, spent = without - wake, sleep.astype(float)
    result: dict[str, dict] = {}
    drawn = [resampled_means(values, contexts, **bootstrap) for values in (spent, saved)]
    for price in PRICES:
        row: dict = {str(m): estimate(wake + price * spent / m, contexts, **bootstrap) for m in QUERIES}
        low, high = np.percentile(break_even(price, *drawn), [2.5, 97.5], method="nearest")
        row["break_even"] = [float(break_even(price, spent.mean(), saved.mean())), float(low), float(high)]
        result[str(price)] = row
    return result


def break_even(price: float, spent: np.ndarray, saved: np.ndarray) -> np.ndarray:
    """m at which price * spent / m is what is saved."""
    with np.errstate(divide="ignore"):
        return np.where(saved > 0, price * np.asarray(spent) / np.where(saved > 0, saved, 1.0), np.inf)


def evaluation(measured: dict[str, Measurement], states: Slept, **bootstrap: int) -> dict:
    """The table of policies without a state; in `states` those of the other states, in `sleep` what sleep is worth."""
    tables = {state: table(own, **bootstrap) for state, own in measured.items()}
    result = tables.pop("none")
    tokens = {state: free_choice(own)["tokens"] for state, own in measured.items()}
    result["states"] = tables
    own = {name: values.astype(float) for name, values in states.numbers.items()}
    numbers = {name: estimate(values, states.contexts, **bootstrap) for name, values in own.items()}
    result["sleep"] = {
        **numbers,
        "contexts": len(set(states.contexts.tolist())),
        "against_none": against_none(measured, states, **bootstrap),
        "without": estimate(tokens["none"], states.contexts, **bootstrap),
        "costs": query_costs(tokens["own"], tokens["none"], states.tokens, states.contexts, **bootstrap),
    }
    return result
