"""How rollouts are laid out and shared out: one ragged batch by hand, and what holds for every batch.

The layouts are checked against their meaning (the token behind the hidden state that is said to predict it; the
path of each rollout through its tree), the partitions against the best one there is, found by trying them all.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from siesta.rl.packing import (
    Pack,
    Unit,
    balance,
    lay_out,
    make_units,
    same_prompts,
    saved_prompts,
    sequence_cost,
    split_packed,
    split_sorted,
)
from tests.helpers import Rows, batch_of

# Prompts of 2, 3 and 1 tokens; completions of 3, 1 (the control token alone) and 2. Control tokens are 1 and 2.
RAGGED: Rows = [([5, 6], [1, 7, 8]), ([2, 3, 4], [2]), ([9], [1, 3])]
# Prompts A, B, A of 2, 1 and 2 tokens; completions of 3, 1 and 2.
ABA: Rows = [([5, 6], [1, 7, 8]), ([4], [2]), ([5, 6], [2, 9])]


def ragged(seed: int, rows: int = 6) -> Rows:
    """Random rows whose tokens are all different, so that a mix-up shows."""
    draw, tokens = random.Random(seed), itertools.count(1)
    return [
        ([next(tokens) for _ in range(draw.randint(1, 6))], [next(tokens) for _ in range(draw.randint(1, 6))])
        for _ in range(rows)
    ]


def forest(seed: int, rows: int = 9) -> Rows:
    """Random rows of three prompts in random order, one the beginning and one the end of another."""
    draw, tokens = random.Random(seed), itertools.count(100)
    long = [next(tokens) for _ in range(draw.randint(3, 6))]
    prompts = [long, long[:-1], long[1:]]
    return [(draw.choice(prompts), [next(tokens) for _ in range(draw.choice([1, 1, 2, 5]))]) for _ in range(rows)]


# ---- layouts by hand ---------------------------------------------------------------------------------------------


def test_packed_by_hand() -> None:
    ids, mask, length = batch_of(RAGGED)
    assert ids.tolist() == [[0, 5, 6, 1, 7, 8], [2, 3, 4, 2, 0, 0], [0, 0, 9, 1, 3, 0]]
    pack = lay_out(ids, mask, length, packed=True)
    assert set(pack.inputs) == {"input_ids", "position_ids"}
    assert pack.inputs["input_ids"].tolist() == [[5, 6, 1, 7, 8, 2, 3, 4, 2, 9, 1, 3]]
    assert pack.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert pack.trees.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]
    assert pack.branches.tolist() == [[-1, -1, 0, 0, 0, -1, -1, -1, 1, -1, 2, 2]]
    assert pack.lengths.tolist() == [5, 4, 3]
    # Sequences start at 0, 5 and 9; the last tokens of the prompts are 1, 2 and 0 further.
    assert pack.first.tolist() == [1, 7, 9]
    # 7 and 8 come behind places 2 and 3, the 3 of the last row behind place 10.
    assert pack.predicts.tolist() == [2, 3, 10]
    assert pack.targets.tolist() == [7, 8, 3]
    assert pack.response_mask.tolist() == [[False, True, True], [False, False, False], [False, True, False]]
    assert pack.control_ids.tolist() == [1, 2, 1]


def test_padded_by_hand() -> None:
    """Flush left, five columns wide; only places in the flattened rows differ from the packed layout."""
    pack = lay_out(*batch_of(RAGGED), packed=False, pad_id=77)
    assert set(pack.inputs) == {"input_ids", "position_ids"}
    assert pack.inputs["input_ids"].tolist() == [[5, 6, 1, 7, 8], [2, 3, 4, 2, 77], [9, 1, 3, 77, 77]]
    assert pack.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert pack.trees.tolist() == [[0] * 5, [1, 1, 1, 1, 0], [2, 2, 2, 0, 0]]
    assert pack.branches.tolist() == [[-1, -1, 0, 0, 0], [-1, -1, -1, 1, -2], [-1, 2, 2, -2, -2]]
    # Rows start at 0, 5 and 10.
    assert pack.first.tolist() == [1, 7, 10]
    assert pack.predicts.tolist() == [2, 3, 11]
    assert pack.targets.tolist() == [7, 8, 3]
    packed = lay_out(*batch_of(RAGGED), packed=True)
    for name in ("lengths", "response_mask", "control_ids"):
        assert torch.equal(getattr(pack, name), getattr(packed, name))


def test_completions_of_one_token_leave_nothing_to_predict() -> None:
    pack = lay_out(*batch_of([([3, 4], [1]), ([5], [2])]), packed=True)
    assert pack.first.tolist() == [1, 3]
    assert pack.predicts.shape == pack.targets.shape == (0,)
    assert pack.response_mask.tolist() == [[False], [False]]


def test_shared_packed_by_hand() -> None:
    """Prompt B, padded on the left, sorts before A; the completions of A follow it in the order of rows."""
    pack = lay_out(*batch_of(ABA), packed=True, shared=True)
    assert pack.packed
    assert pack.shared
    assert pack.inputs["input_ids"].tolist() == [[4, 2, 5, 6, 1, 7, 8, 2, 9]]
    assert pack.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 2, 3]]
    assert pack.trees.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1]]
    assert pack.branches.tolist() == [[-1, 0, -1, -1, 1, 1, 1, 2, 2]]
    # All that has a row in front is in the order of the batch: A, B, A. Both A have the 6 at place 3 before them.
    assert pack.lengths.tolist() == [5, 2, 4]
    assert pack.first.tolist() == [3, 0, 3]
    assert pack.predicts.tolist() == [4, 5, 7]
    assert pack.targets.tolist() == [7, 8, 9]
    assert pack.response_mask.tolist() == [[False, True, True], [False, False, False], [False, True, False]]
    assert pack.control_ids.tolist() == [1, 2, 2]


def test_shared_padded_by_hand() -> None:
    """One row for each tree, seven columns wide."""
    pack = lay_out(*batch_of(ABA), packed=False, shared=True, pad_id=77)
    assert not pack.packed
    assert pack.shared
    assert pack.inputs["input_ids"].tolist() == [[4, 2, 77, 77, 77, 77, 77], [5, 6, 1, 7, 8, 2, 9]]
    assert pack.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 2, 3]]
    assert pack.trees.tolist() == [[0] * 7, [1] * 7]
    assert pack.branches.tolist() == [[-1, 0, -2, -2, -2, -2, -2], [-1, -1, 1, 1, 1, 2, 2]]
    # The row of A starts at 7.
    assert pack.first.tolist() == [8, 0, 8]
    assert pack.predicts.tolist() == [9, 10, 12]
    assert pack.targets.tolist() == [7, 8, 9]
    packed = lay_out(*batch_of(ABA), packed=True, shared=True)
    for name in ("lengths", "response_mask", "control_ids"):
        assert torch.equal(getattr(pack, name), getattr(packed, name))


def test_same_prompts_by_hand() -> None:
    """A prompt that ends as another, and one that opens with the padding's own token, are prompts of their own."""
    ids = torch.tensor([[0, 0, 7], [5, 6, 7], [9, 9, 7], [0, 6, 7], [0, 0, 7], [5, 6, 7]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]])
    names = same_prompts(ids, mask).tolist()
    assert names[0] == names[2]  # what lies under the padding does not count
    assert names[1] == names[5]
    assert len(set(names)) == 4
    assert len(set(same_prompts(ids, torch.ones_like(mask)).tolist())) == 4  # negative control
    assert same_prompts(ids, torch.ones_like(mask)).tolist()[0] != same_prompts(ids, torch.ones_like(mask)).tolist()[2]


