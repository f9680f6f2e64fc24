"""The Rule 110 benchmark: rows and splits against the task, the model against a loop by hand, arms, the page."""

from typing import Any

import pytest
import torch

from benchmarks import rule110_rows
from benchmarks.rule110_model import Hybrid, Shape, States, delta_rule, norm, rotate
from siesta.data.errors import DataError
from siesta.data.tasks import rule110
from tests.test_latent import delta_rule as delta_rule_by_token

TINY = Shape(bits=8, width=16, heads=2, inner=24)


@pytest.mark.parametrize("size", [8, 24])
def test_labels_are_the_answers_of_the_task(size: int) -> None:
    made = rule110_rows.make(40, size, [1, 4, 10], "train", seed=3)
    for rows, depth, labels in zip(made.rows.tolist(), made.depth.tolist(), made.labels.tolist(), strict=True):
        answers = [rule110.ask(rows, size, depth + 1, mark)["answer"] for mark in rule110.MARKS]
        assert "".join(answers) == "".join(map(str, labels))


def test_think_is_shown_a_row_on_the_way_and_the_one_after_it() -> None:
    made = rule110_rows.make(200, 24, [2, 8], "train", seed=0)
    steps = set()
    for i, row in enumerate(made.rows.gather(1, made.which[:, None])[:, 0].tolist()):
        way = [row]
        for _ in range(rule110.DEPTHS[made.depth[i]]):
            way.append(rule110.step(way[-1], 24))
        done = way.index(made.shown[i].item())
        assert made.next[i] == way[done + 1]
        steps.add(done)
    assert steps == set(range(8))


def test_splits_share_no_neighbourhood_of_the_first_cell() -> None:
    def near(split: str) -> set[int]:
        rows = rule110_rows.make(4000, 24, [8], split, seed=1).rows.flatten().tolist()
        return {sum(((row >> (place % 24)) & 1) << (place + 8) for place in range(-8, 9)) for row in rows}

    train, validation, test = map(near, rule110_rows.SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test
    counts = torch.bincount(rule110_rows.part_of(torch.arange(1 << 17), 24), minlength=16)
    assert counts.max() < 1.1 * counts.min()


def test_the_first_cell_stands_in_the_middle_of_a_row_that_think_writes() -> None:
    assert rule110_rows.to_bits(torch.tensor(0b110), 8).tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert rule110_rows.centred(torch.tensor(0b00000001), 8).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def test_rows_that_do_not_exist_are_refused() -> None:
    with pytest.raises(DataError, match="depths: 3 is not one of 1, 2, 4"):
        rule110_rows.make(4, 8, [3], "train", seed=0)


def by_token(model: Hybrid, hidden: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
    """All blocks over a window with `model`'s weights, attention and the delta rule written out token by token."""
    after = []
    length = hidden.shape[1]
    for attention, delta, state in zip(model.attention, model.delta, states, strict=True):
        block: Any = attention
        x = norm(hidden, block.before_mixer)
        q, k, v = (block.by_head(x @ layer.weight.T) for layer in (block.q, block.k, block.v))
        scores = rotate(norm(q)) @ rotate(norm(k)).mT * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(torch.ones(length, length).triu(1) > 0, float("-inf")).softmax(-1) @ v
        hidden = block.finish(hidden, mixed)
        block = delta
        x = norm(hidden, block.before_mixer)
        taken = torch.cat([x @ layer.weight.T for layer in (block.q, block.k, block.v)], -1)
        padded = torch.cat([taken.new_zeros(len(x), 3, taken.shape[2]), taken], 1)
        mixed = torch.stack([(padded[:, i : i + 4] * block.taps).sum(1) for i in range(length)], 1)
        q, k, v = torch.nn.functional.silu(mixed).unflatten(-1, (3, block.heads, -1)).unbind(2)
        decay, beta = (x @ block.rates.T).chunk(2, -1)
        decay = -block.log_decay.exp() * torch.nn.functional.softplus(decay + block.decay_bias)
        output, state = delta_rule_by_token(q, k, v, decay, beta.sigmoid(), state)
        gate = torch.nn.functional.silu(block.by_head(x @ block.z.weight.T))
        hidden = block.finish(hidden, norm(output.transpose(1, 2), block.after) * gate)
        after.append(state)
    return hidden, after


def example(seed: int = 0) -> tuple[Hybrid, torch.Tensor, torch.Tensor]:
    model = Hybrid(TINY, seed).double()
    rows = rule110_rows.make(5, TINY.bits, [1, 4], "train", seed)
    return model, rule110_rows.to_bits(rows.rows, TINY.bits), rows.depth


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_sleep_is_the_unrolled_loop(passes: int) -> None:
    model, bits, depth = example()
    states = model.empty(5)
    for row in range(4):
        hidden = model.bit[bits[:, row]] + model.depth[depth][:, None] + model.place[row]
        for _ in range(passes):
            hidden, states = by_token(model, hidden, states)
    found = model.sleep(bits, depth, passes)
    gradients = []
    for made in (states, found):
        gradients.append(torch.autograd.grad(torch.stack(made).square().sum(), list(model.delta.parameters())[:8]))
    for a, b in zip([*states, *gradients[0]], [*found, *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    other = model.sleep(bits, depth, passes + 1)
    assert (other[1] - found[1]).abs().max() > 1e-3  # one pass more is something else


def test_what_wakes_is_the_state_alone() -> None:
    model, bits, depth = example()
    states = model.sleep(bits, depth, 2)
    hidden, _ = by_token(model, model.ask.expand(5, -1, -1), states)
    expected = norm(hidden, model.last) @ model.head.T
    torch.testing.assert_close(model.answer(states), expected, rtol=1e-6, atol=1e-9)
    assert (model.answer(model.empty(5)) - expected).abs().max() > 1e-3


def test_one_triangular_system_is_the_delta_rule_with_alike_keys_too() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 24, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    k = k + 2 * torch.ones(8)  # the hard case: each key overwrites the one before
    decay, beta = -torch.rand(3, 2, 24, generator=draw).double(), torch.rand(3, 2, 24, generator=draw).double()
    state = torch.randn(3, 2, 8, 8, generator=draw, dtype=torch.float64)
    output, after = delta_rule(q, k, v, decay, beta, state)
    q, k, v, decay, beta = (part.transpose(1, 2) for part in (q, k, v, decay, beta))
    expected, left = delta_rule_by_token(q, k, v, decay, beta, state)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    torch.testing.assert_close(after, left)


def test_the_full_model_has_the_size_the_page_says() -> None:
    shape = Shape()
    assert round(sum(weight.numel() for weight in Hybrid(shape, 0).parameters()) / 1e6, 1) == 2.8
    assert shape.state_bytes == sum(state[0].nbytes for state in Hybrid(shape, 0).empty(1)) == 131072
    assert shape.kv_bytes == 2 * 2 * 2 * 256 * 96
