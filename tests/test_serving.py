"""Serving: what may open a response and end it, in transformers and in vLLM, and what requests are refused."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LogitsProcessorList

from siesta.data.errors import ModelError
from siesta.rl.serving import (
    FILE,
    Choice,
    ModeLogitsProcessor,
    RequestError,
    Rules,
    Served,
    above,
    find_rules,
    read_rules,
    write_rules,
)
from tests.helpers import tiny_judge, tiny_model

EOS = 1
SHORT, MIDDLE, THINK = (Served(name, f"<{name}>", token, 3, None) for name, token in (("s", 5), ("m", 6), ("t", 7)))
RULES = Rules((SHORT, THINK), EOS)


def logits(**values: float) -> torch.Tensor:
    """(10,): a free token is likeliest, control tokens have the logits given."""
    found = torch.zeros(10)
    found[9] = 8.0
    for name, value in values.items():
        found[{"s": 5, "m": 6, "t": 7}[name]] = value
    return found


# ---- what a request chooses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        ({}, [5, 7]),
        ({"mode": "auto"}, [5, 7]),
        ({"mode": "s"}, [5]),
        ({"mode": "t"}, [7]),
        ({"threshold": 0.0}, [7]),
        ({"threshold": 0.7}, [7]),  # p(t) = e / (1 + e) = 0.731
        ({"threshold": 0.74}, [5]),
        ({"threshold": 1}, [5]),
        ({"somebody": "else's"}, [5, 7]),
    ],
)
def test_what_may_open_a_response(arguments: dict[str, Any], ids: list[int]) -> None:
    assert RULES.allowed(RULES.choice(arguments), None, 0, logits(s=1.0, t=2.0)) == ids


def test_a_threshold_leaves_the_likeliest_of_the_others() -> None:
    policy = torch.tensor([0.2, 0.5, 0.3])
    assert [above(policy, threshold) for threshold in (0.0, 0.29, 0.31, 1.0)] == [2, 2, 1, 1]
    assert above(torch.tensor([1.0]), 1.0) == 0, "of one mode there is no other"
    certain = torch.tensor([0.0, 1.0])
    assert (above(certain, 1.0), above(certain.flip(0), 0.0)) == (0, 1), "the ends hold for a saturated policy too"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"mode": "slow"}, "mode: 'slow' is unknown; this model has auto, s, t"),
        ({"mode": 3}, "mode: 3 is unknown; this model has auto, s, t"),
        ({"mode": ["s"]}, "mode: ['s'] is unknown; this model has auto, s, t"),
        ({"threshold": 1.5}, "threshold: 1.5 is no number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold: nan is no number from 0 to 1"),
        ({"threshold": "0.5"}, "threshold: '0.5' is no number from 0 to 1"),
        ({"threshold": True}, "threshold: True is no number from 0 to 1"),
        ({"mode": "s", "threshold": 0.5}, "threshold: belongs to mode auto, and s was asked for; leave one out"),
    ],
)
def test_bad_requests_are_named(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError) as error:
        RULES.choice(arguments)
    assert str(error.value) == line
    assert isinstance(error.value, ValueError), "which vLLM answers with HTTP 400"


def test_a_response_ends_within_its_mode_s_budget() -> None:
    free = logits()
    # Three response tokens, the last of which closes the response.
    assert [RULES.allowed(Choice(), 7, written, free) for written in (1, 2, 3, 4)] == [None, None, [EOS], [EOS]]
    assert RULES.allowed(Choice(), 9, 3, free) is None, "no mode of ours opened it"
    assert RULES.allowed(Choice(), None, 3, free) is None


# ---- the exported file ---------------------------------------------------------------------------------------------


def test_rules_are_read_as_written(tmp_path: Path) -> None:
    modes = tiny_judge().modes
    write_rules(tmp_path, modes, eos_id=EOS, instruction="Be brief.")
    rules = find_rules(str(tmp_path))
    assert rules.token_ids == modes.token_ids
    assert (rules.eos_id, rules.instruction) == (EOS, "Be brief.")
    assert [own.max_tokens for own in rules.modes] == [2, 12]
    assert rules.mode_of(modes[1].token_id) == rules.modes[1]


def test_a_folder_without_modes_is_somebody_else_s_model(tmp_path: Path) -> None:
    assert read_rules(str(tmp_path)) is None
    assert read_rules(str(tmp_path / "nowhere")) is None
    with pytest.raises(ModelError, match=r"no modes\.json, so no control tokens are known; name a folder that siesta"):
        find_rules(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"modes": [{"name": "s"}], "eos_id": 1}', '{"modes": 3}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ModelError, match=r"modes\.json: not the modes of an exported model .*export the checkpoint"):
        read_rules(str(tmp_path))


# ---- transformers --------------------------------------------------------------------------------------------------


def test_generate_obeys_every_row_s_choice() -> None:
    judge, model = tiny_judge(), tiny_model()
    short, think = judge.modes
    rules = Rules(tuple(Served(m.name, m.token, m.token_id, m.max_tokens, None) for m in judge.modes), EOS)
    prompt = torch.tensor([[8, 9, 10]] * 4)
    choices = [Choice("short"), Choice("think"), Choice(threshold=0.0), Choice(threshold=1.0)]
    processor = LogitsProcessorList([ModeLogitsProcessor(rules, 3, choices)])
    written = cast(Any, model).generate(
        prompt, logits_processor=processor, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    written = written[:, 3:]
    assert written[:, 0].tolist() == [short.token_id, think.token_id, think.token_id, short.token_id]
    for row, mode in zip(written.tolist(), [short, think, think, short], strict=True):
        assert row.index(EOS) <= mode.max_tokens
    free = cast(Any, model).generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert int(free[0, 3]) not in rules.token_ids, "the tiny model itself would open with something else"


def test_auto_draws_from_the_mode_policy() -> None:
    scores = logits(s=0.0, t=1.0).expand(2, 10)
    ids = torch.zeros(2, 4, dtype=torch.long)
    found = ModeLogitsProcessor(RULES, 4)(ids, scores)
    torch.testing.assert_close(found.softmax(1)[0, [5, 7]], torch.tensor([0.0, 1.0]).softmax(0))
    assert found[0].isinf().sum() == 8
    assert not scores.isinf().any(), "the given scores stay as they are"


# ---- vLLM, with stand-ins for what it hands to a processor ---------------------------------------------------------


class Params:
    """Stands in for vLLM's `SamplingParams`."""

    def __init__(self, **extra: Any):
        self.extra_args = extra or None
        self.verified = 0

    def verify(self, model_config: Any, *rest: Any) -> None:
        self.verified += 1


