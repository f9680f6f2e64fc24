"""The supervised start: which rows it is made of, when it ends, and what its gate lets through."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState

from siesta.data.errors import DataError
from siesta.data.prompts import messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl.judge import Judge
from siesta.rl.policies import Measurement
from siesta.rl.recipe import WarmupSection
from siesta.rl.warmup import (
    IGNORED,
    GateError,
    StopOnAccuracy,
    accuracy,
    accuracy_by_level,
    check_gate,
    surplus,
    teachable,
    warmup_rows,
    within_levels,
    written_response,
)
from tests.helpers import calc_examples, tiny_judge

JUDGE = tiny_judge()
NAN = float("nan")


def rows(examples: list[Example], pairing: str, *, seed: int = 0, judge: Judge = JUDGE, **settings: Any) -> list[dict]:
    settings = {"shares": None, "instruction": ""} | settings
    return warmup_rows(examples, judge, pairing=pairing, seed=seed, **settings).to_list()


def opening(row: dict) -> int:
    """The first id that carries loss."""
    return next(label for label in row["labels"] if label != IGNORED)


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", ["", "answer"])
@pytest.mark.parametrize("pairing", ["paired", "cross"])
def test_only_control_token_and_response_carry_loss(pairing: str, instruction: str) -> None:
    examples = calc_examples(20)
    tokenizer = JUDGE.tokenizer
    made = rows(examples, pairing, instruction=instruction)
    asked = [x for x in examples for _ in range(2 if pairing == "paired" else 1)]
    assert len(made) == len(asked)
    for example, row in zip(asked, made, strict=True):
        prompt = prompt_ids(tokenizer, messages(example, instruction))
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [IGNORED] * len(prompt) + row["input_ids"][len(prompt) :]
        token, *response = row["input_ids"][len(prompt) :]
        mode = JUDGE.modes[JUDGE.modes.token_ids.index(token)]
        assert response[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(response[:-1]) == example.meta["responses"][mode.name]
        assert set(row) == {"input_ids", "labels"}


def test_paired_shows_every_example_in_every_mode() -> None:
    made = rows(calc_examples(15), "paired")
    assert [opening(row) for row in made] == JUDGE.modes.token_ids * 15


def test_paired_does_not_depend_on_the_seed() -> None:
    assert rows(calc_examples(5), "paired", seed=1) == rows(calc_examples(5), "paired", seed=2)


def test_cross_shows_every_example_once_in_even_shares() -> None:
    made = rows(calc_examples(1000), "cross")
    counts = Counter(opening(row) for row in made)
    assert counts[JUDGE.modes[0].token_id] / 1000 == pytest.approx(0.5, abs=0.05)


def test_cross_follows_shares() -> None:
    examples = calc_examples(1000)
    counts = Counter(opening(row) for row in rows(examples, "cross", shares={"short": 1.0, "think": 4.0}))
    assert counts[JUDGE.modes[1].token_id] / 1000 == pytest.approx(0.8, abs=0.04)
    only = {opening(row) for row in rows(examples, "cross", shares={"think": 1.0})}
    assert only == {JUDGE.modes[1].token_id}, "a mode that is not named has no share"


def test_balanced_rows_teach_every_control_token_equally_often() -> None:
    """Nine rows of a mode for one of the other: all responses carry loss, but as many tokens that choose."""
    examples = calc_examples(400)
    shares = {"short": 9.0, "think": 1.0}
    plain, made = (rows(examples, "cross", shares=shares, balanced=balanced) for balanced in (False, True))
    short, think = JUDGE.modes.token_ids
    chosen = Counter(opening(row) for row in made if opening(row) in (short, think))
    assert chosen[short] == chosen[think] == Counter(opening(row) for row in plain)[think]
    for before, after in zip(plain, made, strict=True):
        assert after["input_ids"] == before["input_ids"]
        changed = [i for i, (a, b) in enumerate(zip(before["labels"], after["labels"], strict=True)) if a != b]
        assert changed == [] or (before["labels"][changed[0]] == short and after["labels"][changed[0]] == IGNORED)
        assert len(changed) <= 1


def test_the_surplus_is_what_the_rarest_lacks() -> None:
    assert surplus([5, 6, 5, 5]) == [(2, 5), (3, 5)]
    assert surplus([5, 5]) == surplus([]) == []


def test_cross_draws_modes_by_the_seed() -> None:
    examples = calc_examples(50)
    assert rows(examples, "cross", seed=3) == rows(examples, "cross", seed=3)
    assert rows(examples, "cross", seed=3) != rows(examples, "cross", seed=4)


def test_a_missing_response_names_example_mode_and_column() -> None:
    first, second = calc_examples(2)
    bare = replace(second, meta={"responses": {"short": "1"}})
    with pytest.raises(DataError) as caught:
        rows([first, bare], "paired")
    assert str(caught.value) == (
        f"{second.id}: no response for mode 'think' to warm up on; map one with data.columns.responses.think, or "
        "worked solutions with data.columns.solution"
    )
    with pytest.raises(DataError, match=f"{second.id}: no response for mode 'short'"):
        rows([replace(second, meta={})], "cross", shares={"short": 1.0})
    assert len(rows([bare], "cross", shares={"short": 1.0})) == 1, "a mode that is never drawn needs none"


# ---- rows of a responses file ---------------------------------------------------------------------------------------


def with_responses(*names: str) -> list[Example]:
    """An example for each text: s has a response for short, t one for think, st both."""
    modes = {"s": "short", "t": "think"}
    own = calc_examples(len(names))
    return [
        replace(example, meta={"responses": {modes[key]: example.meta["responses"][modes[key]] for key in name}})
        for example, name in zip(own, names, strict=True)
    ]


def chosen(examples: list[Example], pairing: str, shares: dict[str, float] | None = None) -> list[Example]:
    return teachable(examples, JUDGE.modes, pairing=pairing, shares=shares, where="r.jsonl")


def test_paired_takes_examples_with_every_mode_and_cross_those_with_one() -> None:
    examples = with_responses("st", "s", "t", "st", "")
    assert chosen(examples, "paired") == [examples[0], examples[3]]
    assert chosen(examples, "cross") == examples[:4]
    assert chosen(examples, "cross", {"think": 2.0}) == [examples[0], examples[2], examples[3]]
    short, think = JUDGE.modes.token_ids
    assert [opening(row) for row in rows(chosen(examples, "paired"), "paired", own_only=True)] == [short, think] * 2


def test_cross_draws_among_the_modes_that_an_example_has() -> None:
    examples = with_responses(*["s", "t", "st", "st"] * 250)
    short, think = JUDGE.modes.token_ids
    shares = {"short": 1.0, "think": 4.0}
    made = [opening(row) for row in rows(chosen(examples, "cross", shares), "cross", own_only=True, shares=shares)]
    assert set(made[0::4]) == {short}
    assert set(made[1::4]) == {think}
    both = made[2::4] + made[3::4]
    assert both.count(think) / len(both) == pytest.approx(0.8, abs=0.05)
    with pytest.raises(DataError, match="no response for mode"):  # negative control: drawn regardless
        rows(examples, "cross", shares=shares)


def test_examples_with_every_mode_are_drawn_as_ever() -> None:
    assert rows(calc_examples(50), "cross", own_only=True) == rows(calc_examples(50), "cross")


def test_a_mode_is_shown_up_to_its_highest_level() -> None:
    examples = calc_examples(60)
    modes = JUDGE.modes
    bounded = within_levels(examples, modes, {"short": 2})
    for example, shown in zip(examples, bounded, strict=True):
        assert set(shown.meta["responses"]) == ({"short", "think"} if example.level <= 2 else {"think"})
        assert shown.meta["responses"].items() <= example.meta["responses"].items()
        assert (shown.text, shown.answer) == (example.text, example.answer)
    assert within_levels(examples, modes, {"short": 99}) == within_levels(examples, modes, {}) == examples
    short, think = modes.token_ids
    opened = [opening(row) for row in rows(bounded, "cross", own_only=True)]
    assert {token for token, example in zip(opened, examples, strict=True) if example.level > 2} == {think}
    assert short in opened


def test_a_highest_level_holds_for_responses_made_of_a_solution_and_leaves_gaps_as_they_are() -> None:
    solved = Example("x", "", "1 + 2", "3", meta={"solution": "1 + 2 = 3", "level": 2})
    (shown,) = within_levels([solved], JUDGE.modes, {"short": 1})
    assert shown.meta["responses"] == {"think": written_response(solved, JUDGE.modes[1])}
    gap = replace(solved, meta={"responses": {"short": "3"}, "level": 2})
    assert [x.meta["responses"] for x in within_levels([gap], JUDGE.modes, {"short": 2})] == [{"short": "3"}]


def test_a_file_that_cannot_teach_is_named() -> None:
    with pytest.raises(DataError, match=r"^warmup\.responses: r\.jsonl: no row has a response for mode 'think'$"):
        chosen(with_responses("s", "s"), "cross")
    with pytest.raises(DataError, match=r"r\.jsonl: no row has a response for every mode; use warmup\.pairing: cross"):
        chosen(with_responses("s", "t"), "paired")
    assert len(chosen(with_responses("s", "s"), "cross", {"short": 1.0})) == 2, "think has no share"


# ---- accuracy ------------------------------------------------------------------------------------------------------


def measurement(**columns: Any) -> Measurement:
    """Four items of levels 1, 1, 2, 2. Greedy: short solves the first two and half of the third, think all but one."""
    others = ("greedy_tokens", "sampled_scores", "sampled_tokens", "sampled_rewards", "truncated")
    values: dict[str, Any] = {name: np.zeros((4, 2)) for name in others}
    values |= {
        "levels": np.array([1, 1, 2, 2]),
        "mode_probs": np.array([[0.4, 0.6]] * 4),
        "mass": np.array([0.97, 0.99, 0.98, 0.98]),
        "greedy_scores": np.array([[1, 1], [1, 1], [0.5, 1], [0, 0]]),
    }
    return Measurement(modes=["short", "think"], **(values | columns))


@pytest.mark.parametrize(
    ("key", "value"),
    [("think", 0.75), ("short", 2.5 / 4), ("short@1", 1.0), ("short@2", 0.25), ("think@1", 1.0), ("think@2", 0.5)],
)
def test_accuracy_by_mode_and_level(key: str, value: float) -> None:
    assert accuracy(measurement(), key) == pytest.approx(value)


def test_accuracy_of_a_level_without_items_is_nan() -> None:
    assert np.isnan(accuracy(measurement(), "short@7"))


def test_an_unscorable_item_is_left_out_of_the_accuracy() -> None:
    """A verifier that failed once must not keep the warm-up from ever reaching its accuracy."""
    measured = measurement(greedy_scores=np.array([[1, NAN], [NAN, 1], [0.5, 1], [0, 0]]))
    assert accuracy(measured, "short") == pytest.approx(0.5)
    assert accuracy(measured, "short@1") == 1.0
    assert accuracy(measured, "think@1") == 1.0
    assert accuracy_by_level(measured) == "short 100 25 | think 100 50"


def test_accuracy_in_one_line() -> None:
    assert accuracy_by_level(measurement()) == "short 100 25 | think 100 50"


# ---- when to stop --------------------------------------------------------------------------------------------------


def stopped(stop: dict[str, float], step: int, check_every: int = 10) -> tuple[bool, list[str]]:
    said: list[str] = []
    own = StopOnAccuracy(lambda model: measurement(), WarmupSection(stop=stop, check_every=check_every), said.append)
    control = TrainerControl()
    args: Any = None
    own.on_step_end(args, TrainerState(global_step=step, max_steps=90), control)
    return control.should_training_stop, said


@pytest.mark.parametrize(
    ("stop", "ends"),
    [
        ({"think": 0.75, "short@1": 1.0}, True),
        ({"think": 0.76, "short@1": 1.0}, False),
        ({"short@2": 0.25}, True),
        ({"short@7": 0.0}, False),
        ({}, False),
    ],
)
def test_the_warm_up_ends_when_every_accuracy_is_reached(stop: dict[str, float], ends: bool) -> None:
    assert stopped(stop, 20)[0] == ends


def test_accuracy_is_measured_every_so_many_steps() -> None:
    assert stopped({"think": 0.0}, 19) == (False, [])
    assert stopped({"think": 0.0}, 20) == (True, ["warm-up 20/90 accuracy % by level: short 100 25 | think 100 50"])


# ---- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        WarmupSection(),
        WarmupSection(min_mass=0.98, min_share=0.4, stop={"think": 0.75, "short@1": 1.0}),
    ],
)
def test_the_gate_lets_a_sound_start_through(section: WarmupSection) -> None:
    check_gate(measurement(), section, JUDGE.modes)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"mass": np.full(4, 0.5)}, {}, "mass on control tokens is 0.500, below warmup.min_mass 0.95"),
        ({}, {"min_mass": 0.985}, "mass on control tokens is 0.980, below warmup.min_mass 0.985"),
        (
            {"mode_probs": np.array([[0.01, 0.99]] * 4)},
            {},
            "mode 'short' has probability 0.0100, below warmup.min_share 0.02",
        ),
        (
            {"mode_probs": np.array([[1.0, 0.0]] * 4)},
            {},
            "mode 'think' has probability 0.0000, below warmup.min_share 0.02",
        ),
        ({}, {"stop": {"think": 0.9}}, "accuracy of think is 0.750, below warmup.stop 0.9"),
        ({}, {"stop": {"short@2": 0.3}}, "accuracy of short@2 is 0.250, below warmup.stop 0.3"),
        ({}, {"stop": {"short@7": 0.0}}, "accuracy of short@7 is nan, below warmup.stop 0.0"),
        ({"mass": np.full(4, NAN)}, {}, "mass on control tokens is nan"),
        ({"mode_probs": np.full((4, 2), NAN)}, {}, "mode 'short' has probability nan"),
    ],
)
def test_the_gate_says_which_number_failed(columns: dict, settings: dict, message: str) -> None:
    with pytest.raises(GateError) as caught:
        check_gate(measurement(**columns), WarmupSection.model_validate(settings), JUDGE.modes)
    assert f"warm-up gate: {message}" in str(caught.value)
    assert "warmup." in str(caught.value).split(";")[-1], "and what to change"


def test_a_mode_that_some_prompts_never_choose_passes() -> None:
    """The mean counts: to be sure on every prompt is no fault."""
    check_gate(measurement(mode_probs=np.array([[1.0, 0.0], [0.0, 1.0]] * 2)), WarmupSection(), JUDGE.modes)
