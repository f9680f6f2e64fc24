"""A generation batch dealt to steps, ranks and micro-batches: nothing lost, nothing twice, the work even.

Ranks are simulated: each calls `spread` with its own rollouts, and `gather_object` hands it those of all.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from siesta.rl import spread as module
from siesta.rl.packing import Unit, make_units, sequence_cost
from siesta.rl.spread import Batch, concatenate, select, sequence_lengths, spread


def make_batch(sizes: list[tuple[int, int]], *, first: int = 0, mode_targets: bool = True) -> Batch:
    """Rows of these prompt and completion lengths, numbered from `first`; real tokens are the row's number + 1."""
    rows, number = len(sizes), torch.arange(first, first + len(sizes))
    prompts, completions = (torch.tensor(list(column))[:, None] for column in zip(*sizes, strict=True))
    before, length = int(prompts.max()), int(completions.max())
    prompt_mask = (torch.arange(before) >= before - prompts).long()
    completion_mask = (torch.arange(length) < completions).long()
    batch = {
        "prompt_ids": prompt_mask * (number[:, None] + 1),
        "prompt_mask": prompt_mask,
        "completion_ids": completion_mask * (number[:, None] + 1),
        "completion_mask": completion_mask,
        "number": number,
        "advantages": completion_mask * (number[:, None] - 2.5),
        "weights": completion_mask * (number[:, None] + 1.0),
        "mass_weights": number + 1.0,
        "importance_sampling_ratio": torch.ones(rows, 1),
        "num_items_in_batch": completion_mask.sum(),
    }
    if mode_targets:
        batch["mode_targets"] = number[:, None] + torch.tensor([0.1, 0.2, 0.3])
        batch["mode_target_weights"] = number + 1.0
    return batch


def real(batch: Batch) -> list[dict[str, list]]:
    """Each row without its padding, whatever the widths of the batch."""
    rows = []
    for i in range(len(batch["number"])):
        row = {key: value[i] for key, value in batch.items() if value.dim()}
        prompt, completion = batch["prompt_mask"][i].bool(), batch["completion_mask"][i].bool()
        row |= {key: row[key][prompt] for key in ("prompt_ids", "prompt_mask")}
        row |= {key: row[key][completion] for key in ("completion_ids", "completion_mask", "advantages", "weights")}
        rows.append({key: value.tolist() for key, value in row.items()})
    return rows


# ---- rows of a batch ---------------------------------------------------------------------------------------------

SIZES = [(2, 4), (5, 1), (3, 2)]


def test_select_by_hand() -> None:
    """Rows 2 and 1, in this order: prompts need their last 5 columns, completions their first 2."""
    part = select(make_batch(SIZES), [2, 1])
    assert part["prompt_ids"].tolist() == [[0, 0, 3, 3, 3], [2, 2, 2, 2, 2]]
    assert part["completion_ids"].tolist() == [[3, 3], [2, 0]]
    assert part["completion_mask"].tolist() == [[1, 1], [1, 0]]
    assert part["advantages"].tolist() == [[-0.5, -0.5], [-1.5, 0.0]]
    assert part["weights"].tolist() == [[3.0, 3.0], [2.0, 0.0]]
    assert part["number"].tolist() == [2, 1]
    assert part["mass_weights"].tolist() == [3.0, 2.0]
    assert part["num_items_in_batch"] == 7  # no row dimension: handed on whole


def test_select_trims_prompts_on_the_left_and_the_rest_on_the_right() -> None:
    part = select(make_batch(SIZES), [0])
    assert part["prompt_ids"].tolist() == [[1, 1]]
    assert part["completion_ids"].tolist() == [[1, 1, 1, 1]]
    part = select(make_batch(SIZES), [1])
    assert part["prompt_ids"].tolist() == [[2, 2, 2, 2, 2]]
    assert part["completion_ids"].tolist() == [[2]]


def test_select_does_not_trim_mode_targets() -> None:
    """Three modes beside a completion of one token: (B, M) is not (B, T)."""
    part = select(make_batch(SIZES), [1])
    assert part["completion_mask"].shape == (1, 1)
    torch.testing.assert_close(part["mode_targets"], torch.tensor([[1.1, 1.2, 1.3]]))
    assert part["importance_sampling_ratio"].tolist() == [[1.0]]


