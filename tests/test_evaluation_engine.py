"""evaluate.engine: vllm writes the responses of the final evaluation.

A stand-in that answers by `generate` takes vLLM's place, so both engines must come to the same numbers.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from siesta.rl import machine, train
from siesta.rl.generation import complete
from siesta.rl.models import load_model
from siesta.rl.modes import Mode
from siesta.rl.train import main

SMALL = [
    "model.embedded={layers: 1, hidden_size: 16, heads: 2}",
    "data.train_size=400",
    "warmup.max_steps=2",
    "warmup.check_every=6",
    "warmup.min_mass=0",
    "rl.max_steps=1",
    "rl.vllm_gpu_memory_utilization=0.1",
    "evaluate.items=16",
    "evaluate.every=0",
    "evaluate.batch_size=256",
    "export.enabled=false",
]


class LLM:
    """Stands for vLLM's LLM: notes how it is made and answers with the weights of the folder it is given."""

    made: list[dict] = []  # noqa: RUF012
    autocast: list[bool] = []  # noqa: RUF012

    def __init__(self, model: str, **settings: Any) -> None:
        self.made.append({"folder": Path(model).name} | settings)
        self.model = load_model(Path(model))

    def generate(self, asked: list[dict], params: list[SimpleNamespace], use_tqdm: bool) -> list[SimpleNamespace]:
        self.autocast.append(torch.is_autocast_enabled("cuda"))
        prompts = [prompt["prompt_token_ids"] for prompt in asked]
        (control,) = {ids[-1] for ids in prompts}
        assert not params[0].detokenize
        mode = Mode("any", "<any>", control, params[0].max_tokens)
        (end,) = params[0].stop_token_ids
        heat = params[0].temperature or None
        settings = {"batch_size": 256, "pad_id": 0, "eos_id": end}
        written = complete(self.model, [ids[:-1] for ids in prompts], mode, temperature=heat, **settings)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in written]


def evaluated(folder: Path, name: str, *overrides: str) -> dict:
    assert main(["smoke", f"tracking.output_dir={folder}", f"tracking.run={name}", *SMALL, *overrides]) == 0
    return json.loads((folder / name / "evaluation.json").read_text())


def test_both_engines_measure_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled: the stand-in draws the same numbers from the same random state."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))  # type: ignore
    monkeypatch.setattr(train, "check_engine", lambda key, without: None)
    expected = evaluated(tmp_path, "generate")
    assert LLM.made == []
    assert evaluated(tmp_path, "vllm", "evaluate.engine=vllm") == expected
    before, after = LLM.made  # an engine for each folder, none for the gate
    assert (before["folder"], after["folder"]) == ("warmup", "rl")
    assert (before["dtype"], before["gpu_memory_utilization"], before["seed"]) == ("float32", 0.1, 0)
    assert before["max_model_len"] > 12
    assert not any(LLM.autocast)


def test_an_engine_that_cannot_run_here_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["smoke", f"tracking.output_dir={tmp_path}", *SMALL, "evaluate.engine=vllm"]
    monkeypatch.setattr(machine, "default_device", lambda: "cpu")
    monkeypatch.setattr(machine, "check_vllm", lambda key, without: None)
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip() == (
        "siesta: error: evaluate.engine: vLLM needs a CUDA device, and there is none; set engine: generate"
    )
    assert list(tmp_path.iterdir()) == []
