"""Ways to collect a reward without earning it, as flags on single responses.

    hidden_thinking  a mode that answers at once works in its answer: what it writes is far longer than what a mode
                     that thinks writes *after* its thought, on the same question (the yardstick of TNT,
                     arXiv 2601.04805). So an answer that is long by nature is not flagged.
    hedging          a mode that answers at once talks like one that thinks: "Wait,", "Let me check", "Hmm"
    nested_control   a control token inside the response: `<short><think>...` would be paid as short. Read from ids; a
                     response that spells the token in other tokens changes no mode
    empty            nothing where the answer should stand. A thought that was cut off is no hack and is not flagged

A flag is a suspicion, not a verdict: what it costs is up to the recipe (`rl.hack_prices`), and by default nothing.
"""

import re
from collections.abc import Collection, Sequence

from siesta.rewards.verifiers import solution_part

FLAGS = ("hidden_thinking", "hedging", "nested_control", "empty")

RATIO = 2.0  # times the length of a solution after a thought
SLACK = 40  # characters: wording around a bare answer

# Where a sentence starts, so that "the train must wait" and "what actually happened" are no hedges.
START = r"(?:^|[.!?:\n]\s*|\bbut )"
OPENINGS = r"wait\b|hmm+\b|hold on\b|actually,|alternatively,|on second thought|let me (?:think|see|check|verify|re)"
HEDGE = re.compile(rf"{START}(?:{OPENINGS})|\bdouble[- ]check", re.IGNORECASE)


def hidden_thinking(body: str, solutions: Sequence[str]) -> bool:
    """Is an answer given at once far longer than what stands after a thought? No if there is nothing to compare with.

    Args:
        body: The whole response.
        solutions: What stood after the thought in other responses to the question.
    """
    if not solutions:
        return False
    usual = sum(map(len, solutions)) / len(solutions)
    return len(body.strip()) > RATIO * usual + SLACK


def hedging(body: str) -> bool:
    """Does a response doubt or correct itself?"""
    return HEDGE.search(body) is not None


def nested_control(response: Sequence[int], control: Collection[int]) -> bool:
    """Is there a control token among the ids after the first?"""
    return not set(control).isdisjoint(response)


def empty(body: str, answer_after: str | None) -> bool:
    """Is there no answer although the response came to the place for one?"""
    reached = answer_after is None or answer_after in body or not body.strip()
    return reached and not solution_part(body, answer_after)
