"""Worked solutions for items of reasoning-gym families: what a `think` response is taught from in the warm-up.

reasoning-gym gives questions and answers, no working. Each function here writes the working of one family from the
metadata of an item or its text, in steps a model of 100M parameters can copy: one digit or letter decides the next.

    chain_sum        terms sorted by sign; each sum with its digits from the right, all numbers of one width, so that a
                     digit of the result stands at a fixed distance from the two it comes from and from its carry
    leg_counting     animal by animal: its legs, the product by decimal places, the running total
    letter_counting  every word spelled, hits numbered as they come
    spell_backward   letters numbered forwards, then copied by number backwards
    count_bits       halved again and again, odd numbers counted as they come
    aiw              the women whom the question counts, and the one it forgets: she whose circle it is
    family_relationships
                     every couple with its children, then the steps from the one person to the other

The working ends in the answer, which must be the item's own: `worked` compares them.
"""

import re
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
    lines, answer = WORKED[family](entry["metadata"] | {"question": entry["question"]})
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


def aiw(metadata: dict[str, Any]) -> Working:
    """Alice has 4 sisters and 1 brother; how many sisters has he? Hers, and Alice herself: 5."""
    found = re.match(r"(\w+) has .*?(\d+) (sisters|female friends|female colleagues)", metadata["question"])
    assert found is not None, metadata["question"]
    name, count, kind = found[1], int(found[2]), found[3]
    lines = [f"{kind} of {name} {count}", f"with {name} {count}+1={count + 1}", f"so {count + 1}"]
    return lines, str(count + 1)


COUPLE = re.compile(r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]+)\.)?")
# Steps from the first person to the second -> what reasoning-gym calls the first; in-laws, nieces and nephews are its
# own way round.
KINSHIP = {
    ("spouse",): ("wife", "husband"),
    ("child",): ("mother", "father"),
    ("parent",): ("daughter", "son"),
    ("parent", "child"): ("sister", "brother"),
    ("child", "child"): ("grandmother", "grandfather"),
    ("spouse", "parent"): ("mother-in-law", "father-in-law"),
    ("parent", "child", "child"): ("aunt", "uncle"),
    ("parent", "parent", "child"): ("niece", "nephew"),
}


def family_relationships(metadata: dict[str, Any]) -> Working:
    """Al is married to Bo. They have a child called Cy. What is Bo to Cy? Al + Bo: Cy; Bo child Cy; so mother."""
    steps: dict[str, list[tuple[str, str]]] = {}
    lines = []
    for one, other, named in COUPLE.findall(metadata["question"]):
        children = re.split(r", | and ", named) if named else []
        lines.append(f"{one} + {other}" + (f": {' '.join(children)}" if children else ""))
        for parent, spouse in ((one, other), (other, one)):
            steps.setdefault(parent, []).append(("spouse", spouse))
            for child in children:
                steps[parent].append(("child", child))
                steps.setdefault(child, []).append(("parent", parent))
    start, end = metadata["person1"], metadata["person2"]
    ways = [[(step, start, person)] for step, person in steps[start]]
    for way in ways:  # grows: the shortest comes first
        kin, last = tuple(step for step, _, _ in way), way[-1][2]
        if last == end and metadata["relationship"] in KINSHIP.get(kin, ()):
            lines += [f"{before} {step} {after}" for step, before, after in way]
            return [*lines, f"so {metadata['relationship']}"], metadata["relationship"]
        if len(way) < max(map(len, KINSHIP)):
            ways += [[*way, (step, last, person)] for step, person in steps[last]]
    return lines, f"no known relation of {start} and {end}"


WORKED: dict[str, Callable[[dict[str, Any]], Working]] = {
    "chain_sum": chain_sum,
    "leg_counting": leg_counting,
    "letter_counting": letter_counting,
    "spell_backward": spell_backward,
    "count_bits": count_bits,
    "aiw": aiw,
    "family_relationships": family_relationships,
}
