"""SIGTERM and SIGINT: a checkpoint and exit code 143 or 130, and the same command goes on."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from siesta.rl import signals
from siesta.rl.signals import REPEAT, SIGNALS, SignalStop, StopRequest
from siesta.rl.train import main
from siesta.rl.trainer import DeGRPOTrainer
from siesta.rl.warmup_trainer import WarmupTrainer

SMALL = ["model.embedded={layers: 1, hidden_size: 16, heads: 2}", "data.train_size=100", "evaluate.items=4"]
SHORT = ["warmup.max_steps=6", "warmup.check_every=6", "rl.max_steps=3", "rl.save_steps=100", "rl.logging_steps=1"]


def arguments(folder: Path) -> list[str]:
    return ["smoke", f"tracking.output_dir={folder}", *SHORT, *SMALL]


class Exit(BaseException):
    """In the place of os._exit."""


def test_the_first_signal_waits_for_the_training_and_the_second_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    now = [100.0]
    request = StopRequest(clock=lambda: now[0])
    request.training = True
    request.handle(signal.SIGTERM, None)
    assert request.received == signal.SIGTERM
    now[0] += REPEAT - 0.1
    request.handle(signal.SIGTERM, None)  # the same one, passed on by a launcher
    now[0] += 0.2
    with pytest.raises(Exit, match="130"):
        request.handle(signal.SIGINT, None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_of_a_training_the_first_one_ends_the_run(number: signal.Signals, code: int) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    request = StopRequest()
    with pytest.raises(SignalStop, match=f"{number.name}: stopped") as raised, request.handled():
        os.kill(os.getpid(), number)
    assert raised.value.exit_code == code
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def weights(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "smoke" / "rl").state_dict()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(folder)) == 0
    return weights(folder)


@pytest.mark.parametrize(
    ("kind", "stage", "number", "code"),
    [
        (DeGRPOTrainer, "rl", signal.SIGTERM, 143),
        (WarmupTrainer, "warmup", signal.SIGINT, 130),
    ],
)
def test_a_stopped_run_saves_and_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    undisturbed: dict[str, torch.Tensor],
    kind: type[DeGRPOTrainer] | type[WarmupTrainer],
    stage: str,
    number: signal.Signals,
    code: int,
) -> None:
    step = kind.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "training_step", signalled)
        assert main(arguments(tmp_path)) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    folder = tmp_path / "smoke" / stage
    assert line == (
        f"siesta: {number.name}: stopped at step 2; the same command goes on from {folder / 'checkpoint-2'}"
    )
    assert stage not in json.loads((tmp_path / "smoke" / "stages.json").read_text())
    assert not (folder / "model.safetensors").exists(), "what follows a whole training was not done"
    assert main(arguments(tmp_path)) == 0
    ended = weights(tmp_path)
    for name, weight in undisturbed.items():
        assert torch.equal(weight, ended[name]), name


def test_an_evaluation_is_stopped_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from siesta.rl.context import Context

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(Context, "load", signalled)
    assert main([*arguments(tmp_path), "warmup.enabled=false"]) == 143
    assert "siesta: SIGTERM: stopped; the same command does the stage again" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "smoke" / "stages.json").read_text())) == ["model"]
