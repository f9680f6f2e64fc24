"""Items of reasoning-gym families over curriculum levels, split by content as our own tasks are.

An item is `{query: question, answer: the whole entry as JSON, verifier: reasoning_gym, level}`: many families have
more than one right answer, so the entry goes to reasoning-gym's own scoring. The package is an optional extra
(`siesta-rl[tasks]`); on a machine without it, train on files that `siesta.data.pregenerate` wrote on another.
"""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from random import Random
from typing import Any

from siesta.data.errors import DataError
from siesta.data.schema import Example
from siesta.data.sources import Split, split_of
from siesta.data.worked import worked

POOL = 100_000  # items of a family at a level that are drawn from
ATTEMPTS = 500
DEFAULT_LEVELS = (1, 2, 3, 4)


def check_families(families: Sequence[str]) -> None:
    """Raises DataError unless reasoning-gym is installed and has these families, with curricula."""
    try:
        from reasoning_gym.factory import CURRICULA
    except ImportError as error:
        raise DataError(
            "data.families: reasoning-gym is not installed; pip install 'siesta-rl[tasks]', or write the items to "
            "files where it is (python -m siesta.data.pregenerate) and name them in data.train and data.test"
        ) from error
    for family in families:
        if family not in CURRICULA:
            near = get_close_matches(family, CURRICULA, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"data.families: reasoning-gym has no family {family!r} with a curriculum{hint}")


@cache
def family_items(family: str, level: int) -> Any:
    """reasoning-gym's data set of a family at a curriculum level, from 1: exactly that hard, nothing easier mixed in.

    Raises:
        DataError: The family refuses the level.
    """
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import create_curriculum, create_dataset

    curriculum = create_curriculum(family)
    curriculum.set_global_level(level - 1)
    try:
        alone = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
        items = create_dataset(family, **vars(curriculum.generate_configuration({"seed": 0, "size": POOL}, alone)))
        items[0]  # some families find out only now that they have nothing at this level
        return items
    except (ValueError, AssertionError, IndexError) as error:
        raise DataError(f"data.families: {family} at level {level}: {error}") from error


class FamilySource(Sequence[Example]):
    """`size` items of one split; item i depends on `seed + i` alone.

    Args:
        families: Names in reasoning-gym.
        level_weights: Share of each curriculum level, from 1; equal ones by default. Training draws levels;
            validation and test go round the families in turn and deal them the levels, so that shares are exact.
    """

    def __init__(
        self,
        families: Sequence[str],
        split: Split,
        size: int,
        *,
        seed: int = 0,
        level_weights: dict[int, float] | None = None,
    ):
        check_families(families)
        weights = level_weights or dict.fromkeys(DEFAULT_LEVELS, 1.0)
        if min(weights) < 1 or min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise DataError(
                f"data.level_weights: levels start at 1, shares are at least 0, and one is more: {weights}"
            )
        self.families, self.split, self.size, self.seed = list(families), split, size, seed
        self.levels = sorted(level for level, weight in weights.items() if weight > 0)
        self.weights = [weights[level] for level in self.levels]
        self.dealt = [] if split == "train" else deal(self.weights, -(-size // len(self.families)))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = Random(self.seed + index)
        family = self.families[index % len(self.families)]
        if self.split == "train":
            level = rng.choices(self.levels, self.weights)[0]
        else:
            level = self.levels[self.dealt[index // len(self.families)]]
        items = family_items(family, level)
        for _ in range(ATTEMPTS):
            entry = items[rng.randrange(POOL)]
            example = to_example(family, level, entry, f"{family}-{self.split}-{index}")
            if split_of(example.text) == self.split:
                return example
        raise DataError(
            f"data.families: {family} at level {level} has hardly any item for the {self.split} split: it makes too "
            "few different ones; leave the level out (data.level_weights)"
        )


def deal(weights: Sequence[float], count: int) -> list[int]:
    """`count` places in `weights`, each as often as its share says at every point of the way, to within one."""
    counts, dealt = [0] * len(weights), []
    for turn in range(1, count + 1):
        owed = [turn * weight / sum(weights) - had for weight, had in zip(weights, counts, strict=True)]
        dealt.append(owed.index(max(owed)))
        counts[dealt[-1]] += 1
    return dealt


def to_example(family: str, level: int, entry: dict[str, Any], name: str) -> Example:
    """An entry of reasoning-gym as ours, with a worked solution for the families that `worked` knows.

    Raises:
        DataError: What scoring needs of it cannot be written as JSON.
    """
    kept = {"family": family, "answer": entry["answer"], "question": entry["question"], "metadata": entry["metadata"]}
    try:
        answer = json.dumps(kept)
    except TypeError as error:
        raise DataError(f"data.families: {family}: its entries cannot be written as JSON: {error}") from error
    meta = {"level": level, "family": family}
    solution = worked(family, entry)
    if solution is not None:
        meta["solution"] = solution
    return Example(name, "", entry["question"].strip(), answer, verifier="reasoning_gym", meta=meta)
