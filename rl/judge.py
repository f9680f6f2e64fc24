"""From completion ids to rewards: the one place where a response is decoded, cut, verified, flagged and priced.

`Judge` does it for one mode at a time; `RewardFunction` is the form in which TRL calls it during training.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.data.prompts import end_id
from siesta.rewards import hacking
from siesta.rewards.isolated import MEMORY
from siesta.rewards.reward import RewardTable, mode_reward, score_solutions
from siesta.rewards.score import Verifier
from siesta.rewards.verifiers import build_verifier, solution_part
from siesta.rl.modes import Mode, Modes

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOLD = 5  # different reasons of failure that are told as they come up; all are counted


@dataclass(frozen=True)
class Judge:
    """Scores, flags and prices responses; `reasons` counts why verifiers failed."""

    tokenizer: PreTrainedTokenizerBase
    modes: Modes
    verifiers: dict[str, Verifier]
    price_per_token: float
    verifier_workers: int = 1
    hack_prices: Mapping[str, float] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)

    def text(self, response: list[int]) -> str:
        """A response as text."""
        return str(self.tokenizer.decode(response, skip_special_tokens=True))

    def score(
        self, mode: Mode, responses: Sequence[list[int]], names: Sequence[str], answers: Sequence[str]
    ) -> list[float | None]:
        """Score in [0, 1] of each response; None where the verifier failed.

        Args:
            mode: The mode all responses were written in.
            responses: Ids after the control token.
            names, answers: Verifier and reference of each response.
        """
        solutions = [solution_part(self.text(response), mode.answer_after) for response in responses]
        scores = score_solutions(self.verifiers, names, solutions, answers, threads=self.verifier_workers)
        for reason in scores.reasons.keys() - self.reasons.keys():
            if len(self.reasons) < TOLD:
                logger.warning(
                    "a verifier failed: %s; such rollouts are left out and counted (rollout/unscorable), "
                    "training goes on",
                    reason,
                )
            self.reasons[reason] = 0
        self.reasons.update(scores.reasons)
        return scores.values

    def reward(self, mode: Mode, score: float, tokens: int, hacks: Iterable[str] = ()) -> float:
        """The mode's table less the price of `tokens` response tokens and of the flags in `hacks`."""
        table = RewardTable(correct=mode.correct, wrong=mode.wrong)
        price = sum(self.hack_prices.get(flag, 0.0) for flag in hacks)
        return mode_reward(score, table, tokens=tokens, price_per_token=self.price_per_token) - price

    def hacks(
        self, modes: Sequence[Mode], responses: Sequence[list[int]], questions: Sequence[Hashable]
    ) -> list[list[str]]:
        """Flags of `siesta.rewards.hacking` on each response; those that are equal in `questions` are compared.

        Only a mode without a marker answers at once, so only there are long or hedging responses suspicious. A group
        that is spread over ranks is compared with what this rank has of it.
        """
        texts = [self.text(response) for response in responses]
        solutions: dict[Hashable, list[str]] = defaultdict(list)
        for mode, text, question in zip(modes, texts, questions, strict=True):
            if mode.answer_after is not None and (solution := solution_part(text, mode.answer_after)):
                solutions[question].append(solution)
        found = []
        for mode, text, response, question in zip(modes, texts, responses, questions, strict=True):
            at_once = mode.answer_after is None
            flags = {
                "hidden_thinking": at_once and hacking.hidden_thinking(text, solutions[question]),
                "hedging": at_once and hacking.hedging(text),
                "nested_control": hacking.nested_control(response, self.modes.token_ids),
                "empty": hacking.empty(text, mode.answer_after),
            }
            found.append([name for name in hacking.FLAGS if flags[name]])
        return found


def build_judge(
    tokenizer: PreTrainedTokenizerBase,
    modes: Modes,
    verifier_names: Iterable[str],
    *,
    price_per_token: float,
    verifier_timeout: float,
    verifier_workers: int = 1,
    verifier_memory: float = MEMORY,
    hack_prices: Mapping[str, float] | None = None,
) -> Judge:
    """A judge with every verifier that the examples name, each built (and so checked) now.

    Raises:
        DataError: A verifier is unknown or cannot be imported.
    """
    try:
        verifiers = {
            name: build_verifier(name, timeout=verifier_timeout, workers=verifier_workers, memory=verifier_memory)
            for name in sorted(set(verifier_names))
        }
    except ValueError as error:
        raise DataError(f"data.verifier: {error}") from error
    return Judge(tokenizer, modes, verifiers, price_per_token, verifier_workers, hack_prices or {})


