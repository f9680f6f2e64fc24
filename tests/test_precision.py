"""The dtype a run is asked for is that of its weights everywhere, and updates that bfloat16 loses are pointed out."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import TrainingArguments

from siesta.rl import context as context_module
from siesta.rl import train
from siesta.rl.precision import lost_updates, training_autocast
from siesta.rl.recipe import RLSection
from tests.test_end_to_end import arguments


def settings(rate: float, **fields: str) -> TrainingArguments:
    return TrainingArguments(learning_rate=rate, bf16=False, use_cpu=True, **fields)  # pyright: ignore[reportArgumentType]


def after_steps(rate: float, dtype: torch.dtype, start: float = 0.02, steps: int = 20) -> float:
    """A weight after some steps of AdamW down a constant slope."""
    weight = torch.nn.Parameter(torch.tensor([start], dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.item()


def test_rounding_swallows_small_updates_by_hand() -> None:
    # 0.02 lies in [2^-6, 2^-5), where bfloat16 has a spacing of 2^-13: an update must reach half of it, 6.1e-5.
    start = torch.tensor(0.02, dtype=torch.bfloat16).item()
    assert after_steps(5e-6, torch.bfloat16) == start
    assert after_steps(2**-13, torch.bfloat16, steps=1) == start - 2**-13
    # Master weights keep what is lost above: 20 steps of 5e-6.
    assert after_steps(5e-6, torch.float32) == pytest.approx(0.02 - 20 * 5e-6, abs=1e-7)


@pytest.mark.parametrize("rate", [1e-6, 9e-6])
def test_the_line_names_the_size_above_which_nothing_moves(rate: float) -> None:
    line = lost_updates(settings(rate), torch.bfloat16)
    assert line is not None
    assert f"{512 * rate:.2g}" in line
    assert "model.dtype: float32" in line
    assert "\n" not in line
    above = 1.01 * 512 * rate
    assert after_steps(rate, torch.bfloat16, above) == torch.tensor(above, dtype=torch.bfloat16).item()
    small = 0.99 * 128 * rate  # and smaller ones do move
    assert after_steps(rate, torch.bfloat16, small) != torch.tensor(small, dtype=torch.bfloat16).item()


@pytest.mark.parametrize(
    ("rate", "dtype", "fields"),
    [
        (1e-6, torch.float32, {}),
        (1e-5, torch.bfloat16, {}),
        (1e-6, torch.bfloat16, {"optim": "adafactor"}),
    ],
    ids=["master-weights", "large-rate", "another-optimizer"],
)
def test_negative_control_no_line(rate: float, dtype: torch.dtype, fields: dict) -> None:
    assert lost_updates(settings(rate, **fields), dtype) is None


def test_measuring_uses_the_precision_of_training() -> None:
    def product(**fields: bool) -> torch.dtype:
        weight = torch.nn.Linear(4, 4)
        with training_autocast(RLSection.model_validate(fields), torch.device("cpu")):
            return weight(torch.ones(1, 4)).dtype

    assert product(bf16=True) == torch.bfloat16
    assert product(bf16=False) == torch.float32
    assert product(fp16=True) == torch.float16
    assert product() == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a mapping


def test_a_bfloat16_run_is_bfloat16_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []
    load = context_module.load_whole

    def noting(folder: Path, *settings):
        model = load(folder, *settings)
        loaded.append((folder.name, next(model.parameters()).dtype))
        return model

    monkeypatch.setattr(context_module, "load_whole", noting)
    assert train.main(arguments(tmp_path, "model.dtype=bfloat16", "rl.learning_rate=1e-6")) == 0
    run = tmp_path / "smoke"
    assert {stage: dtypes(run / stage) for stage in ("model", "warmup", "rl", "export")} == {
        stage: {"BF16"} for stage in ("model", "warmup", "rl", "export")
    }
    # The gate, and the evaluation before and after RL.
    assert loaded == [("warmup", torch.bfloat16), ("warmup", torch.bfloat16), ("rl", torch.bfloat16)]
    printed = capsys.readouterr().out
    assert "rl: learning_rate 1e-06 with bfloat16 weights" in printed
    assert "warmup: learning_rate" not in printed
