"""Sleep offline: the commands `siesta sleep` and `siesta answer`, what a kill leaves, and bad input in one line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from siesta.data.errors import DataError, RecipeError
from siesta.data.prompts import end_id, messages, pad_id, prompt_ids
from siesta.data.schema import Example
from siesta.rl import cli
from siesta.rl.generation import complete
from siesta.rl.models import save_model
from siesta.rl.recipe import load_recipe
from siesta.rl.sleep import night
from siesta.rl.sleep.factory import BUILDERS, Sleeper, build_consolidator, open_sleeper
from siesta.rl.sleep.store import StateStore, identity
from siesta.rl.sleep.wake import answer, stored_answers
from siesta.rl.sleep_section import SleepSection
from tests.helpers import save_tiny_model, tiny_judge, tiny_model
from tests.hybrids import TOKENIZER, context, hybrid, query

CONTEXTS = {f"c {i}/": context(n, i) for i, n in enumerate((9, 6, 9, 7))}  # ids are no file names
QUERIES = [("q0", "c 2/", 4), ("q1", "c 0/", 2), ("q2", "c 2/", 3), ("q3", "c 1/", 3), ("q4", "c 0/", 2)]
WAYS = {
    "raw": ["mechanism=raw"],
    "gist": ["mechanism=gist", "slots=3", "passes=2"],
    "memory": ["mechanism=memory", "layer=1", "segment=4", "passes=2"],
    "latent": ["mechanism=latent", "passes=2", "window=5"],
    "notes": ["mechanism=notes", "passes=2", "max_tokens=5"],
}
EVERY = pytest.mark.parametrize("mechanism", WAYS)


def overrides(mechanism: str) -> list[str]:
    return [f"sleep.{setting}" for setting in WAYS[mechanism]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with contexts, queries and two models."""
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "contexts.jsonl", [{"id": name, "context": text} for name, text in CONTEXTS.items()])
    asked = [{"id": name, "context_id": own, "query": query(n, i).query} for i, (name, own, n) in enumerate(QUERIES)]
    rows(tmp_path / "queries.jsonl", asked)
    save_tiny_model(tmp_path / "llama")
    save_model(hybrid("qwen3_5", torch.float32), TOKENIZER, tmp_path / "hybrid")
    return tmp_path


def rows(file: Path, content: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))


def model_of(mechanism: str) -> str:
    return "hybrid" if mechanism == "latent" else "llama"


def sleep(mechanism: str, out: str = "states", *more: str) -> int:
    given = ["sleep", "smoke", *overrides(mechanism), "--contexts", "contexts.jsonl", "--out", out]
    return cli.main([*given, "--model", model_of(mechanism), *more])


def answers(mechanism: str, *more: str) -> int:
    given = ["answer", "smoke", *overrides(mechanism), "--states", "states", "--queries", "queries.jsonl"]
    return cli.main([*given, "--out", "answers.jsonl", "--model", model_of(mechanism), *more])


def sleeper_of(mechanism: str) -> Sleeper:
    return open_sleeper(load_recipe("smoke", overrides(mechanism)), model_of(mechanism))


def store_of(mechanism: str, out: str = "states") -> StateStore:
    sleeper = sleeper_of(mechanism)
    section = load_recipe("smoke", overrides(mechanism)).sleep
    return StateStore(Path(out), identity(section, sleeper.model, sleeper.tokenizer))


def content(out: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(out).iterdir())}


