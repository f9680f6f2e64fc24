"""Phases add up to the time that passed, each with its own work; FLOPs by hand."""

import math
from contextlib import suppress

import pytest
import torch
from transformers import GPT2Config, Qwen3Config

from siesta.rl import timing
from siesta.rl.timing import Phases, model_flops, peak_flops


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until its only entry is changed."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_a_phase_inside_another_takes_its_time_out_of_it(clock: list[float]) -> None:
    phases = Phases(torch.device("cpu"))
    with phases("step"):
        clock[0] += 1
        with phases("rollout", tokens=30):
            clock[0] += 5
            with phases("plan"):
                clock[0] += 2
        clock[0] += 3
    clock[0] += 100  # outside of all phases
    with phases("save"):
        clock[0] += 4
    rows = phases.collect(steps=2)
    assert rows == {
        "time/step": 7.5,  # the total; it replaces the phase of that name
        "time/rollout": 2.5,
        "time/plan": 1.0,
        "time/save": 2.0,
        "tokens/rollout": 15.0,
    }
    assert phases.collect(steps=1) == {"time/step": 0.0}


def test_an_error_leaves_its_phase(clock: list[float]) -> None:
    phases = Phases(torch.device("cpu"))
    with suppress(KeyError), phases("outer"), phases("inner"):
        clock[0] += 1
        raise KeyError
    with phases("next"):
        clock[0] += 2
    assert phases.collect(1) == {"time/outer": 0.0, "time/inner": 1.0, "time/next": 2.0, "time/step": 3.0}


def config() -> Qwen3Config:
    return Qwen3Config(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=100,
    )


def test_flops_by_hand() -> None:
    """Per layer and token 2 (8 24 + 8 12 + 8 12 + 24 8 + 3 8 16) for the products, and 2 24 n n for attention."""
    products = 2 * (8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 16)
    forward = 3 * (products * (6 + 4) + 2 * 24 * (36 + 16)) + 2 * 8 * 100 * 7
    assert model_flops(config(), [6, 4], scored=7) == 3 * forward


def test_long_sequences_pay_for_attention() -> None:
    apart = model_flops(config(), [50, 50], scored=0)
    together = model_flops(config(), [100], scored=0)
    assert together - apart == 3 * 3 * 2 * 24 * (100**2 - 2 * 50**2)


def test_models_of_another_build_have_no_number() -> None:
    assert math.isnan(model_flops(GPT2Config(), [5], scored=5))


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None
