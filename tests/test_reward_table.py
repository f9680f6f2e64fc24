"""Rewards against hand numbers, and failed verifiers as None with a counted reason."""

from collections import Counter

import pytest

from siesta.rewards.reward import RewardTable, mode_reward, score_solutions
from siesta.rewards.score import Unscorable
from siesta.rewards.verifiers import build_verifier

SHORT = RewardTable(correct=1.0, wrong=-1.0)
THINK = RewardTable(correct=0.5, wrong=-1.0)


@pytest.mark.parametrize(
    ("score", "table", "tokens", "price", "reward"),
    [
        (1.0, SHORT, 10, 0.0, 1.0),
        (0.0, SHORT, 10, 0.0, -1.0),
        (1.0, THINK, 500, 0.0, 0.5),
        (0.0, THINK, 500, 0.0, -1.0),
        (0.5, SHORT, 0, 0.0, 0.0),
        (0.5, THINK, 0, 0.0, -0.25),
        (1.0, SHORT, 8, 0.01, 0.92),
        (0.0, THINK, 100, 0.002, -1.2),
    ],
)
def test_mode_reward(score: float, table: RewardTable, tokens: int, price: float, reward: float) -> None:
    assert mode_reward(score, table, tokens=tokens, price_per_token=price) == pytest.approx(reward)


def test_short_pays_more_only_when_it_is_right() -> None:
    def reward(score: float, table: RewardTable) -> float:
        return mode_reward(score, table, tokens=0, price_per_token=0.0)

    assert reward(1.0, SHORT) > reward(1.0, THINK) > reward(0.0, SHORT) == reward(0.0, THINK)


def fails(solution: str, answer: str) -> float:
    raise Unscorable("timed out after 5 s")


def test_scores_keep_their_places() -> None:
    verifiers = {"exact": build_verifier("exact", timeout=1), "fails": fails}
    scores = score_solutions(
        verifiers, ["exact", "fails", "exact", "exact", "fails"], ["7", "7", "8", "7", ""], ["7", "7", "7", "", "7"]
    )
    assert scores.values == [1.0, None, 0.0, None, None]
    assert scores.reasons == Counter(
        {"fails: timed out after 5 s": 2, "exact: ValueError: the gold answer is empty": 1}
    )


def test_numbers_outside_the_contract_are_not_scores() -> None:
    results = [True, False, 7.0, float("nan"), 0.25]
    verifiers = {str(i): lambda solution, answer, result=result: result for i, result in enumerate(results)}
    scores = score_solutions(verifiers, list(verifiers), [""] * 5, [""] * 5)
    assert scores.values == [1.0, 0.0, None, None, 0.25]
    assert scores.reasons == Counter({"2: returned 7.0, outside [0, 1]": 1, "3: returned nan, outside [0, 1]": 1})


def test_a_bug_in_a_plain_callable_is_not_hidden() -> None:
    """Only Unscorable is a counted failure; build_verifier's callables raise nothing else."""
    with pytest.raises(ZeroDivisionError):
        score_solutions({"bug": lambda solution, answer: 1 / 0}, ["bug"], ["7"], ["7"])


def test_names_and_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="no verifier was built for math"):
        score_solutions({"exact": fails}, ["exact", "math"], ["7", "7"], ["7", "7"])
    with pytest.raises(ValueError, match="zip"):
        score_solutions({"exact": fails}, ["exact"], ["7", "7"], ["7"])


def test_no_rollouts() -> None:
    scores = score_solutions({}, [], [], [])
    assert scores.values == []
    assert not scores.reasons
