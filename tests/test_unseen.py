"""Questions kept from the warm-up: the two stages share none, whatever order and copies the items come in."""

from pathlib import Path
from typing import Any, cast

import pytest

from siesta.data.errors import DataError
from siesta.data.schema import Example
from siesta.data.unseen import is_unseen, one_side
from siesta.rl.context import Context
from siesta.rl.recipe import load_recipe
from siesta.rl.run import Run
from siesta.rl.stages import rl_dataset
from siesta.rl.train import check_sides


def item(query: str, context: str = "") -> Example:
    return Example(id=query, query=query, context=context, answer="1", verifier="exact")


def test_a_question_lies_on_one_side_whatever_stands_around_it() -> None:
    items = [item(f"{i} + {i}") for i in range(2000)]
    rl = one_side(items, 0.1, 0, unseen=True)
    taught = one_side(items, 0.1, 0, unseen=False)
    assert len(rl) + len(taught) == 2000
    assert not {e.query for e in rl} & {e.query for e in taught}
    assert 160 < len(rl) < 240  # 200, three standard deviations of 13
    assert one_side(items[::-1], 0.1, 0, unseen=True) == rl[::-1]
    assert is_unseen(item("  a   B"), 0.5, 3) == is_unseen(item("A b"), 0.5, 3)
    assert one_side(items, 0.1, 1, unseen=True) != rl


def test_all_questions_on_a_context_lie_on_its_side() -> None:
    sides = {c: {is_unseen(item(f"q{q}", c), 0.5, 0) for q in range(8)} for c in map(str, range(40))}
    assert all(len(side) == 1 for side in sides.values())
    assert {True} in sides.values()
    assert {False} in sides.values()


def test_without_a_share_both_sides_are_everything() -> None:
    items = [item("a"), item("b")]
    assert one_side(items, 0, 0, unseen=True) is items
    assert one_side(items, 0, 0, unseen=False) is items


@pytest.mark.parametrize(
    ("share", "unseen", "line"),
    [(1e-9, True, "leaves none to RL; raise it"), (1 - 1e-9, False, "leaves none to the warm-up; lower it")],
)
def test_a_side_without_items_is_refused(share: float, unseen: bool, line: str) -> None:
    with pytest.raises(DataError, match=line):
        one_side([item("a"), item("b")], share, 0, unseen=unseen)


@pytest.fixture
def context(tmp_path: Path, request: pytest.FixtureRequest) -> Context:
    """A run of the smoke recipe with settings; what it says is kept in `said`."""
    own = ["data.train_size=400", f"tracking.output_dir={tmp_path}", *getattr(request, "param", [])]
    return Context(Run(load_recipe("smoke", own)), said.append)


said: list[str] = []
SHARE = ["data.unseen_share=0.25"]


def asked(context: Context) -> set[str]:
    """The questions of RL's rows."""
    return {cast(Any, row)["prompt"][-1]["content"] for row in rl_dataset(context)}


@pytest.mark.parametrize("context", [SHARE, [*SHARE, "warmup.level_weights={1: 1, 2: 1}"]], indirect=True)
def test_the_stages_of_a_run_share_no_question(context: Context) -> None:
    check_sides(context.recipe, context)
    taught = {example.query for example in context.warmup_examples}
    assert taught
    assert asked(context)
    assert not taught & asked(context)
    rl = len(context.rl_examples)
    assert said[-1] == f"data: RL is trained on {rl} of 400 training items; the warm-up does not see them"


def test_without_a_share_the_stages_ask_the_same(context: Context) -> None:
    assert {example.query for example in context.warmup_examples} == asked(context)
