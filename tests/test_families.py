"""Items of reasoning-gym: functions of seed and index, splits that cannot touch, scored by the package itself."""

import builtins
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from siesta.data import families, pregenerate
from siesta.data.errors import DataError
from siesta.data.families import FamilySource, to_example
from siesta.data.loading import load_examples, training_examples
from siesta.data.sources import Split, read_rows, to_examples
from siesta.rewards.verifiers import build_verifier, reasoning_gym
from siesta.rl.recipe import DataSection

pytest.importorskip("reasoning_gym")

NAMES = ["chain_sum", "gcd", "spell_backward"]
SPLITS = get_args(Split)


@pytest.mark.parametrize("split", SPLITS)
def test_an_item_is_a_function_of_seed_and_index(split: Split) -> None:
    items = list(FamilySource(NAMES, split, 12))
    families.family_items.cache_clear()
    assert list(FamilySource(NAMES, split, 20))[:12] == items
    assert FamilySource(NAMES, split, 12, seed=4)[0].answer != items[0].answer


def test_no_item_stands_in_two_splits() -> None:
    texts = [{example.text for example in FamilySource(NAMES, split, 150)} for split in SPLITS]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


def test_evaluation_goes_round_families_in_turn_and_deals_each_the_levels_by_weight() -> None:
    items = list(FamilySource(NAMES, "test", 4 * len(NAMES), level_weights={1: 1, 3: 3, 2: 0}))
    dealt = [3, 1, 3, 3]  # owed .75 3 to .25; .5 to .5, and the first wins; then 3 is behind
    assert [(item.meta["family"], item.level) for item in items] == [(n, level) for level in dealt for n in NAMES]


def test_dealt_levels_keep_their_shares_at_every_point() -> None:
    assert families.deal([1.0, 1.0, 1.0], 6) == [0, 1, 2, 0, 1, 2]
    assert families.deal([3.0, 1.0, 1.0], 5).count(0) == 3
    for turn in range(1, 50):
        counts = [families.deal([4.0, 2.0, 1.0], turn).count(place) for place in range(3)]
        assert all(abs(count - turn * w / 7) < 1 for count, w in zip(counts, (4, 2, 1), strict=True))


def test_training_draws_levels_by_weight_and_higher_levels_are_longer() -> None:
    items = list(FamilySource(["chain_sum"], "train", 400, level_weights={1: 1, 4: 3}))
    assert {item.level for item in items} == {1, 4}
    assert 0.65 < sum(item.level == 4 for item in items) / 400 < 0.85
    lengths = {level: [len(item.query) for item in items if item.level == level] for level in (1, 4)}
    assert max(lengths[1]) < min(lengths[4])


def test_the_verifier_scores_as_the_package_does() -> None:
    example = FamilySource(["chain_sum"], "test", 1)[0]
    gold = json.loads(example.answer)["answer"]
    assert reasoning_gym(gold, example.answer) == 1.0
    assert reasoning_gym(f"{gold}1", example.answer) == 0.0
    entry = {"question": "", "answer": "b", "metadata": {"x": 1}}
    assert to_example("gcd", 2, entry, "name").verifier == "reasoning_gym"


def test_part_marks_are_no_right_answer() -> None:
    """The package gives an answer a little for holding the right one somewhere."""
    example = FamilySource(["chain_sum"], "test", 1)[0]
    entry = json.loads(example.answer)
    wordy = f"{entry['answer']}, or perhaps one more"
    assert 0.0 < families.family_items("chain_sum", example.level).score_answer(wordy, entry) < 1.0
    assert reasoning_gym(wordy, example.answer) == 0.0


def test_the_verifier_runs_in_a_process_of_its_own() -> None:
    verifier = build_verifier("reasoning_gym", timeout=60.0)
    example = FamilySource(["gcd"], "test", 1)[0]
    assert verifier(json.loads(example.answer)["answer"], example.answer) == 1.0


def test_a_recipe_section_loads_families() -> None:
    section = DataSection(families=NAMES, level_weights={1: 1}, seed=3, train_size=5)
    examples, dropped = training_examples(section)
    assert (len(examples), dropped) == (5, 0)
    assert examples == load_examples(section, "train", 5)
    assert {example.level for example in examples} == {1}


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (
            ["chain_sums"],
            None,
            "reasoning-gym has no family 'chain_sums' with a curriculum; did you mean 'chain_sum'?",
        ),
        (["gcd"], {0: 1.0}, "data.level_weights: levels start at 1"),
        (["gcd"], {1: 0.0}, "data.level_weights: levels start at 1, shares are at least 0, and one is more"),
        (["modulo_grid"], {2: 1.0}, "data.families: modulo_grid at level 2: max_target must be greater than 0"),
    ],
)
def test_what_cannot_be_made_is_one_line(names: list[str], weights: dict | None, message: str) -> None:
    with pytest.raises(DataError) as error:
        list(FamilySource(names, "train", 1, level_weights=weights))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_family_with_one_item_ends_instead_of_searching_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"question": "same?", "answer": "1", "metadata": {}}
    monkeypatch.setattr(families, "family_items", lambda family, level: [entry] * families.POOL)
    made, refused = [], []
    for split in SPLITS:
        try:
            made.append(FamilySource(["gcd"], split, 1)[0].text)
        except DataError as error:
            refused.append(str(error))
    assert made == ["same?"]
    assert len(refused) == 2
    assert all("gcd at level" in line and "hardly any item" in line for line in refused)


def test_without_the_package_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"^data\.families: reasoning-gym is not installed; pip install"):
        FamilySource(["gcd"], "train", 1)


def test_entries_that_are_no_json_are_refused() -> None:
    entry = {"question": "x?", "answer": "1", "metadata": {"board": {1, 2}}}
    with pytest.raises(DataError, match=r"^data\.families: gcd: its entries cannot be written as JSON"):
        to_example("gcd", 1, entry, "name")


@pytest.mark.parametrize("exact", [False, True])
def test_pregenerated_files_hold_the_same_items(tmp_path: Path, exact: bool, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--levels", "1", "2", "--train", "6", "--validation", "4", "--test", "5", "--out", str(tmp_path)]
    assert pregenerate.main(["chain_sum", "gcd", *sizes, *["--exact"] * exact]) == 0
    for split, size in zip(SPLITS, (6, 4, 5), strict=True):
        path = str(tmp_path / f"{split}.jsonl")
        found = to_examples(read_rows(path), path, {}, "exact")
        made = list(FamilySource(["chain_sum", "gcd"], split, size, level_weights={1: 1.0, 2: 1.0}))
        assert [(x.id, x.query, x.level) for x in found] == [(x.id, x.query, x.level) for x in made]
        assert [x.meta.get("solution") for x in found] == [x.meta.get("solution") for x in made]
        expected = [json.loads(x.answer)["answer"] for x in made] if exact else [x.answer for x in made]
        assert [x.answer for x in found] == expected
        assert {x.verifier for x in found} == {"exact" if exact else "reasoning_gym"}
    assert "6 items" in capsys.readouterr().out


def test_pregenerate_ends_with_code_two_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert pregenerate.main(["gcds", "--out", str(tmp_path / "out")]) == 2
    assert "no family 'gcds'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
