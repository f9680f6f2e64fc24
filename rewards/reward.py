"""From scores to rewards: reward = table[mode][right or wrong] - price of the tokens.

The table makes the cheap mode worth more when both modes would be right, so that thinking has to earn its cost; the
price does the same in proportion to length. Both come from the recipe. Unlike in the Thinkless paper, a score may lie
between 0 and 1, tokens may have a price, and a rollout whose verifier failed has no score instead of a wrong one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from siesta.rewards.score import Unscorable, Verifier, as_score


@dataclass(frozen=True)
class RewardTable:
    """What a right and a wrong answer are worth in one mode."""

    correct: float
    wrong: float


@dataclass(frozen=True)
class Scores:
    """`values` follows the order of the rollouts, None where the verifier failed; `reasons` counts those failures."""

    values: list[float | None]
    reasons: Counter[str]


def mode_reward(score: float, table: RewardTable, *, tokens: int, price_per_token: float) -> float:
    """The reward of one rollout, linear in its score: wrong + score * (correct - wrong) - price_per_token * tokens.

    The table of Thinkless (arXiv 2505.13379) is short +1 / -1 and think +0.5 / -1, without a price.
    """
    return table.wrong + score * (table.correct - table.wrong) - price_per_token * tokens


def score_solutions(
    verifiers: Mapping[str, Verifier],
    names: Sequence[str],
    solutions: Sequence[str],
    answers: Sequence[str],
    *,
    threads: int = 1,
) -> Scores:
    """Score each solution against its answer with the verifier its example names.

    `threads` calls run side by side, which helps verifiers that work in processes of their own.
    """
    missing = sorted(set(names) - set(verifiers))
    if missing:
        raise ValueError(f"no verifier was built for {', '.join(missing)}")

    def score(row: tuple[str, str, str]) -> float | str:
        name, solution, answer = row
        try:
            return as_score(verifiers[name](solution, answer))
        except Unscorable as error:
            return f"{name}: {error.reason}"

    rows = list(zip(names, solutions, answers, strict=True))
    if threads == 1:
        found = [score(row) for row in rows]
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(score, rows))
    reasons = Counter(reason for reason in found if isinstance(reason, str))
    return Scores([None if isinstance(value, str) else value for value in found], reasons)
