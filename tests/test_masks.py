"""Who attends to whom: small packs by hand, and FlexAttention's table of blocks against the whole mask.

The table is right if it looks at every block that holds a visible pair, and skips the mask only where all pairs are
visible; it is worth having if it looks at few others.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from siesta.rl.masks import BLOCK, block_mask, boundaries, branch_order, ordered, overlap, tree_mask, visible
from siesta.rl.packing import Pack, lay_out
from tests.helpers import Rows, batch_of

# Prompts A, B, A of 2, 1 and 2 tokens; completions of 2, 1 and 1. Shared, B is the first tree.
ABA: Rows = [([5, 6], [1, 7]), ([4], [2]), ([5, 6], [2])]


def dense(pack: Pack) -> torch.Tensor:
    """The whole mask of a packed row, (S, S)."""
    places = torch.arange(pack.trees.shape[1])
    return visible(pack.trees[0], pack.branches[0])(None, None, places[:, None], places)


def random_pack(seed: int, *, shared: bool, groups: int = 6, prompt: int = 300, completion: int = 200) -> Pack:
    """Groups of one to five rollouts in random order; lengths up to `prompt` and `completion` tokens."""
    draw = random.Random(seed)
    rows: Rows = []
    for group in range(groups):
        asked = [group] * draw.randint(1, prompt)
        rows += [(asked, [1] * draw.randint(1, completion)) for _ in range(draw.randint(1, 5))]
    draw.shuffle(rows)
    return lay_out(*batch_of(rows), packed=True, shared=shared)


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_boundaries_by_hand() -> None:
    rows: Rows = [([4] * 5, [1] * 5), ([4] * 2, [1] * 2), ([4] * 3, [1] * 9), ([4], [1])]
    given = boundaries(lay_out(*batch_of(rows), packed=True))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert given[name].tolist() == [0, 10, 14, 26, 28]
        assert given[name].dtype == torch.int32
    assert given["max_length_q"] == given["max_length_k"] == 12
    assert isinstance(given["max_length_q"], int)


def test_visible_by_hand() -> None:
    """A prompt of two with completions of one and two, and a tree of two."""
    trees, branches = torch.tensor([0, 0, 0, 0, 0, 1, 1]), torch.tensor([-1, -1, 0, 1, 1, -1, 2])
    places = torch.arange(7)
    assert visible(trees, branches)(None, None, places[:, None], places).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        (
            False,
            [
                [1, 0, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0, 0, 0, 0],
                [1, 1, 1, 1, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 1, 1, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 1, 0, 0],
                [0, 0, 0, 0, 0, 0, 1, 1, 0],
                [0, 0, 0, 0, 0, 0, 1, 1, 1],
            ],
        ),
        (
            True,
            [
                [1, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0],
                [0, 0, 1, 0, 0, 0, 0],
                [0, 0, 1, 1, 0, 0, 0],
                [0, 0, 1, 1, 1, 0, 0],
                [0, 0, 1, 1, 1, 1, 0],
                [0, 0, 1, 1, 0, 0, 1],
            ],
        ),
    ],
)
def test_block_mask_by_hand(shared: bool, expected: list[list[int]]) -> None:
    """A, B, A without sharing; shared B, then A with its completions of two and one."""
    pack = lay_out(*batch_of(ABA), packed=True, shared=shared)
    mask = block_mask(pack)["block_mask"]
    places = torch.arange(len(expected))
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
    assert seen.int().tolist() == expected
    assert mask.seq_lengths == (len(expected), len(expected))
    assert mask.kv_num_blocks.tolist() == [[[1]]]  # one block, looked at through the mask
    assert mask.full_kv_num_blocks.tolist() == [[[0]]]


def test_tree_mask_by_hand() -> None:
    """Rows of trees: B with its only completion and three columns of padding, and A with two completions."""
    mask = tree_mask(lay_out(*batch_of(ABA), packed=False, shared=True))["attention_mask"]
    assert mask.shape == (2, 1, 5, 5)
    assert mask.dtype == torch.bool
    assert mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert mask[0, 0, :2].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert mask.any(-1).all()  # padding looks somewhere too: a softmax over nothing is NaN
    assert not mask[0, 0, :2, 2:].any()  # but nobody looks at padding
    assert tree_mask(lay_out(*batch_of(ABA), packed=False)) == {}


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_trees_and_packed_trees_see_the_same(seed: int) -> None:
    """The mask of a packed row, cut at the trees, is the mask of the rows."""
    draw = random.Random(seed)
    rows: Rows = [([draw.choice([4, 5, 6])], [1] * draw.randint(1, 4)) for _ in range(8)]
    packed, padded = (lay_out(*batch_of(rows), packed=packed, shared=True) for packed in (True, False))
    whole, trees = dense(packed), packed.trees[0]
    for tree, mask in enumerate(tree_mask(padded)["attention_mask"][:, 0]):
        size = int((trees == tree).sum())
        assert torch.equal(mask[:size, :size], whole[trees == tree][:, trees == tree])
        assert not whole[trees == tree][:, trees != tree].any()


# ---- the table of blocks -----------------------------------------------------------------------------------------


def table(number: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Which key blocks each query block looks at, (blocks, blocks)."""
    looked = torch.zeros(places.shape[-2:], dtype=torch.bool)
    for query, count in enumerate(number[0, 0].tolist()):
        looked[query, places[0, 0, query, :count].long()] = True
    return looked


