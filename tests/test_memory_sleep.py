"""Titans memory: a new one changes nothing, a written one is read and nothing else, gradients reach the writer."""

import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from siesta.data.errors import ModelError
from siesta.rl.sleep.tensors import TensorState
from tests.hybrids import COMMON, FAMILIES, TOKENIZER, context, query

pytest.importorskip("titans_pytorch")

from siesta.rl.sleep.memory import BRANCH, MemorySleep, add_memory

LAYER = 1


def setting(gate: float = 1.0) -> tuple[Any, MemorySleep]:
    """A tiny Llama with a memory behind its second layer, the gate opened."""
    set_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**COMMON))
    model.to(torch.float64).eval()
    add_memory(model, LAYER, heads=2, segment=4)
    torch.nn.init.constant_(model.get_submodule(BRANCH).gate.bias, gate)
    return model, MemorySleep(TOKENIZER, model.config, LAYER)


def wake(model: Any, way: MemorySleep, state: TensorState, lengths: tuple[int, ...]) -> torch.Tensor:
    return model(**way.attach(state, [query(n) for n in lengths])).logits


def test_a_closed_gate_leaves_the_model_as_it_was() -> None:
    model, way = setting(gate=0.0)
    with torch.no_grad():
        state = way.sleep(model, [context(6)], passes=1).state
        kwargs = way.attach(state, [query(3)])
        plain = model(input_ids=kwargs["input_ids"]).logits
        assert torch.equal(model(**kwargs).logits, plain)


def test_every_weight_of_a_new_memory_is_its_own() -> None:
    """An optimizer step on weights that share memory is an error, and so is saving them."""
    branch = setting()[0].get_submodule(BRANCH)
    assert all(weight.is_contiguous() for weight in branch.parameters())


def test_reading_moves_no_weight_and_takes_each_token_by_itself() -> None:
    model, way = setting()
    branch = model.get_submodule(BRANCH)
    with torch.no_grad():
        state = way.sleep(model, [context(6)], passes=2).state
        before = {name: part.clone() for name, part in state.parts.items()}
        hidden = torch.randn(1, 5, 16, dtype=torch.float64)
        together = branch.read(hidden, state.parts)
        alone = torch.cat([branch.read(hidden[:, t : t + 1], state.parts) for t in range(5)], dim=1)
        wake(model, way, state, (3,))
    torch.testing.assert_close(together, alone)
    assert all(torch.equal(part, before[name]) for name, part in state.parts.items())


def test_the_package_has_no_pure_read_of_its_own() -> None:
    """Why `read` is written as it is: with nothing to store, a forward pass still decays what it reads from."""
    branch = setting()[0].get_submodule(BRANCH)
    hidden = torch.randn(1, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        _, state = branch.memory(hidden)
        masked, _ = branch.memory(hidden, state=state, store_mask=torch.zeros(1, 5, dtype=torch.bool))
        weights = {name: part.unflatten(0, (1, -1)) for name, part in state.states[0].items()}
        pure = (branch.read(hidden, weights) - hidden) / torch.tanh(branch.gate(hidden))
    assert (masked - pure).abs().max() > 1e-3


def test_batches_fan_out_and_padded_queries_are_exact() -> None:
    model, way = setting()
    contexts = [context(6), context(9, 1), context(6, 2)]
    with torch.no_grad():
        state = way.sleep(model, contexts, passes=2).state
        together = wake(model, way, state.select([0, 1, 2, 1]), (5, 2, 3, 5))
        for row, (i, n) in enumerate(((0, 5), (1, 2), (2, 3), (1, 5))):
            alone = wake(model, way, way.sleep(model, [contexts[i]], passes=2).state, (n,))[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=1e-6, atol=1e-6)


def test_zeroed_and_shuffled_states_and_more_passes_change_the_answer() -> None:
    model, way = setting()
    with torch.no_grad():
        once, twice = (way.sleep(model, [context(6), context(6, 1)], passes=n).state for n in (1, 2))
        own = wake(model, way, once, (3, 3))
        zeroed = TensorState({name: torch.zeros_like(part) for name, part in once.parts.items()})
        for other in (zeroed, once.select([1, 0]), twice):
            assert (wake(model, way, other, (3, 3)) - own).abs().max() > 1e-4


def test_gradients_reach_the_writer_and_the_context() -> None:
    model, way = setting()
    wake(model, way, way.sleep(model, [context(6)], passes=2).state, (3,)).square().mean().backward()
    memory = model.get_submodule(BRANCH).memory
    for part in (memory.to_keys, memory.to_values, memory.to_queries, memory.to_adaptive_step):
        assert all(weight.grad.abs().sum() > 0 for weight in part.parameters())
    seen = torch.tensor(TOKENIZER.encode(context(6)))
    only_context = [i for i in seen.tolist() if i not in TOKENIZER.encode(query(3).query)]
    assert model.get_input_embeddings().weight.grad[only_context].abs().sum() > 0


def test_generate_decodes_as_a_greedy_loop_does() -> None:
    model, way = setting()
    with torch.no_grad():
        state = way.sleep(model, [context(6), context(9, 1)], passes=1).state
        kwargs = way.attach(state, [query(3), query(3, 1)])
        written = model.generate(**kwargs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        ids = kwargs["input_ids"]
        for _ in range(5):
            logits = model(input_ids=ids, past_key_values=way.cache(state)).logits[:, -1]
            logits[:, TOKENIZER.eos_token_id] = float("-inf")
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, ids)


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = setting()
    with pytest.raises(ModelError, match="width 16 does not divide into 3 memories"):
        add_memory(model, LAYER, heads=3)
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    with pytest.raises(ModelError, match=r"install siesta-rl\[titans\]"):
        add_memory(model, LAYER)
    with pytest.raises(ModelError, match="falcon_h1 has recurrent layers of its own"):
        MemorySleep(TOKENIZER, FAMILIES["falcon_h1"][1], LAYER)
