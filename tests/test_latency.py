"""Milliseconds from tokens."""

import pytest

from siesta.rl.latency import CUT, Latency, fit, time_responses, with_milliseconds
from siesta.rl.modes import Mode, Modes


def test_fit_finds_the_line() -> None:
    found = fit([1, 5, 10, 20], [12 + 3 * n for n in (1, 5, 10, 20)])
    assert (found.first_ms, found.token_ms, found.median_error) == pytest.approx((12, 3, 0))
    assert found.of(7) == pytest.approx(33)
    assert fit([2, 2], [5.0, 7.0]).of(2) == pytest.approx(6)


def test_responses_are_timed_one_at_a_time_and_cut() -> None:
    now = [0.0]
    asked = []

    def write(prompts, mode, *, temperature):
        assert temperature is None
        asked.append((len(prompts), mode.max_tokens))
        now[0] += 0.010 + 0.002 * mode.max_tokens
        return [[0] * mode.max_tokens for _ in prompts]

    modes = Modes([Mode("short", "<s>", 1, 4), Mode("think", "<t>", 2, 5000)])
    found = time_responses(write, [[7], [8]], modes, clock=lambda: now[0])
    assert asked == [(1, 4), *[(1, 4), (1, CUT)] * 2]
    assert (found.first_ms, found.token_ms, found.responses) == (pytest.approx(10), pytest.approx(2), 4)


def test_every_row_gets_its_milliseconds() -> None:
    row = {"tokens": 2.0, "interval": {"tokens": (1.0, 3.0)}, "levels": {1: {"tokens": 4.0}}}
    found = with_milliseconds(
        {"greedy": {"free": row}, "points": [row], "kinds": ["a"], "items": 3}, Latency(10, 1, 1, 0)
    )
    for own in (found["greedy"]["free"], found["points"][0]):
        assert own["milliseconds"] == 12
        assert own["interval"]["milliseconds"] == [11, 13]
        assert own["levels"][1]["milliseconds"] == 14
    assert (found["kinds"], found["items"]) == (["a"], 3)
