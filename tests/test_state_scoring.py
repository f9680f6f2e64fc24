"""Rollouts behind states: scores and gradients are those of an unrolled run, and each context is slept on once."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl.trainer.utils import add_fused_lm_head

from siesta.rl import embedded
from siesta.rl.attention import BACKENDS
from siesta.rl.modes import Mode, Modes
from siesta.rl.scoring import Scorer, TokenScores
from siesta.rl.sleep.gist import GistSleep, add_slots
from siesta.rl.sleep.latent import LatentSleep
from siesta.rl.sleep.memory import BRANCH, MemorySleep, add_memory
from siesta.rl.sleep.scoring import StateScorer
from siesta.rl.sleep.tensors import TensorState
from tests.helpers import batch_of
from tests.hybrids import COMMON, TOKENIZER, context, hybrid

CONTROL = [TOKENIZER.get_vocab()[word] for word in ("a", "b")]  # any two words will do
MODES = Modes([Mode(name=f"m{token}", token="", token_id=token, max_tokens=4) for token in CONTROL])
# Three rollouts of a context, one of another, one that is read as it stands.
CONTEXTS = [context(7), context(4, 1), None, context(7), context(7)]
ROWS = [
    ([9], [CONTROL[0], 7, 8]),
    ([11, 5], [CONTROL[1], 6]),
    ([21, 22, 23, 14, 5], [CONTROL[1], 9, 7, 1]),
    ([13, 14, 15, 5], [CONTROL[1], 16, 1]),
    ([9], [CONTROL[0], 1]),
]
PASSES = 2
WAYS = ["latent", "gist", "memory"]


def setting(mechanism: str) -> tuple[Any, Any]:
    """A tiny model in float64 with its fused head, and a way to sleep."""
    if mechanism == "latent":
        model: Any = hybrid("qwen3_5")
        way: Any = LatentSleep(TOKENIZER, model.config, "carry_h")
    else:
        set_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
        model.to(torch.float64).eval()
        tokenizer = embedded.build_tokenizer()
        if mechanism == "gist":
            add_slots(model, tokenizer, 3)
            way = GistSleep(tokenizer, model.config, 3)
        else:
            pytest.importorskip("titans_pytorch")
            add_memory(model, 1, heads=2, segment=4)
            torch.nn.init.constant_(model.get_submodule(BRANCH).gate.bias, 1.0)
            way = MemorySleep(tokenizer, model.config, 1)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model, way


def scorer(model: Any, way: Any) -> StateScorer:
    rows = Scorer(MODES, BACKENDS["sdpa"])
    rows.attach(model)
    return StateScorer(rows, way, PASSES)


def unrolled(model: Any, way: Any, row: int) -> torch.Tensor:
    """Log-probabilities of one rollout, token by token of a plain forward pass behind its own sleep."""
    prompt, completion = ROWS[row]
    cache = None
    if CONTEXTS[row] is not None:
        cache = way.cache(way.sleep(model, [CONTEXTS[row]], passes=PASSES).state)
    logits = model(input_ids=torch.tensor([prompt + completion]), past_key_values=cache).logits[0, len(prompt) - 1 :]
    logps = torch.log_softmax(logits[:-1], dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    control = MODES.log_policy(logits[0])
    return torch.cat([control[CONTROL.index(completion[0])][None].to(logps), logps[1:]])


def weighted(scores: TokenScores) -> torch.Tensor:
    """A loss in which no two tokens weigh the same."""
    logps = scores.per_token_logps
    return (logps * torch.arange(1.0, 1 + logps.numel()).view_as(logps)).sum()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mechanism", WAYS)
def test_rows_score_as_each_alone(mechanism: str) -> None:
    model, way = setting(mechanism)
    with torch.no_grad():
        scores = scorer(model, way).score(model, CONTEXTS, *batch_of(ROWS, left=1, right=1))
        for row, (_, completion) in enumerate(ROWS):
            found = scores.per_token_logps[row]
            torch.testing.assert_close(
                found[: len(completion)], unrolled(model, way, row), rtol=1e-6, atol=1e-6, check_dtype=False
            )
            assert (found[len(completion) :] == 0).all()
    assert scores.mode_logps.shape == (len(ROWS), len(MODES))
    assert scores.entropies is not None


@pytest.mark.parametrize("mechanism", WAYS)
def test_gradients_through_sleep_add_up(mechanism: str) -> None:
    """To those of rollouts that each sleep for themselves; without a gradient through sleep they would be others."""
    model, way = setting(mechanism)
    scored = scorer(model, way)
    batch = batch_of(ROWS)
    mine = gradients(model, weighted(scored.score(model, CONTEXTS, *batch)))
    width = batch[2]
    alone = torch.zeros((), dtype=torch.float64)
    for row in range(len(ROWS)):
        logps = unrolled(model, way, row)
        alone = alone + (logps * torch.arange(1.0 + row * width, 1 + row * width + len(logps))).sum()
    theirs = gradients(model, alone)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-4)  # float32 scores
    consolidate = way.consolidate

    def cut(*arguments: Any) -> Any:  # the negative control
        state, cost = consolidate(*arguments)
        return state.detach(), cost

    way.consolidate = cut
    without = gradients(model, weighted(scored.score(model, CONTEXTS, *batch)))
    assert max((mine[name] - without[name]).abs().max() for name in without) > 1e-3
    if mechanism == "memory":
        assert any(name.startswith(f"{BRANCH}.memory.to_keys") for name in mine.keys() - without.keys())


@pytest.mark.parametrize("mechanism", WAYS)
def test_each_context_is_slept_on_once_and_is_read(mechanism: str) -> None:
    model, way = setting(mechanism)
    scored = scorer(model, way)
    slept: list[int] = []
    consolidate = way.consolidate

    def watching(model: Any, rows: list[list[int]], passes: int) -> Any:
        slept.append(len(rows))
        return consolidate(model, rows, passes)

    way.consolidate = watching
    with torch.no_grad():
        own = scored.score(model, CONTEXTS, *batch_of(ROWS)).per_token_logps
        assert slept == [2]

        def zeroed(*arguments: Any) -> Any:
            state, cost = consolidate(*arguments)
            return TensorState({name: torch.zeros_like(part) for name, part in state.parts.items()}), cost

        way.consolidate = zeroed
        empty = scored.score(model, CONTEXTS, *batch_of(ROWS)).per_token_logps
    moved = (own - empty).abs().amax(dim=1) > 1e-5
    assert moved.tolist() == [context is not None for context in CONTEXTS]
