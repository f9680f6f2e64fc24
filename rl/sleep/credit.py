"""What written notes are credited with, and which contexts are asked without a state. Pure functions.

The hierarchy is context -> J sleeps -> m queries -> G answers: C contexts, each slept on J times; every notes is read
by the same m queries, and each of those has a group of G answers. A rollout batch holds them in this order:
context, query, sleep, answer.
"""

from collections.abc import Sequence
from math import floor

import torch

OWN, NONE, SHUFFLED = "own", "none", "shuffled"
# The state that a context's queries come with in training: its own notes, none, another context's notes.
KINDS = [OWN, NONE, SHUFFLED]


def sleep_rewards(rewards: torch.Tensor, tokens: torch.Tensor, price: float) -> torch.Tensor:
    """R_j: what the notes earned a query, less their share of what they cost.

    Args:
        rewards: r, shape (C, m, J, G); NaN where the verifier failed.
        tokens: Written for each notes, shape (C, J).
        price: Of a token, in reward units; m queries share it.

    Returns:
        Shape (C, J): mean_{q,g} r - price tokens / m; NaN where no answer is scorable.
    """
    return rewards.nanmean(dim=(1, 3)) - price * tokens / rewards.shape[1]


def write_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A(c, j) = R_j - mean_j R, credit of every token of notes j. (C, J) -> (C, J), NaN where R_j is."""
    return rewards - rewards.nanmean(dim=1, keepdim=True)


def state_kinds(count: int, stateless: float, *, first: int, keep_context: bool) -> list[str]:
    """The kinds of `count` contexts, a share `stateless` of them without notes of their own, spread evenly.

    A reader who keeps the context can tell notes on another one, and has to learn to: every second of the stateless
    gets such. Without the context nothing tells whose notes they are, so there `shuffled` is left out.

    Args:
        first: Number of the first context, counted through the whole training.
    """
    kinds = []
    for number in range(first, first + count):
        before, after = floor(number * stateless + 1e-9), floor((number + 1) * stateless + 1e-9)
        foreign = keep_context and before % 2 == 1
        kinds.append(OWN if before == after else SHUFFLED if foreign else NONE)
    # Another context's notes must have been written.
    return [NONE if kind == SHUFFLED and OWN not in kinds else kind for kind in kinds]


def sources(kinds: Sequence[str]) -> list[int | None]:
    """Whose notes each context is read with: its own, those of the next context that has some, or none."""
    count = len(kinds)
    found: list[int | None] = []
    for place, kind in enumerate(kinds):
        after = [(place + step) % count for step in range(count)]
        found.append(None if kind == NONE else next(other for other in after if kinds[other] == OWN))
    return found


def query_blocks(contexts: Sequence[str], queries: int) -> list[list[int]]:
    """Rows in blocks of `queries` that follow each other and share their context; rows left over are dropped."""
    blocks: list[list[int]] = [[]]
    for row, context in enumerate(contexts):
        last = blocks[-1]
        if last and (len(last) == queries or contexts[last[-1]] != context):
            blocks.append([])
        blocks[-1].append(row)
    return [block for block in blocks if len(block) == queries]