class Arguments:
    """Stands in for vLLM's `EngineArgs`."""

    def __init__(self, model: str):
        self.model, self.revision, self.logits_processors = model, None, None

    def create_model_config(self) -> SimpleNamespace:
        return SimpleNamespace(**vars(self))


def process_dict_updates(state: dict, update: Any, new: Any) -> None:
    """As vLLM does it: removed, added, moved."""
    for index in update.removed:
        state.pop(index, None)
    for index, params, prompt, written in update.added:
        state.pop(index, None)
        if (found := new(params, prompt, written)) is not None:
            state[index] = found
    for source, target in update.moved:
        state[target] = state.pop(source)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`siesta.rl.serving_vllm` on stand-ins of the four modules it imports from."""
    interface = {"BatchUpdate": SimpleNamespace, "LogitsProcessor": object}
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": type("SamplingParams", (Params,), {"verify": Params.verify})},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {
            "EngineArgs": type("EngineArgs", (Arguments,), {"create_model_config": Arguments.create_model_config})
        },
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": interface,
        "vllm.v1.sample.logits_processor.builtin": {"process_dict_updates": process_dict_updates},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "siesta.rl.serving_vllm", raising=False)
    yield import_module("siesta.rl.serving_vllm")
    sys.modules.pop("siesta.rl.serving_vllm", None)


@pytest.fixture
def exported(tmp_path: Path) -> str:
    """A folder with RULES."""
    rows = [vars(mode) for mode in RULES.modes]
    (tmp_path / FILE).write_text(json.dumps({"modes": rows, "eos_id": EOS, "instruction": ""}))
    return str(tmp_path)


def processor(plugin: Any, model: str) -> Any:
    config = SimpleNamespace(model_config=SimpleNamespace(model=model, revision=None))
    return plugin.ModeProcessor(config, torch.device("cpu"), False)


def update(removed=(), added=(), moved=()) -> SimpleNamespace:
    return SimpleNamespace(removed=removed, added=added, moved=moved)


def opened(batch: torch.Tensor) -> list[list[int]]:
    """Ids that each row leaves possible; [] where all are."""
    return [[] if not row.isinf().any() else row.isfinite().nonzero()[:, 0].tolist() for row in batch]


def test_requests_are_followed_through_a_batch(plugin: Any, exported: str) -> None:
    own = processor(plugin, exported)
    assert not own.is_argmax_invariant()
    batch = lambda rows: own.apply(torch.stack([logits(s=1.0, t=2.0)] * rows))  # noqa: E731
    first, second, third = [], [], []
    own.update_state(update(added=[(0, Params(), [8], first), (1, Params(mode="t"), [8], second)]))
    assert opened(batch(2)) == [[5, 7], [7]]
    first.append(5)
    second.append(7)
    own.update_state(update(added=[(2, Params(threshold=0.9), [8], third)]))
    assert opened(batch(3)) == [[], [], [5]]
    own.update_state(update(removed=[0], moved=[(2, 0)]))
    assert opened(batch(2)) == [[5], []]
    second += [9, 9]
    assert opened(batch(2)) == [[5], [EOS]]


def test_a_prompt_that_ends_in_a_control_token_has_chosen(plugin: Any, exported: str) -> None:
    own = processor(plugin, exported)
    own.update_state(update(added=[(0, Params(), [8, 7], []), (1, Params(), None, [])]))
    assert opened(own.apply(torch.stack([logits(), logits()]))) == [[], [5, 7]]


def test_other_models_are_left_alone(plugin: Any, tmp_path: Path) -> None:
    own = processor(plugin, str(tmp_path))
    own.update_state(update(added=[(0, Params(mode="nonsense"), [8], [])]))
    assert opened(own.apply(logits()[None])) == [[]]


def test_engines_of_our_models_get_the_processor_and_requests_a_check(
    plugin: Any, exported: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = str(tmp_path_factory.mktemp("other"))
    plugin.register()
    plugin.register()
    arguments, params = sys.modules["vllm.engine.arg_utils"], sys.modules["vllm"]
    ours = vars(arguments)["EngineArgs"](exported).create_model_config()
    theirs = vars(arguments)["EngineArgs"](other).create_model_config()
    assert (ours.logits_processors, theirs.logits_processors) == (["siesta.rl.serving_vllm:ModeProcessor"], None)
    good, bad = (vars(params)["SamplingParams"](mode=mode) for mode in ("s", "slow"))
    good.verify(ours, None, None)
    bad.verify(theirs, None, None)
    assert (good.verified, bad.verified) == (1, 1)
    with pytest.raises(ValueError, match="mode: 'slow' is unknown"):
        bad.verify(ours, None, None)
    assert bad.verified == 1
