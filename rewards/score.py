"""The one contract every verifier meets: a score in [0, 1], or Unscorable with a reason.

A verifier that fails says nothing about the answer. Scoring such a rollout 0 would blame the model for a fault of
the data or of the verifier, so a failure is never a number: it is an exception, and the caller leaves the rollout
out and counts it. This module is imported by the worker process as well, so it stays on the standard library.
"""

import numbers
from collections.abc import Callable

REASON_LENGTH = 200

# (solution, answer) -> how right the solution is; `solution` is what `verifiers.solution_part` returned
Verifier = Callable[[str, str], float | bool]


class Unscorable(Exception):
    """A verifier raised, timed out or returned nonsense: the rollout is excluded and counted, never scored 0."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def as_score(result: object) -> float:
    """A verifier's return value as a float in [0, 1]; Unscorable for anything else."""
    if not isinstance(result, numbers.Real):
        raise Unscorable(f"returned {type(result).__name__}, not a number")
    score = float(result)
    if not 0.0 <= score <= 1.0:  # NaN compares false, so it ends here too
        raise Unscorable(f"returned {score}, outside [0, 1]")
    return score


def reason_of(error: BaseException) -> str:
    """One short line about an exception; short because reasons are counted, logged and sent through a pipe."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]


def guarded(verifier: Verifier) -> Callable[[str, str], float]:
    """`verifier` with its outcomes narrowed to the contract: a float in [0, 1] or Unscorable."""

    def score(solution: str, answer: str) -> float:
        try:
            return as_score(verifier(solution, answer))
        except Unscorable:
            raise
        except (Exception, SystemExit) as error:  # a library that calls sys.exit must not end the run
            raise Unscorable(reason_of(error)) from error

    return score
