"""Milliseconds of a response: a few responses are written one at a time and timed, the others priced by their tokens.

A batch has no time per response, so the responses of an evaluation cannot be timed themselves. Written alone, one
takes a fixed time (reading the prompt, the control token) and a time per token; both are fitted by least squares.
The numbers are those of this machine and engine at batch size 1, and leave out that a token of a long response takes
longer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from siesta.rl.generation import Writer
from siesta.rl.modes import Modes

CUT = 128  # tokens after which a timed response ends


@dataclass(frozen=True)
class Latency:
    """Time of a response of n tokens, first_ms + n token_ms. `responses` were timed, `median_error` is in ms."""

    first_ms: float
    token_ms: float
    responses: int
    median_error: float

    def of(self, tokens: float) -> float:
        """Milliseconds of so many tokens, or of so many in the mean."""
        return self.first_ms + self.token_ms * tokens


def fit(tokens: Sequence[int], milliseconds: Sequence[float]) -> Latency:
    """Least squares; where all responses have the same length, all of the time is put on the tokens."""
    counts, times = np.array(tokens, dtype=float), np.array(milliseconds, dtype=float)
    if len(np.unique(counts)) == 1:
        first, slope = 0.0, float(times.mean() / counts[0])
    else:
        slope, first = (float(value) for value in np.polyfit(counts, times, 1))
    errors = np.abs(times - first - slope * counts)
    return Latency(first, slope, len(counts), float(np.median(errors)))


def time_responses(
    write: Writer,
    prompts: Sequence[list[int]],
    modes: Modes,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[int], None] = lambda count: None,
) -> Latency:
    """Write a greedy response to every prompt in every mode, one at a time.

    Args:
        write: Returns when the response is there.
        advance: Is told of each response that is timed.
    """
    short = [replace(mode, max_tokens=min(mode.max_tokens, CUT)) for mode in modes]
    write([prompts[0]], short[0], temperature=None)  # the first call also sets things up
    tokens, times = [], []
    for prompt in prompts:
        for mode in short:
            start = clock()
            (response,) = write([prompt], mode, temperature=None)
            times.append(1000 * (clock() - start))
            tokens.append(len(response))
            advance(1)
    return fit(tokens, times)


def with_milliseconds(result: dict, latency: Latency) -> dict:
    """An evaluation with `milliseconds` beside every `tokens` of its rows, their levels and their intervals."""
    grown = {
        name: with_milliseconds(part, latency)
        if isinstance(part, dict)
        else [with_milliseconds(each, latency) for each in part]
        if isinstance(part, list) and part and isinstance(part[0], dict)
        else part
        for name, part in result.items()
    }
    tokens = result.get("tokens")
    if isinstance(tokens, float):
        grown["milliseconds"] = latency.of(tokens)
    elif isinstance(tokens, Sequence):  # an interval
        grown["milliseconds"] = [latency.of(bound) for bound in tokens]
    return grown
