"""Which rollouts share a forward pass, and how they lie in it.

A policy that answers most prompts at once has short rollouts and a few long ones. Padded to the longest, most of the
compute goes into padding; so rows are split by tokens and laid out without padding (`packed`), or, where attention
cannot tell sequences apart, in rows of similar length (`padded`). Either way only the hidden states that predict a
completion token reach the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pack:
    """R rollouts laid out for one forward pass of a causal model.

    Args:
        packed: Whether all sequences lie in one row.
        inputs: What the model is called with: `input_ids` and `position_ids`, (1, S) packed or (R, L) padded on the
            right, where causal attention never looks.
        lengths: Tokens of each sequence, (R,).
        first: Flat index of the hidden state that predicts each control token, (R,).
        predicts: Flat indices of the hidden states that predict response tokens, (K,), rollout by rollout.
        targets: These response tokens, (K,).
        response_mask: Where they stand in the completions, (R, T); column 0 is the control token and False.
        control_ids: First completion token of each rollout, (R,).
    """

    packed: bool
    inputs: dict[str, torch.Tensor]
    lengths: torch.Tensor
    first: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    response_mask: torch.Tensor
    control_ids: torch.Tensor


def lay_out(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int, *, packed: bool, pad_id: int = 0
) -> Pack:
    """Lay out all rows of a batch.

    Args:
        input_ids, attention_mask: Shape (R, P + T), prompts padded on the left, completions on the right; each
            completion has at least its control token.
        completion_length: T.
        packed: One row without padding; otherwise one row each, padded with `pad_id`.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    places = mask.cumsum(dim=1) - 1  # position of each token in its own sequence
    if packed:
        inputs = {"input_ids": input_ids[mask][None], "position_ids": places[mask][None]}
        starts = lengths.cumsum(dim=0) - lengths
    else:
        width = int(lengths.max())
        ids = input_ids.new_full((len(lengths), width), pad_id)
        positions = torch.arange(width, device=ids.device).expand(len(lengths), width)
        ids[positions < lengths[:, None]] = input_ids[mask]  # both in row order
        inputs = {"input_ids": ids, "position_ids": positions}
        starts = torch.arange(len(lengths), device=ids.device) * width
    response_mask = mask[:, -completion_length:].clone()
    first = starts + lengths - response_mask.sum(dim=1) - 1
    response_mask[:, 0] = False
    steps = torch.arange(completion_length, device=first.device)
    completion_ids = input_ids[:, -completion_length:]
    return Pack(
        packed=packed,
        inputs=inputs,
        lengths=lengths,
        first=first,
        predicts=(first[:, None] + steps)[response_mask],
        targets=completion_ids[response_mask],
        response_mask=response_mask,
        control_ids=completion_ids[:, 0],
    )


def sequence_costs(lengths: Sequence[int], tokens_per_doubling: float) -> list[float]:
    """Work of each sequence in units of one token's linear layers.

    Attention of a sequence of n tokens grows with n squared; at `tokens_per_doubling` tokens it costs as much as the
    linear layers do.
    """
    return [length * (1 + length / tokens_per_doubling) for length in lengths]


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


def split_sorted(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batches of similar length, each at most `budget` tokens with its padding and at least one row."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
