"""What the warm-up teaches about notes: to write them, and to answer from them, beside answering without any state.

The text that is taught comes with the example: `meta["notes"]` and `meta["responses_with_notes"]`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from random import Random
from typing import Any, cast

from torch.utils.data import Sampler
from trl import SFTTrainer

from siesta.data.errors import DataError
from siesta.data.prompts import response_ids
from siesta.data.schema import Example
from siesta.rl.sleep.credit import KINDS, NONE, OWN, SHUFFLED
from siesta.rl.sleep.notes import NotesSleep

WRITER_SHARE = 0.2  # of the warm-up's rows; each has many more tokens than an answer
IGNORED = -100  # label of tokens without loss, as transformers defines it


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
    so can tell, another context's. Responses are those that fit: who has nothing but notes works from them.

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
        if not sleep.section.keep_context:
            if "responses_with_notes" not in example.meta:
                raise DataError(f"{example.id}: no responses of a reader of notes; set sleep.keep_context: true")
            read = replace(read, meta=example.meta | {"responses": example.meta["responses_with_notes"]})
        taught.append(read)
    return taught


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


class SortedSteps(Sampler[int]):
    """The rows of each optimizer step by length, so that its micro-batches are padded little. Written notes are many
    times as long as answers; the gradient of the step is the same, because the loss is a mean over its tokens.

    Args:
        order: Of all rows.
        lengths: Tokens of each row.
        step: Rows of an optimizer step.
    """

    def __init__(self, order: Sampler[int], lengths: Sequence[int], step: int):
        self.order, self.lengths, self.step = order, lengths, step

    def __iter__(self) -> Iterator[int]:
        rows = list(self.order)
        for start in range(0, len(rows), self.step):
            yield from sorted(rows[start : start + self.step], key=lambda row: self.lengths[row])

    def __len__(self) -> int:
        return len(cast(Any, self.order))


class SortedSFTTrainer(SFTTrainer):
    """SFTTrainer whose order of rows is `SortedSteps`."""

    def _get_train_sampler(self, train_dataset=None):
        order = cast(Sampler[int], super()._get_train_sampler(train_dataset))
        lengths = [len(ids) for ids in cast(Any, self.train_dataset)["input_ids"]]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SortedSteps(order, lengths, step)
