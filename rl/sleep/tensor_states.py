"""What a state of tensors is worth at wake: examples read from their own, another context's and a zeroed state.

The counterpart of `siesta.rl.sleep.states` for states that are not text: those are read in the place of the context,
these lie in front of a query that comes without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from siesta.data.schema import Example
from siesta.rl.evaluate import measurement
from siesta.rl.generation import inference
from siesta.rl.judge import Judge
from siesta.rl.modes import Mode
from siesta.rl.policies import Measurement
from siesta.rl.sleep.reading import state_policy, state_responses
from siesta.rl.sleep.tensors import TensorSleep, TensorState


@dataclass(frozen=True)
class TensorStates:
    """States of the contexts of I examples.

    Args:
        examples: The I examples, each with its context.
        state: Of the C contexts, on the CPU.
        contexts: Number of each example's context, (I,).
        tokens: Computed in the sleep on each example's context, (I,).
        state_bytes: Of each example's state, (I,).
    """

    examples: list[Example]
    state: TensorState
    contexts: np.ndarray
    tokens: np.ndarray
    state_bytes: np.ndarray

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """What the table says of the states, (I,) each."""
        return {"sleep_tokens": self.tokens, "state_bytes": self.state_bytes}

    def behind(self, kind: str) -> TensorState:
        """The state that each example is read from: its `own`, that of the next context (`shuffled`), or `zeroed`."""
        next_one = kind == "shuffled"
        state = self.state.select([(place + next_one) % len(self.state) for place in self.contexts.tolist()])
        if kind == "zeroed":
            return TensorState({name: part.new_zeros(()).expand_as(part) for name, part in state.parts.items()})
        return state


def tensor_states_of(
    way: TensorSleep, model: PreTrainedModel, examples: Sequence[Example], *, passes: int
) -> TensorStates:
    """Sleep on every context once."""
    place = {context: i for i, context in enumerate(dict.fromkeys(example.context for example in examples))}
    contexts = np.array([place[example.context] for example in examples])
    with inference(model):
        night = way.sleep(model, list(place), passes=passes)
    return TensorStates(
        examples=list(examples),
        state=night.state.to("cpu"),
        contexts=contexts,
        tokens=np.array(night.cost.tokens)[contexts],
        state_bytes=np.array(night.cost.state_bytes)[contexts],
    )


def measure_behind(
    way: TensorSleep,
    model: PreTrainedModel,
    judge: Judge,
    states: TensorStates,
    kind: str,
    *,
    samples: int,
    temperature: float,
) -> Measurement:
    """`siesta.rl.evaluate.measure` for examples read from states of a kind, without their contexts."""
    examples, state = states.examples, states.behind(kind)
    log_policy, mass = state_policy(model, way, state, examples, judge.modes, temperature=temperature)

    def respond(mode: Mode, repeats: int, heat: float | None) -> list[list[int]]:
        rows = [row for row in range(len(examples)) for _ in range(repeats)]
        asked = [examples[row] for row in rows]
        return state_responses(model, way, state.select(rows), asked, mode, temperature=heat)

    return measurement(judge, examples, log_policy, mass, respond, samples=samples, temperature=temperature)
