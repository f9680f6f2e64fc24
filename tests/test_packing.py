"""How rollouts are laid out and shared out: one ragged batch by hand, and what holds for every batch.

The layouts are checked against their meaning (the token behind the hidden state that is said to predict it), the
partitions against the best one there is, found by trying them all.
"""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from siesta.rl.packing import Pack, balance, lay_out, sequence_costs, split_packed, split_sorted
from tests.helpers import Rows, batch_of

# Prompts of 2, 3 and 1 tokens; completions of 3, 1 (the control token alone) and 2. Control tokens are 1 and 2.
RAGGED: Rows = [([5, 6], [1, 7, 8]), ([2, 3, 4], [2]), ([9], [1, 3])]


def ragged(seed: int, rows: int = 6) -> Rows:
    """Random rows whose tokens are all different, so that a mix-up shows."""
    draw, tokens = random.Random(seed), itertools.count(1)
    return [
        ([next(tokens) for _ in range(draw.randint(1, 6))], [next(tokens) for _ in range(draw.randint(1, 6))])
        for _ in range(rows)
    ]


# ---- layouts by hand ---------------------------------------------------------------------------------------------


def test_packed_by_hand() -> None:
    ids, mask, length = batch_of(RAGGED)
    assert ids.tolist() == [[0, 5, 6, 1, 7, 8], [2, 3, 4, 2, 0, 0], [0, 0, 9, 1, 3, 0]]
    pack = lay_out(ids, mask, length, packed=True)
    assert set(pack.inputs) == {"input_ids", "position_ids"}
    assert pack.inputs["input_ids"].tolist() == [[5, 6, 1, 7, 8, 2, 3, 4, 2, 9, 1, 3]]
    assert pack.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("left", "right", "pad_id"), [(3, 0, 0), (0, 4, 0), (2, 5, 7)])
def test_columns_of_padding_and_what_they_hold_change_nothing(
    packed: bool, left: int, right: int, pad_id: int
) -> None:
    """7 is a token of the batch too: masks, not ids, tell what is real."""
    plain = lay_out(*batch_of(RAGGED), packed=packed)
    wide = lay_out(*batch_of(RAGGED, pad_id, left=left, right=right), packed=packed)
    for name, value in plain.inputs.items():
        assert torch.equal(wide.inputs[name], value)
    for name in ("lengths", "first", "predicts", "targets", "control_ids"):
        assert torch.equal(getattr(wide, name), getattr(plain, name))
    assert torch.equal(wide.response_mask[:, :3], plain.response_mask)
    assert not wide.response_mask[:, 3:].any()


def test_lay_out_leaves_its_inputs_alone() -> None:
    ids, mask, length = batch_of(RAGGED)
    before = ids.clone(), mask.clone()
    for packed in (True, False):
        lay_out(ids, mask, length, packed=packed)
        lay_out(ids, mask.bool(), length, packed=packed)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


# ---- costs -------------------------------------------------------------------------------------------------------


def test_sequence_costs_by_hand() -> None:
    # 10 * (1 + 10 / 20) = 15; at 20 tokens attention costs as much as the linear layers: 40.
    assert sequence_costs([10, 20, 1], 20.0) == pytest.approx([15.0, 40.0, 1.05])
    assert sequence_costs([], 20.0) == []


def test_one_long_sequence_costs_more_than_two_of_half_its_length() -> None:
    whole, half = sequence_costs([1000, 500], 3000.0)
    assert whole > 2 * half
    whole, half = sequence_costs([1000, 500], 1e12)  # negative control: without attention, tokens are all that counts
    assert whole == pytest.approx(2 * half)


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
    costs = sequence_costs(lengths, 300.0)
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
    costs = sequence_costs(lengths, 300.0)
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
    # 9 alone (two of width 9 are 18), then 8 and 3 in 2 * 8 = 16, then 3 and 2.
    assert split_sorted([3, 9, 2, 3, 8], 16) == [[1], [4, 0], [3, 2]]
    assert split_sorted([3, 9, 2, 3, 8], 1) == [[1], [4], [0], [3], [2]]
    assert split_sorted([], 16) == []


@pytest.mark.parametrize("budget", [1, 50, 400, 1000, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_sorted_batches_hold_every_row_once_within_the_budget(budget: int, seed: int) -> None:
    """Padding counts; only a row alone may be larger. No batch could have taken the first row of the next one."""
    lengths = rollout_lengths(seed)
    parts = split_sorted(lengths, budget)
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    ordered = [lengths[i] for part in parts for i in part]
    assert ordered == sorted(lengths, reverse=True)
    for part, following in itertools.zip_longest(parts, parts[1:]):
        width = max(lengths[i] for i in part)
        assert len(part) * width <= budget or len(part) == 1
        assert following is None or (len(part) + 1) * width > budget


def test_sorting_saves_padding() -> None:
    """Negative control: batches of as many tokens in the order of rows are mostly padding."""
    lengths = rollout_lengths(2)
    parts = split_sorted(lengths, 1000)
    size = -(-len(lengths) // len(parts))
    unsorted = [list(range(len(lengths)))[i : i + size] for i in range(0, len(lengths), size)]
    padded, naive = (sum(len(part) * max(lengths[i] for i in part) for part in split) for split in (parts, unsorted))
    assert padded < 1.5 * sum(lengths)
    assert naive > 2 * sum(lengths)
