"""Latent sleep against a loop written by hand, with its gradients, its cache and its controls."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5

from siesta.data.errors import DataError, ModelError
from siesta.data.prompts import context_ids
from siesta.rl.sleep.cache import functional_cache, linear_layers, recurrent_states
from siesta.rl.sleep.latent import Form, LatentSleep, looped, one_pass
from siesta.rl.sleep.tensors import TensorState, equal_lengths
from tests.helpers import tiny_model
from tests.hybrids import FAMILIES, TOKENIZER, context, hybrid, query

EVERY = pytest.mark.parametrize("family", FAMILIES)
FORMS = pytest.mark.parametrize("form", ["carry_h", "reread"])
DELTA = ["qwen3_5", "olmo_hybrid"]


def sleeper(model: PreTrainedModel, form: Form = "carry_h", **options: Any) -> LatentSleep:
    return LatentSleep(TOKENIZER, model.config, form, **options)


def wake(way: LatentSleep, model: PreTrainedModel, state: TensorState, words: int = 3) -> torch.Tensor:
    """Logits of one query asked of every state, (P, T, V)."""
    return cast(Any, model)(**way.attach(state, [query(words)] * len(state))).logits


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([context_ids(TOKENIZER, text)])


def difference(a: TensorState, b: TensorState) -> float:
    assert a.parts.keys() == b.parts.keys()
    return max((a.parts[key] - b.parts[key]).abs().max().item() for key in a.parts)


def unrolled(model: Any, ids: torch.Tensor, passes: int, form: str) -> dict[str, torch.Tensor]:
    """Sleep of Qwen3.5 over one window with the delta rule token by token, from the model's own weights."""
    decoder, states = model.model, {}
    length = ids.shape[1]
    place = torch.arange(length)[None, None].expand(3, 1, -1)
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    embedded = h = decoder.embed_tokens(ids)
    for _ in range(passes):
        h = h if form == "carry_h" else embedded
        rotary = decoder.rotary_emb(h, place)
        for i, block in enumerate(decoder.layers):
            x = block.input_layernorm(h)
            if model.config.layer_types[i] == "full_attention":
                x = block.self_attn(hidden_states=x, position_embeddings=rotary, attention_mask=mask)[0]
            else:
                x, states[f"{i}.0"] = linear_layer(block.linear_attn, x, states.get(f"{i}.0"))
            h = h + x
            h = h + block.mlp(block.post_attention_layernorm(h))
    return states


def linear_layer(layer: Any, x: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated DeltaNet of one row (1, T, d): the convolution starts from nothing, the recurrence from `state`."""
    kernel, length = layer.conv_kernel_size, x.shape[1]
    padded = F.pad(layer.in_proj_qkv(x)[0], (0, 0, kernel - 1, 0))
    taps = layer.conv1d.weight[:, 0].T
    mixed = F.silu(torch.stack([(padded[t : t + kernel] * taps).sum(0) for t in range(length)]))
    q, k, v = (part.view(1, length, layer.num_k_heads, -1) for part in mixed.split([layer.key_dim] * 3, dim=-1))
    g = -layer.A_log.exp() * F.softplus(layer.in_proj_a(x) + layer.dt_bias)
    output, state = delta_rule(q, k, v, g, layer.in_proj_b(x).sigmoid(), state)
    z = layer.in_proj_z(x).view(-1, layer.head_v_dim)
    return layer.out_proj(layer.norm(output.flatten(0, 2), z).view(1, length, -1)), state


def delta_rule(q, k, v, g, beta, initial_state=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t, token by token in the type of q."""
    q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    s = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        s = s * g[:, t, :, None, None].exp()
        correction = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], s))
        s = s + k[:, t, :, :, None] * correction[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), s


