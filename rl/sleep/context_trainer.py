"""ContextTrainer: what DeGRPO trainers share that sleep on contexts, whatever the state.

    context c -> J sleeps -> m queries -> G answers          J = 1 where a state is a function of its context

A generation batch holds whole contexts, each with m queries of its own; a share of the contexts is asked without a
state, so that the mode policy meets both. What is overridden: `_get_train_sampler`.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from siesta.data.errors import DataError, RecipeError
from siesta.rl.advantages import Rollouts
from siesta.rl.config import DeGRPOConfig, optimizer_steps
from siesta.rl.judge import Judge
from siesta.rl.metrics import sleep_metrics
from siesta.rl.resumable import EpochOrder
from siesta.rl.sleep import credit
from siesta.rl.sleep_section import SleepSection
from siesta.rl.trainer import DeGRPOTrainer


class BlockSampler(Sampler[int]):
    """TRL's order of rows with blocks in the place of rows: the rows of a block follow each other, each repeated."""

    def __init__(self, blocks: Sequence[Sequence[int]], repeats: int, **settings: Any):
        self.blocks, self.repeats = blocks, repeats
        self.order = RepeatSampler(cast(Any, range(len(blocks))), mini_repeat_count=1, **settings)

    def __iter__(self):
        for block in self.order:
            for row in self.blocks[block]:
                yield from [row] * self.repeats

    def __len__(self) -> int:
        return len(self.order) * len(self.blocks[0]) * self.repeats


def check_batch(config: DeGRPOConfig, queries: int) -> None:
    """Raises RecipeError unless a rank's generation batch is a whole number of contexts."""
    block = queries * cast(int, config.num_generations)
    sleeps = cast(int, config.num_generations) // config.group
    drawn = f"sleep.sleeps {sleeps} x " if sleeps > 1 else ""
    rows = config.per_device_train_batch_size * cast(int, config.steps_per_generation)
    if rows % block:
        raise RecipeError(
            f"rl.per_device_train_batch_size: {rows} rollouts of a device are no whole number of contexts: each has "
            f"sleep.queries {queries} x {drawn}rl.num_generations {config.group} = {block}"
        )


class ContextTrainer(DeGRPOTrainer):
    """DeGRPO in blocks of m queries a context.

    Args:
        model, judge: As for DeGRPOTrainer.
        args: `num_generations` is J * G.
        sleep_section: The recipe's.
        kwargs: Passed on. Rows of the data set have `context` and `query` too; those of a context follow each other.

    Raises:
        RecipeError: A device's batch does not hold whole contexts.
        DataError: No context has as many queries.
    """

    def __init__(self, model, judge: Judge, args: DeGRPOConfig, *, sleep_section: SleepSection, **kwargs):
        self.sleep_section = sleep_section
        check_batch(args, sleep_section.queries)
        super().__init__(model, judge, args, **kwargs)
        self.sleeps = cast(int, args.num_generations) // self.group
        self.block = sleep_section.queries * self.sleeps * self.group  # rollouts of a context

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        """Blocks of m queries, so that a batch holds all queries of its contexts."""
        examples = cast(Dataset, self.train_dataset if dataset is None else dataset)
        queries, settings = self.sleep_section.queries, self.method
        blocks = credit.query_blocks(examples["context"], queries)
        contexts = cast(int, settings.generation_batch_size) // self.block
        if len(blocks) < contexts:
            raise DataError(
                f"data: {len(blocks)} contexts have sleep.queries {queries} rows that follow each other, a batch "
                f"needs {contexts}; lower sleep.queries, or ask a task for more (data.queries, data.train_size)"
            )
        rows = BlockSampler(
            blocks,
            self.sleeps * self.group,
            batch_size=contexts,
            repeat_count=self.num_iterations * cast(int, settings.steps_per_generation),
            shuffle=bool(self.shuffle_dataset),
            seed=settings.seed,
        )
        return EpochOrder(rows, rows.order, self._epoch)

    def _contexts(self, inputs: Sequence[dict]) -> tuple[list[str], list[str]]:
        """The contexts of this rank's generation batch, and the kind of state that each one's queries come with."""
        contexts = [row["context"] for row in inputs[:: self.block]]
        # A rank counts its own contexts only, so all ranks sleep on as many: writing can be a collective.
        batches = self.state.global_step // optimizer_steps(self.method)
        kinds = credit.state_kinds(
            len(contexts),
            self.sleep_section.stateless,
            first=batches * len(contexts),
            keep_context=self.sleep_section.keep_context,
        )
        return contexts, kinds

    def _log_kinds(
        self, kinds: Sequence[str], rollouts: Rollouts, tokens: torch.Tensor, advantages: torch.Tensor
    ) -> None:
        """Numbers by kind of state; of what was written, (S, J) each, `tokens` and `advantages` (see SleepTrainer)."""
        places = torch.tensor([credit.KINDS.index(kind) for kind in kinds]).repeat_interleave(self.block)
        numbers = sleep_metrics(
            self.modes.names,
            rollouts,
            self._gathered(places),
            kinds=credit.KINDS,
            tokens=self._gathered(tokens),
            advantages=self._gathered(advantages),
        )
        for name, value in numbers.items():
            self._current_metrics[name].append(value)
