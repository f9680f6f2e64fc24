"""What the stages of a run share: recipe, data, tokenizer, modes, judge, and the way they are measured."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.data.loading import load_examples, response_examples, training_examples
from siesta.data.prompts import end_id, messages, prompt_ids
from siesta.data.schema import Example
from siesta.data.sources import Split
from siesta.data.unseen import one_side
from siesta.rl.console import Tracker
from siesta.rl.engines import vllm_writer
from siesta.rl.evaluate import measure
from siesta.rl.generation import Writer, fixed_randomness
from siesta.rl.judge import Judge, build_judge
from siesta.rl.models import build_modes, make_tokenizer, model_config
from siesta.rl.modes import Modes
from siesta.rl.policies import Measurement
from siesta.rl.precision import default_device, mixed_dtype, training_autocast
from siesta.rl.recipe import Recipe
from siesta.rl.run import Run
from siesta.rl.signals import StopRequest
from siesta.rl.sleep.factory import build_way, load_whole
from siesta.rl.sleep.gist import add_slot_tokens
from siesta.rl.sleep.notes import NotesSleep
from siesta.rl.sleep.state_warmup import state_examples
from siesta.rl.sleep.states import STATES as KINDS
from siesta.rl.sleep.states import States, by_context, states_of
from siesta.rl.sleep.tensor_states import TensorStates, measure_behind, tensor_states_of
from siesta.rl.sleep.tensors import TensorSleep
from siesta.rl.sleep.warmup import reader_examples
from siesta.rl.sleep_section import STATES
from siesta.rl.warmup import teachable, within_levels


@dataclass
class Context:
    """One run in progress. `say` prints a line on the main process; `stop` is what a signal asks for; `tracker` is
    told how far the stage has come.
    """

    run: Run
    say: Callable[[str], None]
    stop: StopRequest = field(default_factory=StopRequest)
    tracker: Tracker = field(default_factory=Tracker)

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def path(self) -> Path:
        return self.run.path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = make_tokenizer(self.recipe)[0]
        if self.recipe.sleep.mechanism == "gist":
            add_slot_tokens(tokenizer, self.recipe.sleep.slots)
        return tokenizer

    @cached_property
    def modes(self) -> Modes:
        return build_modes(self.recipe.modes, self.tokenizer)

    @cached_property
    def _training(self) -> tuple[list[Example], int]:
        return training_examples(self.recipe.data)

    @property
    def overlap(self) -> int:
        """Training items that were left out because they also stand in an evaluation set."""
        return self._training[1]

    @cached_property
    def train_examples(self) -> list[Example]:
        examples, dropped = self._training
        if dropped:
            self.say(f"data: {dropped} training items also stand in an evaluation set (same text); they are left out")
        return examples

    @cached_property
    def rl_examples(self) -> list[Example]:
        """What RL asks: the training examples, or those of `data.unseen_share` alone."""
        return self.one_side(self.train_examples, unseen=True)

    def one_side(self, examples: list[Example], *, unseen: bool) -> list[Example]:
        """Those of the examples that are RL's alone, or those that the warm-up may see."""
        return one_side(examples, self.recipe.data.unseen_share, self.recipe.data.seed, unseen=unseen)

    @cached_property
    def warmup_examples(self) -> list[Example]:
        """What the warm-up is taught on: rows of `warmup.responses`, or else the training examples it may see."""
        section, file = self.recipe.warmup, str(self.recipe.warmup.responses)
        if section.responses is None:
            return self.own_warmup_examples
        examples, dropped = response_examples(file, self.recipe.data, self.evaluation_size)
        examples = self.one_side(examples, unseen=False)
        used = teachable(examples, self.modes, pairing=section.pairing, shares=section.shares, where=file)
        overlap = f"; {dropped} more also stand in an evaluation set" if dropped else ""
        self.say(f"warm-up: {len(used)} of {len(examples)} rows of {file}, pairing {section.pairing}{overlap}")
        return used

    @cached_property
    def taught_examples(self) -> list[Example]:
        """The warm-up examples as they are asked: those of readers of a state without their context."""
        if self.trains_states:
            return self.taught_behind[0]
        if not self.writes_notes:
            return self.known_examples
        return reader_examples(self.known_examples, self.notes(), seed=self.recipe.seed)

    @property
    def known_examples(self) -> list[Example]:
        """The warm-up examples with the responses that they may be shown in (`warmup.max_level`)."""
        most = self.recipe.warmup.max_level
        return within_levels(self.warmup_examples, self.modes, most) if most else self.warmup_examples

    @cached_property
    def taught_behind(self) -> tuple[list[Example], list[str]]:
        """The warm-up examples of a sleep into tensors as they are asked, and what is slept on for each."""
        return state_examples(self.known_examples, seed=self.recipe.seed)

    @property
    def writes_notes(self) -> bool:
        return self.recipe.sleep.mechanism == "notes"

    @property
    def trains_states(self) -> bool:
        """Is the state tensors that training writes?"""
        return self.recipe.sleep.mechanism in STATES

    @property
    def sleeps(self) -> bool:
        """Does training sleep on contexts?"""
        return self.writes_notes or self.trains_states

    @cached_property
    def way(self) -> TensorSleep:
        """How to sleep where the state is tensors."""
        return build_way(
            self.recipe.sleep,
            self.tokenizer,
            model_config(self.recipe, self.tokenizer),
            instruction=self.recipe.data.instruction,
            batch_size=self.recipe.evaluate.batch_size,
        )

    def notes(self, temperature: float | None = None) -> NotesSleep:
        """Sleep by writing at a temperature; None is greedy."""
        return NotesSleep(
            self.tokenizer,
            self.recipe.sleep,
            self.modes.token_ids,
            instruction=self.recipe.data.instruction,
            temperature=temperature,
            batch_size=self.recipe.evaluate.batch_size,
        )

    @property
    def evaluation_size(self) -> int:
        """Items of the largest evaluation set that the run measures on."""
        recipe = self.recipe
        return max(recipe.evaluate.items, recipe.warmup.check_items, recipe.evaluate.every_items)

    @cached_property
    def own_warmup_examples(self) -> list[Example]:
        """The training examples it may see, in the warm-up's own mix of levels if it has one."""
        weights = self.recipe.warmup.level_weights
        if weights is None:
            return self.one_side(self.train_examples, unseen=False)
        section = self.recipe.data.model_copy(update={"level_weights": weights})
        return self.one_side(load_examples(section, "train", section.train_size), unseen=False)

    @cached_property
    def judge(self) -> Judge:
        examples = self.examples("test", self.recipe.evaluate.items)
        examples += self.examples("validation", self.recipe.warmup.check_items)
        return self.judge_of(examples + self.train_examples)

    def judge_of(self, examples: Sequence[Example]) -> Judge:
        """A judge with the verifiers that these examples name."""
        return build_judge(
            self.tokenizer,
            self.modes,
            {example.verifier for example in examples},
            price_per_token=self.recipe.rl.setting("price_per_token"),
            verifier_timeout=self.recipe.rl.setting("verifier_timeout"),
            verifier_workers=self.recipe.rl.setting("verifier_workers"),
            verifier_memory=self.recipe.rl.setting("verifier_memory"),
            hack_prices=self.recipe.rl.setting("hack_prices"),
        )

    @property
    def start(self) -> Path:
        """The folder RL starts from."""
        return self.path / ("warmup" if self.recipe.warmup.enabled else "model")

    @property
    def temperature(self) -> float:
        """Of rollouts, and so of the policy that is measured."""
        return self.recipe.rl.setting("temperature")

    def load(self, folder: Path, device: str | None = None) -> PreTrainedModel:
        """The model that a stage left, in the recipe's dtype."""
        return cast(Any, load_whole(folder, self.recipe)).to(device or default_device())

    def trainable(self, folder: Path) -> str | PreTrainedModel:
        """What a trainer starts from: a folder, or the model itself where transformers would not load all of it."""
        return self.load(folder, "cpu") if self.recipe.sleep.mechanism == "memory" else str(folder)

    def examples(self, split: Split, size: int) -> list[Example]:
        """At most `size` examples of a split."""
        return load_examples(self.recipe.data, split, size)

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Prompt ids, none longer than the limit.

        Raises:
            DataError: Names the example whose prompt is too long.
        """
        limit = self.recipe.data.max_prompt_tokens
        rows = []
        for example in examples:
            ids = prompt_ids(self.tokenizer, messages(example, self.recipe.data.instruction))
            if len(ids) > limit:
                raise DataError(
                    f"{example.id}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens {limit}; "
                    "raise the limit or remove the row"
                )
            rows.append(ids)
        return rows

    def writer(self, folder: Path, examples: Sequence[Example]) -> AbstractContextManager[Writer | None]:
        """What writes the responses of the final evaluation of `folder`; None is `generate` with the model itself."""
        recipe = self.recipe
        if recipe.evaluate.engine == "generate":
            return nullcontext()
        return vllm_writer(
            folder,
            end_id=end_id(self.tokenizer),
            dtype=str(mixed_dtype(recipe.rl) or recipe.model.dtype).removeprefix("torch."),
            gpu_memory_utilization=recipe.rl.setting("vllm_gpu_memory_utilization"),
            max_model_len=max(map(len, self.prompts(examples))) + 1 + max(mode.max_tokens for mode in self.modes),
            seed=recipe.evaluate.seed,
            trust_remote_code=recipe.model.trust_remote_code,
        )

    def measure(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        samples: int,
        write: Writer | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Measurement:
        """Forced rollouts of `model` on `examples` in the precision of RL's training pass.

        The random state of the training around it is left as it was.

        Args:
            write, advance: See `siesta.rl.evaluate.measure`.
        """
        with fixed_randomness(self.recipe.evaluate.seed), training_autocast(self.recipe.rl, model.device):
            return measure(
                model,
                self.judge,
                examples,
                instruction=self.recipe.data.instruction,
                samples=samples,
                temperature=self.temperature,
                batch_size=self.recipe.evaluate.batch_size,
                write=write,
                advance=advance,
            )

    def slept(self, model: PreTrainedModel, examples: Sequence[Example]) -> States | TensorStates:
        """What `model` makes of every context of the examples: greedy notes, or tensors."""
        if not self.trains_states:
            return self.sleep_states(model, examples)
        with training_autocast(self.recipe.rl, model.device):
            return tensor_states_of(self.way, model, examples, passes=self.recipe.sleep.passes)

    def sleep_states(
        self, model: PreTrainedModel, examples: Sequence[Example], temperature: float | None = None
    ) -> States:
        """Notes of `model` on every context of the examples; greedy by default."""
        with fixed_randomness(self.recipe.evaluate.seed), training_autocast(self.recipe.rl, model.device):
            return states_of(self.notes(temperature), model, examples)

    def sleep_right(self, model: PreTrainedModel, examples: Sequence[Example]) -> float:
        """See `Measurement.sleep_right`."""
        states = self.slept(model, examples)
        if isinstance(states, States):
            return float(states.rows_right.mean())
        return float(np.nanmean(self.measure_states(model, states, 1, only=["own"])["own"].greedy_scores))

    def measure_states(
        self, model: PreTrainedModel, states: States | TensorStates, samples: int, only: Sequence[str] = KINDS
    ) -> dict[str, Measurement]:
        """`measure` for examples in each state."""
        return {kind: by_context(self._measure_kind(model, states, samples, kind), states) for kind in only}

    def _measure_kind(
        self, model: PreTrainedModel, states: States | TensorStates, samples: int, kind: str
    ) -> Measurement:
        if isinstance(states, States):
            return self.measure(model, states.examples[kind], samples=samples)
        if kind == "none":
            return self.measure(model, states.examples, samples=samples)
        settings = {"samples": samples, "temperature": self.temperature}
        with fixed_randomness(self.recipe.evaluate.seed), training_autocast(self.recipe.rl, model.device):
            return measure_behind(self.way, model, self.judge, states, kind, **settings)


def main_process() -> bool:
    return PartialState().is_main_process