def test_select_of_no_rows_is_one_that_weighs_nothing() -> None:
    batch = make_batch(SIZES)
    part = select(batch, [])
    assert part["number"].tolist() == [0]
    assert part["completion_mask"].tolist() == [[1, 1, 1, 1]]
    for name in ("weights", "mass_weights", "mode_target_weights"):
        assert part[name].shape == select(batch, [0])[name].shape
        assert not part[name].any()
    for name in ("prompt_ids", "completion_ids", "advantages", "mode_targets"):
        assert torch.equal(part[name], select(batch, [0])[name])


def test_select_keeps_every_real_token_and_leaves_the_batch_alone() -> None:
    batch = make_batch(SIZES)
    before = {key: value.clone() for key, value in batch.items()}
    for rows in ([0], [1, 2], [2, 0], [0, 1, 2], []):
        part = select(batch, rows)
        assert real(part) == [real(batch)[i] for i in rows] or not rows
        assert sequence_lengths(part) == [sequence_lengths(batch)[i] for i in rows or [0]]
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_sequence_lengths_by_hand() -> None:
    assert sequence_lengths(make_batch(SIZES)) == [6, 6, 5]


def test_concatenate_by_hand() -> None:
    """Prompts grow on the left, everything else of two dimensions on the right."""
    joined = concatenate([make_batch([(1, 3)]), make_batch([(2, 1), (3, 2)], first=1)])
    assert joined["prompt_ids"].tolist() == [[0, 0, 1], [0, 2, 2], [3, 3, 3]]
    assert joined["prompt_mask"].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert joined["completion_ids"].tolist() == [[1, 1, 1], [2, 0, 0], [3, 3, 0]]
    assert joined["weights"].tolist() == [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [3.0, 3.0, 0.0]]
    assert joined["number"].tolist() == [0, 1, 2]
    assert joined["mode_targets"].shape == (3, 3)
    assert joined["num_items_in_batch"] == 3  # of the first: it is the same number on every rank


def test_concatenate_undoes_select() -> None:
    batch = make_batch([(2, 4), (5, 1), (3, 2), (1, 6)])
    joined = concatenate([select(batch, [0]), select(batch, [1, 2]), select(batch, [3])])
    for key, value in batch.items():
        assert torch.equal(joined[key], value)
        assert joined[key].dtype == value.dtype


# ---- the deal ----------------------------------------------------------------------------------------------------


def costs(lengths: list[int]) -> list[float]:
    return [sequence_cost(length, 300.0) for length in lengths]


def alone(batch: Batch) -> list[Unit]:
    """Each rollout on its own."""
    lengths = sequence_lengths(batch)
    return [Unit([row], n, cost) for row, (n, cost) in enumerate(zip(lengths, costs(lengths), strict=True))]


