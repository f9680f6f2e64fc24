"""Was the answer right? The built-in verifiers, and the way from a name in a recipe to a callable.

A verifier takes (solution, answer) and returns a score in [0, 1]. The trainer gets its verifiers from `build_verifier`
alone: those return a float or raise `Unscorable`, and cannot hang. The functions themselves raise ValueError when the
*data* is at fault (an empty or unreadable gold answer), which becomes Unscorable there: the model is not to blame.
"""

import json
from difflib import get_close_matches
from typing import Any

from siesta.rewards.isolated import MEMORY, IsolatedVerifier
from siesta.rewards.score import Unscorable, Verifier, guarded

__all__ = ["KNOWN", "Unscorable", "Verifier", "build_verifier", "exact", "math", "reasoning_gym", "solution_part"]

# A right answer, by which a worker is tried at its start.
EXAMPLE = ("5", json.dumps({"family": "chain_sum", "answer": "5", "question": "2 + 3 =", "metadata": {}}))
KNOWN = ("exact", "math", "reasoning_gym")


def solution_part(response: str, answer_after: str | None) -> str:
    """The text after the last `answer_after` (such as "</think>" or "="), or all of it when the mode has no marker.

    Empty when the marker is missing: a thought that was cut off has no solution, whatever numbers it mentions.
    """
    if answer_after is None:
        return response.strip()
    _, marker, solution = response.rpartition(answer_after)
    return solution.strip() if marker else ""


def exact(solution: str, answer: str) -> float:
    """Equality after collapsing white space."""
    wanted = answer.split()
    if not wanted:
        raise ValueError("the gold answer is empty")
    return float(solution.split() == wanted)


def math(solution: str, answer: str) -> float:
    r"""Mathematical equality by math-verify: 1/2 is 0.5 is \frac{1}{2}, and 1,234 is 1234.

    `answer` may be bare or hold a \boxed. A solution is read as math-verify reads prose: numbers and fractions
    anywhere, algebra only inside $...$ or \boxed{...}. Call this through `build_verifier`: the time limits of
    math-verify are off because they need SIGALRM and so the main thread, and some input never comes back.
    """
    from math_verify import parse, verify  # imports sympy: half a second that only the worker should pay

    # no_fallback: otherwise text that does not parse comes back as a string and compares by its letters
    gold = parse(
        answer if "\\boxed" in answer else f"\\boxed{{{answer}}}",
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]  (annotated int, documented as optional)
        raise_on_error=True,
    )
    if not gold:
        raise ValueError(f"the gold answer {answer!r} does not parse")
    found = parse(
        solution,
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        raise_on_error=False,  # 6,000 repeated digits make sympy raise; that is a wrong answer, not a broken verifier
    )
    return float(verify(gold, found, timeout_seconds=None, raise_on_error=True))


def reasoning_gym(solution: str, answer: str) -> float:
    """Full marks by reasoning-gym's own scoring, which also accepts answers other than the one in the entry.

    `answer` is an entry as `siesta.data.families` writes it. Part marks, which some families give for the right form
    of a wrong answer, count as wrong.
    """
    from reasoning_gym import get_score_answer_fn

    entry = json.loads(answer)
    score: Any = get_score_answer_fn(entry["family"])
    return float(score(solution, entry) >= 1.0)


def build_verifier(name: str, *, timeout: float, workers: int = 1, memory: float = MEMORY) -> Verifier:
    """The verifier a recipe names, with `timeout` seconds per call and `memory` GiB; ValueError when there is none.

    `exact` runs in this process. `math`, `reasoning_gym` and dotted paths run in up to `workers` processes, the first
    of them started here so that a path that does not import is reported before training starts.
    """
    if name == "exact":
        return guarded(exact)
    if name == "math":
        return IsolatedVerifier(f"{__name__}.math", timeout, workers=workers, memory=memory, example=("1", "1"))
    if name == "reasoning_gym":
        return IsolatedVerifier(f"{__name__}.reasoning_gym", timeout, workers=workers, memory=memory, example=EXAMPLE)
    if "." in name:
        return IsolatedVerifier(name, timeout, workers=workers, memory=memory)
    close = get_close_matches(name, KNOWN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    known = ", ".join(KNOWN)
    raise ValueError(f"unknown verifier {name!r}: use one of {known}, or a dotted path package.module.function.{hint}")