class RewardFunction:
    """The judge as a TRL reward function. `outcomes` keeps what TRL would drop about the batch in hand.

    `outcomes` has shape (B, 4): reward, score (both NaN where the verifier failed), response tokens, and 1 where the
    mode's cap cut the response. `flags`, (B, F), is 1 where a flag of `siesta.rewards.hacking.FLAGS` was raised.
    """

    __name__ = "reward"

    def __init__(self, judge: Judge):
        self.judge = judge
        self.outcomes = torch.empty(0, 4)
        self.flags = torch.empty(0, len(hacking.FLAGS))
        self.done: Callable[[], None] = lambda: None  # called when a batch has its rewards
        self._batch: list[tuple[object, Mode, list[int], list[str]]] = []
        self._background = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._begun: dict[int, tuple[Future[list[float | None]], int]] = {}

    def begin(self, mode: Mode, rows: Sequence[int], responses: Sequence[list[int]], examples: Sequence[dict]) -> None:
        """Score responses of the coming batch in the background; `rows` are their places in it.

        `examples` are the batch's rows of the data set. The call that follows waits for what has been begun.
        """
        names = [examples[row]["verifier"] for row in rows]
        answers = [examples[row]["answer"] for row in rows]
        future = self._background.submit(self.judge.score, mode, responses, names, answers)
        self._begun |= {row: (future, place) for place, row in enumerate(rows)}

    def __call__(
        self,
        prompts: list,
        completion_ids: list[list[int]],
        answer: list[str],
        verifier: list[str],
        log_extra: Callable[[str, list], None] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Reward of each rollout, None where the verifier failed; the mode is read from the first id."""
        by_token = {mode.token_id: mode for mode in self.judge.modes}
        modes = [by_token[ids[0]] for ids in completion_ids]
        responses = [ids[1:] for ids in completion_ids]
        begun, self._begun = self._begun, {}
        scores: list[float | None] = [None] * len(modes)
        for row, (future, place) in begun.items():
            scores[row] = future.result()[place]
        for mode in self.judge.modes:
            rows = [i for i, own in enumerate(modes) if own is mode and i not in begun]
            judged = self.judge.score(
                mode, [responses[i] for i in rows], [verifier[i] for i in rows], [answer[i] for i in rows]
            )
            for i, score in zip(rows, judged, strict=True):
                scores[i] = score
        hacks = self.judge.hacks(modes, responses, [repr(prompt) for prompt in prompts])
        rewards = [
            None if score is None else self.judge.reward(mode, score, len(response), found)
            for mode, score, response, found in zip(modes, scores, responses, hacks, strict=True)
        ]
        end = end_id(self.judge.tokenizer)
        self.outcomes = torch.tensor(
            [
                [_or_nan(reward), _or_nan(score), len(response), float(not response or response[-1] != end)]
                for reward, score, response in zip(rewards, scores, responses, strict=True)
            ]
        )
        self.flags = torch.tensor([[float(flag in found) for flag in hacking.FLAGS] for found in hacks])
        self._batch = list(zip(prompts, modes, responses, hacks, strict=True))
        if log_extra is not None:
            log_extra("mode", [mode.name for mode in modes])
            log_extra("score", scores)
            log_extra("hacks", [" ".join(found) for found in hacks])
        self.done()
        return rewards

    def state_dict(self) -> dict:
        """The batch that `samples` shows, as plain containers."""
        batch = [(prompt, mode.name, response, hacks) for prompt, mode, response, hacks in self._batch]
        return {"batch": batch, "outcomes": self.outcomes}

    def load_state_dict(self, state: dict) -> None:
        """Show what `state_dict` has given."""
        by_name = {mode.name: mode for mode in self.judge.modes}
        self._batch = [(prompt, by_name[name], response, hacks) for prompt, name, response, hacks in state["batch"]]
        self.outcomes = state["outcomes"]

    def samples(self, count: int) -> list[dict]:
        """Rollouts of the last batch to look at, with score, reward and flags: of prompts spread evenly over it, a
        rollout in each mode, so that modes can be compared; if those are fewer than `count`, others as well.
        """
        firsts: dict[tuple[str, str], int] = {}
        for i, (prompt, mode, *_) in enumerate(self._batch):
            firsts.setdefault((str(prompt), mode.name), i)
        prompts = list(dict.fromkeys(prompt for prompt, _ in firsts))
        shown = set(spread(prompts, max(1, count // len(self.judge.modes))))
        compared = [i for (prompt, _), i in firsts.items() if prompt in shown][:count]
        others = [i for i in range(len(self._batch)) if i not in compared]
        return [self._shown(i) for i in sorted([*compared, *spread(others, count - len(compared))])]

    def _shown(self, i: int) -> dict:
        """A rollout as a row of samples.jsonl."""
        prompt, mode, response, hacks = self._batch[i]
        reward, score, tokens, _ = self.outcomes[i].tolist()
        text = self.judge.tokenizer.decode(response)
        # None, not NaN: the row goes to JSON as it is.
        judged = {"score": None, "reward": None} if math.isnan(reward) else {"score": score, "reward": reward}
        row = {"prompt": prompt, "mode": mode.name, "response": text, "tokens": int(tokens), **judged}
        return row | {"hacks": hacks}


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, from the first to the last in even steps."""
    last = len(items) - 1
    places = {place * last // max(1, count - 1) for place in range(count)} if items else set()
    return [items[place] for place in sorted(places)]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
