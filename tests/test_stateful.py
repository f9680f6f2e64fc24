"""A word problem in two: sentences that end where they should, questions found wherever they stand, nothing lost."""

import json
from collections import Counter
from pathlib import Path

import pytest

from siesta.data.errors import DataError
from siesta.data.loading import load_examples, response_examples, skipped_rows
from siesta.data.schema import Example
from siesta.data.stateful import Parts, amounts, sentences, split, stateful
from siesta.rl.data_section import DataSection, Source

WHOLE = [  # each is one sentence, whatever stands inside
    "Rice costs 3.5 dollars.",
    "He pays $4.50 for 1,200.75 kg.",
    "Half of it is .5 kg.",
    "Mr. Day met Mrs. Night, Ms. Dawn and Dr. Dusk.",
    "St. Ives is 4 miles from Mt. Ida.",
    "She walks from Elm St. to the shop.",
    "School starts at 8 a.m. and ends at 3 p.m. on Fridays.",
    "He likes fruit, e.g. plums, i.e. sweet ones, etc. but not figs.",
    "The U.S. Army bought 3 boats.",
    "J. K. Rowling and John F. Kennedy sat down.",
    "J.K. Rowling wrote 7 books.",
    "He waited ... and waited... then left.",
    "He waited… and left.",
    'She said, "I have 3. You have 4. We share." and left.',
    '"How many?" asked Tom.',
    "“Is it 5?” he thought.",
    "It has (one pint is 2 cups. Really.) more than that.",
    "A 5 lb. bag and a 3 oz. bag weigh 2 kg.",
    "Take bus No. 5 to the zoo.",
    "See example.com or version 2.0.1 of it.",
    "The room is 20 sq. ft. large.",
]
SEVERAL = [
    ("He has 5. How many are left?", 2),
    ("It costs $2. She pays $4.50. He pays 3.5.", 3),
    ("She gets up at 7 a.m. Tom sleeps.", 2),
    ("He lives in the U.S. He likes it.", 2),
    ("He went with J. K. Then he left.", 2),
    ("He lives on Main St. How far is it?", 2),
    ("1. Tom has 3 figs. 2. Ann has 4 figs. 3. Find the sum.", 3),
    ("Tom has:\n1. three figs\n2. two plums\nHow many are there?", 3),
    ("- Ann has 3\n- Bob has 4", 2),
    ("One part\n\nanother part", 2),
    ("Wait... What is it?", 2),
    ('He said, "Go home." She went.', 2),
    ("He said “Go!” She went.", 2),
    ("Each has 3 figs.How many are there?", 2),
    ("It is sold for $9.99. (There are 12 in a box.) He buys 2!", 3),
    ("he has 3 figs. how many are left?", 2),
    ("Let $x = 3.$ Find $x^2.$", 2),
    ("Let\n\\[x = 3.\\]Find $x$.", 2),
    ("He weighs 20 kg. She weighs 5 lbs. Both ran.", 3),
]


@pytest.mark.parametrize("text", WHOLE)
def test_no_sentence_ends_inside(text: str) -> None:
    assert sentences(text) == [text]


@pytest.mark.parametrize(("text", "count"), SEVERAL)
def test_sentences_end(text: str, count: int) -> None:
    found = sentences(text)
    assert len(found) == count, found
    assert "".join("".join(found).split()) == "".join(text.split())


def test_negative_control_cutting_at_every_full_stop_tears_sentences() -> None:
    torn = [text for text in WHOLE if len([part for part in text.split(".") if part.strip()]) > 1]
    assert len(torn) >= 15


CASES = [  # context | query, sentences that ask, facts in the query
    ("Ann has 3 figs. She eats 1. | How many are left?", 1, False),
    ("He buys 4 pens. | If each costs $2, how much does he pay?", 1, True),
    ("Tom runs 3 miles a day. | How far is it in 7 days?", 1, True),
    ("A box has six pens. | How many are in 6 boxes?", 1, False),
    ("A bag has 2 red and 3 blue balls. | Find the total.", 1, False),
    ("A pen costs $9. | If he has $20, find his change.", 1, True),
    ("Let $x = 3$. | What is $x$? Express your answer as a decimal.", 2, False),
    ("Let $x = 3$. | What is $x^2$?", 1, True),  # a number of a formula counts: rather one flag too many
    ("A cat eats 3 mice. | How many does it eat.", 1, False),
    ("Bo has 3 figs. | After eating 1, how many are left.", 1, True),
    ("Al has 8 ants. | He wonders how many legs they have.", 1, False),
    ('"Where is Waldo?" is a book. It costs $3. | What do 2 cost?', 1, True),
    ('Ann has 3 figs. | Bob asks, "How many?"', 1, False),
    ("Herb wonders how much it is. It is $3. | What is it in cents?", 1, False),
    ("Bo has 3 figs. | How many has he? How many after he eats 1?", 2, True),
]


