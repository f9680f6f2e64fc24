"""Which rollouts share a forward pass, and how they lie in it.

A policy that answers most prompts at once has short rollouts and a few long ones. Padded to the longest, most of the
compute goes into padding; so rows are split by tokens and laid out without padding (`packed`), or, where attention
cannot tell sequences apart, in rows of similar length (`padded`). Either way only the hidden states that predict a
completion token reach the head. The rollouts of a group have the same prompt; where attention can follow a tree, it
is computed once for all of them (`shared`).
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Pack:
    """R rollouts laid out for one forward pass of a causal model.

    A tree is a prompt and, behind it, the completions that share it. Without sharing each rollout is a tree.

    Args:
        packed: Whether all trees lie in one row.
        shared: Whether rollouts share prompts; then attention has to follow `trees` and `branches`.
        inputs: What the model is called with: `input_ids` and `position_ids`, (1, S) packed or (trees, L) padded on
            the right, where causal attention never looks.
        trees: Tree of each token, shaped like the inputs.
        branches: Completion of each token, counted through all trees; -1 in prompts, -2 in the padding.
        lengths: Tokens of each sequence, (R,).
        first: Flat index of the hidden state that predicts each control token, (R,).
        predicts: Flat indices of the hidden states that predict response tokens, (K,), rollout by rollout.
        targets: These response tokens, (K,).
        response_mask: Where they stand in the completions, (R, T); column 0 is the control token and False.
        control_ids: First completion token of each rollout, (R,).
    """

    packed: bool
    shared: bool
    inputs: dict[str, torch.Tensor]
    trees: torch.Tensor
    branches: torch.Tensor
    lengths: torch.Tensor
    first: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    response_mask: torch.Tensor
    control_ids: torch.Tensor


def same_prompts(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
    """Equal numbers for rows with equal prompts, (R,); prompts padded on the left, (R, P)."""
    return torch.unique(prompt_ids.masked_fill(~prompt_mask.bool(), -1), dim=0, return_inverse=True)[1]


def lay_out(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    *,
    packed: bool,
    shared: bool = False,
    pad_id: int = 0,
) -> Pack:
    """Lay out all rows of a batch.

    Args:
        input_ids, attention_mask: Shape (R, P + T), prompts padded on the left, completions on the right; each
            completion has at least its control token.
        completion_length: T.
        packed: One row without padding; otherwise one row for each tree, padded with `pad_id`.
        shared: Lay a prompt that several rows have out once, their completions behind it.
    """
    mask = attention_mask.bool()
    completions = mask.clone()
    completions[:, :-completion_length] = False
    rows = torch.arange(len(mask), device=mask.device)
    prompts = same_prompts(input_ids[:, :-completion_length], mask[:, :-completion_length]) if shared else rows
    order = prompts.argsort(stable=True)  # of the rows in the layout: tree by tree
    opens = torch.ones_like(mask[:, 0])  # whether a row, in that order, is the first of its tree
    opens[1:] = prompts[order][1:] != prompts[order][:-1]
    tree = opens.cumsum(dim=0) - 1
    kept = completions[order] | (mask[order] & opens[:, None])
    ends = kept.sum(dim=1).cumsum(dim=0)
    begins = ends - completions[order].sum(dim=1)  # of each completion
    roots = (begins[opens] - 1)[tree]  # last token of its prompt
    branch = torch.where(completions[order], rows[:, None], -1)
    tokens = [input_ids[order], (mask.cumsum(dim=1) - 1)[order], tree[:, None].expand_as(mask), branch]
    tokens = [values[kept][None] for values in tokens]
    if not packed:
        last = torch.cat([opens[1:], opens[:1]])  # whether the next row opens a tree
        tokens, shift = in_rows_of_trees(tokens, ends[last], pad_id)
        begins, roots = begins + shift[tree], roots + shift[tree]
    response_mask = completions[:, -completion_length:].clone()
    response_mask[:, 0] = False
    steps = torch.arange(completion_length, device=mask.device)
    completion_ids = input_ids[:, -completion_length:]
    back = order.argsort()
    return Pack(
        packed=packed,
        shared=shared,
        inputs={"input_ids": tokens[0], "position_ids": tokens[1]},
        trees=tokens[2],
        branches=tokens[3],
        lengths=mask.sum(dim=1),
        first=roots[back],
        predicts=(begins[back][:, None] - 1 + steps)[response_mask],
        targets=completion_ids[response_mask],
        response_mask=response_mask,
        control_ids=completion_ids[:, 0],
    )


def in_rows_of_trees(
    tokens: Sequence[torch.Tensor], ends: torch.Tensor, pad_id: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Ids, positions, trees and branches of one row, (1, S) each, cut at `ends` into rows padded on the right.

    Returns:
        The four, (trees, L) each, and how far the flat index of a tree's tokens has moved, (trees,).
    """
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    sizes = ends - begins
    columns = torch.arange(int(sizes.max()), device=ends.device).repeat(len(sizes), 1)
    real = columns < sizes[:, None]
    padding = (torch.full_like(columns, pad_id), columns, torch.zeros_like(columns), torch.full_like(columns, -2))
    rows = [empty.masked_scatter(real, values) for empty, values in zip(padding, tokens, strict=True)]
    return rows, torch.arange(len(sizes), device=ends.device) * columns.shape[1] - begins


