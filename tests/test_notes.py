"""Notes as a state: what is kept of them, who reads what, pass after pass, and what the warm-up teaches."""

from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.data.prompts import end_id, messages, prompt_ids
from siesta.data.schema import Example
from siesta.data.sources import TaskSource
from siesta.rl import embedded
from siesta.rl.modes import Mode, grow_embeddings, prepare_tokenizer
from siesta.rl.sleep.notes import Notes, NotesSleep, kept, kept_rows, note_tokens, rows_right
from siesta.rl.sleep.protocol import SleepTokens
from siesta.rl.sleep.warmup import distinct, reader_examples, writer_rows
from siesta.rl.sleep_section import SleepSection
from siesta.rl.warmup import IGNORED, within_levels
from siesta.rl.warmup_trainer import SortedSteps
from tests.helpers import SECTIONS, tiny_judge

TOKENS = [section.token for section in SECTIONS.values()]


def sleeper(**settings) -> NotesSleep:
    """Notes over the embedded tokenizer with the control tokens and the sleep token."""
    tokenizer = embedded.build_tokenizer()
    prepare_tokenizer(tokenizer, [*TOKENS, "<sleep>"])
    reserved = [tokenizer.get_vocab()[token] for token in TOKENS]
    options = {"max_tokens": 66} | settings
    return NotesSleep(tokenizer, SleepSection.model_validate({"mechanism": "notes"} | options), reserved)


def words(sleep: NotesSleep, ids: list[int]) -> str:
    return str(sleep.tokenizer.decode(ids))


def hop(count: int, queries: int = 4) -> list[Example]:
    return list(TaskSource("hop", "train", count, queries=queries))