def tables(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks that are looked at through the mask, and whole."""
    full: Any = (mask.full_kv_num_blocks, mask.full_kv_indices)
    return table(mask.kv_num_blocks, mask.kv_indices), table(*full)


def of_blocks(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether any and whether all pairs of each pair of blocks are visible, (blocks, blocks)."""
    blocks = -(-len(pairs) // BLOCK)
    tail = blocks * BLOCK - len(pairs)
    squares = torch.nn.functional.pad(pairs, (0, tail, 0, tail)).view(blocks, BLOCK, blocks, BLOCK)
    return squares.any(3).any(1), squares.all(3).all(1)


def mistakes(mask: BlockMask, pairs: torch.Tensor) -> tuple[int, int]:
    """Blocks with a visible pair that nobody looks at, and blocks looked at whole that are not visible whole."""
    partial, full = tables(mask)
    some, every = of_blocks(pairs)
    assert not (partial & full).any()
    return int((some & ~(partial | full)).sum()), int((full & ~every).sum())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("prompt", "completion"), [(300, 200), (600, 40), (20, 500), (10, 10), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_table_misses_no_visible_pair_and_skips_the_mask_only_where_all_are(
    seed: int, prompt: int, completion: int, shared: bool
) -> None:
    """And it looks at no block in vain: prompts come first in their trees, branches one after the other."""
    pack = random_pack(seed, shared=shared, prompt=prompt, completion=completion)
    mask, pairs = block_mask(pack)["block_mask"], dense(pack)
    assert mistakes(mask, pairs) == (0, 0)
    partial, full = tables(mask)
    assert torch.equal(partial | full, of_blocks(pairs)[0])


def test_the_random_packs_are_of_many_blocks_and_no_multiple_of_them() -> None:
    packs = [random_pack(seed, shared=True) for seed in range(3)]
    assert all(pack.trees.shape[1] > 8 * BLOCK and pack.trees.shape[1] % BLOCK for pack in packs)
    long = [random_pack(seed, shared=True, prompt=600, completion=40) for seed in range(3)]
    assert all(tables(block_mask(pack)["block_mask"])[1].any() for pack in long)  # some are looked at whole


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("shared", [True, False])
def test_the_ends_of_trees_and_of_the_row_may_lie_on_the_ends_of_blocks(size: int, shared: bool) -> None:
    rows: Rows = [([4] * size, [1] * BLOCK), ([5] * BLOCK, [1] * size), ([4] * size, [2] * BLOCK), ([5] * BLOCK, [2])]
    pack = lay_out(*batch_of(rows), packed=True, shared=shared)
    assert mistakes(block_mask(pack)["block_mask"], dense(pack)) == (0, 0)


def test_many_short_sequences_leave_most_blocks_alone() -> None:
    """Negative control: a row that is one sequence looks at the whole causal half."""
    short = random_pack(0, shared=False, groups=120, prompt=12, completion=12)
    partial, full = tables(block_mask(short)["block_mask"])
    blocks = len(partial)
    assert blocks > 20
    assert (partial | full).sum() <= 2 * blocks
    one = lay_out(*batch_of([([4] * 1500, [1] * 1500)]), packed=True)
    partial, full = tables(block_mask(one)["block_mask"])
    blocks = len(partial)
    assert (partial | full).sum() == blocks * (blocks + 1) // 2


def test_completions_of_a_tree_do_not_look_at_each_other() -> None:
    """A prompt of one block and eight completions of two: only prompt and own blocks, 1 + 8 * (2 + 3)."""
    rows: Rows = [([4] * BLOCK, [1] * 2 * BLOCK) for _ in range(8)]
    pack = lay_out(*batch_of(rows), packed=True, shared=True)
    partial, full = tables(block_mask(pack)["block_mask"])
    assert len(partial) == 17
    assert partial.sum() == 17  # the diagonal
    assert full.sum() == 24
    assert torch.equal(partial, torch.eye(17, dtype=torch.bool))


def test_broken_tables_are_found() -> None:
    """Negative controls: one block less, partial blocks taken whole, the table of other trees, no common prompt."""
    pack = random_pack(1, shared=True)
    mask, pairs = block_mask(pack)["block_mask"], dense(pack)
    partial, full = tables(mask)

    def rebuilt(partial: torch.Tensor, full: torch.Tensor) -> BlockMask:
        return BlockMask.from_kv_blocks(*ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK)

    assert mistakes(rebuilt(partial, full), pairs) == (0, 0)
    less = partial.clone()
    less[-1, -1] = False
    assert mistakes(rebuilt(less, full), pairs) == (1, 0)
    assert mistakes(rebuilt(less & full, full | partial), pairs)[1] > 0
    turned = replace(pack, trees=pack.trees.flip(1), branches=pack.branches.flip(1))
    assert sum(mistakes(block_mask(turned)["block_mask"], pairs)) > 0
    apart = replace(pack, branches=pack.branches.clamp(min=0))
    assert mistakes(block_mask(apart)["block_mask"], pairs)[0] > 0


# ---- its parts ---------------------------------------------------------------------------------------------------


def test_branches_are_numbered_as_they_come() -> None:
    """Prompts count as well; the tail is behind all of them."""
    branches = torch.tensor([-1, -1, 3, 3, 0, -1, 7])
    assert branch_order(branches, size=7, tail=2).tolist() == [1, 1, 2, 2, 3, 4, 5, 8, 8]


def test_overlap_by_hand() -> None:
    low, high = torch.tensor([0, 1, 3]), torch.tensor([1, 2, 5])
    assert overlap(low, high).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_ordered_by_hand() -> None:
    number, places = ordered(torch.tensor([[True, False, False], [False, True, True], [True, False, True]]))
    assert number.tolist() == [[[1, 2, 2]]]
    assert places[0, 0, 0, :1].tolist() == [0]
    assert places[0, 0, 1, :2].tolist() == [1, 2]
    assert places[0, 0, 2, :2].tolist() == [0, 2]
    assert number.dtype == places.dtype == torch.int32
