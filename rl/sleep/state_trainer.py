"""StateTrainer: DeGRPO behind a sleep whose state is tensors, with a gradient through the sleep.

    context c -> one sleep -> m queries -> G answers

Nothing is sampled in such a sleep, so it needs no credit of its own: rollouts are written from the state of this
step's weights, and every training pass sleeps again and sends the gradient of the answers back through it. What a
pass computes together are rollouts of one context, behind one sleep; where they exceed the token budget, each part
sleeps for itself, which costs more and adds up to the same gradient.

What is overridden, beside what ContextTrainer overrides: `_generate_and_score_completions`, `_add_weights`, and of
DeGRPOTrainer `_make_passes`, `_policy`, `_respond`, `_sequences`.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from siesta.data.errors import RecipeError
from siesta.data.prompts import messages
from siesta.data.schema import Example
from siesta.rl.advantages import Credit, Rollouts
from siesta.rl.config import DeGRPOConfig, optimizer_steps
from siesta.rl.generation import Writer, inference
from siesta.rl.judge import Judge
from siesta.rl.memory import zero_stage
from siesta.rl.modes import Mode
from siesta.rl.packing import Unit, make_units
from siesta.rl.passes import Passes, with_prompts
from siesta.rl.scoring import TokenScores
from siesta.rl.sleep import credit
from siesta.rl.sleep.context_trainer import ContextTrainer
from siesta.rl.sleep.reading import state_policy, state_responses
from siesta.rl.sleep.scoring import StateScorer
from siesta.rl.sleep.tensors import TensorSleep, TensorState
from siesta.rl.sleep_section import SleepSection
from siesta.rl.spread import Batch, sequence_lengths


def check_states(config: DeGRPOConfig, section: SleepSection) -> None:
    """Refuse what would train no sleep, or another one than is said.

    Raises:
        RecipeError: With the key to change.
    """
    name, attention = section.mechanism, config.attention
    contexts = cast(int, config.generation_batch_size) // (section.queries * config.group)
    steps = optimizer_steps(config)
    refused = [
        (config.use_vllm, "rl.use_vllm: vLLM cannot read a state; set it to false"),
        (config.gradient_checkpointing, "rl.gradient_checkpointing: such blocks leave no state; set it to false"),
        (config.share_prompts, "rl.share_prompts: rows behind a state do not share prompts; set it to false"),
        (
            attention not in ("auto", "sdpa", "eager"),
            f"rl.attention: {attention}: rows behind a state cannot be packed; use sdpa",
        ),
        (
            name == "memory" and config.beta != 0,
            "rl.beta: the reference model would have no memory; set it to 0",
        ),
        (
            PartialState().num_processes > 1 or zero_stage() > 0,
            f"sleep.mechanism: {name}: gradients of sleep are not averaged over processes; run a single one without "
            "DeepSpeed, or take notes",
        ),
        (
            contexts % steps != 0,
            f"rl.steps_per_generation: {contexts} contexts of a generation batch cannot be dealt evenly to {steps} "
            "optimizer steps; change it",
        ),
    ]
    for holds, line in refused:
        if holds:
            raise RecipeError(line)


class StatePasses(Passes):
    """Passes whose rows are read behind states.

    `contexts` has what is slept on for each context of the generation batch in hand, None if its rows are read as they
    stand; `read` has the tokens which that sleep computes. The column `contexts` of a batch is the place in both.

    Args:
        settings: Of `Passes`.
        way: How to sleep.
        section: The recipe's.
    """

    def __init__(self, *settings: Any, way: TensorSleep, section: SleepSection):
        super().__init__(*settings)
        self.states = StateScorer(self.scorer, way, section.passes)
        self.block = section.queries * self.args.group
        self.contexts: list[str | None] = []
        self.read: list[int] = []
        self.peak_flops = None  # the count that it would be compared with knows nothing of sleep

    def units(self, batch: Batch, **most: Any) -> list[Unit]:
        """Rollouts of a context, with the tokens of its sleep in front, once."""
        places = batch["contexts"].tolist()
        before = [self.read[place] for place in places]
        lengths = [sum(pair) for pair in zip(before, sequence_lengths(batch), strict=True)]
        return make_units(lengths, list(zip(places, before, strict=True)), self.cost, **most)

    def groups(self, batch: Batch) -> list[Unit]:
        """See `Passes.groups`: whole contexts."""
        return self.units(batch, rows=self.block)

    def scores(self, model: torch.nn.Module, rows: Batch, *, counted: bool = False) -> TokenScores:
        """See `Passes.scores`; each context of the batch is slept on once."""
        contexts = [self.contexts[place] for place in rows["contexts"].tolist()]
        whole, length = with_prompts(rows), rows["completion_ids"].shape[1]
        with self.accelerator.autocast():
            return self.states.score(cast(PreTrainedModel, model), contexts, *whole, length)


class StateTrainer(ContextTrainer):
    """DeGRPO with a state that is tensors.

    Args:
        model, judge, args: As for DeGRPOTrainer.
        way: How to sleep.
        kwargs: Of ContextTrainer.

    Raises:
        RecipeError: See `check_states`, and ContextTrainer.
    """

    def __init__(
        self, model, judge: Judge, args: DeGRPOConfig, *, way: TensorSleep, sleep_section: SleepSection, **kwargs
    ):
        check_states(args, sleep_section)
        if args.attention == "auto":
            args.attention = "sdpa"
        self.way = way
        super().__init__(model, judge, args, sleep_section=sleep_section, **kwargs)

    def _make_passes(self, models: Sequence[torch.nn.Module]) -> Passes:
        settings = (self.accelerator, self.method, self.modes, models)
        self._state_passes = StatePasses(*settings, way=self.way, section=self.sleep_section)
        return self._state_passes

    def _progress(self):
        passes = self._state_passes
        return super()._progress() | {"contexts": passes.contexts, "read": passes.read}

    def _go_on(self, progress):
        super()._go_on(progress)
        self._state_passes.contexts, self._state_passes.read = progress["contexts"], progress["read"]

    # ---- sleep -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        """Sleep first; then TRL's batch, with the place of each row's context."""
        contexts, self._kinds = self._contexts(inputs)
        slept = [place for place, kind in enumerate(self._kinds) if kind == credit.OWN]
        self._state_of = {place: row for row, place in enumerate(slept)}
        passes = self._state_passes
        passes.contexts = [text if place in self._state_of else None for place, text in enumerate(contexts)]
        passes.read = [0] * len(contexts)
        if slept:
            with self.phases("sleep"), inference(self._whole), self.accelerator.autocast():
                texts = [contexts[place] for place in slept]
                night = self.way.sleep(self._whole, texts, passes=self.sleep_section.passes)
            self._states = night.state
            for place, tokens in zip(slept, night.cost.tokens, strict=True):
                passes.read[place] = tokens
        self._queries = [Example("", "", row["query"], row["answer"]) for row in inputs]
        places = range(len(inputs))
        read = [self._reader(row, i // self.block in self._state_of) for i, row in zip(places, inputs, strict=True)]
        batch = super()._generate_and_score_completions(read)
        batch["contexts"] = self._places.to(batch["prompt_ids"].device)
        return batch

    @property
    def _whole(self) -> PreTrainedModel:
        """The model that sleeps and writes; it is in no wrapper that matters (see `check_states`)."""
        return cast(PreTrainedModel, self.accelerator.unwrap_model(self.model_wrapped))

    @property
    def _places(self) -> torch.Tensor:
        """Place of the context of every row of the generation batch."""
        return torch.arange(len(self._queries)) // self.block

    def _reader(self, row: dict, slept: bool) -> dict:
        """A row of the data set with the prompt that is read: behind a state, without the context."""
        if not slept:
            return row
        return row | {"prompt": messages(Example("", "", row["query"], row["answer"]), self.way.instruction)}

    def _apart(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Places in `rows` of those behind a state, and of those without."""
        behind = [row // self.block in self._state_of for row in rows]
        return [i for i, own in enumerate(behind) if own], [i for i, own in enumerate(behind) if not own]

    def _read(self, rows: Sequence[int]) -> tuple[TensorState, list[Example]]:
        """State and query of each of some rows."""
        states = self._states.select([self._state_of[row // self.block] for row in rows])
        return states, [self._queries[row] for row in rows]

    # ---- rollouts ----------------------------------------------------------------------------------------------

    def _policy(self, prompt_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        log_policy, mass = torch.empty(len(prompt_ids), len(self.modes)), torch.empty(len(prompt_ids))
        own, bare = self._apart(range(len(prompt_ids)))
        if own:  # the rows of a group have one query of one context
            found = state_policy(
                self._whole, self.way, *self._read(own[:: self.group]), self.modes, temperature=self.temperature
            )
            log_policy[own], mass[own] = (values.repeat_interleave(self.group, dim=0) for values in found)
        if bare:
            log_policy[bare], mass[bare] = super()._policy([prompt_ids[i] for i in bare])
        return log_policy, mass

    def _respond(self, write: Writer, prompt_ids: list[list[int]], rows: Sequence[int], mode: Mode) -> list[list[int]]:
        responses: list[list[int]] = [[] for _ in rows]
        own, bare = self._apart(rows)
        written = []
        if own:
            asked = self._read([rows[i] for i in own])
            written += state_responses(self._whole, self.way, *asked, mode, temperature=self.temperature)
        if bare:
            written += super()._respond(write, prompt_ids, [rows[i] for i in bare], mode)
        for i, response in zip([*own, *bare], written, strict=True):
            responses[i] = response
        return responses

    # ---- log-probabilities and credit --------------------------------------------------------------------------

    def _sequences(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> Batch:
        batch = super()._sequences(input_ids, attention_mask, completion_length)
        return batch | {"contexts": self._places.to(input_ids.device)}

    def _add_weights(self, batch: dict, rollouts: Rollouts, given: Credit, own: slice) -> None:
        """DeGRPO's weights; the numbers are logged by kind of state."""
        super()._add_weights(batch, rollouts, given, own)
        self._log_kinds(self._kinds, rollouts, torch.empty(0, 1), torch.empty(0, 1))
