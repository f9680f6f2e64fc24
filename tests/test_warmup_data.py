"""`siesta warmup-data`: what is kept and what is refused, that a killed run ends in the same bytes, the card."""

import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siesta.data.prompts import response_ids
from siesta.data.schema import Example
from siesta.data.sources import TaskSource, read_rows, to_examples
from siesta.rl import cli, teachers, warmup_data
from siesta.rl.teachers import Draft
from siesta.rl.warmup_card import card_text, mode_numbers
from siesta.rl.warmup_data import verified
from tests.helpers import tiny_judge
from tests.teaching import MODES, save_byte_tokenizer, save_teacher

JUDGE = tiny_judge()
SHORT, THINK = JUDGE.modes
EXAMPLE = Example(id="a", context="", query="<calc> 1 +2", answer="3")
BY_HEART = list(TaskSource("calc", "train", 10))


# ---- verdicts ------------------------------------------------------------------------------------------------------


def verdict(draft: Draft, mode: Any = THINK, example: Example = EXAMPLE) -> dict[str, int]:
    (outcome,) = verified([example], [[draft]], JUDGE, mode)
    assert (outcome.text is None) == (outcome.drafts != {"right": 1})
    return outcome.drafts


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        (Draft("1 2 = 3"), "right"),
        (Draft("1 2 = 4"), "wrong"),
        (Draft("3 = "), "wrong"),
        (Draft("1 2 = 3", ended=False), "unfinished"),
        (Draft(" \n"), "empty"),
        (Draft("<think> 2 = 3"), "reserved token"),  # nested
        (Draft("1 2 = <short> 3"), "reserved token"),  # the other mode's
        (Draft("1 <eos> = 3"), "reserved token"),  # would end before its answer
        (Draft("one = 3"), "reserved token"),  # not a word of the trained model
        (Draft("3"), "no marker"),
        (Draft("1 1 1 1 1 1 1 1 1 = 3"), "right"),  # 11 tokens and the end: 12, the cap
        (Draft("1 1 1 1 1 1 1 1 1 1 = 3"), "too long"),
    ],
)
def test_a_draft_is_kept_or_refused_for_a_reason(draft: Draft, reason: str) -> None:
    assert verdict(draft) == {reason: 1}


def test_a_mode_without_marker_takes_the_whole_draft_as_its_answer() -> None:
    assert verdict(Draft("3"), SHORT) == {"right": 1}
    assert verdict(Draft("= 3"), SHORT) == {"too long": 1}
    assert verdict(Draft("4"), SHORT) == {"wrong": 1}


def test_a_failed_verifier_is_not_a_wrong_answer() -> None:
    blank = Example(id="a", context="", query="q", answer=" ")
    assert verdict(Draft("1 = 3"), THINK, blank) == {"unscorable": 1}


def test_the_shortest_right_draft_is_kept_and_every_draft_is_counted() -> None:
    drafts = [
        [Draft("1 2 = 3"), Draft("1 = 4"), Draft("2 = 3"), Draft("1 = 3"), Draft("3")],
        [],
        [Draft("1 = 5"), Draft("1 = 6")],
    ]
    outcomes = verified([EXAMPLE] * 3, drafts, JUDGE, THINK)
    assert [outcome.text for outcome in outcomes] == ["2 = 3", None, None], "of equal lengths the first"
    assert outcomes[0].tokens == 4
    assert [outcome.drafts for outcome in outcomes] == [
        {"right": 3, "wrong": 1, "no marker": 1},
        {"missing": 1},
        {"wrong": 2},
    ]


# ---- from worked solutions -----------------------------------------------------------------------------------------

WRITTEN = """\
model: {path: tokenizer}
modes:
  short: {token: "<short>", max_tokens: 20}
  think: {token: "<think>", max_tokens: 60, answer_after: "</think>"}
data: {train: {path: train.jsonl, format: gsm8k}, test: {path: test.jsonl, format: gsm8k}}
teachers: {short: {from: written}, think: {from: written}}
"""
SOLUTIONS = ["3 + 4 = <<3+4=7>>7 clips.", "2 <think> 5", "x" * 60, "6 - 1 = 5", "9"]


