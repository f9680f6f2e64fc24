"""Items that can be answered without their context, found by measuring and dropped: they say nothing about sleep.

A model answers each item K times from the query alone (`without_context`); an item is dropped if the mean score of
those answers reaches a threshold. A file of such scores has a row an item, made by whatever model is to be trusted:

    {"id": "test.jsonl:7", "without": [0, 1, 0, 0], "with": [1, 1, 1, 0]}

Guessing scores too. So the threshold must lie above the chance level, and the report says how many items a guesser
would have had dropped: if that is near the number dropped, the filter has thrown away luck and not knowledge.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, comb

from siesta.data.errors import DataError
from siesta.data.schema import Example
from siesta.data.sources import BLANK, read_rows

Scores = Mapping[str, Sequence[float | None]]  # item -> score of each answer; None where it could not be scored


@dataclass(frozen=True)
class FilterReport:
    """What was measured and dropped.

    Args:
        items: With a context; others are kept and not counted.
        unmeasured: Of them, those with no answer that could be scored; they are kept.
        without: Mean score from the query alone; `with_context` likewise from the whole prompt, if that was measured.
        chance: Score of always giving the commonest answer.
        by_luck: Items that a guesser at that level would have had dropped, in the mean.
    """

    items: int
    dropped: int
    unmeasured: int
    without: float
    with_context: float | None
    chance: float
    by_luck: float

    def __str__(self) -> str:
        beside = "" if self.with_context is None else f", with it {self.with_context:.3f}"
        unmeasured = f"; {self.unmeasured} could not be measured and are kept" if self.unmeasured else ""
        return (
            f"{self.dropped} of {self.items} items are answered without their context and left out (a guesser: "
            f"{self.by_luck:.1f}); mean score without context {self.without:.3f}{beside}, chance {self.chance:.3f}"
            f"{unmeasured}"
        )


def without_context(examples: Iterable[Example]) -> list[Example]:
    """What the model is asked for the measurement: the queries of the items that have a context, nothing else."""
    return [replace(example, context="") for example in examples if example.context]


def chance_level(examples: Sequence[Example]) -> float:
    """Share of the commonest answer."""
    return max(Counter(example.answer for example in examples).values()) / len(examples)


def needing_context(
    examples: Sequence[Example], without: Scores, *, threshold: float = 0.5, with_context: Scores | None = None
) -> tuple[list[Example], FilterReport]:
    """The items whose mean score without context lies below the threshold, and what was measured.

    Args:
        without: Scores in [0, 1] of answers to the query alone, by id.
        with_context: The same of answers to the whole prompt; only reported.

    Raises:
        DataError: An item has no scores, or guessing reaches the threshold.
    """
    measured = [example for example in examples if example.context]
    if not measured:
        raise DataError("no item has a context, so none can be answered without it")
    chance = chance_level(measured)
    if threshold <= chance:
        raise DataError(
            f"the threshold {threshold} is not above the chance level {chance:.3f}: guessing would drop items that "
            "need their context"
        )
    means = {example.id: _mean(example.id, without) for example in measured}
    known = {name: mean for name, mean in means.items() if mean is not None}
    dropped = {name for name, mean in known.items() if mean >= threshold}
    report = FilterReport(
        items=len(measured),
        dropped=len(dropped),
        unmeasured=len(measured) - len(known),
        without=_average(known.values()),
        with_context=None
        if with_context is None
        else _average(m for e in measured if (m := _mean(e.id, with_context)) is not None),
        chance=chance,
        by_luck=sum(reached_by_luck(_answers(without[name]), chance, threshold) for name in known),
    )
    return [example for example in examples if not (example.context and example.id in dropped)], report


def reached_by_luck(answers: int, chance: float, threshold: float) -> float:
    """Probability that a guesser's mean over so many right-or-wrong answers reaches the threshold."""
    least = ceil(threshold * answers - 1e-9)
    tail = range(least, answers + 1)
    return sum(comb(answers, right) * chance**right * (1 - chance) ** (answers - right) for right in tail)


def read_scores(path: str) -> tuple[Scores, Scores | None]:
    """Scores without and, if every row has them, with context, from a file of rows as above.

    Raises:
        DataError: The file or a row is malformed; names file and row.
    """
    without: dict[str, list[float | None]] = {}
    beside: dict[str, list[float | None]] = {}
    for number, row in enumerate(read_rows(path), start=1):
        if row is BLANK:
            continue
        for name, scores in (("without", without), ("with", beside)):
            if name == "with" and name not in row:
                continue
            values = row.get(name)
            if not isinstance(values, list) or not all(x is None or _is_score(x) for x in values) or "id" not in row:
                raise DataError(
                    f"{path}, row {number}: an id and {name!r}, a list of scores from 0 to 1, are expected"
                )
            scores[str(row["id"])] = values
    return without, beside if len(beside) == len(without) else None


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _answers(scores: Sequence[float | None]) -> int:
    return sum(score is not None for score in scores)


def _mean(name: str, scores: Scores) -> float | None:
    """Mean over the answers of an item that could be scored; None if none could."""
    if name not in scores:
        raise DataError(f"{name}: no scores; measure every item that has a context")
    values = [score for score in scores[name] if score is not None]
    return sum(values) / len(values) if values else None


def _average(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