@FORMS
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("exact", [True, False])
def test_sleep_equals_the_unrolled_loop(form: Form, passes: int, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and gradients of all weights. Models compute the rule in float32 whatever their own type, so for the
    exact comparison the rule is replaced by one in float64.
    """
    model = hybrid("qwen3_5")
    if exact:
        monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", delta_rule)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    reference = unrolled(model, ids_of(context(9)), passes, form)
    states = sleeper(model, form).sleep(model, [context(9)], passes=passes).state.parts
    assert states.keys() == reference.keys() == {"1.0", "3.0"}
    tolerance = 1e-12 if exact else 1e-5
    for key, state in reference.items():
        torch.testing.assert_close(states[key].double(), state, rtol=tolerance, atol=tolerance)
    weights = list(model.model.parameters())
    ours, theirs = (
        torch.autograd.grad(
            cast(torch.Tensor, sum(x.square().sum() for x in found.values())), weights, allow_unused=True
        )
        for found in (states, reference)
    )
    assert [x is None for x in ours] == [x is None for x in theirs]
    vectors = [torch.cat([x.flatten().double() for x in found if x is not None]) for found in (ours, theirs)]
    torch.testing.assert_close(*vectors, rtol=0, atol=10 * tolerance * vectors[1].abs().max().item())


@pytest.mark.parametrize(("family", "norm"), [("olmo_hybrid", "norm"), ("falcon_h1", "final_layernorm")])
def test_hidden_states_loop_before_the_final_norm(family: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop from outside, through `inputs_embeds` of a model without its final norm and a stock cache."""
    model = hybrid(family)
    decoder = cast(Any, model).get_decoder()
    with torch.no_grad():
        state = sleeper(model).sleep(model, [context(9)], passes=3).state
        monkeypatch.setitem(decoder._modules, norm, torch.nn.Identity())
        hidden, states = None, {}
        for _ in range(3):
            cache = DynamicCache(config=model.config)
            if hidden is None:
                hidden = decoder(input_ids=ids_of(context(9)), past_key_values=cache)[0]
            else:
                decoder(inputs_embeds=hidden, past_key_values=cache)  # gives the buffers their shapes
                cache = reopened(cache, states)
                hidden = decoder(inputs_embeds=hidden, past_key_values=cache)[0]
            states = {key: part.clone() for key, part in recurrent_states(cache).items()}
    assert difference(state, TensorState(states)) < 1e-5


def reopened(cache: DynamicCache, states: dict[str, torch.Tensor]) -> DynamicCache:
    """A stock cache with `states`, no inputs of the convolution and no keys."""
    for layer in cast(Any, cache.layers):
        if "keys" in vars(layer):
            layer.keys, layer.values, layer.is_initialized = None, None, False
    for i, layer in linear_layers(cache):
        cast(torch.Tensor, layer.conv_states[0]).zero_()
        cast(torch.Tensor, layer.recurrent_states[0]).copy_(states[f"{i}.0"])
    return cache


def test_the_two_forms_agree_on_one_pass_only() -> None:
    model = hybrid("olmo_hybrid")
    states = {
        (form, n): sleeper(model, form).sleep(model, [context(9)], passes=n).state
        for form in ("carry_h", "reread")
        for n in (1, 2)
    }
    assert difference(states["carry_h", 1], states["reread", 1]) == 0
    assert difference(states["carry_h", 2], states["reread", 2]) > 1e-3


@EVERY
def test_one_pass_is_an_ordinary_forward(family: str) -> None:
    """N = 1 is the hybrid as it is, and the functional cache computes what the stock one does."""
    model = hybrid(family)
    ids = ids_of(context(9))
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = cast(Any, model)(input_ids=ids, past_key_values=stock).logits
        after = {key: state.clone() for key, state in recurrent_states(stock).items()}
        ours = functional_cache(model.config, {})
        actual = cast(Any, model)(input_ids=ids, past_key_values=ours).logits
        state = sleeper(model).sleep(model, [context(9)], passes=1).state
        more = [cast(Any, model)(input_ids=ids[:, :3], past_key_values=cache).logits for cache in (stock, ours)]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(more[0], more[1], rtol=1e-5, atol=1e-5)
    assert difference(state, TensorState(after)) < 1e-6


@EVERY
def test_the_stock_cache_cannot_be_differentiated_through_passes_of_the_delta_rule(family: str) -> None:
    model = cast(Any, hybrid(family))
    ids = ids_of(context(6))

    def loss(cache: DynamicCache) -> torch.Tensor:
        for _ in range(3):
            logits = model(input_ids=ids, past_key_values=cache).logits
        return logits.square().mean()

    loss(functional_cache(model.config, {})).backward()
    ours = model.get_input_embeddings().weight.grad
    assert ours.abs().sum() > 0
    if family in DELTA:
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss(DynamicCache(config=model.config)).backward()
        return
    model.zero_grad()
    loss(DynamicCache(config=model.config)).backward()
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, ours, rtol=1e-4, atol=1e-6)