def saved_prompts(pack: Pack) -> list[int]:
    """Lengths of the prompts that were not laid out, because another rollout of the pack has them."""
    trees = pack.trees.flatten()[pack.first].tolist()
    prompts = (pack.lengths - pack.response_mask.sum(dim=1) - 1).tolist()
    return [prompt for i, prompt in enumerate(prompts) if trees[i] in trees[:i]]


@dataclass(frozen=True)
class Unit:
    """Rollouts that go through a pass together: one, or some that share their prompt.

    Args:
        rows: Their places in the batch.
        tokens: What they are laid out in.
        cost: Their work, in units of one token's linear layers.
    """

    rows: list[int]
    tokens: int
    cost: float


def make_units(
    lengths: Sequence[int],
    prompts: Sequence[tuple[Hashable, int]],
    cost: Callable[[int], float],
    *,
    rows: int,
    tokens: float = float("inf"),
) -> list[Unit]:
    """Rollouts of the same prompt in units of at most `rows` rows and, where one row does not exceed them, `tokens`.

    Args:
        lengths: Tokens of each rollout, prompt included.
        prompts: Name and length of each rollout's prompt.
        cost: Work of a sequence.
    """
    units: list[Unit] = []
    units_of: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, (length, (name, prompt)) in enumerate(zip(lengths, prompts, strict=True)):
        more = length - prompt
        for place in units_of[name]:  # the first that has room: then no two of a prompt would fit into one pass
            unit = units[place]
            if len(unit.rows) < rows and unit.tokens + more <= tokens:
                units[place] = Unit([*unit.rows, row], unit.tokens + more, unit.cost + cost(length) - cost(prompt))
                break
        else:
            units_of[name].append(len(units))
            units.append(Unit([row], length, cost(length)))
    return units


def sequence_cost(length: int, tokens_per_doubling: float) -> float:
    """Work of a sequence in units of one token's linear layers.

    Attention of a sequence of n tokens grows with n squared; at `tokens_per_doubling` tokens it costs as much as the
    linear layers do.
    """
    return length * (1 + length / tokens_per_doubling)


def balance(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Longest-processing-time partition: the dearest item first, each into the cheapest bin.

    Returns:
        Items of each bin in ascending order; some bins are empty if there are fewer items.
    """
    totals, parts = [0.0] * bins, [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        cheapest = totals.index(min(totals))
        parts[cheapest].append(item)
        totals[cheapest] += costs[item]
    return [sorted(part) for part in parts]


def split_packed(lengths: Sequence[int], costs: Sequence[float], budget: int) -> list[list[int]]:
    """Packs of at most `budget` tokens and about equal work, the fewest for which that works out.

    A sequence longer than the budget raises the limit of all packs to its own length: it must fit anyway.
    """
    limit = max(budget, *lengths)
    bins = -(-sum(lengths) // limit)
    while True:
        parts = balance(costs, bins)
        if max(sum(lengths[i] for i in part) for part in parts) <= limit:
            return parts
        bins += 1


def split_sorted(lengths: Sequence[int], budget: int, pass_cost: int = 0) -> list[list[int]]:
    """Batches of similar length, each at most `budget` tokens with its padding and at least one row.

    Of all cuts of the sorted rows it takes the one with the fewest tokens, padding included, where another batch
    counts as `pass_cost` tokens: many small passes would cost more than the padding they save.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    widths = np.array([lengths[i] for i in order])
    cheapest = np.zeros(len(order) + 1)  # of the first n rows
    cut = np.zeros(len(order) + 1, dtype=int)  # where their last batch begins
    for end in range(1, len(order) + 1):
        begins = np.arange(end)
        tokens = (end - begins) * widths[:end]
        totals = np.where((tokens <= budget) | (begins == end - 1), cheapest[:end] + tokens + pass_cost, np.inf)
        cut[end] = totals.argmin()
        cheapest[end] = totals[cut[end]]
    parts, end = [], len(order)
    while end:
        parts.append(order[cut[end] : end])
        end = cut[end]
    return parts[::-1]