@pytest.mark.parametrize("packed", [True, False])
def test_saved_prompts_by_hand(packed: bool) -> None:
    """The second A; with two more rows, a second B and a third A."""
    more: Rows = [*ABA, ([4], [1, 3]), ([5, 6], [1])]
    assert saved_prompts(lay_out(*batch_of(ABA), packed=packed, shared=True)) == [2]
    assert saved_prompts(lay_out(*batch_of(more), packed=packed, shared=True)) == [2, 1, 2]
    assert saved_prompts(lay_out(*batch_of(more), packed=packed)) == []


# ---- layouts of any batch ----------------------------------------------------------------------------------------


def sequences(pack: Pack, packed: bool) -> list[list[int]]:
    """The real tokens of each row, read back from the layout."""
    ids = pack.inputs["input_ids"]
    rows = (
        ids[0].split(pack.lengths.tolist()) if packed else [row[:n] for row, n in zip(ids, pack.lengths, strict=True)]
    )
    return [row.tolist() for row in rows]


def assert_means(pack: Pack, rows: Rows) -> None:
    """`first` are last prompt tokens with control tokens behind them; `predicts` have `targets` behind them."""
    flat = pack.inputs["input_ids"].flatten()
    assert flat[pack.first].tolist() == [prompt[-1] for prompt, _ in rows]
    assert flat[pack.first + 1].tolist() == pack.control_ids.tolist() == [completion[0] for _, completion in rows]
    assert flat[pack.predicts + 1].tolist() == pack.targets.tolist()
    assert pack.targets.tolist() == [token for _, completion in rows for token in completion[1:]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_predicting_place_stands_before_its_token(packed: bool, seed: int) -> None:
    rows = ragged(seed)
    pack = lay_out(*batch_of(rows), packed=packed)
    assert_means(pack, rows)
    assert sequences(pack, packed) == [prompt + completion for prompt, completion in rows]
    places = [pack.inputs["position_ids"][0].split(pack.lengths.tolist())] if packed else []
    for part in itertools.chain(*places):
        assert part.tolist() == list(range(len(part)))
    back = torch.zeros(pack.response_mask.shape, dtype=torch.long).masked_scatter(pack.response_mask, pack.targets)
    for row, (_, completion) in zip(back.tolist(), rows, strict=True):
        assert row[1 : len(completion)] == completion[1:]
        assert not any(row[len(completion) :])


def paths(pack: Pack) -> list[list[tuple[int, int]]]:
    """Tokens and positions that each rollout sees on its way through its tree: the prompt and its own branch."""
    trees, branches = pack.trees.flatten(), pack.branches.flatten()
    tokens = torch.stack([pack.inputs[name].flatten() for name in ("input_ids", "position_ids")], dim=1)
    found = []
    for row, root in enumerate(pack.first.tolist()):
        # Which branch is a rollout's own: the one that opens with a control token that no other rollout has.
        own = branches[(trees == trees[root]) & (tokens[:, 0] == pack.control_ids[row]) & (branches >= 0)]
        assert len(own) == 1
        seen = (trees == trees[root]) & ((branches == -1) | (branches == own))
        found.append([(token, place) for token, place in tokens[seen].tolist()])
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_shared_layouts_hold_each_prompt_once_and_every_rollout_whole(packed: bool, seed: int) -> None:
    """Each path is its rollout with positions from 0 on; predicting places stand in front, in the same branch."""
    rows = forest(seed)
    pack = lay_out(*batch_of(rows, left=2, right=1), packed=packed, shared=True)
    ids, branches = pack.inputs["input_ids"].flatten(), pack.branches.flatten()
    places = pack.inputs["position_ids"].flatten()
    assert paths(pack) == [[(token, place) for place, token in enumerate(p + c)] for p, c in rows]
    once = {tuple(prompt) for prompt, _ in rows}
    real = branches != -2
    assert real.sum() == sum(map(len, once)) + sum(len(completion) for _, completion in rows)
    assert len(pack.trees[pack.branches != -2].unique()) == len(once)
    assert saved_prompts(pack) == [len(p) for i, (p, _) in enumerate(rows) if p in [q for q, _ in rows[:i]]]
    assert ids[pack.first].tolist() == [prompt[-1] for prompt, _ in rows]
    assert (branches[pack.first] == -1).all()
    assert ids[pack.predicts + 1].tolist() == pack.targets.tolist() == [t for _, c in rows for t in c[1:]]
    assert torch.equal(branches[pack.predicts], branches[pack.predicts + 1])
    assert torch.equal(places[pack.predicts] + 1, places[pack.predicts + 1])
    assert torch.equal(pack.trees.flatten()[pack.predicts], pack.trees.flatten()[pack.predicts + 1])


@pytest.mark.parametrize("packed", [True, False])
def test_without_sharing_equal_prompts_stay_apart(packed: bool) -> None:
    """Each rollout is a tree of its own, in the order of rows."""
    rows = forest(1)
    pack = lay_out(*batch_of(rows), packed=packed)
    assert not pack.shared
    assert sequences(pack, packed) == [prompt + completion for prompt, completion in rows]
    expected = [row for row, (p, c) in enumerate(rows) for _ in p + c]
    assert pack.trees[pack.branches != -2].tolist() == expected
    own = [branch for row, (p, c) in enumerate(rows) for branch in [-1] * len(p) + [row] * len(c)]
    assert pack.branches[pack.branches != -2].tolist() == own


@pytest.mark.parametrize("packed", [True, False])
def test_prompts_that_all_differ_are_laid_out_as_without_sharing(packed: bool) -> None:
    """But for the order of rows, which is that of the prompts: here the same."""
    rows = sorted(ragged(2), key=lambda row: (len(row[0]), row[0]))
    plain, shared = (lay_out(*batch_of(rows), packed=packed, shared=share) for share in (False, True))
    for name, value in plain.inputs.items():
        assert torch.equal(shared.inputs[name], value)
    for name in ("trees", "branches", "lengths", "first", "predicts", "targets", "response_mask", "control_ids"):
        assert torch.equal(getattr(shared, name), getattr(plain, name)), name


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("left", "right", "pad_id"), [(3, 0, 0), (0, 4, 0), (2, 5, 7)])
def test_columns_of_padding_and_what_they_hold_change_nothing(
    packed: bool, shared: bool, left: int, right: int, pad_id: int
) -> None:
    """7 is a token of the batch too: masks, not ids, tell what is real."""
    rows = [*RAGGED, ([9], [2])]
    plain = lay_out(*batch_of(rows), packed=packed, shared=shared)
    wide = lay_out(*batch_of(rows, pad_id, left=left, right=right), packed=packed, shared=shared)
    for name, value in plain.inputs.items():
        assert torch.equal(wide.inputs[name], value)
    for name in ("trees", "branches", "lengths", "first", "predicts", "targets", "control_ids"):
        assert torch.equal(getattr(wide, name), getattr(plain, name))
    assert torch.equal(wide.response_mask[:, :3], plain.response_mask)
    assert not wide.response_mask[:, 3:].any()