def groups(batch: Batch) -> list[Unit]:
    """Rollouts in groups of four, by their numbers."""
    prompts = zip((batch["number"] // 4).tolist(), batch["prompt_mask"].sum(1).tolist(), strict=True)
    return make_units(sequence_lengths(batch), list(prompts), lambda n: sequence_cost(n, 300.0), rows=4)


def sizes(rows: int, seed: int) -> list[tuple[int, int]]:
    """Many short completions and a few long ones."""
    draw = random.Random(seed)
    return [
        (draw.randint(3, 9), draw.randint(60, 90) if draw.random() < 0.2 else draw.randint(1, 8)) for _ in range(rows)
    ]


def deal(
    monkeypatch: pytest.MonkeyPatch,
    batches: list[Batch],
    *,
    steps: int = 1,
    accumulation: int = 1,
    units: Callable[[Batch], list[Unit]] = alone,
    seed: int = 0,
) -> list[list[Batch]]:
    """What `spread` gives each rank; `batches` are the rollouts of the ranks."""

    def gather(own: list[Batch]) -> list[Batch]:
        assert len(own) == 1
        assert all(value.device.type == "cpu" for value in own[0].values())
        return batches

    if len(batches) == 1:
        monkeypatch.setattr(module, "gather_object", lambda own: pytest.fail("nobody to gather from"))
    else:
        monkeypatch.setattr(module, "gather_object", gather)
    ranks = []
    for rank, batch in enumerate(batches):
        accelerator: Any = SimpleNamespace(num_processes=len(batches), process_index=rank)
        ranks.append(
            spread(
                batch,
                cast(Accelerator, accelerator),
                steps=steps,
                accumulation=accumulation,
                units=units,
                seed=seed,
            )
        )
    return ranks


def on_ranks(all_sizes: list[tuple[int, int]], ranks: int) -> list[Batch]:
    """Rows cut into consecutive parts of equal size, one for each rank, each with its own widths."""
    share = len(all_sizes) // ranks
    return [make_batch(all_sizes[rank * share :][:share], first=rank * share) for rank in range(ranks)]


SHAPES = [(1, 1, 1), (1, 1, 4), (1, 3, 2), (2, 1, 1), (2, 2, 3), (4, 3, 1)]  # ranks, steps, accumulation


@pytest.mark.parametrize(("ranks", "steps", "accumulation"), SHAPES)
def test_every_row_is_dealt_once_with_all_that_belongs_to_it(
    monkeypatch: pytest.MonkeyPatch, ranks: int, steps: int, accumulation: int
) -> None:
    batches = on_ranks(sizes(48, seed=1), ranks)
    dealt = deal(monkeypatch, batches, steps=steps, accumulation=accumulation)
    assert [len(own) for own in dealt] == [steps * accumulation] * ranks
    found = [row for own in dealt for micro in own for row in real(micro)]
    assert sorted(row["number"] for row in found) == list(range(48))
    expected = {row["number"]: row for batch in batches for row in real(batch)}
    assert all(row == expected[row["number"]] for row in found)


@pytest.mark.parametrize(("ranks", "steps", "accumulation"), SHAPES)
def test_optimizer_steps_get_as_many_rows_and_micro_batches_the_same_work(
    monkeypatch: pytest.MonkeyPatch, ranks: int, steps: int, accumulation: int
) -> None:
    """No two micro-batches of a step, on whatever ranks, differ by more than the dearest rollout."""
    dealt = deal(monkeypatch, on_ranks(sizes(48, seed=1), ranks), steps=steps, accumulation=accumulation)
    for step in range(steps):
        micros = [micro for own in dealt for micro in own[step * accumulation :][:accumulation]]
        assert sum(len(micro["number"]) for micro in micros) == 48 // steps
        work = [costs(sequence_lengths(micro)) for micro in micros]
        totals = [sum(part) for part in work]
        assert max(totals) - min(totals) <= max(max(part) for part in work) + 1e-9


def test_work_is_even_where_equal_numbers_of_rows_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: dealing rows in turn leaves ranks to wait for the one with the long rollouts."""
    batches = on_ranks(sizes(64, seed=3), 4)
    dealt = deal(monkeypatch, batches, accumulation=2)
    totals = [sum(costs(sequence_lengths(micro))) for own in dealt for micro in own]
    assert max(totals) < 1.2 * min(totals)
    everyone = [cost for batch in batches for cost in costs(sequence_lengths(batch))]
    in_turn = [sum(everyone[i::8]) for i in range(8)]
    assert max(in_turn) > 2 * min(in_turn)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_deal_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    batches = on_ranks(sizes(24, seed=2), ranks)

    def numbers(seed: int) -> list[list[list[int]]]:
        dealt = deal(monkeypatch, batches, steps=2, accumulation=2, seed=seed)
        return [[micro["number"].tolist() for micro in own] for own in dealt]

    torch.manual_seed(1)
    first, state = numbers(7), torch.get_rng_state()
    torch.manual_seed(2)
    assert numbers(7) == first
    assert numbers(8) != first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the sampler's own random numbers are not used up


def test_ranks_of_one_deal_agree_whatever_they_hold_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many ranks as before, each with other widths, give what one process with all rows gives."""
    all_sizes = sizes(24, seed=4)
    apart = deal(monkeypatch, on_ranks(all_sizes, 3), steps=2, accumulation=1)
    whole = deal(monkeypatch, [make_batch(all_sizes)], steps=2, accumulation=3)[0]
    for step in range(2):
        for rank in range(3):
            assert real(apart[rank][step]) == real(whole[step * 3 + rank])


def test_micro_batches_without_rows_weigh_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rollouts for eight micro-batches: the sums over the whole deal are those of the batch."""
    batches = [make_batch(SIZES[:2]), make_batch(SIZES[2:], first=2)]
    micros = [micro for own in deal(monkeypatch, batches, accumulation=4) for micro in own]
    assert len(micros) == 8
    assert sum(not micro["weights"].any() for micro in micros) == 5
    for name in ("weights", "mass_weights", "mode_target_weights"):
        assert sum(micro[name].sum() for micro in micros) == sum(batch[name].sum() for batch in batches)
    product = sum((micro["weights"] * micro["advantages"]).sum() for micro in micros)
    assert product == sum((batch["weights"] * batch["advantages"]).sum() for batch in batches)


def test_a_batch_without_mode_targets_is_dealt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(sizes(8, seed=5), mode_targets=False)
    micros = deal(monkeypatch, [batch], accumulation=2)[0]
    assert sorted(row for micro in micros for row in micro["number"].tolist()) == list(range(8))
    assert all("mode_targets" not in micro for micro in micros)


# ---- groups stay together ----------------------------------------------------------------------------------------


def grouped_sizes(rows: int, seed: int) -> list[tuple[int, int]]:
    """Groups of four with a prompt of the same length."""
    own = sizes(rows, seed)
    return [(own[row - row % 4][0], completion) for row, (_, completion) in enumerate(own)]


@pytest.mark.parametrize(("ranks", "steps", "accumulation"), SHAPES)
def test_groups_are_dealt_whole_and_every_row_once(
    monkeypatch: pytest.MonkeyPatch, ranks: int, steps: int, accumulation: int
) -> None:
    batches = on_ranks(grouped_sizes(48, seed=1), ranks)
    dealt = deal(monkeypatch, batches, steps=steps, accumulation=accumulation, units=groups)
    assert [len(own) for own in dealt] == [steps * accumulation] * ranks
    micros = [micro for own in dealt for micro in own if micro["weights"].any()]
    found = [row for micro in micros for row in real(micro)]
    expected = {row["number"]: row for batch in batches for row in real(batch)}
    assert sorted(row["number"] for row in found) == list(range(48))
    assert all(row == expected[row["number"]] for row in found)
    for micro in micros:
        assert len(micro["number"]) == 4 * len((micro["number"] // 4).unique())


def test_rollouts_that_are_dealt_alone_are_cut_from_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    batches = on_ranks(grouped_sizes(48, seed=1), 2)
    micros = [micro for own in deal(monkeypatch, batches, accumulation=3) for micro in own]
    whole = [len(micro["number"]) == 4 * len((micro["number"] // 4).unique()) for micro in micros]
    assert not any(whole)


@pytest.mark.parametrize(("ranks", "steps", "accumulation"), [(1, 1, 4), (1, 3, 2), (2, 2, 3), (4, 3, 1)])
def test_steps_get_as_many_groups_and_micro_batches_the_same_work(
    monkeypatch: pytest.MonkeyPatch, ranks: int, steps: int, accumulation: int
) -> None:
    """Work of a group: that of its rollouts less that of the three prompts that are not computed."""
    batches = on_ranks(grouped_sizes(96, seed=1), ranks)
    dealt = deal(monkeypatch, batches, steps=steps, accumulation=accumulation, units=groups)
    dearest = max(unit.cost for batch in batches for unit in groups(batch))
    for step in range(steps):
        micros = [micro for own in dealt for micro in own[step * accumulation :][:accumulation]]
        assert sum(len(micro["number"]) for micro in micros) == 96 // steps
        totals = [sum(unit.cost for unit in groups(micro)) for micro in micros]
        assert max(totals) - min(totals) <= dearest + 1e-9


def test_groups_cut_over_ranks_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks of eight rows; numbers are dealt out in turn, so that each rank holds parts of every group."""
    all_sizes = grouped_sizes(24, seed=3)
    whole = make_batch(all_sizes)
    batches = [select(whole, list(range(rank, 24, 3))) for rank in range(3)]
    micros = [micro for own in deal(monkeypatch, batches, accumulation=2, units=groups) for micro in own]
    numbers = [sorted(micro["number"].tolist()) for micro in micros]
    assert sorted(n for part in numbers for n in part) == list(range(24))
    assert all(len(part) == 4 and len({n // 4 for n in part}) == 1 for part in numbers)