@EVERY
@FORMS
def test_gradients_flow_through_every_pass_that_truncation_leaves(family: str, form: Form) -> None:
    """One loss on what wakes from S; the gradient of what leaves the first block is read in each pass."""
    model = hybrid(family)
    for truncate, reached in (
        (None, [True] * 3),
        (3, [True] * 3),
        (2, [False, True, True]),
        (1, [False, False, True]),
    ):
        seen: list[torch.Tensor] = []

        def watch(block, args, seen=seen):
            if args[0].requires_grad:
                args[0].retain_grad()
            seen.append(args[0])

        way = sleeper(model, form, truncate=truncate)
        handle = cast(Any, model).get_decoder().layers[1].register_forward_pre_hook(watch)
        state = way.sleep(model, [context(6)], passes=3).state
        handle.remove()
        wake(way, model, state).square().mean().backward()
        assert [x.grad is not None and bool(x.grad.abs().sum() > 0) for x in seen] == reached
        assert [x.requires_grad for x in seen] == reached


def test_truncation_moves_no_value() -> None:
    model = hybrid("qwen3_5")
    states = [sleeper(model, truncate=p, window=4).sleep(model, [context(9)], passes=2).state for p in (None, 1, 3)]
    assert difference(states[0], states[1]) == difference(states[0], states[2]) == 0


def test_no_graph_without_gradients() -> None:
    model = hybrid("falcon_h1")
    with torch.no_grad():
        state = sleeper(model).sleep(model, [context(6)], passes=2).state
    assert not any(part.requires_grad for part in state.parts.values())


@EVERY
@FORMS
def test_a_batch_gives_what_each_context_gives_alone(family: str, form: Form) -> None:
    """Contexts of many lengths, one of a single token, windows among them."""
    model = hybrid(family)
    way = sleeper(model, form, window=5, batch_size=2)
    contexts = [context(n, seed) for seed, n in enumerate((9, 6, 9, 1, 11, 9))]
    with torch.no_grad():
        together = way.sleep(model, contexts, passes=2).state
        alone = [way.sleep(model, [text], passes=2).state for text in contexts]
    assert max(difference(together.select([i]), state) for i, state in enumerate(alone)) < 1e-6
    assert difference(together.select([0]), alone[2]) > 1e-3


def test_windows_carry_the_state_alone() -> None:
    """Two windows by hand: N passes over each, hidden states anew at the border."""
    model = hybrid("olmo_hybrid")
    decoder, states = cast(Any, model).get_decoder(), {}
    for window in ids_of(context(9)).split([5, 4], dim=1):
        hidden = None
        for _ in range(2):
            hidden, states = one_pass(decoder, model.config, window, hidden, states)
    out = sleeper(model, window=5).sleep(model, [context(9)], passes=2)
    assert difference(out.state, TensorState(states)) == 0
    assert difference(out.state, sleeper(model).sleep(model, [context(9)], passes=2).state) > 1e-3
    assert out.cost.tokens == [18]


@EVERY
def test_a_fan_out_wakes_as_separate_states_do(family: str) -> None:
    model = hybrid(family)
    way = sleeper(model)
    with torch.no_grad():
        state = way.sleep(model, [context(6), context(9, 1)], passes=2).state
        fanned = wake(way, model, state.select([0, 0, 1, 1, 1]))
        single = [wake(way, model, state.select([i]))[0] for i in (0, 0, 1, 1, 1)]
    torch.testing.assert_close(fanned, torch.stack(single), rtol=0, atol=1e-6)
    assert not torch.allclose(single[0], single[2])


