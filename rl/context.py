"""What the stages of a run share: recipe, data, tokenizer, modes, judge, and the way they are measured."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.data.loading import load_examples, response_examples, training_examples
from siesta.data.prompts import end_id, messages, prompt_ids
from siesta.data.schema import Example
from siesta.data.sources import Split
from siesta.rl.engines import vllm_writer
from siesta.rl.evaluate import measure
from siesta.rl.generation import Writer
from siesta.rl.judge import Judge, build_judge
from siesta.rl.models import build_modes, load_model, make_tokenizer
from siesta.rl.modes import Modes
from siesta.rl.policies import Measurement
from siesta.rl.precision import default_device, mixed_dtype, training_autocast
from siesta.rl.recipe import Recipe
from siesta.rl.run import Run
from siesta.rl.sleep.notes import NotesSleep
from siesta.rl.sleep.states import STATES, States, by_context, states_of
from siesta.rl.sleep.warmup import reader_examples
from siesta.rl.warmup import teachable


@dataclass
class Context:
    """One run in progress. `say` prints a line on the main process."""

    run: Run
    say: Callable[[str], None]

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def path(self) -> Path:
        return self.run.path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return make_tokenizer(self.recipe)[0]

    @cached_property
    def modes(self) -> Modes:
        return build_modes(self.recipe.modes, self.tokenizer)

    @cached_property
    def train_examples(self) -> list[Example]:
        examples, dropped = training_examples(self.recipe.data)
        if dropped:
            self.say(f"data: {dropped} training items also stand in an evaluation set (same text); they are left out")
        return examples

    @cached_property
    def warmup_examples(self) -> list[Example]:
        """What the warm-up is taught on: rows of `warmup.responses`, or else the training examples."""
        section, file = self.recipe.warmup, str(self.recipe.warmup.responses)
        if section.responses is None:
            return self.own_warmup_examples
        examples, dropped = response_examples(file, self.recipe.data, self.evaluation_size)
        used = teachable(examples, self.modes, pairing=section.pairing, shares=section.shares, where=file)
        overlap = f"; {dropped} more also stand in an evaluation set" if dropped else ""
        self.say(f"warm-up: {len(used)} of {len(examples)} rows of {file}, pairing {section.pairing}{overlap}")
        return used

    @cached_property
    def taught_examples(self) -> list[Example]:
        """The warm-up examples as they are asked: those of notes' readers in a state."""
        if not self.writes_notes:
            return self.warmup_examples
        return reader_examples(self.warmup_examples, self.notes(), seed=self.recipe.seed)

    @property
    def writes_notes(self) -> bool:
        return self.recipe.sleep.mechanism == "notes"

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
        """The training examples, in the warm-up's own mix of levels if it has one."""
        weights = self.recipe.warmup.level_weights
        if weights is None:
            return self.train_examples
        section = self.recipe.data.model_copy(update={"level_weights": weights})
        return load_examples(section, "train", section.train_size)

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
        section = self.recipe.model
        return load_model(
            folder,
            device=device or default_device(),
            dtype=section.dtype,
            trust_remote_code=section.trust_remote_code,
        )

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
        self, model: PreTrainedModel, examples: Sequence[Example], samples: int, write: Writer | None = None
    ) -> Measurement:
        """Forced rollouts of `model` on `examples` in the precision of RL's training pass.

        The random state of the training around it is left as it was.
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
            )

    def sleep_states(
        self, model: PreTrainedModel, examples: Sequence[Example], temperature: float | None = None
    ) -> States:
        """Notes of `model` on every context of the examples; greedy by default."""
        with fixed_randomness(self.recipe.evaluate.seed), training_autocast(self.recipe.rl, model.device):
            return states_of(self.notes(temperature), model, examples)

    def measure_states(
        self, model: PreTrainedModel, states: States, samples: int, only: Sequence[str] = STATES
    ) -> dict[str, Measurement]:
        """`measure` for examples in each state."""
        return {
            state: by_context(self.measure(model, states.examples[state], samples=samples), states) for state in only
        }


@contextmanager
def fixed_randomness(seed: int):
    """torch's generators seeded inside, restored outside: measuring more often must not change the training."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def main_process() -> bool:
    return PartialState().is_main_process
