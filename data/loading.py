"""From a recipe's `data:` section to the examples of a split."""

from typing import TYPE_CHECKING

from siesta.data.errors import DataError
from siesta.data.schema import Example
from siesta.data.sources import Split, TaskSource, check_overlap, read_rows, to_examples

if TYPE_CHECKING:
    from siesta.rl.recipe import DataSection


def load_examples(section: "DataSection", split: Split, size: int) -> list[Example]:
    """At most `size` examples of a split.

    Without a validation source, the validation split is the tail of the training rows (a tenth), which training then
    does not see.

    Raises:
        DataError: A source is missing, empty or malformed, or test items stand in the training set.
    """
    if section.task is not None:
        return list(TaskSource(section.task, split, size, seed=section.seed, level_weights=section.level_weights))
    source = {"train": section.train, "validation": section.validation or section.train, "test": section.test}[split]
    assert source is not None  # the recipe has checked it
    rows = read_rows(source.path, name=source.name, split=source.split, revision=source.revision)
    examples = to_examples(rows, source.path, section.columns, section.verifier)
    if section.validation is None and split != "test":
        cut = len(examples) - len(examples) // 10
        examples = examples[:cut] if split == "train" else examples[cut:]
    if not examples:
        raise DataError(f"{source.path}: no rows for the {split} split")
    return examples[:size]


def check_splits(section: "DataSection") -> None:
    """Refuse a test set that stands in the training set. Generated tasks are apart by construction."""
    if section.task is not None:
        return
    train = load_examples(section, "train", section.train_size)
    test = load_examples(section, "test", 10**9)
    shared = check_overlap(train, test)
    if shared:
        raise DataError(f"data.test: {shared} of {len(test)} test items also stand in the training set; remove them")