def write_rows(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with rows as GSM8K writes them, a tokenizer of bytes, and `written.yaml`."""
    monkeypatch.chdir(tmp_path)
    save_byte_tokenizer(Path("tokenizer"))
    rows = [{"question": f"Question {i}?", "answer": f"{s}\n#### {7 - i}"} for i, s in enumerate(SOLUTIONS)]
    write_rows("train.jsonl", rows)
    write_rows("test.jsonl", [{"question": "QUESTION  4?", "answer": "9\n#### 3"}])
    Path("written.yaml").write_text(WRITTEN)
    return tmp_path


def test_written_rows_become_responses_of_both_modes(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup-data", "written.yaml", "--out", "out", "--limit", "4"]) == 0
    rows = [json.loads(line) for line in Path("out/responses.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "id": "train.jsonl:1",
        "context": "",
        "query": "Question 0?",
        "answer": "7",
        "verifier": "math",
        "level": 0,
        "responses": {"short": "\\boxed{7}", "think": "3 + 4 = 7 clips.\n</think>\n\\boxed{7}"},
    }
    assert [list(row["responses"]) for row in rows] == [["short", "think"], ["short"], ["short"], ["short", "think"]]
    card = json.loads(Path("out/card.json").read_text())
    assert card["examples"] == 4
    assert (card["paired"], card["left_out"]) == (2, 0)
    assert card["by_modes"] == {"short": 2, "short+think": 2}
    # \boxed{7} has nine bytes, the end makes ten; "6 - 1 = 5\n</think>\n\boxed{4}" has 9 + 1 + 8 + 1 + 9 and the end.
    assert card["modes"]["short"] == {
        "kept": 4,
        "drafts": {"right": 4},
        "tokens": {"min": 10, "p10": 10, "median": 10, "p90": 10, "max": 10},
    }
    assert card["modes"]["think"] == {
        "kept": 2,
        "drafts": {"right": 2, "reserved token": 1, "too long": 1},
        "tokens": {"min": 29, "p10": 29, "median": 29, "p90": 29, "max": 36},
    }
    assert "4 examples, 2 of them with a response in every mode, 0 left out" in capsys.readouterr().out


def test_rows_that_also_stand_in_the_test_set_are_not_taught(written: Path) -> None:
    assert cli.main(["warmup-data", "written.yaml", "--out", "out"]) == 0
    assert "Question 4?" not in Path("out/responses.jsonl").read_text()
    assert "Question 3?" in Path("out/responses.jsonl").read_text()


def test_rows_come_back_as_they_were(written: Path) -> None:
    assert cli.main(["warmup-data", "written.yaml", "--out", "out"]) == 0
    back = to_examples(read_rows("out/responses.jsonl"), "out/responses.jsonl", {}, "exact")
    assert {example.verifier for example in back} == {"math"}
    assert back[0].meta["responses"]["short"] == "\\boxed{7}"


def test_rows_without_a_solution_are_counted_and_a_wrong_one_is_refused(written: Path) -> None:
    """Plain rows: the first has responses of its own, one of them wrong; the second nothing to be taught from."""
    Path("plain.yaml").write_text(WRITTEN.replace(", format: gsm8k", ""))
    own = {"short": "8", "think": "work</think>7"}
    write_rows("train.jsonl", [{"query": "a", "answer": "7", "responses": own}, {"query": "b", "answer": "7"}])
    write_rows("test.jsonl", [{"query": "c", "answer": "1"}])
    assert cli.main(["warmup-data", "plain.yaml", "--out", "out"]) == 0
    (row,) = Path("out/responses.jsonl").read_text().splitlines()
    assert json.loads(row)["responses"] == {"think": "work</think>7"}
    card = json.loads(Path("out/card.json").read_text())
    assert (card["examples"], card["left_out"], card["paired"], card["by_modes"]) == (2, 1, 0, {"think": 1})
    assert card["modes"]["short"] == {"kept": 0, "drafts": {"missing": 1, "wrong": 1}, "tokens": {}}


# ---- killed and resumed --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, each of which knows ten examples by heart in one mode."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("short", "think"):
        save_teacher(folder / name, [(example, example.meta["responses"][name]) for example in BY_HEART])
    return folder


@pytest.fixture
def taught(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command with two sampling teachers on ten examples, four at a time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warmup_data, "PART", 4)
    settings = "dtype: float32, temperature: 1.5, samples: 4, batch_size: 3"
    lines = "".join(f"  {name}: {{from: model, path: {models}/{name}, {settings}}}\n" for name in ("short", "think"))
    Path("taught.yaml").write_text(MODES + "data: {task: calc}\nteachers:\n" + lines)
    return lambda *more, out="out": cli.main(["warmup-data", "taught.yaml", *more, "--out", out, "--limit", "10"])


def files(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def dying_at(name: str) -> Callable[[Path, str], None]:
    """Writes files, until it is killed half-way through the one of this name."""
    write = warmup_data.write_atomically

    def dying(file: Path, text: str) -> None:
        if str(file).endswith(name):
            file.with_name(file.name + ".part").write_text(text[: len(text) // 2])
            raise KeyboardInterrupt
        write(file, text)

    return dying


def test_a_run_killed_at_any_write_ends_in_the_same_bytes(taught: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taught() == 0
    undisturbed = files("out")
    card = json.loads(undisturbed["card.json"])
    assert 0 < card["modes"]["think"]["kept"] <= 10
    assert card["modes"]["think"]["drafts"].get("wrong", 0) + card["modes"]["short"]["drafts"]["wrong"] > 0
    for name, of in card["modes"].items():
        assert sum(of["drafts"].values()) == 10 * 4, name
    write = warmup_data.write_atomically
    names = ["settings.json", *(f"parts/{mode}-{i:05d}.jsonl" for mode in ("short", "think") for i in range(3))]
    assert [name for name in undisturbed if name not in names] == ["card.json", "card.md", "responses.jsonl"]
    for name in ["settings.json", *names[1::2], "card.md", "responses.jsonl"]:
        folder = f"killed at {Path(name).stem}"

        monkeypatch.setattr(warmup_data, "write_atomically", dying_at(name))
        assert taught(out=folder) == 130
        assert name not in files(folder)
        monkeypatch.setattr(warmup_data, "write_atomically", write)
        assert taught(out=folder) == 0
        assert files(folder) == undisturbed


def test_negative_control_a_draw_that_goes_on_from_part_to_part_would_differ(
    taught: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded once per run instead of once per part, what is drawn after a kill is another draw."""
    real, write = warmup_data.open_teacher, warmup_data.write_atomically

    def counting(*of: Any) -> Any:
        teacher, calls = real(*of), itertools.count()
        return lambda part, seed: teacher(part, next(calls))

    monkeypatch.setattr(warmup_data, "open_teacher", counting)
    assert taught() == 0
    monkeypatch.setattr(warmup_data, "write_atomically", dying_at("think-00001.jsonl"))
    assert taught(out="killed") == 130
    monkeypatch.setattr(warmup_data, "write_atomically", write)
    assert taught(out="killed") == 0
    assert files("killed") != files("out")


def test_a_finished_folder_is_left_alone(taught: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taught() == 0
    Path("out/card.md").write_text("with my own notes")
    before = files("out")
    monkeypatch.setattr(warmup_data, "open_teacher", lambda *of: pytest.fail("a teacher was loaded"))
    assert taught() == 0
    assert files("out") == before


def test_one_teacher_is_gone_before_the_next_is_loaded(taught: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref] = []
    load = teachers.load_weights

    def noting(*arguments: Any, **settings: Any) -> Any:
        assert [model() for model in loaded] == [None] * len(loaded)
        model = load(*arguments, **settings)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teachers, "load_weights", noting)
    assert taught() == 0
    assert len(loaded) == 2


def test_settings_may_change_while_nothing_is_written(written: Path) -> None:
    """A misspelt path of a teacher must not cost the folder."""
    arguments = ["warmup-data", "written.yaml", "--out", "out", "--limit", "2"]
    assert cli.main([*arguments, "teachers.short={from: model, path: ./gone}"]) == 2
    assert Path("out/settings.json").exists()
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "teachers.short={from: model, path: ./gone}"]) == 2


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("teachers.think={from: model, path: think}",), "teachers"),
        (("modes.short.max_tokens=3",), "modes"),
        (("data.instruction=answer",), "data"),
        (("seed=1",), "seed"),
        (("--limit", "9"), "examples, limit"),
    ],
)
def test_other_settings_are_refused(
    taught: Callable, more: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taught.yaml").write_text(
        MODES + "data: {task: calc}\nteachers: {short: {from: written}, think: {from: written}}\n"
    )
    assert taught() == 0
    before = files("out")
    capsys.readouterr()
    arguments = ["warmup-data", "taught.yaml", "--out", "out", "--limit", "10", *more]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"siesta: error: out: begun with other settings ({named}); "
        "name another folder with --out, or delete this one\n"
    )
    assert files("out") == before


