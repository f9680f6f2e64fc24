"""Who attends to whom in a pack, in the form that each back end takes: boundaries, blocks or a whole mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from siesta.rl.packing import Pack

BLOCK = 128  # tokens of a block of FlexAttention


def boundaries(pack: Pack) -> dict[str, Any]:
    """Where each sequence of a packed row begins and ends, as the flash kernels take it."""
    ends = torch.nn.functional.pad(pack.lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(pack.lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def visible(trees: torch.Tensor, branches: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Causal attention inside each tree of a packed row: to its prompt and, in completions, to their own tokens."""

    def mask(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        path = (branches[key] == -1) | (branches[key] == branches[query])
        return (trees[query] == trees[key]) & path & (query >= key)

    return mask


def block_mask(pack: Pack) -> dict[str, Any]:
    """The mask of a packed row as FlexAttention takes it.

    Which blocks it has to look at follows from the range of trees and branches in each, without the S x S mask that
    `create_block_mask` would build. Blocks that may be partly visible are masked token by token in the kernel, so it
    is enough that none is missing.
    """
    trees, branches = pack.trees[0], pack.branches[0]
    size, blocks = len(trees), -(-len(trees) // BLOCK)
    tail = blocks * BLOCK - size
    tree = torch.nn.functional.pad(trees, (0, tail), value=size).view(blocks, BLOCK)
    branch = torch.nn.functional.pad(branches, (0, tail), value=size).view(blocks, BLOCK)
    prompt = branch == -1
    order = branch_order(branches, size, tail).view(blocks, BLOCK)
    place = torch.arange(blocks, device=trees.device)
    same_tree = overlap(tree.amin(1), tree.amax(1))
    same_branch = overlap(order.masked_fill(prompt, size).amin(1), order.masked_fill(prompt, -1).amax(1))
    needed = same_tree & (same_branch | prompt.any(1)) & (place[:, None] >= place)
    one_tree = tree.amin(1) == tree.amax(1)
    one_branch = (branch.amin(1) == branch.amax(1)) & ~prompt.any(1)
    own = one_branch[:, None] & one_branch & (branch[:, :1] == branch[:, 0])
    full = needed & one_tree[:, None] & one_tree & (prompt.all(1) | own) & (place[:, None] > place)
    mask = BlockMask.from_kv_blocks(
        *ordered(needed & ~full),
        *ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible(trees, branches),
        seq_lengths=(size, size),
    )
    return {"block_mask": mask}


def branch_order(branches: torch.Tensor, size: int, tail: int) -> torch.Tensor:
    """Completions numbered as they come in the row, so that those of a block are a range; the tail comes last."""
    changes = torch.ones_like(branches)
    changes[1:] = branches[1:] != branches[:-1]
    return torch.nn.functional.pad(changes.cumsum(0), (0, tail), value=size + 1)


def overlap(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Whether the ranges of two blocks meet, (blocks, blocks)."""
    return (low[:, None] <= high) & (low <= high[:, None])


def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block looks at, and which, those first: (1, 1, N) and (1, 1, N, N)."""
    number = blocks.sum(1, dtype=torch.int32)
    places = blocks.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return number[None, None], places[None, None]


def tree_mask(pack: Pack) -> dict[str, Any]:
    """The mask of padded rows of trees, (trees, 1, L, L), True where a token may look; as sdpa takes it."""
    if not pack.shared:
        return {}  # causal attention says it all
    query, key = pack.branches[:, :, None], pack.branches[:, None]
    causal = torch.ones(key.shape[-1], key.shape[-1], dtype=torch.bool, device=key.device).tril()
    return {"attention_mask": (causal & ((key == -1) | (key == query)))[:, None]}
