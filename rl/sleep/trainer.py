"""SleepTrainer: DeGRPO behind a sleep that writes notes, and the writer is trained by what the answers earn.

    context c -> J sleeps -> m queries -> G answers

In TRL's terms a query is repeated J * G times. Before the rollouts every context of the batch is slept on J times by
the policy of this step and the prompts are replaced by those of a reader, so everything behind them (mode plan,
rollouts, rewards, credit, engines) is DeGRPO's own. After the rewards the notes join the batch as rows with weights
of their own: the loss of the notes, of the modes and of the answers are means apart.

What is overridden, beside what ContextTrainer overrides: `_generate_and_score_completions`, `_add_weights`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.grpo_trainer import use_adapter

from siesta.data.prompts import messages, pad_id
from siesta.data.schema import Example
from siesta.rl.advantages import Credit, Rollouts, token_weights
from siesta.rl.config import SleepConfig
from siesta.rl.generation import left_pad
from siesta.rl.judge import Judge
from siesta.rl.sleep import credit
from siesta.rl.sleep.context_trainer import ContextTrainer
from siesta.rl.sleep.notes import NotesSleep, note_tokens
from siesta.rl.sleep.protocol import SleepTokens
from siesta.rl.spread import Batch, concatenate


@dataclass(frozen=True)
class Night:
    """The sleep before a generation batch, of C contexts on this rank.

    Args:
        kinds: State that each context's queries come with (`credit.KINDS`).
        slept: The contexts with notes of their own, S of them.
        actions: Written in each pass, J notes a context, S * J rows.
    """

    kinds: list[str]
    slept: list[int]
    actions: list[SleepTokens]


class SleepTrainer(ContextTrainer):
    """DeGRPO with notes.

    Args:
        model, judge, args: As for ContextTrainer.
        sleep: Writes at the temperature of the rollouts.
        kwargs: Of ContextTrainer.

    Raises:
        RecipeError, DataError: See ContextTrainer.
    """

    def __init__(self, model, judge: Judge, args: SleepConfig, *, sleep: NotesSleep, **kwargs):
        self.sleep = sleep
        super().__init__(model, judge, args, sleep_section=sleep.section, **kwargs)

    # ---- sleep -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        """Sleep first; then TRL's batch for readers, and the notes as rows of it."""
        contexts, kinds = self._contexts(inputs)
        slept = [place for place, kind in enumerate(kinds) if kind == credit.OWN]
        with self.phases("sleep"), self._writer() as write:
            copies = [contexts[place] for place in slept for _ in range(self.sleeps)]
            notes, actions = self.sleep.write(write, copies, passes=self.sleep_section.passes)
        self._night = Night(kinds, slept, actions)
        texts = {place: notes.texts[i * self.sleeps : (i + 1) * self.sleeps] for i, place in enumerate(slept)}
        read = []
        for source in credit.sources(kinds):
            read.append([None] * self.sleeps if source is None else texts[source])
        return super()._generate_and_score_completions(
            [self._reader(row, read[i // self.block][i // self.group % self.sleeps]) for i, row in enumerate(inputs)]
        )

    def _reader(self, row: dict, notes: str | None) -> dict:
        """A row of the data set with the prompt of a reader of `notes`."""
        if notes is None:
            return row
        example = Example("", row["context"], row["query"], row["answer"])
        return row | {"prompt": messages(self.sleep.reader(example, notes), self.sleep.instruction)}

    @contextmanager
    def _as_reference(self) -> Iterator[torch.nn.Module]:
        """The reference policy, as TRL has it: a model of its own, or this one without its adapter."""
        if self.ref_model is not None:
            yield cast(torch.nn.Module, self.ref_model)
            return
        model = cast(Any, self.accelerator.unwrap_model(self.model))
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield cast(torch.nn.Module, self.model)

    # ---- credit ------------------------------------------------------------------------------------------------

    def _add_weights(self, batch: dict, rollouts: Rollouts, given: Credit, own: slice) -> None:
        """Answers get DeGRPO's weights; behind them stand the notes with their own."""
        super()._add_weights(batch, rollouts, given, own)
        night = self._night
        if night.slept:
            advantages, tokens = self._write_credit(rollouts.rewards[own])
            batch |= concatenate([batch, self._write_rows(batch, advantages)])
        else:
            advantages, tokens = torch.empty(0, self.sleeps), torch.empty(0, self.sleeps)
        self._log_kinds(night.kinds, rollouts, tokens, advantages)

    def _write_credit(self, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantage and tokens of each notes of this rank, (S, J) each, from the rewards of its rollouts."""
        slept = rewards.view(-1, self.sleep_section.queries, self.sleeps, self.group)[self._night.slept]
        tokens = torch.tensor(note_tokens(self._night.actions)).float().view(-1, self.sleeps)
        # A sleep token costs `price` wake tokens, and a wake token what the recipe says.
        price = self.sleep_section.price * self.method.price_per_token
        return credit.write_advantages(credit.sleep_rewards(slept, tokens, price)), tokens

    def _write_rows(self, batch: Batch, advantages: torch.Tensor) -> Batch:
        """The written tokens of all passes as rows that `batch` can be joined with.

        Every token of notes (c, j) has weight `sleep.weight` / (N T) with T its tokens and N the texts of the
        optimizer step over all ranks; the sleep token was forced and has none. The KL term weighs as much, so that
        `beta` holds the writer as well: what moves it is mostly the choice of the mode, which shares its weights.
        """
        passes = len(self._night.actions)
        prompts = [ids for step in self._night.actions for ids in step.prompt_ids]
        completions = [torch.tensor(ids) for step in self._night.actions for ids in step.completion_ids]
        prompt_ids, prompt_mask = left_pad(prompts, pad_id(self._tokenizer))
        ids = pad_sequence(completions, batch_first=True, padding_value=pad_id(self._tokenizer))
        mask = pad_sequence([torch.ones_like(row) for row in completions], batch_first=True)
        credited = advantages.flatten().repeat(passes)
        known = ~credited.isnan()
        steps = cast(int, self.method.steps_per_generation) / self.args.gradient_accumulation_steps
        total = self._gathered(known.sum()[None]).sum().item() / steps
        weights = token_weights(mask, known, total, control=torch.zeros(len(ids)), decoupled=True)
        weights = self.sleep_section.weight * weights
        rows = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": credited.nan_to_num(0.0)[:, None].repeat(1, ids.shape[1]),
            "weights": weights,
            "importance_sampling_ratio": torch.ones(ids.shape),  # the notes come from the trainer's own weights
        }
        rows = {key: value.to(batch["prompt_ids"].device) for key, value in rows.items() if key in batch}
        whole = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        whole_mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        logps = partial(
            self._get_per_token_logps_and_entropies,
            input_ids=whole,
            attention_mask=whole_mask,
            logits_to_keep=ids.shape[1],
        )
        if "old_per_token_logps" in batch:
            rows["old_per_token_logps"] = logps(self.model)[0]
        if "ref_per_token_logps" in batch:
            with self._as_reference() as reference:
                rows["ref_per_token_logps"] = logps(reference)[0]
            rows["kl_weights"] = rows["weights"]
        # The rest is about modes: nothing of that weighs here.
        for key in batch.keys() - rows.keys():
            value = batch[key]
            token_wise = value.dim() == 2 and value.shape[1] == batch["completion_ids"].shape[1]
            shape = (len(ids), *((ids.shape[1],) if token_wise and key != "mode_targets" else value.shape[1:]))
            rows[key] = value if value.dim() == 0 else value.new_zeros(shape)
        return rows