def test_data_that_changed_is_refused(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup-data", "written.yaml", "--out", "out", "--limit", "2"]) == 0
    text = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text(text.replace("#### 7", "#### 8"))
    assert cli.main(["warmup-data", "written.yaml", "--out", "out", "--limit", "2"]) == 2
    assert "begun with other settings (examples)" in capsys.readouterr().err


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_a_folder_with_other_things_is_refused(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (".", "written.yaml"):
        assert cli.main(["warmup-data", "written.yaml", "--out", out]) == 2
        message = f"siesta: error: {out}: holds other things; --out names a new or empty folder\n"
        assert capsys.readouterr().err == message
    Path("empty").mkdir()
    assert cli.main(["warmup-data", "written.yaml", "--out", "empty"]) == 0


def test_nothing_right_is_an_error_that_counts(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["warmup-data", "written.yaml", "modes.short.max_tokens=3", "modes.think.max_tokens=3", "--out", "x"])
        == 2
    )
    assert "no response was right" in (error := capsys.readouterr().err)
    assert "short: {'too long': " in error
    assert not Path("x/responses.jsonl").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["written.yaml"],
        ["written.yaml", "--out", "x", "--limit", "0"],
        ["written.yaml", "--out", "x", "--limit", "many"],
        ["--out", "x"],
    ],
)
def test_arguments_that_do_not_parse(written: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["warmup-data", *arguments])
    assert stop.value.code == 2
    assert "siesta warmup-data: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("teachers={short: {from: written}}", "teachers: mode 'think' has none"),
        ("data.train.path=gone.jsonl", "gone.jsonl: no such file"),
        ("teachers.think={from: model, path: ./gone}", "teachers.think.path: ./gone: "),
    ],
)
def test_bad_recipes_are_one_line(
    written: Path, override: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["warmup-data", "written.yaml", override, "--out", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("siesta: error: ")
    assert named in line


# ---- the card ------------------------------------------------------------------------------------------------------


def test_quantiles_are_lengths_that_occur() -> None:
    outcomes = [{"text": "x", "tokens": n, "drafts": {"right": 1}} for n in range(1, 12)]
    outcomes.append({"text": None, "tokens": 0, "drafts": {"wrong": 2, "unscorable": 1}})
    assert mode_numbers(outcomes) == {
        "kept": 11,
        "drafts": {"right": 11, "wrong": 2, "unscorable": 1},
        "tokens": {"min": 1, "p10": 2, "median": 6, "p90": 10, "max": 11},
    }


def test_the_card_shows_what_it_holds(written: Path) -> None:
    assert cli.main(["warmup-data", "written.yaml", "--out", "out", "--limit", "4"]) == 0
    text = Path("out/card.md").read_text()
    assert text == card_text(json.loads(Path("out/card.json").read_text()))
    for line in (
        '- `short` is taught by `{"from": "written"}`',
        "- verified by math (4)",
        "| think | 2 | 29 | 29 | 29 | 29 | 36 |",
        "| right | 4 | 2 |",
        "| too long | 0 | 1 |",
        "- too long: more tokens than the mode's `max_tokens`",
    ):
        assert line in text.splitlines()


def test_lengths_are_those_of_the_rows_in_training() -> None:
    (outcome,) = verified([EXAMPLE], [[Draft("1 2 = 3")]], JUDGE, THINK)
    assert outcome.tokens == len(response_ids(JUDGE.tokenizer, "1 2 = 3"))
