"""rule110: a context of 4 rows of bits; the query is the first bit of a row after t steps of Rule 110.

    context "<rows> t2 r1 0 1 1 0 1 0 0 1 r2 ..."      query "r1"      short "0"      think "1 1 1 ; 0 = 0"

Rows are cyclic: a bit becomes (it or its right neighbour) and not (left and it and right). The level is a place in
DEPTHS, the values of t: how much is stored stays the same while the computation deepens (after arXiv 2605.26099, where
a row has 24 bits). t stands in the context, because a pass over the context that happens before the query (sleep) must
know how far to go.

`think` writes only the bits that the answer still depends on: r on each side of the first, with r steps to go. It
writes at most ROWS such rows, so up to t = 8 each follows from the one before it in one step, and in up to 4 steps at
t = 32: every depth has a response (of at most 156 words for 24 bits), but not one that is equally easy to learn.
"""

from random import Random

DEPTHS = (1, 2, 4, 8, 10, 12, 14, 16, 32)
MAX_LEVEL = len(DEPTHS)
MARKS = ["r1", "r2", "r3", "r4"]
QUERIES = len(MARKS)
ROWS = 8
SIZE, SIZES = 24, range(8, 65)  # bits of a row
WORDS = ["<rows>", ";", "=", "0", "1", *MARKS, *(f"t{t}" for t in DEPTHS)]


def step(row: int, size: int) -> int:
    """Rule 110 once, on a row whose first bit is the lowest."""
    right = (row >> 1) | ((row & 1) << (size - 1))
    left = ((row << 1) & ((1 << size) - 1)) | (row >> (size - 1))
    return (row | right) & ~(left & row & right)


def bits(row: int, size: int, places: range) -> str:
    """The bits at some places, as words."""
    return " ".join(str((row >> (place % size)) & 1) for place in places)


def work(row: int, size: int, depth: int) -> list[str]:
    """The rows that `think` writes, the last of which is the answer."""
    gap = -(-depth // ROWS)
    written = []
    for to_go in reversed(range(depth)):
        row = step(row, size)
        if to_go % gap == 0:
            reach = min(to_go, size // 2)
            written.append(bits(row, size, range(-reach, min(reach + 1, size - reach))))
    return written


def draw(rng: Random, size: int) -> list[int]:
    """The rows of a context."""
    return [rng.getrandbits(size) for _ in MARKS]


def ask(rows: list[int], size: int, level: int, mark: str) -> dict:
    """One query of a context, as the fields of an `Example`."""
    depth = DEPTHS[level - 1]
    written = work(rows[MARKS.index(mark)], size, depth)
    answer = written[-1]
    context = [f"{name} {bits(row, size, range(size))}" for name, row in zip(MARKS, rows, strict=True)]
    return {
        "context": " ".join(["<rows>", f"t{depth}", *context]),
        "query": mark,
        "answer": answer,
        "meta": {"level": level, "responses": {"short": answer, "think": f"{' ; '.join(written)} = {answer}"}},
    }


def fields(rng: Random, level: int, size: int = SIZE) -> dict:
    """Draw one item, as the fields of an `Example`."""
    rows = draw(rng, size)
    return ask(rows, size, level, rng.choice(MARKS))


def every_query(rng: Random, level: int, size: int = SIZE) -> list[dict]:
    """Draw one context and list all its queries, in an order of their own."""
    rows = draw(rng, size)
    return [ask(rows, size, level, mark) for mark in rng.sample(MARKS, QUERIES)]
