"""Gist sleep against one forward pass under a mask that hides the context from the query."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, set_seed

from siesta.data.errors import DataError, ModelError
from siesta.data.prompts import context_ids, messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl import embedded
from siesta.rl.sleep.gist import GistSleep, add_slots, slot_tokens
from siesta.rl.sleep.tensors import TensorState
from tests.hybrids import COMMON, FAMILIES, context, query

SLOTS = 3
FAMILY = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
EVERY = pytest.mark.parametrize("family", FAMILY)


def setting(family: str = "llama", k: int = SLOTS) -> tuple[Any, GistSleep]:
    """A tiny model in float64 with its slots, and the way to sleep."""
    set_seed(0)
    build, config = FAMILY[family]
    tokenizer = embedded.build_tokenizer()
    model: Any = build(config(**COMMON, head_dim=8)).to(torch.float64).eval()
    add_slots(model, tokenizer, k)
    return model, GistSleep(tokenizer, model.config, k)


def wake(model: Any, way: GistSleep, state: TensorState, queries: list[Example]) -> torch.Tensor:
    return model(**way.attach(state, queries)).logits


def masked(model: Any, way: GistSleep, text: str, asked: Example, passes: int, start: int | None) -> torch.Tensor:
    """Logits of the query in one pass over context, slots and query; the query sees the last slots and itself."""
    before = context_ids(way.tokenizer, text) + way.slots * (passes - 1)
    own = prompt_ids(way.tokenizer, messages(Example("q", "", asked.query, "")))
    ids = torch.tensor([before + way.slots + own])
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[-len(own) :, : len(before)] = False
    mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(~seen, float("-inf"))[None, None]
    first = -len(before) if start is None else start
    place = torch.arange(first, first + length)[None]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits
    return logits[:, -len(own) :]


@EVERY
@pytest.mark.parametrize("passes", [1, 3])
def test_gist_equals_a_mask(family: str, passes: int) -> None:
    """Logits and the gradient of every weight, the slots' embeddings among them."""
    model, way = setting(family)
    state = way.sleep(model, [context(7)], passes=passes).state
    ours, reference = wake(model, way, state, [query(4)]), masked(model, way, context(7), query(4), passes, None)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(x.square().mean(), list(model.parameters())) for x in (ours, reference)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    embedding = grads[0][0]
    assert embedding.shape == model.get_input_embeddings().weight.shape
    assert (embedding[way.slots].abs().sum(dim=1) > 0).all()
    assert embedding[context_ids(way.tokenizer, context(7))].abs().sum() > 0


