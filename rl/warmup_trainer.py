"""TRL's SFTTrainer on packed rows, for the warm-up.

Half of its rows are a prompt and a few tokens, the others hold a whole working. Padded to the longest, most of a batch
is padding; sorted into batches by length, a batch shows one mode of one kind of question, and learning slows down. So
batches stay mixed and lose their padding where the machine has an attention that tells packed rows apart.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.nn import functional
from torch.utils.data import RandomSampler, Sampler
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from siesta.rl.attention import Backend, choose_backend, packed_row
from siesta.rl.guards import FiniteSteps
from siesta.rl.machine import compute_dtype
from siesta.rl.packing import lay_out
from siesta.rl.passes import layers_of, without_adapters
from siesta.rl.resumable import EpochShuffle, ResumableTrainer
from siesta.rl.warmup import IGNORED


class WarmupTrainer(FiniteSteps, ResumableTrainer, SFTTrainer):
    """SFTTrainer whose loss is computed on one row without padding; the loss is the same. Steps are finite.

    `length_power` below 1 is for rows of very different lengths: the loss is then `row_loss`, and rows stay padded.
    """

    backend: Backend | None = None
    length_power: float = 1.0

    def pack_if_possible(self, attention: str, *, compiled: bool) -> str | None:
        """Pack rows from now on if the back end that `attention` comes to here does.

        Returns:
            A line that says which it is; None if rows stay padded.

        Raises:
            RecipeError: This machine does not have it.
        """
        if self.length_power != 1:
            return None
        model = without_adapters(cast(torch.nn.Module, self.model))
        dtype = compute_dtype(self.args, model.dtype)
        backend, line = choose_backend(attention, self.accelerator.device.type, dtype, model.config, model)
        if not backend.packed:
            return None
        self.pack(backend, compiled=compiled)
        return line

    def pack(self, backend: Backend, *, compiled: bool) -> None:
        """Pack rows from now on, for a back end that packs.

        Args:
            compiled: Compile the layers, once for packs of any length; not under ZeRO-3.
        """
        self.backend = backend
        model = without_adapters(cast(torch.nn.Module, self.model))
        model.set_attn_implementation(backend.implementation)
        if compiled and not is_deepspeed_zero3_enabled():
            for layer in layers_of(model):
                layer.compile(dynamic=True)

    def _get_train_sampler(self, train_dataset=None):
        order = super()._get_train_sampler(train_dataset)
        if type(order) is not RandomSampler:  # the recipe asks for another strategy
            return order
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochShuffle(len(order), seed, self._epoch)

    def _progress(self):
        return super()._progress() | {"tokens": self._total_train_tokens}

    def _go_on(self, progress):
        super()._go_on(progress)
        self._total_train_tokens = progress["tokens"]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss and metrics, over the packed form of `inputs`; or `row_loss`, without metrics."""
        if self.length_power != 1:
            return self._row_loss(model, inputs, *args, **kwargs)
        if self.backend is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with packed_row():
            return super().compute_loss(model, packed_inputs(inputs, self.backend), *args, **kwargs)

    def _row_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """`row_loss` as a mean over the rows of an optimizer step: each of its micro-batches has as many."""
        output = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = row_loss(output.logits, inputs["labels"], self.length_power)
        loss = loss / self.args.gradient_accumulation_steps
        return (loss, output) if return_outputs else loss


def row_loss(logits: torch.Tensor, labels: torch.Tensor, power: float) -> torch.Tensor:
    """Cross-entropy in which a row of T labels weighs T ** power: the mean over rows of T ** (power - 1) sum_t CE.

    The mean over tokens, which is power 1 up to a factor, is about the long rows: beside notes of 60 tokens an answer
    of one is a hundredth of it. Power 0 weighs every row alike.

    Args:
        logits: (R, L, V).
        labels: (R, L), `IGNORED` where nothing is learned; the label at t is predicted at t - 1.
    """
    target = labels[:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none", ignore_index=IGNORED)
    counts = (target != IGNORED).sum(dim=1).clamp(min=1)
    return (losses.sum(dim=1) * counts.to(losses.dtype) ** (power - 1)).mean()


def packed_inputs(inputs: dict[str, torch.Tensor], backend: Backend) -> dict[str, Any]:
    """A padded batch as one row.

    Args:
        inputs: `input_ids`, `attention_mask` and `labels`, (R, L), padded on the right. The first label of a row is
            never learned: nothing in its row comes before it, and in the pack another row does.

    Returns:
        `input_ids`, `position_ids` and `labels`, (1, S), and what the back end needs to tell the rows apart.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pack = lay_out(ids, mask, ids.shape[1] - 1, packed=True)
    labels = inputs["labels"].clone()
    labels[:, 0] = IGNORED
    return pack.inputs | {"labels": labels[mask.bool()][None]} | backend.arguments(pack)


class SortedSteps(Sampler[int]):
    """The rows of each optimizer step by length, so that its micro-batches are padded little. Written notes are many
    times as long as answers; the gradient of the step is the same, because the loss is a mean over its tokens.

    Args:
        order: Of all rows.
        lengths: Tokens of each row.
        step: Rows of an optimizer step.
    """

    def __init__(self, order: Sampler[int], lengths: Sequence[int], step: int):
        self.order, self.lengths, self.step = order, lengths, step

    def __iter__(self) -> Iterator[int]:
        rows = list(self.order)
        for start in range(0, len(rows), self.step):
            yield from sorted(rows[start : start + self.step], key=lambda row: self.lengths[row])

    def __len__(self) -> int:
        return len(cast(Any, self.order))


class SortedWarmupTrainer(WarmupTrainer):
    """WarmupTrainer whose order of rows is `SortedSteps`."""

    def _get_train_sampler(self, train_dataset=None):
        order = cast(Sampler[int], super()._get_train_sampler(train_dataset))
        lengths = [len(ids) for ids in cast(Any, self.train_dataset)["input_ids"]]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SortedSteps(order, lengths, step)
