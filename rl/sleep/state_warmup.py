"""The warm-up of a sleep whose state is tensors: responses are taught behind the state, and the loss trains the sleep.

Every example is shown in a state that is drawn: behind that of its context, without the context in the prompt, or as
it stands. Nothing is taught about the state itself: what it has to hold is what the responses need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from siesta.data.schema import Example
from siesta.rl.sleep.scoring import behind, fanned_out
from siesta.rl.sleep.tensors import TensorSleep
from siesta.rl.warmup_trainer import WarmupTrainer


def state_examples(examples: Sequence[Example], *, seed: int) -> tuple[list[Example], list[str]]:
    """Every example as it is asked, and what is slept on for it: its context for every second one, drawn, else "".

    Behind a state the responses are those that fit one, `meta["responses_with_notes"]`, where the example has them.
    """
    # Not the numbers that `warmup_rows` draws modes from: each state would have a mode of its own.
    rng = Random(f"states {seed}")
    asked, contexts = [], []
    for example in examples:
        slept = example.context != "" and rng.random() < 0.5
        contexts.append(example.context if slept else "")
        if slept:
            fitting = example.meta.get("responses_with_notes")
            meta = example.meta if fitting is None else example.meta | {"responses": fitting}
            example = replace(example, context="", meta=meta)
        asked.append(example)
    return asked, contexts


def with_contexts(rows: Dataset, contexts: Sequence[str]) -> Dataset:
    """Rows with the column `context`; each context has as many rows, one behind the other, as there are modes shown.

    Args:
        rows: Of `siesta.rl.warmup.warmup_rows`.
    """
    repeats = len(rows) // len(contexts)
    return rows.add_column("context", [context for context in contexts for _ in range(repeats)])  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class ContextCollator:
    """A collator that hands on what is slept on for each row, `contexts`, beside the batch of another."""

    collate: Callable[[list[dict]], dict[str, Any]]

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        bare = [{key: value for key, value in row.items() if key != "context"} for row in rows]
        return self.collate(bare) | {"contexts": [row["context"] for row in rows]}


class StateWarmupTrainer(WarmupTrainer):
    """WarmupTrainer whose rows with a `context` are read behind its state, with a gradient through the sleep.

    Rows stay padded, on the right: a row behind a state cannot be packed.

    Args:
        way: How to sleep.
        passes: N.
        settings: Of SFTTrainer; rows have `context`, empty where nothing is slept on.
    """

    def __init__(self, *, way: TensorSleep, passes: int, **settings: Any):
        super().__init__(**settings)
        self.way, self.passes = way, passes
        self.data_collator = ContextCollator(self.data_collator)

    def pack_if_possible(self, attention: str, *, compiled: bool) -> str | None:
        """See `WarmupTrainer.pack_if_possible`: never."""
        return "rows behind states stay padded"

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "context" not in self._signature_columns:
            self._signature_columns.append("context")

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss of the rows behind a state, and of the others: sums over the same number of tokens."""
        contexts = inputs["contexts"]
        tensors = {key: value for key, value in inputs.items() if key != "contexts"}
        losses = []
        for slept in (True, False):
            rows = [row for row, context in enumerate(contexts) if (context != "") == slept]
            if rows:
                part = {key: value[rows] for key, value in tensors.items()}
                if slept:
                    part |= self._behind(model, [contexts[row] for row in rows], part["attention_mask"])
                losses.append(super().compute_loss(model, part, *args, **kwargs))
        return torch.stack(losses).sum()

    def _behind(self, model: Any, contexts: Sequence[str], mask: torch.Tensor) -> dict[str, Any]:
        """States in front of rows, and the mask of both, (R, K + L)."""
        with self.accelerator.autocast():
            whole = cast(PreTrainedModel, self.accelerator.unwrap_model(model))
            state = fanned_out(self.way, whole, contexts, self.passes)
        arguments = behind(self.way, state, torch.arange(mask.shape[1], device=mask.device).expand_as(mask))
        held = mask.new_ones(len(mask), arguments["past_key_values"].get_seq_length())
        return arguments | {"attention_mask": torch.cat([held, mask], dim=1)}
