"""Several queries of one context: what they share, where splits are cut, and that one query each changes nothing."""

import hashlib
import json
from itertools import pairwise
from random import Random
from typing import get_args

import pytest

from siesta.data.errors import DataError
from siesta.data.loading import load_examples
from siesta.data.sources import Split, TaskSource, split_of
from siesta.data.tasks import hop
from siesta.rl.data_section import DataSection
from siesta.rl.embedded import build_tokenizer
from siesta.rl.models import make_tokenizer
from siesta.rl.recipe import load_recipe

SPLITS = get_args(Split)
CONTEXT = "<ctx> k2 b>c a>b h>a c>d g>h d>e f>g e>f"


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize(("task", "recorded"), [("calc", "606f6842aeeb8b59"), ("hop", "4fb69691edf8a071")])
def test_one_query_a_context_gives_the_items_that_published_numbers_rest_on(task: str, recorded: str) -> None:
    items = [x for split in SPLITS for x in TaskSource(task, split, 200, seed=3)]
    rows = [[x.id, x.context, x.query, x.answer, x.verifier, x.meta["level"], x.meta["responses"]] for x in items]
    assert digest(rows) == recorded


def test_the_embedded_vocabulary_is_the_one_that_published_numbers_rest_on() -> None:
    vocabulary = build_tokenizer().get_vocab()
    assert digest(sorted(vocabulary, key=vocabulary.__getitem__)) == "539f624d6c01c072"


def test_notes_of_a_context_by_hand() -> None:
    assert hop.notes(CONTEXT) == (
        "b c d = b>d ; a b c = a>c ; h a b = h>b ; c d e = c>e ; "
        "g h a = g>a ; d e f = d>f ; f g h = f>h ; e f g = e>g ;"
    )


def test_a_query_by_hand() -> None:
    item = hop.ask(CONTEXT, "g")
    assert (item["context"], item["query"], item["answer"]) == (CONTEXT, "g", "a")
    assert item["meta"] == {
        "level": 2,
        "responses": {"short": "a", "think": "g h a = a"},
        "notes": hop.notes(CONTEXT),
        "responses_with_notes": {"short": "a", "think": "g a = a"},
    }


@pytest.mark.parametrize("level", range(1, 5))
def test_notes_need_no_word_of_their_own_and_answer_every_query(level: int) -> None:
    known = set(build_tokenizer().get_vocab())
    for item in hop.every_query(Random(level), level):
        words = item["meta"]["notes"].split()
        assert set(words) | set(item["meta"]["responses_with_notes"]["think"].split()) <= known
        kept = [after for word, after in pairwise(words) if word == "="]
        assert f"{item['query']}>{item['answer']}" in kept
        assert [fact[0] for fact in kept] == [fact[0] for fact in item["context"].split()[2:]], "order of the context"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("queries", [2, 3, 8])
def test_an_item_is_a_query_of_a_context(split: Split, queries: int) -> None:
    source = TaskSource("hop", split, 50, seed=5, queries=queries)
    items = list(source)
    assert [source[i] for i in reversed(range(50))] == items[::-1], "independent of the order of access"
    for index, item in enumerate(items):
        assert item.id == f"hop-{split}-{index // queries}-{index % queries}"
    for start in range(0, 50 - queries, queries):
        own = items[start : start + queries]
        assert len({item.context for item in own}) == 1
        assert len({item.query for item in own}) == queries
    assert len({item.context for item in items}) == -(-50 // queries)


def test_all_queries_of_a_context_are_all_nodes_in_changing_order() -> None:
    items = list(TaskSource("hop", "train", 80, queries=8))
    orders = ["".join(item.query for item in items[i : i + 8]) for i in range(0, 80, 8)]
    assert {"".join(sorted(order)) for order in orders} == {"abcdefgh"}
    assert len(set(orders)) == 10


def test_no_context_stands_in_two_splits() -> None:
    """The negative control: by the text of the items, as with one query each, contexts would be torn apart."""
    drawn = {split: list(TaskSource("hop", split, 400, queries=8)) for split in SPLITS}
    for split, items in drawn.items():
        assert {split_of(item.context) for item in items} == {split}
    torn = [items for items in drawn.values() if len({split_of(item.text) for item in items}) > 1]
    assert len(torn) == 3


def test_evaluation_goes_round_the_levels_context_by_context() -> None:
    source = TaskSource("hop", "test", 16, queries=2)
    assert [item.level for item in source] == [1, 1, 2, 2, 3, 3, 4, 4] * 2


@pytest.mark.parametrize(
    ("task", "queries", "message"),
    [
        ("calc", 2, r"^data\.queries: calc has no context, so an item has one query, not 2$"),
        ("hop", 9, r"^data\.queries: a context of hop has 8 queries, not 9$"),
    ],
)
def test_queries_that_a_task_does_not_have_are_refused(task: str, queries: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TaskSource(task, "train", 10, queries=queries)


@pytest.mark.parametrize(("task", "queries"), [("rule110", 4), ("graph", 32)])
@pytest.mark.parametrize("split", SPLITS)
def test_every_task_with_a_context_lists_its_queries(task: str, queries: int, split: Split) -> None:
    items = list(TaskSource(task, split, 2 * queries, queries=queries))
    for own in (items[:queries], items[queries:]):
        assert len({item.context for item in own}) == 1
        assert len({item.query for item in own}) == queries
        assert split_of(own[0].context) == split
    assert items[0].context != items[-1].context
    with pytest.raises(DataError, match=rf"a context of {task} has {queries} queries, not {queries + 1}"):
        TaskSource(task, split, 10, queries=queries + 1)


@pytest.mark.parametrize("task", ["rule110", "graph"])
def test_a_task_brings_its_own_words_behind_the_others(task: str) -> None:
    base, own = build_tokenizer().get_vocab(), build_tokenizer(task).get_vocab()
    assert {word: own[word] for word in base} == base
    assert not {"t8", "v8"} & set(base)
    assert build_tokenizer("calc").get_vocab() == build_tokenizer("hop").get_vocab() == base
    tokenizer, known = make_tokenizer(load_recipe("hop", [f"data.task={task}", "warmup.level_weights=null"]))
    for item in TaskSource(task, "test", 40):
        text = " ".join([item.text, *item.meta["responses"].values()])
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert known == ["<short>", "<think>"]


@pytest.mark.parametrize(
    ("task", "size", "message"),
    [
        ("hop", 9, "the size of hop is fixed, not 9"),
        ("graph", 31, "the size of graph is from 32 to 75, not 31"),
        ("rule110", 65, "the size of rule110 is from 8 to 64, not 65"),
    ],
)
def test_sizes_that_a_task_does_not_have_are_refused(task: str, size: int, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.task_size: {message}$"):
        TaskSource(task, "train", 10, task_size=size)


def test_a_recipe_scales_a_task() -> None:
    (item,) = load_examples(DataSection(task="rule110", task_size=8), "test", 1)
    assert len(item.context.split()) == 2 + 4 * (1 + 8)


def test_a_recipe_asks_for_queries() -> None:
    section = DataSection(task="hop", queries=4, seed=2)
    assert load_examples(section, "test", 12) == list(TaskSource("hop", "test", 12, seed=2, queries=4))
    with pytest.raises(ValueError, match="belong to a `task`"):
        DataSection(families=["chain_sum"], queries=2)
