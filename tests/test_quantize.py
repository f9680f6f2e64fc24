"""QLoRA: what is refused, what is quantised, and that each stage's adapter is merged into unquantised weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from siesta.data.errors import ModelError
from siesta.rl import quantize, train
from siesta.rl.quantize import quantization_config
from siesta.rl.recipe import ModelSection
from siesta.rl.trainer import DeGRPOTrainer
from tests.test_end_to_end import arguments

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def section(quantization: dict | None, **fields) -> ModelSection:
    return ModelSection(**({"lora": LORA, "quantization": quantization, "dtype": "bfloat16"} | fields))


@pytest.mark.parametrize(
    ("settings", "fields", "line"),
    [
        ({"load_in_4bit": True}, {"lora": None}, r"model\.quantization: .* set model\.lora as well"),
        ({"load_in_4bit": True}, {"dtype": "float32"}, r"model\.quantization: .* set model\.dtype: bfloat16"),
        ({"load_in_4bits": True}, {}, r"model\.quantization\.load_in_4bits: BitsAndBytesConfig knows .*load_in_4bit"),
        ({"load_in_4bit": "yes"}, {}, r"model\.quantization: "),
        ({"load_in_8bit": True}, {}, r"model\.quantization: set load_in_4bit: true"),
        ({}, {}, r"model\.quantization: set load_in_4bit: true"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict, fields: dict, line: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ModelError, match=line):
        quantization_config(section(settings, **fields))


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"model\.quantization: needs bitsandbytes; pip install 'siesta-rl\[qlora\]'"):
        quantization_config(section({"load_in_4bit": True}))


def test_defaults_are_those_of_trl_and_settings_win() -> None:
    pytest.importorskip("bitsandbytes")
    assert quantization_config(section(None)) is None
    config = quantization_config(section({"load_in_4bit": True}))
    assert config is not None
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"}
    config = quantization_config(section(given))
    assert config is not None
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("fp4", torch.float32)


def test_a_qlora_run_merges_into_unquantised_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    kinds = []
    begin = DeGRPOTrainer.train

    def noting(self, *args, **kwargs):
        model = self.model.get_base_model()
        kinds.extend(type(m).__name__ for m in (model.model.layers[0].mlp.up_proj, model.get_input_embeddings()))
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(DeGRPOTrainer, "train", noting)
    small = ["model.embedded={layers: 1, hidden_size: 64, heads: 2}", "model.dtype=bfloat16", "rl.learning_rate=0.02"]
    lora = "model.lora={r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}"
    assert train.main(arguments(tmp_path, lora, *small, "model.quantization={load_in_4bit: true}")) == 0
    run = tmp_path / "smoke"
    assert kinds == ["Linear4bit", "Embedding"]
    before, after = load_file(run / "warmup" / "model.safetensors"), load_file(run / "rl" / "model.safetensors")
    adapter = load_file(run / "rl" / "adapter" / "adapter_model.safetensors")
    assert set(before) == set(after)
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16, name
        if "q_proj" not in name and "v_proj" not in name:
            assert torch.equal(weight, before[name]), name
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        low, high = adapter[f"{stem}.lora_A.weight"].float(), adapter[f"{stem}.lora_B.weight"].float()
        update = 2 * high @ low  # lora_alpha / r
        assert update.norm() > 0.01 * before[name].float().norm(), "the adapter was trained"
        error = (weight.float() - before[name].float() - update).norm() / update.norm()
        # Negative control: the base as the adapter saw it in training.
        packed, state = functional.quantize_4bit(before[name].float(), quant_type="nf4")
        seen = functional.dequantize_4bit(packed, state)
        assert 10 * error < (weight.float() - seen - update).norm() / update.norm()
    assert "quantization_config" not in json.loads((run / "export" / "config.json").read_text())
    assert next(AutoModelForCausalLM.from_pretrained(run / "export").parameters()).dtype == torch.bfloat16