@pytest.mark.parametrize(("marked", "questions", "facts"), CASES)
def test_splits_by_hand(marked: str, questions: int, facts: bool) -> None:
    context, query = marked.split(" | ")
    assert split(f"{context} {query} ") == Parts(context, query, questions, facts)


@pytest.mark.parametrize(
    ("text", "context", "query"),
    [
        ("How old is Ann? Ann is 2. Bob is 4.", "Ann is 2. Bob is 4.", "How old is Ann?"),
        ("Ann has 3. How many has she? (A dozen is 12.)", "Ann has 3. (A dozen is 12.)", "How many has she?"),
        ("Find $x$. It is 3. Find $y$, too.", "It is 3.", "Find $x$. Find $y$, too."),
    ],
)
def test_a_question_is_found_wherever_it_stands(text: str, context: str, query: str) -> None:
    parts = split(text)
    assert parts is not None
    assert (parts.context, parts.query) == (context, query)


@pytest.mark.parametrize("text", [text for text, _ in SEVERAL] + ["Find $x$. It is 3.\n\nFind  $y$, too. Say so."])
def test_context_and_query_are_the_whole_text(text: str) -> None:
    """Up to white space and the order of sentences."""
    parts = split(text)
    if parts is not None:
        assert Counter("".join(f"{parts.context}{parts.query}".split())) == Counter("".join(text.split()))


@pytest.mark.parametrize("text", ["If 2 pens cost $4, what do 3 cost?", "What is $2 + 2$?", "Ann is 3. Bob is 4.", ""])
def test_what_has_no_question_or_nothing_else_is_not_split(text: str) -> None:
    assert split(text) is None


def test_amounts_in_digits_and_words() -> None:
    assert amounts("Two of 1,250 cost $3.50, in 2006.") == {"2", "1250", "3.50", "2006"}
    assert amounts("one dozen, twice thirteen, 3, 4") == {"dozen", "twice", "thirteen", "3", "4"}


def test_items_are_split_counted_and_left_out() -> None:
    has_context = Example("1", "Known.", "What? Which?", "a")
    first = Example("2", "", "Ann has 3 figs. If Bob has 4, what is the sum?", "7", meta={"level": 2})
    plain = Example("3", "", "Ann has 3 figs. How many has she?", "3")
    kept, count = stateful([has_context, first, plain, Example("4", "", "What is 2 + 2?", "4")])
    assert [x.id for x in kept] == ["1", "2", "3"]
    assert kept[0] is has_context
    assert (kept[1].context, kept[1].query) == ("Ann has 3 figs.", "If Bob has 4, what is the sum?")
    assert kept[1].meta == {"level": 2, "query_has_facts": True, "questions": 1}
    assert (count.items, count.failed, count.with_facts) == (3, 1, 1)


def problems(path: Path, count: int) -> str:
    rows = [{"query": f"Ann has {i} figs. How many has she?", "answer": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"query": "Why?", "answer": "0"}]))
    return str(path)


def test_a_recipe_asks_for_the_split(tmp_path: Path) -> None:
    train, test = problems(tmp_path / "train.jsonl", 20), problems(tmp_path / "test.jsonl", 5)
    section = DataSection(train=Source(path=train), test=Source(path=test), stateful_split=True)
    examples = load_examples(section, "test", 100)
    assert [(x.context, x.query) for x in examples[:2]] == [
        ("Ann has 0 figs.", "How many has she?"),
        ("Ann has 1 figs.", "How many has she?"),
    ]
    assert len(examples) == 5
    assert skipped_rows(section) == [
        f"data: {path}: 1 of {count} items are left out, which have no question sentence or nothing beside it; "
        "0 of the others have facts in their question"
        for path, count in ((train, 21), (test, 6))
    ]
    plain = section.model_copy(update={"stateful_split": False})
    assert skipped_rows(plain) == []
    assert {x.context for x in load_examples(plain, "test", 100)} == {""}


def test_rows_of_written_responses_are_split_alike(tmp_path: Path) -> None:
    """Else the text of the same item would differ, and a test item could be taught."""
    train, test = problems(tmp_path / "train.jsonl", 20), problems(tmp_path / "test.jsonl", 5)
    section = DataSection(train=Source(path=train), test=Source(path=test), stateful_split=True)
    examples, overlap = response_examples(train, section, 100)
    assert {x.context for x in examples} == {f"Ann has {i} figs." for i in range(5, 18)}
    assert overlap == 7, "five of the test set, two of the validation tail"
    with pytest.raises(DataError, match="also stand in an evaluation set"):
        response_examples(test, section, 100)


def test_the_split_belongs_to_sources() -> None:
    with pytest.raises(ValueError, match="`stateful_split` belongs to a `train` source"):
        DataSection(task="hop", stateful_split=True)
