"""The data card of warm-up data: where it comes from, what was kept, what was refused and why, how long responses are.

It holds no dates, so that the same data has the same card.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from siesta.data.schema import Example
from siesta.rl.recipe import Recipe

QUANTILES = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
# What a draft can fail by, in the order of the checks.
REASONS = {
    "missing": "the data has none",
    "unfinished": "cut off before its end",
    "empty": "nothing but white space",
    "reserved token": "holds a control token, or a special token of the trained model's tokenizer",
    "no marker": "no `answer_after` text before the answer",
    "too long": "more tokens than the mode's `max_tokens`",
    "wrong": "the verifier gives less than full marks",
    "unscorable": "the verifier failed",
}


def card_numbers(recipe: Recipe, examples: Sequence[Example], outcomes: dict[str, list[dict]]) -> dict[str, Any]:
    """The card as data.

    Args:
        outcomes: Mode -> what became of each example, `siesta.rl.warmup_data.Outcome` as a mapping.
    """
    has = [[name for name, each in outcomes.items() if each[i]["text"] is not None] for i in range(len(examples))]
    sets = Counter("+".join(names) for names in has)
    content = recipe.model_dump(mode="json", exclude_defaults=True, include={"data", "teachers"})
    return {
        "data": content["data"],
        "teachers": content["teachers"],
        "model": recipe.model.path or "embedded",
        "verifiers": dict(sorted(Counter(example.verifier for example in examples).items())),
        "examples": len(examples),
        "left_out": sets.pop("", 0),
        "paired": sets.get("+".join(outcomes), 0),
        "by_modes": dict(sorted(sets.items())),
        "modes": {name: mode_numbers(each) for name, each in outcomes.items()},
    }


def mode_numbers(outcomes: Sequence[dict]) -> dict[str, Any]:
    """Of one mode: examples kept, drafts by verdict, and quantiles of kept lengths in tokens."""
    drafts: Counter[str] = Counter()
    for outcome in outcomes:
        drafts.update(outcome["drafts"])
    lengths = [outcome["tokens"] for outcome in outcomes if outcome["text"] is not None]
    # A quantile is one of the lengths, so that it can be checked by counting.
    values = np.percentile(lengths, list(QUANTILES.values()), method="lower") if lengths else []
    return {
        "kept": len(lengths),
        "drafts": {verdict: drafts[verdict] for verdict in ("right", *REASONS) if drafts[verdict]},
        "tokens": dict(zip(QUANTILES, map(int, values), strict=False)),
    }


def card_text(numbers: dict[str, Any]) -> str:
    """The card in Markdown."""
    modes = numbers["modes"]
    verdicts = [verdict for verdict in ("right", *REASONS) if any(verdict in of["drafts"] for of in modes.values())]
    lines = [
        "# Warm-up data",
        "",
        f"- data: `{json.dumps(numbers['data'])}`",
        *(f"- `{name}` is taught by `{json.dumps(teacher)}`" for name, teacher in numbers["teachers"].items()),
        f"- verified by {', '.join(f'{name} ({count:,})' for name, count in numbers['verifiers'].items())}",
        f"- lengths in tokens of {numbers['model']}",
        "- licence: that of the data and of the teachers; look it up before you pass this on",
        "",
        f"{numbers['examples']:,} examples, {numbers['paired']:,} of them with a response in every mode, "
        f"{numbers['left_out']:,} left out for want of any.",
        "",
        *table(["modes of an example", "examples"], numbers["by_modes"].items()),
        "",
        *table(
            ["mode", "kept", *QUANTILES], [[name, of["kept"], *of["tokens"].values()] for name, of in modes.items()]
        ),
        "",
        *table(["drafts", *modes], [[v, *(of["drafts"].get(v, 0) for of in modes.values())] for v in verdicts]),
        "",
        *(f"- {verdict}: {REASONS[verdict]}" for verdict in verdicts if verdict in REASONS),
    ]
    return "\n".join(lines).rstrip() + "\n"


def table(head: Sequence[str], rows: Any) -> list[str]:
    """Lines of a Markdown table; short rows are filled up."""
    cells = [[str(cell) for cell in row] for row in rows]
    filled = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in cells)]
    return [f"| {' | '.join(row)} |" for row in filled]
