"""What the warm-up teaches about notes: to write them, and to answer from them, beside answering without any state.

The text that is taught comes with the example: `meta["notes"]` and `meta["responses_with_notes"]`.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from random import Random

from siesta.data.errors import DataError
from siesta.data.prompts import response_ids
from siesta.data.schema import Example
from siesta.rl.sleep.credit import KINDS, NONE, OWN, SHUFFLED
from siesta.rl.sleep.notes import NotesSleep
from siesta.rl.warmup import IGNORED

WRITER_SHARE = 0.2  # of the warm-up's rows; each has many more tokens than an answer


def taught_notes(example: Example) -> str:
    """The notes on an example's context that the warm-up teaches.

    Raises:
        DataError: The example has none.
    """
    if not example.meta.get("notes"):
        raise DataError(f"{example.id}: no notes to warm up on; sleep.mechanism: notes needs data that brings them")
    return example.meta["notes"]


def distinct(examples: Sequence[Example]) -> list[Example]:
    """The first example of every context, in order."""
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(example.context, example)
    return list(found.values())


def reader_examples(examples: Sequence[Example], sleep: NotesSleep, *, seed: int) -> list[Example]:
    """Every example as a reader sees it, in a state that is drawn: its notes, none or, if readers keep the context and
    so can tell, another context's. Responses are those that fit: who has notes answers as they allow.

    Raises:
        DataError: An example has no notes, or no responses for a reader who has only those.
    """
    rng = Random(seed)
    foreign = distinct(examples)
    kinds = KINDS if sleep.section.keep_context and len(foreign) > 1 else [OWN, NONE]
    taught = []
    for example in examples:
        kind, other = rng.choice(kinds), rng.choice(foreign)
        while kind == SHUFFLED and other.context == example.context:
            other = rng.choice(foreign)
        if kind == NONE:
            taught.append(example)
            continue
        read = sleep.reader(example, sleep.keep(taught_notes(example if kind == OWN else other)))
        if kind == OWN:
            read = replace(read, meta=example.meta | {"responses": responses_with_notes(example, sleep)})
        taught.append(read)
    return taught


def responses_with_notes(example: Example, sleep: NotesSleep) -> dict[str, str]:
    """What a reader of the notes on an example's context is taught. Who has the context besides works as if without
    notes, and answers from them what is not known otherwise.

    Raises:
        DataError: The example has none for a reader who has only notes.
    """
    given = example.meta.get("responses_with_notes", {})
    if sleep.section.keep_context:
        return given | example.meta.get("responses", {})
    if not given:
        raise DataError(f"{example.id}: no responses of a reader of notes; set sleep.keep_context: true")
    return given


def writer_rows(examples: Sequence[Example], sleep: NotesSleep) -> list[dict[str, list[int]]]:
    """Rows of `input_ids` and `labels`: what a pass reads, the sleep token, the notes. There are as many as make
    `WRITER_SHARE` of all rows, if each example is a reader's row; contexts follow each other as often as it takes.

    Raises:
        DataError: An example has no notes, or they do not fit into `sleep.max_tokens`.
    """
    rows = []
    number = round(len(examples) * WRITER_SHARE / (1 - WRITER_SHARE))
    for example in islice(cycle(distinct(examples)), number):
        notes = taught_notes(example)
        completion = [sleep.mode.token_id, *response_ids(sleep.tokenizer, notes)]
        if len(completion) > sleep.section.max_tokens:
            raise DataError(
                f"{example.id}: its notes take {len(completion)} tokens, more than sleep.max_tokens "
                f"{sleep.section.max_tokens}"
            )
        # A pass in turn: every later one reads what the one before it should have left, and writes the same.
        so_far = "" if len(rows) % sleep.section.passes == 0 else sleep.keep(notes)
        prompt = sleep.writer_prompt(example.context, so_far)
        rows.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return rows