def test_positions_are_relative() -> None:
    """Counting from the start of the context gives the same, up to the float32 of the rotary angles."""
    model, way = setting()
    state = way.sleep(model, [context(7)], passes=2).state
    counted = masked(model, way, context(7), query(4), 2, start=0)
    torch.testing.assert_close(wake(model, way, state, [query(4)]), counted, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_the_context_is_another_answer() -> None:
    """The negative control of the mask, and what is left of a context: dropping more than its keys would be seen."""
    model, way = setting()
    with torch.no_grad():
        text, asked = context(7), query(4)
        state = way.sleep(model, [text], passes=1).state
        own = prompt_ids(way.tokenizer, messages(Example("q", "", asked.query, "")))
        ids = torch.tensor([context_ids(way.tokenizer, text) + way.slots + own])
        open_logits = model(input_ids=ids).logits[:, -len(own) :]
        assert (open_logits - wake(model, way, state, [asked])).abs().max() > 1e-3


@EVERY
def test_batches_and_padded_queries_are_exact(family: str) -> None:
    model, way = setting(family)
    contexts, queries = [context(7), context(3, 1), context(7, 2)], [query(5), query(2, 1), query(3, 2)]
    with torch.no_grad():
        state = way.sleep(model, contexts, passes=2).state
        together = wake(model, way, state, queries)
        for i, (text, asked) in enumerate(zip(contexts, queries, strict=True)):
            alone = wake(model, way, way.sleep(model, [text], passes=2).state, [asked])[0]
            torch.testing.assert_close(together[i, -len(alone) :], alone, rtol=1e-9, atol=1e-9)
        fanned = wake(model, way, state.select([2, 0, 2]), [query(4)] * 3)
        torch.testing.assert_close(fanned[0], fanned[2])
        torch.testing.assert_close(fanned[1:2], wake(model, way, state.select([0]), [query(4)]))
        assert not torch.allclose(fanned[0], fanned[1])


@EVERY
def test_generate_decodes_as_a_greedy_loop_does(family: str) -> None:
    """Queries of unequal length, one context twice."""
    model, way = setting(family)
    queries = [query(5), query(2, 1), query(3, 2)]
    with torch.no_grad():
        state = way.sleep(model, [context(7), context(3, 1)], passes=2).state.select([0, 1, 0])
        kwargs = way.attach(state, queries)
        written = model.generate(**kwargs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        written = written[:, kwargs["input_ids"].shape[1] :]
        for i, asked in enumerate(queries):
            ids = way.attach(state.select([i]), [asked])["input_ids"]
            start = ids.shape[1]
            for _ in range(5):  # every token reads the whole row anew
                logits = model(input_ids=ids, past_key_values=way.cache(state.select([i]))).logits[:, -1]
                logits[:, way.tokenizer.eos_token_id] = float("-inf")
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            assert ids[0, start:].tolist() == written[i].tolist()


def test_zeroed_and_shuffled_states_change_the_answer() -> None:
    model, way = setting()
    with torch.no_grad():
        state = way.sleep(model, [context(7), context(7, 1)], passes=1).state
        before = {key: part.clone() for key, part in state.parts.items()}
        own = wake(model, way, state, [query(3)] * 2)
        zeroed = TensorState({key: torch.zeros_like(part) for key, part in state.parts.items()})
        assert (own - wake(model, way, zeroed, [query(3)] * 2)).abs().max() > 1e-3
        assert (own - wake(model, way, state.select([1, 0]), [query(3)] * 2)).abs().max() > 1e-3
    assert all(torch.equal(part, before[key]) for key, part in state.parts.items())


def test_a_state_survives_a_file(tmp_path: Path) -> None:
    model, way = setting()
    state = way.sleep(model, [context(7), context(3, 1)], passes=1).state.detach()
    save_file(state.tensors(), tmp_path / "state.safetensors")
    restored = way.restore(load_file(tmp_path / "state.safetensors"))
    assert restored.parts.keys() == state.parts.keys()
    assert all(torch.equal(part, state.parts[key]) for key, part in restored.parts.items())
    assert torch.equal(wake(model, way, restored, [query(3)] * 2), wake(model, way, state, [query(3)] * 2))


def test_what_is_kept_and_what_it_cost() -> None:
    """Four layers, keys and values, one head of 8, in float64."""
    model, way = setting()
    out = way.sleep(model, [context(7), context(4)], passes=2)
    assert {part.shape for part in out.state.parts.values()} == {(2, 1, SLOTS, 8)}
    assert out.cost.state_bytes == [4 * 2 * SLOTS * 8 * 8] * 2
    assert out.cost.tokens == [7 + 2 * SLOTS, 4 + 2 * SLOTS]
    weights = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 24
    assert out.cost.flops == [4 * (2 * weights * n + 2 * 16 * n**2) for n in out.cost.tokens]


def test_slots_are_rows_of_their_own_that_nothing_else_moves() -> None:
    model, way = setting()
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == len(way.tokenizer) == way.slots[-1] + 1
    assert len({tuple(row) for row in weight[way.slots].tolist()}) == SLOTS
    before = weight.detach().clone()
    add_slots(model, way.tokenizer, SLOTS)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert [way.tokenizer.encode(token) for token in slot_tokens(SLOTS)] == [[slot] for slot in way.slots]


def test_bad_input_is_one_line() -> None:
    model, way = setting()
    with pytest.raises(ModelError, match="has no <gist_3>"):
        GistSleep(way.tokenizer, model.config, 4)
    with pytest.raises(ModelError, match="full attention only, falcon_h1 has other layers; take latent"):
        GistSleep(way.tokenizer, FAMILIES["falcon_h1"][1], SLOTS)
    with pytest.raises(ModelError, match="gpt2 has none"):
        GistSleep(way.tokenizer, GPT2Config(), SLOTS)
    with pytest.raises(DataError, match="context 0: empty"):
        way.sleep(model, [""], passes=1)
    with pytest.raises(DataError, match="of 66 tokens, the model takes 64"):
        way.sleep(model, [context(60)], passes=2)
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        way.sleep(cast(Any, model.train()), [context(3)], passes=1)
