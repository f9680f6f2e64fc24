"""The warm-up on packed rows: the loss and gradient of TRL's padded batch, and nothing of one row in another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from siesta.rl.attention import BACKENDS
from siesta.rl.warmup import IGNORED, warmup_rows
from siesta.rl.warmup_trainer import WarmupTrainer, packed_inputs
from tests.helpers import PACKED_SDPA, calc_examples, save_tiny_model, tiny_judge

JUDGE = tiny_judge()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def trainer(folder: Path, out: Path) -> Any:
    """On two-mode rows of calc, in float32 on the CPU."""
    rows = warmup_rows(calc_examples(12), JUDGE, pairing="paired", shares=None, instruction="", seed=0)
    args = SFTConfig(
        output_dir=str(out), use_cpu=True, bf16=False, report_to=[], max_length=None, gradient_checkpointing=False
    )
    made: Any = WarmupTrainer(model=str(folder), args=args, train_dataset=rows, processing_class=JUDGE.tokenizer)
    made.model.eval()  # no dropout in these models; TRL asks `training` only to file its metrics
    return made


def loss_and_gradient(made: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    made.model.zero_grad()
    loss = made.compute_loss(made.model, dict(batch), num_items_in_batch=torch.tensor(29))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])
    metrics = {name: values[-1] for name, values in made._metrics["eval"].items()}
    return loss.detach(), gradient, metrics


def test_a_packed_batch_has_the_loss_the_gradient_and_the_metrics_of_the_padded_one(
    folder: Path, tmp_path: Path
) -> None:
    made = trainer(folder, tmp_path)
    batch = made.data_collator([made.train_dataset[i] for i in range(10)])
    assert (batch["attention_mask"] == 0).any(), "padding is what is to go away"
    padded = loss_and_gradient(made, batch)
    made.pack(PACKED_SDPA, compiled=False)
    packed = loss_and_gradient(made, batch)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-5, atol=1e-6)
    assert packed[2] == pytest.approx(padded[2], rel=1e-5)


def test_rows_that_see_each_other_have_another_loss(folder: Path, tmp_path: Path) -> None:
    """Negative control: the same pack with positions that run on is one long sequence."""
    made = trainer(folder, tmp_path)
    batch = made.data_collator([made.train_dataset[i] for i in range(10)])
    apart = packed_inputs(batch, PACKED_SDPA)
    together = apart | {"position_ids": torch.arange(apart["input_ids"].shape[1])[None]}
    losses = [SFTTrainer.compute_loss(made, made.model, dict(inputs)) for inputs in (apart, together)]
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_packed_rows_by_hand() -> None:
    """Rows of 3 and 2 tokens: positions start anew, padding is gone, no end learns the next one's start."""
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[IGNORED, 6, 7], [8, 9, IGNORED]]),
    }
    packed = packed_inputs(inputs, BACKENDS["varlen"])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert inputs["labels"][1, 0] == 8, "the batch itself is left as it was"
