"""vLLM behind TRL's seam: caps, order of results, version and weight checks. Stand-ins take the place of vLLM."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from siesta.data.errors import RecipeError
from siesta.rl import engines
from siesta.rl.engines import MAX_LOGP_GAP, WeightsError, caps_per_mode, check_logp_gap, check_vllm
from siesta.rl.modes import Mode, Modes

MODES = Modes([Mode("short", "<short>", 7, 2), Mode("think", "<think>", 8, 90)])
PROMPTS = [[1, 7], [2, 3, 8], [4, 7], [5, 8]]


@dataclass
class Params:
    """Stands for vLLM's SamplingParams."""

    max_tokens: int = 1000
    temperature: float = 0.5
    detokenize: bool = True
    stop: list[str] = field(default_factory=list)

    def clone(self) -> "Params":
        return replace(self)


@dataclass
class Engine:
    """Stands for vLLM's LLM: notes what it is asked."""

    asked: list[Params] = field(default_factory=list)

    def generate(self, prompts: list[dict], sampling_params: list[Params], use_tqdm: bool) -> list[int]:
        self.asked = sampling_params
        return [prompt["prompt_token_ids"][0] for prompt in prompts]


def test_colocated_prompts_get_the_cap_of_their_control_token() -> None:
    engine = Engine()
    generation = SimpleNamespace(mode="colocate", llm=engine)
    with caps_per_mode(generation, MODES):
        shared = Params()
        rows: Any = [{"prompt_token_ids": ids} for ids in PROMPTS]
        assert generation.llm.generate(rows, sampling_params=shared, use_tqdm=False) == [1, 2, 4, 5]  # type: ignore
    assert [params.max_tokens for params in engine.asked] == [2, 90, 2, 90]
    assert {params.temperature for params in engine.asked} == {0.5}
    assert shared.max_tokens == 1000
    assert engine.generate.__func__ is Engine.generate  # the engine is as it was


@pytest.mark.parametrize(
    ("stop", "text", "written"), [([], False, False), ([], True, True), (["\n"], False, True), (["\n"], True, True)]
)
def test_text_is_written_only_where_someone_reads_it(stop: list[str], text: bool, written: bool) -> None:
    engine = Engine()
    generation = SimpleNamespace(mode="colocate", llm=engine)
    with caps_per_mode(generation, MODES, text=text):
        rows: Any = [{"prompt_token_ids": ids} for ids in PROMPTS]
        generation.llm.generate(rows, sampling_params=Params(stop=stop), use_tqdm=False)  # type: ignore
    assert {params.detokenize for params in engine.asked} == {written}


class Client:
    """Stands for TRL's VLLMClient: one cap per request."""

    def __init__(self) -> None:
        self.requests: list[tuple[list[list[int]], int]] = []

    def generate(self, prompts: list[list[int]], max_tokens: int, features: None, n: int) -> dict:
        self.requests.append((prompts, max_tokens))
        return {"prompt_ids": prompts, "completion_ids": [[ids[0], max_tokens] for ids in prompts], "logprobs": None}


def test_a_server_gets_one_request_per_cap_and_rows_keep_their_order() -> None:
    client = Client()
    generation = SimpleNamespace(mode="server", vllm_client=client, accelerator=SimpleNamespace(is_main_process=True))
    with caps_per_mode(generation, MODES):
        answer = generation.vllm_client.generate(prompts=PROMPTS, max_tokens=1000, features=None, n=1)  # type: ignore
    assert client.requests == [([[1, 7], [4, 7]], 2), ([[2, 3, 8], [5, 8]], 90)]
    assert answer["prompt_ids"] == PROMPTS
    assert answer["completion_ids"] == [[1, 2], [2, 90], [4, 2], [5, 90]]
    assert answer["logprobs"] is None


def test_other_ranks_leave_the_server_to_the_first() -> None:
    generation = SimpleNamespace(mode="server", accelerator=SimpleNamespace(is_main_process=False))
    with caps_per_mode(generation, MODES):
        assert "vllm_client" not in vars(generation)


@pytest.mark.parametrize("found", ["0.22.0", "0.25.1", "0.31.2"])
def test_versions_that_work(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(engines, "version", lambda name: found)
    check_vllm()


@pytest.mark.parametrize("found", ["0.21.9", "0.32.0", "1.0.0"])
def test_versions_that_do_not_are_named(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(engines, "version", lambda name: found)
    with pytest.raises(RecipeError, match=rf"rl\.use_vllm: vLLM {found} is installed; versions 0\.22 to 0\.31"):
        check_vllm()


def test_log_probabilities_in_step_pass() -> None:
    check_logp_gap(0.0)
    check_logp_gap(MAX_LOGP_GAP)


@pytest.mark.parametrize("gap", [MAX_LOGP_GAP + 0.01, float("nan"), float("inf")])
def test_log_probabilities_out_of_step_end_the_run(gap: float) -> None:
    with pytest.raises(WeightsError, match="does not write with the trainer's weights"):
        check_logp_gap(gap)