@EVERY
def test_answers_from_stored_states_are_those_from_a_fresh_sleep(mechanism: str, folder: Path) -> None:
    """Token for token, in a mode that is given and in those the model chooses; raw also as from whole prompts."""
    if mechanism == "memory":
        pytest.importorskip("titans_pytorch")
    assert sleep(mechanism) == 0
    sleeper = sleeper_of(mechanism)
    way, model, modes = sleeper.way, sleeper.model, sleeper.modes
    read = [json.loads(line) for line in Path("queries.jsonl").read_text().splitlines()]
    with torch.no_grad():
        fresh = way.sleep(
            model, list(CONTEXTS.values()), passes=load_recipe("smoke", overrides(mechanism)).sleep.passes
        )
    place = {name: i for i, name in enumerate(CONTEXTS)}
    state = fresh.state.select([place[row["context_id"]] for row in read])
    asked = [Example(row["id"], "", row["query"], "") for row in read]
    for mode in (None, modes[1]):
        expected = answer(model, way, state, asked, modes, mode=mode)
        found = {row["id"]: each for row, each in stored_answers(sleeper, store_of(mechanism), read, mode)}
        assert [found[row["id"]] for row in read] == expected
        assert answers(mechanism, *([] if mode is None else ["--mode", mode.name])) == 0
        written = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
        assert [(row["id"], row["mode"], row["tokens"]) for row in written] == [
            (row["id"], each.mode.name, len(each.ids)) for row, each in zip(read, expected, strict=True)
        ]
        if mechanism == "raw" and mode is not None:
            assert [each.ids for each in expected] == from_whole_prompts(sleeper, asked, read)


def from_whole_prompts(sleeper: Sleeper, asked: list[Example], read: list[dict]) -> list[list[int]]:
    """The road that evaluation takes without sleep."""
    full = [replace(each, context=CONTEXTS[row["context_id"]]) for each, row in zip(asked, read, strict=True)]
    prompts = [prompt_ids(sleeper.tokenizer, messages(each, "")) for each in full]
    ends: dict[str, Any] = {"pad_id": pad_id(sleeper.tokenizer), "eos_id": end_id(sleeper.tokenizer)}
    return complete(sleeper.model, prompts, sleeper.modes[1], temperature=None, batch_size=1, **ends)


def test_the_model_may_answer_one_batch_in_several_modes(folder: Path) -> None:
    """Each answer is the one of its own batch of one. New control tokens are alike; here they are told apart."""
    sleeper = sleeper_of("raw")
    with torch.no_grad():
        rows_of: Any = sleeper.model.get_input_embeddings().weight
        rows_of[sleeper.modes.token_ids] = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
        state = sleeper.way.sleep(sleeper.model, [context(9)], passes=1).state
    asked = [query(3, i) for i in range(12)]
    together = answer(sleeper.model, sleeper.way, state.select([0] * 12), asked, sleeper.modes)
    assert {each.mode.name for each in together} == {"short", "think"}
    alone = [answer(sleeper.model, sleeper.way, state, [each], sleeper.modes)[0] for each in asked]
    assert together == alone