def test_lay_out_leaves_its_inputs_alone() -> None:
    ids, mask, length = batch_of(ABA)
    before = ids.clone(), mask.clone()
    for packed, shared in itertools.product((True, False), repeat=2):
        lay_out(ids, mask, length, packed=packed, shared=shared)
        lay_out(ids, mask.bool(), length, packed=packed, shared=shared)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


# ---- costs -------------------------------------------------------------------------------------------------------


def costs_of(lengths: Sequence[int], tokens_per_doubling: float = 300.0) -> list[float]:
    return [sequence_cost(length, tokens_per_doubling) for length in lengths]


def test_sequence_cost_by_hand() -> None:
    # 10 * (1 + 10 / 20) = 15; at 20 tokens attention costs as much as the linear layers: 40.
    assert costs_of([10, 20, 1, 0], 20.0) == pytest.approx([15.0, 40.0, 1.05, 0.0])


def test_one_long_sequence_costs_more_than_two_of_half_its_length() -> None:
    assert sequence_cost(1000, 3000.0) > 2 * sequence_cost(500, 3000.0)
    # Negative control: without attention, tokens are all that counts.
    assert sequence_cost(1000, 1e12) == pytest.approx(2 * sequence_cost(500, 1e12))


# ---- units -------------------------------------------------------------------------------------------------------


