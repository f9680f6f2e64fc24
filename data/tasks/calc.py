"""calc: a start digit and 1 to 8 operations modulo 10, left to right.

    query  "<calc> 3 +4 *7 -2 ; ; ; ; ;"      short "7"      think "7 9 7 = 7"

The level is the number of operations. One operation can be answered at a glance; more need the running values, so
`short` is right at level 1 and little better than a guess beyond, while `think` solves every level. Operations fill
fixed slots (`;` is an empty one), so that step i reads slot i at a constant distance. Multipliers are the units modulo
10 (3, 7, 9): the running value never sticks at 0.
"""

from random import Random

MAX_LEVEL = 8
QUERIES = 0  # no context that could be asked twice
SIZES = range(0)  # nothing to scale
DIGITS = [str(d) for d in range(10)]
OPERATIONS = [f"{sign}{d}" for sign in "+-" for d in range(1, 10)] + [f"*{d}" for d in (3, 7, 9)]
WORDS = ["<calc>", ";", "=", *DIGITS, *OPERATIONS]


def apply(value: int, operation: str) -> int:
    """One step, modulo 10."""
    sign, operand = operation[0], int(operation[1:])
    if sign == "+":
        return (value + operand) % 10
    if sign == "-":
        return (value - operand) % 10
    return (value * operand) % 10


def fields(rng: Random, level: int) -> dict:
    """Draw one item of `level` operations, as the fields of an `Example`."""
    value = rng.randrange(10)
    words, steps = [str(value)], []
    for _ in range(level):
        sign = rng.choice("+-*")
        operation = sign + str(rng.choice([3, 7, 9]) if sign == "*" else rng.randrange(1, 10))
        value = apply(value, operation)
        words.append(operation)
        steps.append(str(value))
    slots = words + [";"] * (MAX_LEVEL - level)
    return {
        "context": "",
        "query": " ".join(["<calc>", *slots]),
        "answer": str(value),
        "meta": {"level": level, "responses": {"short": str(value), "think": " ".join([*steps, "=", str(value)])}},
    }