@EVERY
def test_attention_sees_nothing_of_the_context(family: str) -> None:
    """A wake from S alone is a wake from S beside garbage that was in the keys and values when they were dropped."""
    model = hybrid(family)
    way = sleeper(model)
    with torch.no_grad():
        state = way.sleep(model, [context(6)], passes=1).state
        kwargs = way.attach(state, [query(3)])
        cache = kwargs["past_key_values"]
        assert cache.get_seq_length() == 0
        assert not any(layer.is_initialized for layer in cache.layers if "keys" in vars(layer))
        assert all(torch.equal(part, state.parts[key]) for key, part in recurrent_states(cache).items())
        expected = cast(Any, model)(**kwargs).logits
        # The same S in a cache that has read other tokens: their keys are there, and change the answer.
        dirty = functional_cache(model.config, {})
        cast(Any, model)(input_ids=ids_of(context(6, 7)), past_key_values=dirty)
        for key, part in state.parts.items():
            dirty.update_recurrent_state(part, *map(int, key.split(".")))
        seen = cast(Any, model)(input_ids=kwargs["input_ids"], past_key_values=dirty).logits
        clean = cast(Any, model)(
            input_ids=kwargs["input_ids"], past_key_values=functional_cache(model.config, state.parts)
        ).logits
    assert torch.equal(clean, expected)
    assert not torch.allclose(seen, expected, atol=1e-3)


@EVERY
def test_zeroed_and_shuffled_states_change_the_answer(family: str) -> None:
    model = hybrid(family)
    way = sleeper(model)
    with torch.no_grad():
        state = way.sleep(model, [context(9), context(9, 1)], passes=2).state
        before = {key: part.clone() for key, part in state.parts.items()}
        own = wake(way, model, state)
        zeroed = wake(way, model, TensorState({k: torch.zeros_like(part) for k, part in state.parts.items()}))
        shuffled = wake(way, model, state.select([1, 0]))
        empty = cast(Any, model)(input_ids=way.attach(state, [query(3)] * 2)["input_ids"]).logits
    assert (own - zeroed).abs().max() > 1e-3
    assert (own - shuffled).abs().max() > 1e-3
    torch.testing.assert_close(zeroed, empty, rtol=1e-5, atol=1e-5)  # no state is no context
    torch.testing.assert_close(shuffled.flip(0), own)
    assert all(torch.equal(part, before[key]) for key, part in state.parts.items())


@EVERY
def test_generate_decodes_as_a_greedy_loop_does(family: str) -> None:
    model = cast(Any, hybrid(family))
    way = sleeper(model)
    with torch.no_grad():
        state = way.sleep(model, [context(9), context(6, 1)], passes=2).state
        kwargs = way.attach(state, [query(3), query(3, 1)])
        written = model.generate(**kwargs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        ids = kwargs["input_ids"]
        for _ in range(6):  # every token reads the whole row anew
            logits = model(input_ids=ids, past_key_values=way.cache(state)).logits[:, -1]
            logits[:, TOKENIZER.eos_token_id] = float("-inf")
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, ids)


@EVERY
def test_padding_on_the_right_is_exact_and_on_the_left_is_not(family: str) -> None:
    model = cast(Any, hybrid(family))
    way = sleeper(model)
    with torch.no_grad():
        state = way.sleep(model, [context(9)], passes=1).state
        ids = way.attach(state, [query(4)])["input_ids"]
        expected = model(input_ids=ids, past_key_values=way.cache(state)).logits
        pad, mask = torch.full((1, 2), cast(int, TOKENIZER.pad_token_id)), torch.ones_like(ids)
        hidden = torch.zeros_like(pad)
        right = {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([mask, hidden], 1)}
        left = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([hidden, mask], 1)}
        right_logits = model(**right, past_key_values=way.cache(state)).logits[:, : ids.shape[1]]
        left_logits = model(**left, past_key_values=way.cache(state)).logits[:, 2:]
    torch.testing.assert_close(right_logits, expected, rtol=1e-6, atol=1e-6)
    assert (left_logits - expected).abs().max() > 1e-4


