"""The warm-up on packed rows: the loss and gradient of TRL's padded batch, and nothing of one row in another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from siesta.rl.attention import BACKENDS
from siesta.rl.warmup import IGNORED, warmup_rows
from siesta.rl.warmup_trainer import WarmupTrainer, packed_inputs, row_loss
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


# ---- rows of very different lengths --------------------------------------------------------------------------------


def test_what_a_row_weighs_by_hand() -> None:
    """Two rows with one and four tokens to learn, of CE log 2 each: 1 and 4 tokens weigh 1 and 4, 1 and 2, 1 and 1."""
    logits = torch.zeros(2, 6, 2)
    labels = torch.tensor([[IGNORED, 1, IGNORED, IGNORED, IGNORED, IGNORED], [IGNORED, 0, 1, 1, 0, IGNORED]])
    for power, weights in ((1.0, 1 + 4), (0.5, 1 + 2), (0.0, 1 + 1)):
        expected = weights / 2 * torch.tensor(2.0).log()
        torch.testing.assert_close(row_loss(logits, labels, power), expected, rtol=1e-6, atol=0)


def test_the_first_label_of_a_row_and_padding_weigh_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 3)
    labels = torch.tensor([[2, 1, 0, IGNORED]])
    longer = torch.cat([logits, torch.randn(1, 2, 3)], dim=1)
    padded = torch.cat([labels, torch.full((1, 2), IGNORED)], dim=1)
    assert row_loss(longer, padded, 0.5) == row_loss(logits, torch.tensor([[IGNORED, 1, 0, IGNORED]]), 0.5)
    assert row_loss(logits, torch.full((1, 4), IGNORED), 0.5) == 0


def test_power_one_is_the_loss_over_tokens_up_to_a_factor(folder: Path, tmp_path: Path) -> None:
    """TRL's loss is a sum over tokens over their number in the step (29 here); another power is another loss."""
    made = trainer(folder, tmp_path)
    batch = made.data_collator([made.train_dataset[i] for i in range(10)])
    expected, _, _ = loss_and_gradient(made, batch)
    output = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(row_loss(output.logits, batch["labels"], 1.0) * 10 / 29, expected, rtol=1e-5, atol=1e-6)
    made.length_power = 0.5
    assert made.pack_if_possible("auto", compiled=False) is None, "rows stay padded"
    loss, gradient = of_rows(made, batch)
    torch.testing.assert_close(loss, row_loss(output.logits, batch["labels"], 0.5), rtol=1e-6, atol=1e-7)
    assert gradient.norm() > 0
    assert (loss - expected).abs() > 1e-2


def test_two_micro_batches_make_the_step_of_one(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path)
    made.length_power = 0.5
    rows = [made.train_dataset[i] for i in range(10)]
    whole, _ = of_rows(made, made.data_collator(rows))
    made.args.gradient_accumulation_steps = 2
    halves = [of_rows(made, made.data_collator(part))[0] for part in (rows[:5], rows[5:])]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-6, atol=1e-7)


def of_rows(made: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient with a power: TRL files no metrics then."""
    made._metrics["eval"].clear()
    loss, gradient, metrics = loss_and_gradient(made, batch)
    assert not metrics
    return loss, gradient