@pytest.mark.parametrize("mechanism", ["raw", "latent"])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_sleep_goes_on_to_the_same_bytes(
    mechanism: str, torn: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a state was written and before its line was, with half a line or none."""
    assert sleep(mechanism, "whole") == 0
    add, done = StateStore.add, []

    def killed(self: StateStore, name: str, *rest: Any) -> None:
        before = self.manifest.read_bytes()
        add(self, name, *rest)
        done.append(name)
        if len(done) == 3:
            self.manifest.write_bytes(before + (b'{"id": "c' if torn else b""))
            (self.folder / "left.safetensors.part").write_bytes(b"half a state")
            raise KeyboardInterrupt

    monkeypatch.setattr(StateStore, "add", killed)
    assert sleep(mechanism) == 130
    assert store_of(mechanism).entries.keys() == set(list(CONTEXTS)[:2])
    monkeypatch.setattr(StateStore, "add", add)
    assert sleep(mechanism) == 0
    (folder / "states" / "left.safetensors.part").unlink()
    assert content("states") == content("whole")
    assert len(content("states")) == 1 + len(CONTEXTS)


def test_what_is_there_is_not_made_again_and_what_is_gone_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sleep("raw") == 0
    before, store = content("states"), store_of("raw")
    (folder / "states" / store.entries["c 1/"].file).unlink()
    made = []
    add = StateStore.add
    monkeypatch.setattr(StateStore, "add", lambda self, name, *rest: made.append(name) or add(self, name, *rest))
    assert sleep("raw") == 0
    assert made == ["c 1/"]
    assert {name: data for name, data in content("states").items() if name != "manifest.jsonl"} == {
        name: data for name, data in before.items() if name != "manifest.jsonl"
    }
    with (folder / "contexts.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"id": 7, "context": context(3)}) + "\n")
    assert sleep("raw") == 0
    assert made == ["c 1/", "7"]


def test_the_manifest_says_what_each_context_cost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two recurrent layers of 2 heads of 8 x 8 in float32, two passes."""
    assert sleep("latent") == 0
    entries = store_of("latent").entries
    assert [entries[name].tokens for name in CONTEXTS] == [18, 12, 18, 14]
    assert {entry.bytes for entry in entries.values()} == {2 * 2 * 8 * 8 * 4}
    assert "4 contexts, 4 of them now: 62 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "contexts.jsonl: no rows"),
        (["a"], "row 1: an object is expected"),
        ([{"id": "a", "context": "n1"}, {"context": "n1"}], "row 2: 'id' is missing or no text"),
        ([{"id": "a"}], "row 1: 'context' is missing or no text; each row has id, context"),
        ([{"id": "a", "context": ["n1"]}], "row 1: 'context' is missing or no text"),
        ([{"id": "a", "context": " "}], "row 1: 'context' is empty"),
        ([{"id": "a", "context": "n1"}, {"id": "a", "context": "n2"}], "row 2: id 'a' stands in row 1, too"),
        ([{"id": "a", "context": "n1"}, {"id": "b", "context": context(257)}], "row 2: context: a text of 257 tokens"),
    ],
)
def test_bad_contexts_are_named_before_any_sleep(
    content: list, fault: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(folder / "contexts.jsonl", content)
    assert sleep("raw") == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.startswith("siesta: error: contexts.jsonl")
    assert error.count("\n") == 1
    assert not list(folder.glob("states/*.safetensors"))


def test_states_that_do_not_belong_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sleep("gist") == 0

    def fault(code: int) -> str:
        assert code == 2
        return capsys.readouterr().err

    assert "states: its states were made with mechanism gist, this is raw" in fault(answers("raw"))
    assert "made with mechanism gist, this is raw" in fault(sleep("raw"))
    assert "made with passes 2, this is 3" in fault(answers("gist", "sleep.passes=3"))
    assert "made with slots 3, this is 4" in fault(answers("gist", "sleep.slots=4"))
    assert re.search(r"made with model [0-9a-f]{64}, this is ", fault(answers("gist", "model.dtype=bfloat16")))
    save_tiny_model(folder / "llama", seed=1)
    assert re.search(r"made with model [0-9a-f]{64}, this is ", fault(answers("gist")))
    rows(folder / "contexts.jsonl", [{"id": "c 0/", "context": context(4)}])
    save_tiny_model(folder / "llama")
    assert "row 1: states has a state of another context with id 'c 0/'" in fault(sleep("gist"))
    assert "nowhere: no states here" in fault(answers("gist", "--states", "nowhere"))
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").touch()
    assert "other: holds other things" in fault(sleep("gist", "other"))
    assert "--mode wide: the recipe has the modes short, think" in fault(answers("gist", "--mode", "wide"))
    rows(folder / "queries.jsonl", [{"id": "q", "context_id": "c 9/", "query": "n1"}])
    assert "queries.jsonl, row 1: states has no state of context 'c 9/'" in fault(answers("gist"))
    assert "sleep.mechanism: none keeps no state" in fault(
        cli.main(["sleep", "smoke", "--contexts", "contexts.jsonl", "--out", "s"])
    )
    assert "outputs/smoke/export: the run of this recipe has no export" in fault(
        cli.main(["sleep", "smoke", "sleep.mechanism=raw", "--contexts", "contexts.jsonl", "--out", "s"])
    )


@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_state_is_named(harm: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sleep("raw") == 0
    file = folder / "states" / store_of("raw").entries["c 2/"].file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(data) if harm == "flip" else data[:-100])
    assert answers("raw") == 2
    error = capsys.readouterr().err
    assert f"states/{file.name}: " in error
    assert ("this state is gone" if harm == "gone" else "truncated or altered") in error
    assert "context 'c 2/'" in error


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "row 3: not JSON"),
        ("[]", "row 3: an object is expected"),
        ('{"id": 1}', "row 3: not the line of a state"),
    ],
)
def test_a_broken_manifest_is_named(line: str, fault: str, folder: Path) -> None:
    assert sleep("raw") == 0
    manifest = folder / "states" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(DataError, match=f"manifest.jsonl, {fault}"):
        store_of("raw")
    manifest.write_text("\n".join([*lines[:2], *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="row 3: id 'c 0/' stands there twice"):
        store_of("raw")


@pytest.mark.parametrize(
    ("mechanism", "free", "bound"),
    [
        ("notes", {"sleeps": 3, "weight": 0.5, "price": 1.0}, {"max_tokens": 9}),
        ("latent", {"truncate": 1}, {"form": "reread"}),
    ],
)
def test_settings_of_training_make_no_state_foreign(mechanism: Any, free: dict, bound: dict, folder: Path) -> None:
    sleeper = open_sleeper(load_recipe("smoke"), "llama")

    def about(**settings: Any) -> dict[str, Any]:
        return identity(SleepSection(mechanism=mechanism, **settings), sleeper.model, sleeper.tokenizer)

    assert about(**free) == about()
    assert about(**bound) != about(), "negative control"


def test_the_hash_is_of_what_the_model_computes(folder: Path) -> None:
    """Where it lies does not count."""
    shutil.move("llama", "elsewhere")
    shutil.copytree("elsewhere", "llama")
    section = SleepSection(mechanism="raw")
    found = [
        identity(section, sleeper.model, sleeper.tokenizer)
        for sleeper in (open_sleeper(load_recipe("smoke"), path) for path in ("elsewhere", "llama"))
    ]
    assert found[0] == found[1]


def refused(section: SleepSection, model: PreTrainedModel) -> str:
    with pytest.raises(RecipeError) as error:
        build_consolidator(section, TOKENIZER, model)
    return str(error.value)


def test_a_mechanism_that_does_not_fit_the_model_is_one_line() -> None:
    llama, mixed = tiny_model(), hybrid("falcon_h1", torch.float32)
    assert "sleep.mechanism: latent: model: llama has no recurrent layers" in refused(
        SleepSection(mechanism="latent"), llama
    )
    assert "sleep.mechanism: gist: model: gist keeps full attention only" in refused(
        SleepSection(mechanism="gist"), mixed
    )
    assert "sleep.mechanism: memory: model: falcon_h1 has recurrent" in refused(
        SleepSection(mechanism="memory"), mixed
    )
    assert "sleep.layer: 2: the model has the layers 0 to 1" in refused(
        SleepSection(mechanism="memory", layer=2), llama
    )


def test_every_mechanism_is_built_under_its_name() -> None:
    for mechanism in BUILDERS:
        model = hybrid("olmo_hybrid", torch.float32) if mechanism == "latent" else tiny_model()
        if mechanism == "memory":
            pytest.importorskip("titans_pytorch")
        tokenizer = tiny_judge().tokenizer
        assert (
            build_consolidator(SleepSection.model_validate({"mechanism": mechanism}), tokenizer, model).name
            == mechanism
        )


def test_new_slots_and_memories_are_said_to_be_new(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And those saved with a model are found: the same states, from the same weights."""
    pytest.importorskip("titans_pytorch")
    for mechanism in ("gist", "memory", "notes"):
        assert sleep(mechanism, f"new {mechanism}") == 0
        assert night.UNTRAINED in capsys.readouterr().out
        sleeper = sleeper_of(mechanism)
        shutil.rmtree("llama")
        save_model(sleeper.model, sleeper.tokenizer, folder / "llama")
        assert sleep(mechanism, f"saved {mechanism}") == 0
        assert night.UNTRAINED not in capsys.readouterr().out
        assert content(f"saved {mechanism}") == content(f"new {mechanism}")
        shutil.rmtree("llama")
        save_tiny_model(folder / "llama")