def squared(length: int) -> float:
    return float(length**2)


# Prompts A (2 tokens), B (1), A, A.
LENGTHS, PROMPTS = [5, 2, 4, 6], [("A", 2), ("B", 1), ("A", 2), ("A", 2)]


def test_units_by_hand() -> None:
    """A: 5 + (4 - 2) + (6 - 2) = 11 tokens, cost 25 + (16 - 4) + (36 - 4) = 69."""
    whole = make_units(LENGTHS, PROMPTS, squared, rows=4)
    assert whole == [Unit([0, 2, 3], 11, 69.0), Unit([1], 2, 4.0)]
    assert make_units(LENGTHS, PROMPTS, squared, rows=3, tokens=11) == whole
    # Two rows at most: 5 + 2 = 7 tokens and 25 + 12 = 37; the last row opens a unit, with a prompt of its own.
    chunked = [Unit([0, 2], 7, 37.0), Unit([1], 2, 4.0), Unit([3], 6, 36.0)]
    assert make_units(LENGTHS, PROMPTS, squared, rows=2) == chunked
    # Ten tokens at most: the last row would make it eleven. Seven: the same.
    assert make_units(LENGTHS, PROMPTS, squared, rows=4, tokens=10) == chunked
    assert make_units(LENGTHS, PROMPTS, squared, rows=4, tokens=7) == chunked
    assert make_units([], [], squared, rows=4) == []


