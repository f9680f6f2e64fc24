"""vLLM behind TRL's seam: a cap per mode in one call, a version check, and a check that weights are in step.

And vLLM on its own, as what writes the responses of an evaluation: `vllm_writer`.
"""

import gc
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from siesta.data.errors import RecipeError, UserError
from siesta.rl.generation import Writer, replaced
from siesta.rl.modes import Mode, Modes

OLDEST, NEWEST = Version("0.22"), Version("0.31")
# Mean difference of log-probabilities, in nats a token, beyond which two engines do not hold the same weights. Between
# a bf16 engine and a bf16 trainer with the same weights it is about 0.01.
MAX_LOGP_GAP = 0.3


class WeightsError(UserError):
    """vLLM does not write with the trainer's weights."""


def check_vllm(key: str = "rl.use_vllm", without: str = "use_vllm: false") -> None:
    """Raises RecipeError, with the recipe's `key`, unless a vLLM that TRL works with is installed.

    Args:
        without: The setting that does without it.
    """
    try:
        found = Version(version("vllm"))
    except PackageNotFoundError:
        raise RecipeError(f"{key}: vLLM is not installed; pip install 'siesta-rl[vllm]' or set {without}") from None
    if not OLDEST <= Version(f"{found.major}.{found.minor}") <= NEWEST:
        raise RecipeError(f"{key}: vLLM {found} is installed; versions {OLDEST} to {NEWEST} work with TRL")


@contextmanager
def vllm_writer(folder: Path, *, end_id: int, **settings: Any) -> Iterator[Writer]:
    """Inside, vLLM holds the model of `folder` and writes its responses; afterwards its memory is free again.

    Args:
        settings: Of `vllm.LLM`.
    """
    vllm: Any = importlib.import_module("vllm")
    engine = [vllm.LLM(model=str(folder), **settings)]  # emptied below: the caller still holds `write` then

    def write(prompts: Sequence[list[int]], mode: Mode, *, temperature: float | None) -> list[list[int]]:
        params = vllm.SamplingParams(
            temperature=temperature or 0.0,  # 0 is greedy
            max_tokens=mode.max_tokens,
            stop_token_ids=[end_id],
            detokenize=False,
        )
        asked = [{"prompt_token_ids": [*ids, mode.token_id]} for ids in prompts]
        # The engine has a precision of its own; that of the forward pass around this must not reach it.
        with torch.autocast("cuda", enabled=False):
            outputs = engine[0].generate(asked, [params] * len(asked), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    try:
        yield write
    finally:
        engine.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_logp_gap(gap: float) -> None:
    """Raises WeightsError if vLLM's log-probabilities are `gap` nats a token off the trainer's, on average."""
    if not gap <= MAX_LOGP_GAP:
        raise WeightsError(
            f"vLLM's log-probabilities are {gap:.2f} nats a token off the trainer's (at most {MAX_LOGP_GAP}): it does "
            "not write with the trainer's weights; check that both load the same model and that the server is TRL's"
        )


@contextmanager
def caps_per_mode(generation: Any, modes: Modes, *, text: bool = False) -> Iterator[None]:
    """Inside, TRL's `VLLMGeneration` lets every prompt write up to the cap of the control token that it ends in.

    TRL has one cap for all prompts of a call. A call per mode would wait for each mode's longest response in turn, and
    in server mode, where a rank gets back as many rows as it sent, it would mix up ranks with unequal shares.

    Args:
        text: Have a colocated engine write text as well. TRL reads the ids alone, and turning every id into text is
            work in the process that also schedules the next token.
    """
    caps = {mode.token_id: mode.max_tokens for mode in modes}
    if generation.mode == "colocate":
        engine = generation.llm
        write = engine.generate

        def generate(prompts: Sequence[dict], sampling_params: Any, **settings: Any) -> Any:
            each = [sampling_params.clone() for _ in prompts]
            for params, prompt in zip(each, prompts, strict=True):
                params.max_tokens = caps[prompt["prompt_token_ids"][-1]]
                params.detokenize = text or bool(params.stop)  # strings that stop need text
                params.flat_logprobs = True  # a few lists a response in the place of two objects a token
            return write(prompts, sampling_params=each, **settings)

        with replaced(engine, "generate", generate):
            yield
    elif generation.accelerator.is_main_process:
        client = generation.vllm_client
        with replaced(client, "generate", _one_request_per_cap(client.generate, caps)):
            yield
    else:
        yield


def _one_request_per_cap(write: Any, caps: dict[int, int]) -> Any:
    """`VLLMClient.generate` with a request for each cap; results in the order of the prompts."""

    def generate(prompts: Sequence[list[int]], max_tokens: int, features: Any = None, **settings: Any) -> dict:
        if features is not None:
            raise RecipeError("rl.use_vllm: prompts with images are not supported")
        merged: dict[str, Any] = {}
        for cap in sorted({caps[prompt[-1]] for prompt in prompts}):
            rows = [i for i, prompt in enumerate(prompts) if caps[prompt[-1]] == cap]
            answer = write(prompts=[prompts[i] for i in rows], max_tokens=cap, features=None, **settings)
            for key, values in answer.items():
                if values is None:
                    merged[key] = None
                    continue
                column = merged.setdefault(key, [None] * len(prompts))
                for i, value in zip(rows, values, strict=True):
                    column[i] = value
        return merged

    return generate
