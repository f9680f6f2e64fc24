"""The one record that every source yields: what is known beforehand, the question, and what counts as right."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One item.

    Args:
        id: Unique within its source.
        context: What is known before the question; may be empty.
        query: The question itself.
        answer: The reference that the verifier compares with.
        verifier: `exact`, `math`, `reasoning_gym`, or a dotted path to a callable `(solution, answer) -> score in
            [0, 1]`.
        meta: Whatever else a row carries. Some keys have a meaning: `level` (difficulty, a whole number; evaluation
            is broken down by it), `responses` (mode name -> response) and `solution` (how the answer is worked out),
            which the warm-up is taught from. Three more are about sleep: `notes` (what a pass over the context is
            taught to write), `responses_with_notes` (mode name -> response of a reader who has only those) and
            `query_has_facts` (`siesta.data.stateful`).
    """

    id: str
    context: str
    query: str
    answer: str
    verifier: str = "exact"
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> int:
        """Difficulty; 0 where the source knows none."""
        return int(self.meta.get("level", 0))

    @property
    def text(self) -> str:
        """What identifies the item when two sets are checked for overlap: context and query, white space folded."""
        return " ".join(f"{self.context} {self.query}".split())
