"""Rows and labels of the Rule 110 benchmark, many at a time, in splits that share no content.

A row is an integer whose lowest bit is its first, as in `siesta.data.tasks.rule110`, whose `step` is used here on
whole tensors. The label of a row is its first bit after t steps. It depends on the cells up to t places off; the split
of a row is decided by those up to REACH places off. So up to t = 8 no pattern that a test label depends on was ever in
a training row, and a learned table of patterns scores as a guess does. From t = 1 to 7 the label depends on fewer
cells, which do occur in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from siesta.data.errors import DataError
from siesta.data.tasks.rule110 import DEPTHS, QUERIES, step

SPLITS = {"test": (0,), "validation": (1,), "train": tuple(range(2, 16))}
PARTS = 16
REACH = 8


@dataclass(frozen=True)
class Rows:
    """Contexts and what they are asked.

    Args:
        rows: (..., 4), int64.
        depth: Place of t in `DEPTHS` of each context, (...).
        labels: First bit of each row after t steps, (..., 4).
        which, shown, next: A row for `think` to write from, which of the four it is (...), after how many steps is
            drawn from 0 to t - 1: that row and the one after it, (...).
    """

    rows: torch.Tensor
    depth: torch.Tensor
    labels: torch.Tensor
    which: torch.Tensor
    shown: torch.Tensor
    next: torch.Tensor

    def map(self, function: Any) -> "Rows":
        """The same function of every tensor."""
        return Rows(**{name: function(part) for name, part in vars(self).items()})

    def __len__(self) -> int:
        return len(self.rows)


def part_of(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Which of the PARTS a row belongs to, by the cells around its first one. Same shape."""
    reach = min(REACH, (size - 1) // 2)
    high = rows >> (size - reach)
    near = (rows & ((1 << (reach + 1)) - 1)) | (high << (reach + 1))
    mixed = near * 0x9E3779B1  # Knuth's multiplicative hash: its middle bits depend on every bit of `near`
    return ((mixed >> 20) ^ (mixed >> 27)) % PARTS


def draw(count: int, size: int, split: str, generator: torch.Generator) -> torch.Tensor:
    """Distinct draws of rows of a split, (count,) int64.

    Raises:
        DataError: No row of this size belongs to the split.
    """
    found: list[torch.Tensor] = []
    share = len(SPLITS[split]) / PARTS
    for _ in range(50):
        missing = count - sum(map(len, found))
        if missing <= 0:
            return torch.cat(found)[:count]
        rows = torch.randint(1 << size, (int(missing / share * 1.1) + PARTS,), generator=generator)
        found.append(rows[torch.isin(part_of(rows, size), torch.tensor(SPLITS[split]))])
    raise DataError(f"rows: of {size} bits hardly any belong to the split {split}; take more bits")


def make(count: int, size: int, depths: Sequence[int], split: str, seed: int) -> Rows:
    """`count` contexts of a split; t is drawn from `depths`. The same seed gives the same contexts in the same order.

    Raises:
        DataError: A depth that the task does not have.
    """
    if unknown := set(depths) - set(DEPTHS):
        raise DataError(f"depths: {min(unknown)} is not one of {', '.join(map(str, DEPTHS))}")
    # Splits get numbers of their own, so that they are not drawn alike.
    generator = torch.Generator().manual_seed(len(SPLITS) * seed + list(SPLITS).index(split))
    rows = draw(count * QUERIES, size, split, generator).view(count, QUERIES)
    index = torch.tensor([DEPTHS.index(t) for t in depths])
    depth = index[torch.randint(len(depths), (count,), generator=generator)]
    t = torch.tensor(DEPTHS)[depth]
    which = torch.randint(QUERIES, (count,), generator=generator)
    written = (torch.rand(count, generator=generator) * t).long()
    shown, following, labels, now = which.clone(), which.clone(), torch.empty_like(rows), rows
    for done in range(max(depths)):
        mine = now.gather(1, which[:, None])[:, 0]
        now = cast(Any, step)(now, size)  # integers and tensors of them alike
        after = now.gather(1, which[:, None])[:, 0]
        shown, following = torch.where(written == done, mine, shown), torch.where(written == done, after, following)
        labels = torch.where((t == done + 1)[:, None], now & 1, labels)
    return Rows(rows, depth, labels, which, shown, following)


def to_bits(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Bits of rows in their order, (...) -> (..., size) long."""
    return (rows[..., None] >> torch.arange(size, device=rows.device)) & 1


def centred(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Bits of rows as `think` writes them: the first cell stands in the middle, at size // 2. (..., size)."""
    return to_bits(rows, size).roll(size // 2, -1)
