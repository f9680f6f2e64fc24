"""Worked solutions: by hand, against the items' own answers over levels, every line true, and wrong ones refused."""

import json
import re

import pytest

from siesta.data.errors import DataError
from siesta.data.families import FamilySource, family_items
from siesta.data.worked import WORKED, worked
from siesta.rewards.verifiers import reasoning_gym, solution_part
from siesta.rl.modes import Mode
from siesta.rl.warmup import written_response

pytest.importorskip("reasoning_gym")

LEVELS = {
    "chain_sum": 6,
    "leg_counting": 6,
    "letter_counting": 6,
    "spell_backward": 4,
    "count_bits": 4,
    "aiw": 6,
    "family_relationships": 6,
}
EVERY = [(family, level) for family, last in LEVELS.items() for level in range(1, last + 1)]
SHORT = Mode("short", "<short>", 1, 24)
THINK = Mode("think", "<think>", 2, 512, answer_after="</think>")


@pytest.mark.parametrize(
    ("family", "metadata", "answer", "lines"),
    [
        # 12 + 30 = 42 and 42 - 5 = 37, digits from the right.
        ("chain_sum", {"expression": "12 - 5 + 30"}, 37, ["plus 12 30", "minus 5", "21+03=24", "24-50=73", "so 37"]),
        ("chain_sum", {"expression": "4 - 9"}, -5, ["plus 4", "minus 9", "9-4=5", "so -5"]),
        ("chain_sum", {"expression": "0 - 4 - 4"}, -8, ["plus 0", "minus 4 4", "4+4=8", "8-0=8", "so -8"]),
        ("chain_sum", {"expression": "95 + 7"}, 102, ["plus 95 7", "590+700=201", "so 102"]),
        ("chain_sum", {"expression": "6 - 6"}, 0, ["plus 6", "minus 6", "6-6=0", "so 0"]),
        ("chain_sum", {"expression": "-3 - -8"}, 5, ["plus 8", "minus 3", "8-3=5", "so 5"]),
        (
            "leg_counting",
            {"animals": {"tiger": 25, "jellyfish": 3, "woodlouse": 102, "crab": 2}},
            1548,
            [
                "25 tiger 4 legs 80+20=100",
                "3 jellyfish 0 legs",
                "102 woodlouse 14 legs 1400+28=1428 100+1428=1528",
                "2 crab 10 legs 20 1528+20=1548",
                "so 1548",
            ],
        ),
        ("leg_counting", {"animals": {"leech": 4}}, 0, ["4 leech 0 legs", "so 0"]),
        ("letter_counting", {"target_letter": "e", "span": ["The", "end"]}, 2, ["t h e=1", "e=2 n d", "so 2"]),
        ("spell_backward", {"word": "Sun"}, "nuS", ["1S2u3n", "3n2u1S"]),
        ("count_bits", {"number": 6}, 2, ["6 0", "3 1", "1 2", "so 2"]),
        (
            "family_relationships",
            {
                "question": "Al is married to Bo. They have children called Cy, Di and Ed. Cy is married to Flo.",
                "person1": "Flo",
                "person2": "Bo",
                "relationship": "mother-in-law",
            },
            "mother-in-law",
            ["Al + Bo: Cy Di Ed", "Cy + Flo", "Flo spouse Cy", "Cy parent Bo", "so mother-in-law"],
        ),
        (
            "family_relationships",
            {
                "question": "Al is married to Bo. They have a child called Cy.",
                "person1": "Bo",
                "person2": "Cy",
                "relationship": "mother",
            },
            "mother",
            ["Al + Bo: Cy", "Bo child Cy", "so mother"],
        ),
        (
            "aiw",
            {"question": "Ann has 3 brothers and she also has 4 sisters. How many sisters does Ann's brother have?"},
            5,
            ["sisters of Ann 4", "with Ann 4+1=5", "so 5"],
        ),
        (
            "aiw",
            {"question": "Ann has 2 male colleagues and she also has 9 female colleagues. Bob has 7 female ones."},
            10,
            ["female colleagues of Ann 9", "with Ann 9+1=10", "so 10"],
        ),
    ],
)
def test_by_hand(family: str, metadata: dict, answer: object, lines: list[str]) -> None:
    assert worked(
        family, {"metadata": metadata, "question": metadata.get("question", ""), "answer": str(answer)}
    ) == "\n".join(lines)


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_the_working_comes_to_the_items_answer(family: str, level: int) -> None:
    items = family_items(family, level)
    for place in range(0, 30_000, 150):
        entry = items[place]
        last = (worked(family, entry) or "").splitlines()[-1]
        if family == "spell_backward":
            assert re.sub(r"\d", "", last) == entry["answer"]
        else:
            assert last == f"so {entry['answer']}"


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_another_answer_is_refused(family: str, level: int) -> None:
    entry = family_items(family, level)[7]
    wrong = entry | {"answer": f"{entry['answer']}1"}
    with pytest.raises(DataError, match=rf"^data\.families: {family}: the working comes to .*, the item says"):
        worked(family, wrong)


@pytest.mark.parametrize("level", range(1, 7))
def test_every_line_of_a_sum_is_true_and_its_numbers_are_of_one_width(level: int) -> None:
    items = family_items("chain_sum", level)
    for place in range(0, 20_000, 200):
        sums = re.findall(r"^(\d+)([+-])(\d+)=(\d+)$", worked("chain_sum", items[place]) or "", re.MULTILINE)
        assert len(sums) == items[place]["metadata"]["num_terms"] - 1
        for left, sign, right, result in sums:
            assert len(left) == len(right) == len(result)
            a, b, c = (int(digits[::-1]) for digits in (left, right, result))
            assert c == (a + b if sign == "+" else a - b)


def test_every_sum_of_the_leg_counts_is_true() -> None:
    items = family_items("leg_counting", 6)
    for place in range(0, 20_000, 200):
        for terms, result in re.findall(r"([\d+]+)=(\d+)", worked("leg_counting", items[place]) or ""):
            assert sum(map(int, terms.split("+"))) == int(result)


@pytest.mark.parametrize("family", LEVELS)
def test_what_the_warm_up_teaches_is_what_the_verifier_calls_right(family: str) -> None:
    for example in FamilySource([family], "train", 8):
        think, short = (written_response(example, mode) for mode in (THINK, SHORT))
        assert think == f"{example.meta['solution']}\n</think>\n{short}"
        assert reasoning_gym(solution_part(think, THINK.answer_after), example.answer) == 1.0
        assert reasoning_gym(solution_part(short, None), example.answer) == 1.0
        # The reference itself, a whole entry, is no answer; nor is the working without one.
        assert reasoning_gym(example.answer, example.answer) == 0.0
        assert reasoning_gym(solution_part(example.meta["solution"], THINK.answer_after), example.answer) == 0.0


def test_other_families_have_no_working() -> None:
    assert worked("gcd", {"metadata": {}, "answer": "1"}) is None
    example = FamilySource(["gcd"], "train", 1)[0]
    assert "solution" not in example.meta
    with pytest.raises(DataError, match="no response for mode 'think'"):
        written_response(example, THINK)


def test_the_table_of_levels_covers_every_working() -> None:
    assert set(LEVELS) == set(WORKED)


def test_a_level_at_which_a_family_has_no_item_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^data\.families: spell_backward at level 5: "):
        FamilySource(["spell_backward"], "train", 1, level_weights={5: 1.0})[0]


def test_the_reference_is_the_whole_entry() -> None:
    assert json.loads(FamilySource(["count_bits"], "train", 1)[0].answer)["family"] == "count_bits"