def test_a_row_of_more_tokens_than_a_unit_may_have_is_alone() -> None:
    alone = [Unit([i], n, squared(n)) for i, n in enumerate(LENGTHS)]
    assert make_units(LENGTHS, PROMPTS, squared, rows=4, tokens=4) == alone
    assert make_units(LENGTHS, PROMPTS, squared, rows=4, tokens=1) == alone
    assert make_units(LENGTHS, PROMPTS, squared, rows=1) == alone


def test_prompts_with_names_of_their_own_make_units_of_one_row() -> None:
    prompts = [(row, prompt) for row, (_, prompt) in enumerate(PROMPTS)]
    assert make_units(LENGTHS, prompts, squared, rows=9) == [Unit([i], n, squared(n)) for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize(("most", "tokens"), [(4, float("inf")), (100, 12), (2, 9), (100, float("inf"))])
@pytest.mark.parametrize("seed", range(5))
def test_units_hold_every_row_once_and_as_many_tokens_as_they_are_laid_out_in(
    seed: int, most: int, tokens: float
) -> None:
    rows = forest(seed)
    lengths, prompts = [len(p + c) for p, c in rows], [(tuple(p), len(p)) for p, _ in rows]
    units = make_units(lengths, prompts, squared, rows=most, tokens=tokens)
    assert sorted(row for unit in units for row in unit.rows) == list(range(len(rows)))
    for unit in units:
        assert unit.rows == sorted(unit.rows)
        assert len({prompts[row] for row in unit.rows}) == 1
        assert len(unit.rows) == 1 or (len(unit.rows) <= most and unit.tokens <= tokens)
        pack = lay_out(*batch_of([rows[i] for i in unit.rows]), packed=True, shared=True)
        assert pack.trees.numel() == unit.tokens
        saved = sum(map(squared, saved_prompts(pack)))
        assert unit.cost == sum(squared(lengths[row]) for row in unit.rows) - saved
    if tokens == float("inf"):  # as few as their rows allow
        of = Counter(name for name, _ in prompts)
        assert len(units) == sum(-(-count // most) for count in of.values())


# ---- partitions --------------------------------------------------------------------------------------------------


def loads(parts: list[list[int]], costs: list[float]) -> list[float]:
    return [sum(costs[i] for i in part) for part in parts]


def cases() -> Iterator[tuple[list[float], int]]:
    """Small partition problems: costs and number of bins."""
    draw = random.Random(0)
    for _ in range(40):
        costs = [float(draw.choice([1, 2, 3, 5, 8, 13, 30])) for _ in range(draw.randint(1, 7))]
        yield costs, draw.randint(1, 3)


def best_load(costs: list[float], bins: int) -> float:
    """The smallest possible load of the fullest bin."""
    deals = itertools.product(range(bins), repeat=len(costs))
    return min(max(sum(c for c, b in zip(costs, deal, strict=True) if b == i) for i in range(bins)) for deal in deals)


def test_balance_by_hand() -> None:
    # 7 | 5 -> 7 | 9 -> 10 | 9 -> 10 | 10
    assert balance([7.0, 5.0, 4.0, 3.0, 1.0], 2) == [[0, 3], [1, 2, 4]]
    # 3 | 3, 5 | 5, 7 | 5: the best is 6 | 6, and 7 / 6 = 4 / 3 - 1 / (3 * 2) is as far off as two bins can be.
    assert balance([3.0, 3.0, 2.0, 2.0, 2.0], 2) == [[0, 2, 4], [1, 3]]


def test_balance_leaves_bins_empty_if_there_are_fewer_items() -> None:
    assert balance([1.0, 2.0], 4) == [[1], [0], [], []]
    assert balance([], 2) == [[], []]


def test_balance_deals_every_item_once_and_near_the_optimum() -> None:
    in_turn = []  # negative control
    for costs, bins in cases():
        parts = balance(costs, bins)
        assert len(parts) == bins
        assert sorted(itertools.chain(*parts)) == list(range(len(costs)))
        assert all(part == sorted(part) for part in parts)
        bound = (4 / 3 - 1 / (3 * bins)) * best_load(costs, bins)
        assert max(loads(parts, costs)) <= bound + 1e-9
        in_turn.append(max(sum(costs[i::bins]) for i in range(bins)) <= bound + 1e-9)
    assert not all(in_turn)


def rollout_lengths(seed: int) -> list[int]:
    """Many short ones and a few long ones, as of a policy that answers most prompts at once."""
    draw = random.Random(seed)
    return [draw.randint(100, 400) if draw.random() < 0.2 else draw.randint(5, 30) for _ in range(40)]


def test_split_packed_by_hand() -> None:
    lengths = [6, 3, 3, 2, 2]  # 16 tokens: two packs of 8
    assert split_packed(lengths, [float(n) for n in lengths], 8) == [[0, 3], [1, 2, 4]]
    assert split_packed(lengths, [float(n) for n in lengths], 16) == [[0, 1, 2, 3, 4]]
    # 15 tokens would fit into two packs of 8 if one could be cut; whole, they need three.
    assert split_packed([5, 5, 5], [5.0, 5.0, 5.0], 8) == [[0], [1], [2]]
    assert split_packed([3, 3, 3], [3.0, 3.0, 3.0], 5) == [[0], [1], [2]]  # 6 and 3: one token too many
    assert split_packed([3, 3, 3], [3.0, 3.0, 3.0], 6) == [[0, 2], [1]]
    # A row beyond the budget is alone.
    assert split_packed([2, 9, 3], [2.0, 9.0, 3.0], 8) == [[1], [0, 2]]


@pytest.mark.parametrize("budget", [1, 50, 400, 1000, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_packs_hold_every_row_once_within_the_budget(budget: int, seed: int) -> None:
    """A row longer than the budget has to go somewhere: no pack is then larger than that row."""
    lengths = rollout_lengths(seed)
    costs = costs_of(lengths)
    parts = split_packed(lengths, costs, budget)
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    assert all(parts)
    limit = max(budget, *lengths)
    assert all(sum(lengths[i] for i in part) <= limit for part in parts)
    # As few as the partition allows: one bin less bursts, or would have to.
    fewer = len(parts) - 1
    if fewer > 0:
        assert max(sum(lengths[i] for i in part) for part in balance(costs, fewer)) > limit


def test_packs_are_of_equal_work_where_filling_them_in_order_is_not() -> None:
    lengths = rollout_lengths(1)
    costs = costs_of(lengths)
    parts = split_packed(lengths, costs, 1000)
    assert len(parts) > 2
    assert max(loads(parts, costs)) < 1.05 * min(loads(parts, costs))
    filled: list[list[int]] = [[]]  # negative control: next fit
    for row, length in enumerate(lengths):
        if sum(lengths[i] for i in filled[-1]) + length > 1000:
            filled.append([])
        filled[-1].append(row)
    assert max(loads(filled, costs)) > 1.5 * min(loads(filled, costs))


def test_split_sorted_by_hand() -> None:
    """Sorted 9, 8, 3, 3, 2. If passes cost nothing, only equal lengths stay together."""
    lengths = [3, 9, 2, 3, 8]
    assert split_sorted(lengths, 1000) == [[1], [4], [0, 3], [2]]
    # At 10 a pass, 2 * 9 + 3 * 3 and two passes are 47; one pass 45 + 10 = 55; 9 + 8 + 3 * 3 and three are 56.
    assert split_sorted(lengths, 1000, 10) == [[1, 4], [0, 3, 2]]
    # At 20, 67 against 65 for one pass.
    assert split_sorted(lengths, 1000, 20) == [[1, 4, 0, 3, 2]]
    # At most 16 tokens: 9 has to be alone, and 9 + 8 + 3 * 3 beat 9 + 2 * 8 + 2 * 3.
    assert split_sorted(lengths, 16, 10) == [[1], [4], [0, 3, 2]]
    assert split_sorted(lengths, 1, 10) == [[1], [4], [0], [3], [2]]
    assert split_sorted([], 16, 10) == []


def contiguous_cuts(number: int) -> Iterator[list[range]]:
    for chosen in itertools.product((False, True), repeat=number - 1):
        ends = [place for place, cut in enumerate(chosen, start=1) if cut]
        yield [range(a, b) for a, b in itertools.pairwise([0, *ends, number])]


def price(parts: Sequence[Sequence[int]], lengths: Sequence[int], pass_cost: int) -> int:
    return sum(len(part) * max(lengths[i] for i in part) + pass_cost for part in parts)


def allowed(parts: Sequence[Sequence[int]], lengths: Sequence[int], budget: int) -> bool:
    return all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget for part in parts)


def greedy(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The longest rows that fit, then the next ones: the fewest passes, and the most padding."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


@pytest.mark.parametrize("pass_cost", [0, 3, 20])
def test_no_cut_of_the_sorted_rows_is_cheaper(pass_cost: int) -> None:
    """Of all that keep to the budget, tried one by one."""
    draw, filled = random.Random(pass_cost), []
    for _ in range(40):
        lengths = [draw.choice([1, 2, 3, 5, 8, 13, 30]) for _ in range(draw.randint(1, 8))]
        budget = draw.choice([1, 10, 30, 60, 1000])
        found = split_sorted(lengths, budget, pass_cost)
        assert allowed(found, lengths, budget)
        ordered = sorted(lengths, reverse=True)
        cuts = (cut for cut in contiguous_cuts(len(lengths)) if allowed(cut, ordered, budget))
        best = min(price(cut, ordered, pass_cost) for cut in cuts)
        assert price(found, lengths, pass_cost) == best
        filled.append(price(greedy(lengths, budget), lengths, pass_cost) == best)
    assert not all(filled)  # negative control


@pytest.mark.parametrize("pass_cost", [0, 128, 10**6])
@pytest.mark.parametrize("budget", [1, 50, 400, 1000, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_sorted_batches_hold_every_row_once_within_the_budget(seed: int, budget: int, pass_cost: int) -> None:
    """Padding counts; only a row alone may be larger. Passes that cost much are as few as can be."""
    lengths = rollout_lengths(seed)
    parts = split_sorted(lengths, budget, pass_cost)
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    ordered = [lengths[i] for part in parts for i in part]
    assert ordered == sorted(lengths, reverse=True)
    assert allowed(parts, lengths, budget)
    filled = greedy(lengths, budget)
    if pass_cost == 10**6:
        assert len(parts) == len(filled)
    assert price(parts, lengths, pass_cost) <= price(filled, lengths, pass_cost)


def test_dearer_passes_are_fewer_and_have_more_padding() -> None:
    lengths = rollout_lengths(3)
    splits = [split_sorted(lengths, 1000, pass_cost) for pass_cost in (0, 20, 128, 1024)]
    numbers, tokens = zip(*((len(parts), price(parts, lengths, 0)) for parts in splits), strict=True)
    assert list(numbers) == sorted(numbers, reverse=True)
    assert list(tokens) == sorted(tokens)
    assert tokens[0] == sum(lengths)
    assert numbers[0] > 2 * numbers[-1]


def test_units_of_one_prompt_that_meet_in_a_pass_keep_to_the_budget() -> None:
    """Two rollouts of 33 tokens that a long one of the same prompt parted: together they are a tree of 65."""
    rows: Rows = [([4], [1] * 32), ([4], [1] * 68), ([4], [1] * 32), ([5], [1] * 32)]
    lengths, prompts = [len(p + c) for p, c in rows], [(p[0], 1) for p, _ in rows]
    units = make_units(lengths, prompts, squared, rows=4, tokens=100)
    for part in split_sorted([unit.tokens for unit in units], 100, 1024):
        chosen = [rows[row] for i in part for row in units[i].rows]
        assert lay_out(*batch_of(chosen), packed=False, shared=True).trees.numel() <= 100


def test_sorting_saves_padding() -> None:
    """Negative control: batches of as many tokens in the order of rows are mostly padding."""
    lengths = rollout_lengths(2)
    parts = split_sorted(lengths, 1000, 128)
    size = -(-len(lengths) // len(parts))
    unsorted = [list(range(len(lengths)))[i : i + size] for i in range(0, len(lengths), size)]
    padded, naive = (sum(len(part) * max(lengths[i] for i in part) for part in split) for split in (parts, unsorted))
    assert padded < 1.5 * sum(lengths)
    assert naive > 2 * sum(lengths)
