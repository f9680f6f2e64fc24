"""Spreads a generation batch over optimizer steps, ranks and micro-batches, by work instead of by rows.

A batch is a dict of tensors of one row a rollout, as GRPOTrainer makes it: `prompt_*` are padded on the left, others
of two dimensions on the right. Entries whose name ends in `weights` multiply terms of the loss.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from siesta.rl.packing import Unit, balance

Batch = dict[str, torch.Tensor]


def sequence_lengths(batch: Batch) -> list[int]:
    """Real tokens of each row, prompt and completion."""
    return (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows, without columns that are padding in all of them. No rows: the first one, with all weights 0."""
    places = torch.tensor(list(rows) or [0], device=batch["prompt_mask"].device)
    part = {key: value[places] if value.dim() else value for key, value in batch.items()}
    prompt = int(part["prompt_mask"].sum(1).max())
    completion = int(part["completion_mask"].sum(1).max())
    for key, value in part.items():
        if key.startswith("prompt_"):
            part[key] = value[:, value.shape[1] - prompt :]
        elif value.dim() == 2 and key != "mode_targets":  # that one is (B, M), the others (B, T)
            part[key] = value[:, :completion]
        if not rows and key.endswith("weights"):
            part[key] = torch.zeros_like(part[key])
    return part


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Rows of all batches in order, padded to common widths."""
    joined = {}
    for key, first in batches[0].items():
        if first.dim() == 0:
            joined[key] = first
            continue
        values = [batch[key] for batch in batches]
        if first.dim() == 2:
            width = max(value.shape[1] for value in values)
            sides = [(width - v.shape[1], 0) if key.startswith("prompt_") else (0, width - v.shape[1]) for v in values]
            values = [torch.nn.functional.pad(v, side) for v, side in zip(values, sides, strict=True)]
        joined[key] = torch.cat(values)
    return joined


def spread(
    batch: Batch,
    accelerator: Accelerator,
    *,
    steps: int,
    accumulation: int,
    units: Callable[[Batch], list[Unit]],
    seed: int,
) -> list[Batch]:
    """This rank's micro-batches, `steps * accumulation` of them, in the order in which they are trained on.

    The units of all ranks' rollouts are shuffled into optimizer steps, as many in each, and each step's are dealt to
    ranks and micro-batches so that all have about the same work. The loss does not depend on the deal.

    Args:
        batch: This rank's rollouts.
        steps: Optimizer steps the batch is for.
        accumulation: Micro-batches of a step on each rank.
        units: Which rollouts stay together, of equal numbers of rows if there are several steps.
        seed: Of the shuffle; the same on every rank.
    """
    if accelerator.num_processes > 1:
        device = batch["prompt_ids"].device
        everyone = gather_object([{key: value.cpu() for key, value in batch.items()}])
        batch = {key: value.to(device) for key, value in concatenate(everyone).items()}
    together = units(batch)
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(seed)).tolist()
    micro_batches = []
    for step in range(steps):
        chosen = [together[i] for i in order[step::steps]]
        deal = balance([unit.cost for unit in chosen], accelerator.num_processes * accumulation)
        first = accelerator.process_index * accumulation
        for part in deal[first : first + accumulation]:
            micro_batches.append(select(batch, [row for i in part for row in chosen[i].rows]))
    return micro_batches