class Given:
    """Writes given texts, a list for each call, and remembers the prompts and the mode."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *calls: list[str]):
        self.tokenizer, self.calls = tokenizer, list(calls)
        self.prompts: list[list[list[int]]] = []
        self.modes: list[Mode] = []

    def __call__(self, prompts: Sequence[list[int]], mode: Mode, *, temperature: float | None) -> list[list[int]]:
        self.prompts.append(list(prompts))
        self.modes.append(mode)
        return [[*self.tokenizer.encode(text), end_id(self.tokenizer)] for text in self.calls.pop(0)]


# ---- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a c f = a>f ; b d e = b>e ;", ["a>f", "b>e"]),
        ("a c f = a>f ; b d", ["a>f"]),  # cut: the last row was never finished
        ("a c f = a>f ; b d =", ["a>f"]),
        ("2 = 1 + 1 = two eggs\nso\n3 = three", ["two eggs", "three"]),
        ("no work in\nthese notes", ["no work in\nthese notes"]),
        ("", []),
        (" ; = ;", []),
    ],
)
def test_what_is_kept_of_notes_by_hand(text: str, rows: list[str]) -> None:
    assert kept_rows(text) == rows
    assert kept(text) == " ".join(rows)


def test_rows_right_is_a_share_of_the_taught_rows() -> None:
    taught = "a b = a>b ; b c = b>c ; c d = c>d ; d a = d>a ;"
    assert rows_right(taught, taught) == 1
    assert rows_right("c d = c>d ; a b = a>b ; b c = b>d ;", taught) == 0.5, "in any order"
    assert rows_right("", taught) == 0


def test_a_cap_on_the_state_is_in_tokens() -> None:
    text = "a b = a>b ; b c = b>c ; c d = c>d ;"
    assert sleeper().keep(text) == "a>b b>c c>d"
    assert sleeper(keep_tokens=2).keep(text) == "a>b b>c"


def test_notes_hold_no_token_that_would_open_an_answer() -> None:
    sleep = sleeper()
    ids = sleep.tokenizer.encode("a <short> b <sleep> c <think>")
    assert sleep.text([*ids, end_id(sleep.tokenizer)]) == "a b c"


def test_a_state_of_text_survives_the_disk_and_a_fan_out() -> None:
    state = Notes(["a>f b>d", "", "naïve"])
    assert state.nbytes() == [7, 0, 6]
    assert sleeper().restore(state.tensors()) == state
    assert state.select([2, 0, 0]).texts == ["naïve", "a>f b>d", "a>f b>d"]
    assert sleeper().restore(Notes(["", ""]).tensors()) == Notes(["", ""])


# ---- who reads what ------------------------------------------------------------------------------------------------


def test_a_reader_sees_notes_in_the_place_of_the_context_or_beside_it() -> None:
    example = Example("x", "the context", "the query", "42", meta={"level": 2})
    read = sleeper().reader(example, "notes")
    assert (read.context, read.query, read.answer, read.level) == ("notes", "the query", "42", 2)
    assert sleeper(keep_context=True).reader(example, "notes").context == "the context\n<sleep> notes"
    assert sleeper(keep_context=True).reader(example, "").context == "the context"
    assert messages(sleeper().reader(example, "")) == [{"role": "user", "content": "the query"}]


def test_every_pass_reads_the_context_and_what_was_kept_of_the_pass_before() -> None:
    sleep = sleeper()
    write = Given(sleep.tokenizer, ["a b = a>b ; c", "b c"], ["a c = a>c ;", "b d"])
    state, actions = sleep.write(write, ["<ctx> k1 a>b", "<ctx> k2 b>c"], passes=2)
    assert state.texts == ["a>c", "b d"]
    first, second = [[words(sleep, ids) for ids in prompts] for prompts in write.prompts]
    assert first == ["<ctx> k1 a>b <q>", "<ctx> k2 b>c <q>"]
    assert second == ["<ctx> k1 a>b a>b <q>", "<ctx> k2 b>c b c <q>"]
    assert {mode.token for mode in write.modes} == {"<sleep>"}
    assert {mode.max_tokens for mode in write.modes} == {65}, "the section's cap counts the sleep token"
    assert [words(sleep, ids) for ids in actions[0].completion_ids] == [
        "<sleep> a b = a>b ; c <eos>",
        "<sleep> b c <eos>",
    ]
    assert actions[1].prompt_ids == write.prompts[1]
    assert note_tokens(actions) == [7 + 6, 3 + 3]


def test_an_empty_context_is_refused() -> None:
    sleep = sleeper()
    with pytest.raises(DataError, match=r"^context 1: empty, there is nothing to sleep on$"):
        sleep.write(Given(sleep.tokenizer), ["<ctx>", "  "], passes=1)


def test_a_model_sleeps_within_its_cap_and_a_generator_decides_what_it_writes() -> None:
    sleep = sleeper(max_tokens=6)
    sleep.temperature = 1.0
    model = embedded.build_model(sleep.tokenizer, seed=0, layers=1, hidden_size=16, heads=2, init=0.2)
    grow_embeddings(model, sleep.tokenizer, [*TOKENS, "<sleep>"])
    contexts = [example.context for example in distinct(hop(12))]

    def night(seed: int):
        before = torch.get_rng_state()
        out = sleep.sleep(model, contexts, passes=2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(before, torch.get_rng_state()), "the generators outside are left alone"
        return out

    out = night(1)
    assert len(out.state) == len(contexts) == 3
    for step in out.actions:
        for ids in step.completion_ids:
            assert ids[0] == sleep.mode.token_id
            assert 2 <= len(ids) <= 6
    spans = [[len(p) + len(c) for p, c in zip(x.prompt_ids, x.completion_ids, strict=True)] for x in out.actions]
    assert out.cost.tokens == [a + b for a, b in zip(*spans, strict=True)]
    assert out.cost.state_bytes == out.state.nbytes()
    assert night(1).actions == out.actions
    assert night(2).actions != out.actions
    inputs = sleep.attach(out.state, distinct(hop(12)))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == inputs["position_ids"].shape


def test_a_context_that_the_model_cannot_hold_with_its_notes_is_refused() -> None:
    sleep = sleeper(max_tokens=255)
    model = embedded.build_model(sleep.tokenizer, seed=0, layers=1, hidden_size=16, heads=2, init=0.2)
    with pytest.raises(DataError, match=r"^context: with its notes a text of 266 tokens, the model takes 256$"):
        sleep.sleep(model, [hop(1)[0].context], passes=1)


# ---- warm-up -------------------------------------------------------------------------------------------------------


def test_readers_are_taught_with_notes_and_without() -> None:
    sleep = sleeper()
    examples = hop(400)
    taught = reader_examples(examples, sleep, seed=0)
    shares = []
    for example, read in zip(examples, taught, strict=True):
        with_notes = read.context == kept(example.meta["notes"])
        assert with_notes or read == example
        expected = example.meta["responses_with_notes" if with_notes else "responses"]
        assert read.meta["responses"] == expected
        assert (read.query, read.answer) == (example.query, example.answer)
        shares.append(with_notes)
    assert sum(shares) / 400 == pytest.approx(0.5, abs=0.07)
    assert reader_examples(examples, sleep, seed=0) == taught != reader_examples(examples, sleep, seed=1)


def test_readers_who_keep_the_context_are_shown_other_notes_too_and_work_from_the_context() -> None:
    examples = hop(600)
    counts = {"own": 0, "none": 0, "shuffled": 0}
    for example, read in zip(examples, reader_examples(examples, sleeper(keep_context=True), seed=0), strict=True):
        assert read.meta["responses"] == example.meta["responses"]
        assert read.context.startswith(example.context)
        notes = read.context.removeprefix(example.context).removeprefix("\n<sleep>").strip()
        counts["none" if not notes else "own" if notes == kept(example.meta["notes"]) else "shuffled"] += 1
    assert min(counts.values()) > 150


@pytest.mark.parametrize("keep_context", [False, True])
def test_an_answer_is_taught_where_it_can_be_known(*, keep_context: bool) -> None:
    """Beyond one hop only who has notes on this very context can answer at once; who has the context can work."""
    examples = hop(400, 8)
    bounded = within_levels(examples, tiny_judge().modes, {"short": 1})
    seen = set()
    read_examples = reader_examples(bounded, sleeper(keep_context=keep_context), seed=0)
    for example, read in zip(examples, read_examples, strict=True):
        notes = kept(example.meta["notes"])
        own = read.context == (f"{example.context}\n<sleep> {notes}" if keep_context else notes)
        assert ("short" in read.meta["responses"]) == (own or example.level == 1)
        whose = "responses_with_notes" if own and not keep_context else "responses"
        assert read.meta["responses"]["think"] == example.meta[whose]["think"]
        seen.add((own, example.level))
    assert len(seen) == 8, "with notes of its own and without, at four levels"


@pytest.mark.parametrize(("queries", "count"), [(4, 3), (1, 12)])
def test_a_fifth_of_the_rows_teach_the_writer(queries: int, count: int) -> None:
    sleep = sleeper()
    examples = hop(12, queries)
    rows = writer_rows(examples, sleep)
    assert len(rows) == 3, "3 of 12 + 3"
    assert len(distinct(examples)) == count
    for example, row in zip(distinct(examples), rows, strict=False):
        prompt = prompt_ids(sleep.tokenizer, messages(Example("", example.context, "", "")))
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [IGNORED] * len(prompt) + row["input_ids"][len(prompt) :]
        assert words(sleep, row["input_ids"][len(prompt) :]) == f"<sleep> {example.meta['notes']} <eos>"


def test_later_passes_are_taught_to_write_the_same_again() -> None:
    sleep = sleeper(passes=3)
    rows = [words(sleep, row["input_ids"]) for row in writer_rows(hop(24, 8), sleep)]
    assert len(rows) == 6, "every context twice"
    for i, text in enumerate(rows):
        example = distinct(hop(24, 8))[i % 3]
        so_far = "" if i % 3 == 0 else kept(example.meta["notes"]) + " "
        assert text == f"{example.context} {so_far}<q> <sleep> {example.meta['notes']} <eos>"


def test_a_step_has_the_same_rows_in_order_of_length() -> None:
    lengths = [5, 70, 3, 4, 60, 9, 8, 7]
    order = [7, 1, 2, 0, 5, 4, 3, 6]
    sampler = SortedSteps(cast(Sampler[int], order), lengths, step=4)
    assert list(sampler) == [2, 0, 7, 1, 3, 6, 5, 4], "3 5 7 70 and 4 8 9 60 tokens"
    assert len(sampler) == 8
    assert list(SortedSteps(cast(Sampler[int], order[:6]), lengths, step=4))[4:] == [5, 4], "the last may be smaller"


def test_what_cannot_be_taught_is_refused() -> None:
    bare = Example("row 7", "context", "q", "a", meta={"responses": {"short": "a"}})
    with pytest.raises(DataError, match=r"^row 7: no notes to warm up on"):
        writer_rows([bare] * 4, sleeper())
    with pytest.raises(DataError, match=r"its notes take \d+ tokens, more than sleep\.max_tokens 20$"):
        writer_rows(hop(4), sleeper(max_tokens=20))
    blind = Example("row 8", "context", "q", "a", meta={"notes": "n", "responses": {"short": "a"}})
    with pytest.raises(DataError, match=r"^row 8: no responses of a reader of notes; set sleep\.keep_context: true$"):
        reader_examples([blind] * 9, sleeper(), seed=0)
    read = reader_examples([blind] * 9, sleeper(keep_context=True), seed=0)
    assert {example.context for example in read} <= {"context", "context\n<sleep> n"}


def test_writer_and_reader_meet_in_the_same_words() -> None:
    """A query is one look-up in what is kept of the taught notes."""
    for example in hop(40):
        assert f"{example.query}>{example.answer}" in kept(example.meta["notes"]).split()


def test_tokens_of_notes_leave_the_forced_token_out() -> None:
    assert note_tokens([SleepTokens([[1], [1]], [[9, 4], [9, 4, 5]]), SleepTokens([[1], [1]], [[9], [9, 4]])]) == [
        1,
        3,
    ]
