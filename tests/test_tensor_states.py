"""Evaluation by state where states are tensors: what each example is read from, and that it is read as at wake."""

from typing import Any

import numpy as np
import pytest
import torch

from siesta.data.sources import TaskSource
from siesta.rl import embedded
from siesta.rl.evaluate import what_sleep_left
from siesta.rl.judge import build_judge
from siesta.rl.models import build_modes
from siesta.rl.modes import grow_embeddings, prepare_tokenizer
from siesta.rl.sleep.gist import GistSleep, add_slots
from siesta.rl.sleep.states import STATES, by_context, evaluation
from siesta.rl.sleep.tensor_states import TensorStates, measure_behind, tensor_states_of
from siesta.rl.sleep.wake import answer
from tests.helpers import SECTIONS, tell_apart

TOKENIZER = embedded.build_tokenizer()
ADDED = prepare_tokenizer(TOKENIZER, [section.token for section in SECTIONS.values()])
MODEL: Any = embedded.build_model(embedded.build_tokenizer(), seed=0, layers=2, hidden_size=16, heads=2, init=0.3)
grow_embeddings(MODEL, TOKENIZER, ADDED)
add_slots(MODEL, TOKENIZER, 2)
tell_apart(MODEL, TOKENIZER)
WAY = GistSleep(TOKENIZER, MODEL.config, 2)
MODES = build_modes(SECTIONS, TOKENIZER)
JUDGE = build_judge(TOKENIZER, MODES, {"exact"}, price_per_token=0.0, verifier_timeout=5.0)
EXAMPLES = list(TaskSource("hop", "test", 12, queries=4))


@pytest.fixture(scope="module")
def states() -> TensorStates:
    return tensor_states_of(WAY, MODEL, EXAMPLES, passes=2)


def test_which_state_each_example_is_read_from(states: TensorStates) -> None:
    assert states.contexts.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    alone = [WAY.sleep(MODEL, [EXAMPLES[i].context], passes=2).state.detach() for i in (0, 4, 8)]
    for kind, places in {"own": (0, 1, 2), "shuffled": (1, 2, 0)}.items():
        behind = states.behind(kind)
        for row in range(12):
            for name, part in alone[places[row // 4]].parts.items():
                torch.testing.assert_close(behind.parts[name][row], part[0])
    assert all((part == 0).all() for part in states.behind("zeroed").parts.values())
    assert states.behind("zeroed").nbytes() == states.behind("own").nbytes()


def test_what_sleep_came_to(states: TensorStates) -> None:
    """A context of 10 tokens and 2 passes of 2 slots; keys and values of 2 layers, 2 slots, width 16, 4 bytes."""
    assert states.tokens.tolist() == [10 + 2 * 2] * 12
    assert states.state_bytes.tolist() == [2 * 2 * 2 * 16 * 4] * 12


def measured(states: TensorStates, kind: str) -> Any:
    return measure_behind(WAY, MODEL, JUDGE, states, kind, samples=2, temperature=1.0)


def test_states_are_read_as_at_wake(states: TensorStates) -> None:
    """Policy and greedy responses are those of `answer`, which `siesta answer` gives from the same states."""
    own = measured(states, "own")
    for column, mode in enumerate(MODES):
        expected = answer(MODEL, WAY, states.behind("own"), EXAMPLES, MODES, mode=mode)
        assert own.greedy_tokens[:, column].tolist() == [len(each.ids) for each in expected]
        scores = JUDGE.score(mode, [each.ids for each in expected], ["exact"] * 12, [x.answer for x in EXAMPLES])
        assert own.greedy_scores[:, column].tolist() == scores
    free = answer(MODEL, WAY, states.behind("own"), EXAMPLES, MODES)
    assert own.mode_probs.argmax(1).tolist() == [MODES.index(each.mode.name) for each in free]
    for kind in ("shuffled", "zeroed"):  # negative controls
        assert np.abs(measured(states, kind).mode_probs - own.mode_probs).max() > 1e-4


def test_the_table_has_every_state_and_its_bytes(states: TensorStates) -> None:
    found = {kind: by_context(measured(states, "own" if kind == "none" else kind), states) for kind in STATES}
    result = evaluation(found, states, resamples=20, seed=0)
    assert set(result["states"]) == set(STATES) - {"none"}
    assert result["sleep"]["state_bytes"] == [512.0] * 3
    assert what_sleep_left(result["sleep"]) == "States of 512 bytes, 14.0 tokens computed in sleep"
