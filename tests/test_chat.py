"""siesta chat: single questions, their mode, probability, tokens; commands; bad input in one line."""

import io
from pathlib import Path

import pytest
from transformers import GenerationConfig

from siesta.data.errors import ModelError
from siesta.rl import cli
from siesta.rl.chat import Chat, commanded
from siesta.rl.serving import Choice, RequestError, write_rules
from tests.helpers import tell_apart, tiny_judge, tiny_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as an export leaves it."""
    folder = tmp_path_factory.mktemp("export")
    judge, model = tiny_judge(), tiny_model()
    tell_apart(model, judge.tokenizer)
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    judge.tokenizer.save_pretrained(folder)
    write_rules(folder, judge.modes, eos_id=1, instruction="=")
    return folder


def test_a_reply_is_in_the_mode_asked_for_and_within_its_budget(exported: Path) -> None:
    chat = Chat(str(exported), "cpu")
    for name, most in (("short", 2), ("think", 12)):
        found = chat.reply("a b", Choice(name), temperature=None)
        assert found.mode.name == name
        assert 0 < len(found.ids) <= most
        assert sum(found.policy) == pytest.approx(1.0)
    free = chat.reply("a b", Choice(), temperature=None)
    likelier = max(zip(free.policy, chat.rules.modes, strict=True), key=lambda pair: pair[0])[1]
    assert free.mode == likelier
    again = chat.reply("a b", Choice(threshold=max(free.policy)), temperature=None)
    assert again.mode.name == "short", "think is not above the larger probability"
    assert free.line(chat.rules).startswith(f"[{likelier.name}] p(short) {free.policy[0]:.3f}, p(think) ")


def test_lines_are_answered_one_by_one(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "a b\n\n/mode think\na b\n/mode deep\n/threshold much\n/help\n/threshold 1\na b\n/quit\na b\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert cli.main(["chat", str(exported), "--mode", "short"]) == 0
    shown = capsys.readouterr().out
    assert [line.split("]")[0][1:] for line in shown.splitlines() if line.startswith("[")] == [
        "short",
        "think",
        "short",
    ]
    assert "mode: 'deep' is unknown; this model has auto, short, think\n" in shown
    assert "threshold: 'much' is no number\n" in shown
    assert "/help: unknown; there are /mode, /threshold, /quit\n" in shown


def test_the_end_of_the_input_ends_the_chat(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["chat", str(exported)]) == 0


def test_commands_change_the_choice(exported: Path) -> None:
    rules = Chat(str(exported), "cpu").rules
    assert commanded("/mode think", Choice(), rules) == Choice("think")
    assert commanded("/threshold 0.25", Choice("think"), rules) == Choice(threshold=0.25)
    with pytest.raises(RequestError, match=r"threshold: 2\.0 is no number from 0 to 1"):
        commanded("/threshold 2", Choice(), rules)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--mode", "deep"], "mode: 'deep' is unknown; this model has auto, short, think"),
        (["--threshold", "1.5"], "threshold: 1.5 is no number from 0 to 1"),
        (["--threshold", "0.5", "--mode", "short"], "threshold: belongs to mode auto, and short was asked for"),
    ],
)
def test_bad_wishes_are_one_line(
    exported: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", str(exported), *arguments]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert shown[0].startswith(f"siesta: error: {line}")


def test_a_model_without_modes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(tmp_path)]) == 2
    assert "no modes.json" in capsys.readouterr().err


def test_a_tokenizer_that_lost_a_control_token_is_refused(exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rules = tmp_path / "modes.json"
    rules.write_text(rules.read_text().replace("<think>", "<ponder>"))
    with pytest.raises(ModelError, match="its tokenizer does not have the control token '<ponder>'"):
        Chat(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Chat(str(tmp_path), "cpu")
