"""From a recipe's `data:` section to the examples of a split."""

from typing import TYPE_CHECKING

from siesta.data.errors import DataError
from siesta.data.families import FamilySource
from siesta.data.filter import needing_context, read_scores
from siesta.data.formats import KNOWN
from siesta.data.schema import Example
from siesta.data.sources import Split, TaskSource, read_rows, to_examples, without_overlap
from siesta.data.stateful import stateful

if TYPE_CHECKING:
    from siesta.rl.data_section import DataSection, Source

EVERYTHING = 10**9


def load_examples(section: "DataSection", split: Split, size: int) -> list[Example]:
    """At most `size` examples of a split.

    Without a validation source, the validation split is the tail of the training rows (a tenth), which training then
    does not see.

    Raises:
        DataError: A source is missing, empty or malformed.
    """
    generated = {"seed": section.seed, "level_weights": section.level_weights}
    if section.task is not None:
        contexts = {"queries": section.queries, "task_size": section.task_size}
        return list(TaskSource(section.task, split, size, **contexts, **generated))
    if section.families is not None:
        return list(FamilySource(section.families, split, size, **generated))
    source = {"train": section.train, "validation": section.validation or section.train, "test": section.test}[split]
    assert source is not None  # the recipe has checked it
    examples = read_source(source, section)
    if section.validation is None and split != "test":
        cut = len(examples) - len(examples) // 10
        examples = examples[:cut] if split == "train" else examples[cut:]
    if not examples:
        raise DataError(f"{source.path}: no rows for the {split} split")
    return examples[:size]


def read_source(source: "Source", section: "DataSection") -> list[Example]:
    """All rows of a source as examples; a data set that is known by its hub name is read in its own format."""
    return _read(source, section)[0]


def skipped_rows(section: "DataSection") -> list[str]:
    """A line for what is left out of each source, if anything is: rows that cannot be used, problems that cannot be
    split into context and query, items that are answered without their context.
    """
    sources = [source for source in (section.train, section.validation, section.test) if source is not None]
    said = {
        source.path: _read(source, section)[1]
        for source in sources
        if source.bad_rows == "skip" or section.stateful_split or source.context_free
    }
    return [line for lines in said.values() for line in lines]


def _read(source: "Source", section: "DataSection") -> tuple[list[Example], list[str]]:
    """The examples of a source, and what was left out."""
    data_format, name = source.format, source.name
    if source.path in KNOWN:
        known_format, known_name = KNOWN[source.path]
        data_format, name = data_format or known_format, name or known_name
    rows = read_rows(source.path, name=name, split=source.split, revision=source.revision)
    bad: list[str] = []
    skip = bad if source.bad_rows == "skip" else None
    examples = to_examples(rows, source.path, section.columns, section.verifier, data_format, skip)
    said = [f"data: {len(bad)} rows of {source.path} are left out; the first: {bad[0]}"] if bad else []
    if section.stateful_split:
        examples, count = stateful(examples)
        said.append(f"data: {source.path}: {count}")
    if source.context_free is not None:
        without, beside = read_scores(source.context_free.scores)
        try:
            threshold = source.context_free.threshold
            examples, report = needing_context(examples, without, threshold=threshold, with_context=beside)
        except DataError as error:
            raise DataError(f"{source.path}: context_free: {error}") from error
        said.append(f"data: {source.path}: {report}")
    return examples, said


def training_examples(section: "DataSection") -> tuple[list[Example], int]:
    """Examples to train on, and how many were left out because they also stand in an evaluation set.

    Generated items are kept apart by construction.

    Raises:
        DataError: Nothing is left.
    """
    if section.train is None:
        return load_examples(section, "train", section.train_size), 0
    train = load_examples(section, "train", EVERYTHING)
    kept = without_overlap(train, evaluation_examples(section, EVERYTHING))
    if not kept:
        raise DataError(f"data.train: all {len(train)} rows of {section.train.path} also stand in an evaluation set")
    return kept[: section.train_size], len(train) - len(kept)


def evaluation_examples(section: "DataSection", size: int) -> list[Example]:
    """What training must not see: test and validation items, all of a source's, the first `size` of generated ones."""
    if section.train is None:
        return load_examples(section, "test", size) + load_examples(section, "validation", size)
    held_out = 0 if section.validation else len(load_examples(section, "train", EVERYTHING))
    validation = read_source(section.validation or section.train, section)[held_out:]
    return load_examples(section, "test", EVERYTHING) + validation


def response_examples(path: str, section: "DataSection", size: int) -> tuple[list[Example], int]:
    """Rows of a responses.jsonl (`siesta.rl.warmup_data`), and how many were left out because they also stand in an
    evaluation set; `meta["responses"]` has the modes that a row has a response for.

    Args:
        size: Of each generated evaluation set.

    Raises:
        DataError: The file is missing or malformed, or nothing is left.
    """
    rows = to_examples(read_rows(path), path, {}, section.verifier)
    if section.stateful_split:
        rows, _ = stateful(rows)
    kept = without_overlap(rows, evaluation_examples(section, size))
    if not kept:
        raise DataError(
            f"warmup.responses: {path}: " + ("all rows also stand in an evaluation set" if rows else "empty")
        )
    return kept, len(rows) - len(kept)
