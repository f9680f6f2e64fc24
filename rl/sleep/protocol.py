"""What every way to sleep has in common: contexts in, a state and its cost out, and no query anywhere.

A state belongs to the weights that made it. Latent states are differentiable: the training pass makes them again, with
a gradient. Text is sampled: its tokens are actions, credited by what the answers from it earn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.schema import Example


@dataclass(frozen=True)
class SleepCost:
    """What the sleep of each of P contexts cost.

    Args:
        tokens: Tokens that sleep computed: read, looped over or written.
        flops: Of the model's matrix products over them.
        state_bytes: Of what is kept.
    """

    tokens: list[int]
    flops: list[float]
    state_bytes: list[int]


@dataclass(frozen=True)
class SleepTokens:
    """Sampled tokens of one pass of sleep over P contexts; they are trained on like completions.

    Args:
        prompt_ids: What each pass read.
        completion_ids: What it wrote: the sleep token, then the text.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]


class State(Protocol):
    """States of P contexts, in order."""

    def __len__(self) -> int:
        """P."""
        ...

    def select(self, rows: Sequence[int]) -> "State":
        """The states of some contexts, any of them several times: P -> P * G rows is a fan-out."""
        ...

    def to(self, device: torch.device | str) -> "State": ...

    def detach(self) -> "State":
        """The same state without its graph."""
        ...

    def nbytes(self) -> list[int]:
        """Bytes of each context's state."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that `safetensors` has to keep, first axis P. Where those of several contexts are joined again,
        smaller ones are filled with zeros in front.
        """
        ...


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class SleepOut(Generic[S]):
    """A night's work: the states, the sampled tokens of each pass (text only), the cost."""

    state: S
    actions: list[SleepTokens]
    cost: SleepCost


class Consolidator(Protocol[S]):
    """One mechanism, with its own kind of state.

    `sleep` has no query argument, on purpose: the question has not come yet.
    """

    name: str
    differentiable: bool
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    def check(self, model: PreTrainedModel, contexts: Sequence[str], passes: int) -> None:
        """Refuse, before any of them is slept on, contexts that `sleep` would refuse.

        Raises:
            DataError: See `sleep`.
        """
        ...

    def sleep(
        self, model: PreTrainedModel, contexts: Sequence[str], *, passes: int, generator: torch.Generator | None = None
    ) -> SleepOut[S]:
        """Consolidate contexts in `passes` passes.

        Raises:
            DataError: A context is empty or longer than the model takes.
        """
        ...

    def prompts(self, state: S, queries: Sequence[Example]) -> list[list[int]]:
        """Token ids that wake reads of each query, up to the place of the control token."""
        ...

    def attach(self, state: S, queries: Sequence[Example]) -> dict[str, Any]:
        """Keyword arguments with which `model(...)` and `generate` read one state a query: ids, mask, cache."""
        ...

    def restore(self, tensors: dict[str, torch.Tensor]) -> S:
        """The inverse of `State.tensors`."""
        ...
