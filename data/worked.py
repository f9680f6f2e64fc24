"""Worked solutions for items of reasoning-gym families: what a `think` response is taught from in the warm-up.

reasoning-gym gives questions and answers, no working. Each function here writes the working of one family from the
metadata of an item, in steps that a model of 100M parameters can copy: one digit or one letter decides the next.

    chain_sum        terms sorted by sign; each sum with its digits from the right, all numbers of one width, so that a
                     digit of the result stands at a fixed distance from the two it comes from and from its carry
    leg_counting     animal by animal: its legs, the product by decimal places, the running total
    letter_counting  every word spelled, hits numbered as they come
    spell_backward   letters numbered forwards, then copied by number backwards
    count_bits       halved again and again, odd numbers counted as they come

The working ends in the answer, which must be the item's own: `worked` compares them.
"""

from collections.abc import Callable
from typing import Any

from siesta.data.errors import DataError

Working = tuple[list[str], str]  # lines, and the answer that they come to


def worked(family: str, entry: dict[str, Any]) -> str | None:
    """The working of a reasoning-gym entry, without its final answer; None for a family that has none here.

    Raises:
        DataError: The working comes to another answer than the entry's.
    """
    if family not in WORKED:
        return None
    lines, answer = WORKED[family](entry["metadata"])
    if answer != str(entry["answer"]):
        raise DataError(f"data.families: {family}: the working comes to {answer}, the item says {entry['answer']}")
    return "\n".join(lines)


def chain_sum(metadata: dict[str, Any]) -> Working:
    """12 - 5 + 30: plus 12 30, minus 5, then 21+03=24 and 24-50=73, which is 37."""
    first, *rest = metadata["expression"].split()
    terms = [("+", int(first)), *zip(rest[::2], map(int, rest[1::2]), strict=True)]
    # A negative constant counts on the other side.
    plus = [abs(n) for sign, n in terms if (sign == "+") == (n >= 0)]
    minus = [abs(n) for sign, n in terms if (sign == "+") != (n >= 0)]
    width = len(str(max(sum(plus), sum(minus))))
    sides = (("plus", plus), ("minus", minus))
    lines = [f"{name} {' '.join(map(str, numbers))}" for name, numbers in sides if numbers]
    for _, numbers in sides:
        total, *others = numbers or [0]
        for number in others:
            lines.append(_from_the_right(total, "+", number, total + number, width))
            total += number
    answer = sum(plus) - sum(minus)
    if minus:
        large, small = max(sum(plus), sum(minus)), min(sum(plus), sum(minus))
        lines.append(_from_the_right(large, "-", small, large - small, width))
    return [*lines, f"so {answer}"], str(answer)


def _from_the_right(left: int, sign: str, right: int, result: int, width: int) -> str:
    a, b, c = (f"{number:0{width}}"[::-1] for number in (left, right, result))
    return f"{a}{sign}{b}={c}"


def leg_counting(metadata: dict[str, Any]) -> Working:
    """25 tigers and 2 crabs: 25 tiger 4 legs 80+20=100, 2 crab 10 legs 20 100+20=120."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # where the items come from

    lines, total = [], 0
    for animal, count in metadata["animals"].items():
        legs = ANIMALS[animal]
        line = f"{count} {animal} {legs} legs"
        if legs:
            places = [int(d) * 10**place * legs for place, d in enumerate(reversed(str(count))) if d != "0"][::-1]
            line += f" {'+'.join(map(str, places))}" + (f"={count * legs}" if len(places) > 1 else "")
            if total:
                line += f" {total}+{count * legs}={total + count * legs}"
            total += count * legs
        lines.append(line)
    return [*lines, f"so {total}"], str(total)


def letter_counting(metadata: dict[str, Any]) -> Working:
    """e in "The end": t h e=1, e=2 n d."""
    letter, hits, lines = metadata["target_letter"], 0, []
    for word in metadata["span"]:
        spelled = []
        for own in word.lower():
            hits += own == letter
            spelled.append(f"{own}={hits}" if own == letter else own)
        lines.append(" ".join(spelled))
    return [*lines, f"so {hits}"], str(hits)


def spell_backward(metadata: dict[str, Any]) -> Working:
    """sun: 1s2u3n, 3n2u1s."""
    numbered = [f"{place}{letter}" for place, letter in enumerate(metadata["word"], start=1)]
    return ["".join(numbered), "".join(reversed(numbered))], metadata["word"][::-1]


def count_bits(metadata: dict[str, Any]) -> Working:
    """6: 6 0, 3 1, 1 2. A line is the number and how many odd ones there were, itself included."""
    number, ones, lines = int(metadata["number"]), 0, []
    while number:
        ones += number % 2
        lines.append(f"{number} {ones}")
        number //= 2
    return [*lines, f"so {ones}"], str(ones)


WORKED: dict[str, Callable[[dict[str, Any]], Working]] = {
    "chain_sum": chain_sum,
    "leg_counting": leg_counting,
    "letter_counting": letter_counting,
    "spell_backward": spell_backward,
    "count_bits": count_bits,
}