@EVERY
def test_a_state_survives_a_file(family: str, tmp_path: Path) -> None:
    model = hybrid(family)
    way = sleeper(model)
    state = way.sleep(model, [context(9), context(6, 1)], passes=2).state.detach()
    save_file(state.tensors(), tmp_path / "state.safetensors")
    for tensors in (state.tensors(), load_file(tmp_path / "state.safetensors")):
        restored = way.restore(tensors)
        assert restored.parts.keys() == state.parts.keys()
        assert all(torch.equal(part, state.parts[key]) for key, part in restored.parts.items())
        assert torch.equal(wake(way, model, restored), wake(way, model, state))
    assert state.nbytes() == [sum(part[0].numel() * 4 for part in state.parts.values())] * 2


def test_gradients_reach_the_state_from_every_copy() -> None:
    model = hybrid("qwen3_5")
    way = sleeper(model)
    state = way.sleep(model, [context(6)], passes=2).state
    leaf = TensorState({key: part.detach().requires_grad_() for key, part in state.parts.items()})
    wake(way, model, leaf.select([0, 0])).square().sum().backward()
    double = {key: cast(torch.Tensor, part.grad) for key, part in leaf.parts.items()}
    leaf = TensorState({key: part.detach().requires_grad_() for key, part in state.parts.items()})
    wake(way, model, leaf).square().sum().backward()
    for key, part in leaf.parts.items():
        torch.testing.assert_close(double[key], 2 * cast(torch.Tensor, part.grad), rtol=1e-4, atol=1e-5)


def test_cost_by_hand() -> None:
    """Falcon's blocks: 2-D weights counted by hand, causal attention in four layers with 2 heads of 8."""
    model = hybrid("falcon_h1")
    out = sleeper(model, window=4).sleep(model, [context(8)], passes=3)
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and name.endswith("proj.weight")]
    per_window = 2 * 4 * sum(p.numel() for p in blocks) + 4 * 2 * 16 * 4**2
    assert out.cost.tokens == [24]
    assert out.cost.flops == [6 * per_window]
    assert out.cost.state_bytes == out.state.nbytes() == [4 * 2 * 8 * 8 * 4]


def test_batches_of_equal_length_hold_every_row_once() -> None:
    rows = [[0] * n for n in (3, 1, 3, 2, 3, 1)]
    assert equal_lengths(rows, 2) == [[0, 2], [4], [1, 5], [3]]


def test_looping_leaves_the_model_as_it_was() -> None:
    model = cast(Any, hybrid("qwen3_5"))
    with pytest.raises(KeyError), looped(model.model.layers, None):
        raise KeyError
    assert not model.model.layers[0]._forward_pre_hooks
    assert not model.model.layers[-1]._forward_hooks


def test_bad_input_is_one_line() -> None:
    model = hybrid("qwen3_5")
    way = sleeper(model)
    with pytest.raises(ModelError, match="llama has no recurrent layers to sleep into; take notes or gist"):
        sleeper(tiny_model())
    with pytest.raises(DataError, match="context 1: empty"):
        way.sleep(model, [context(3), "  "], passes=1)
    with pytest.raises(DataError, match="a window of 70 tokens, the model takes 64"):
        way.sleep(model, [context(70)], passes=1)
    sleeper(model, window=64).sleep(model, [context(70)], passes=1)
    state = way.sleep(model, [context(3)] * 2, passes=1).state
    with pytest.raises(DataError, match="batch prompts of equal length"):
        way.attach(state, [query(2), query(3)])
    with pytest.raises(ModelError, match="not the recurrent layers of this falcon_h1 model"):
        sleeper(hybrid("falcon_h1")).attach(state, [query(2)] * 2)
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        way.sleep(model.train(), [context(3)], passes=1)
