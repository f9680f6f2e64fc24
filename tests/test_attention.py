"""Packed attention is exact: a row of many sequences scores, and moves the weights, as each sequence does alone.
So is attention that follows a tree: completions that share a prompt score as each does behind its own.

On the CPU the layout `padded` through sdpa is the reference. FlexAttention runs uncompiled here, and forward only
(torch has no backward of it on the CPU); the kernel of torch.nn.attention.varlen is replaced by a loop over the
sequences, so all around it is ours; and plain sdpa takes the boundaries from the positions. Everything is float32.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from transformers import (
    Gemma2Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.utils import add_fused_lm_head

from siesta.data.errors import RecipeError
from siesta.rl import attention
from siesta.rl.attention import (
    BACKENDS,
    Backend,
    choose_backend,
    flex_forward,
    no_mask_when_packed,
    packed_row,
    unsuited,
    varlen_forward,
)
from siesta.rl.generation import complete
from siesta.rl.masks import block_mask, boundaries
from siesta.rl.modes import Mode, Modes
from siesta.rl.packing import lay_out
from siesta.rl.scoring import Scorer, TokenScores
from tests.helpers import PACKED_SDPA, Rows, batch_of

# torch warns that FlexAttention is not compiled: on the CPU that is what we want.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

MODES = Modes([Mode("short", "<short>", 2, 2), Mode("think", "<think>", 3, 9)])
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
}
WINDOWED: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=3)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, head_dim=8, use_sliding_window=True, sliding_window=3, layer_types=SLIDING)
    ),
}
# Lengths 10, 4, 12 and 2; the completions of the last two open with either control token, and one is nothing else.
ROWS: Rows = [
    ([10, 11, 12, 13, 14], [3, 20, 21, 22, 1]),
    ([15, 16], [2, 23]),
    ([17, 18, 19], [3, 24, 25, 26, 27, 28, 29, 30, 1]),
    ([31], [2]),
]
# Groups of three, two and one, interleaved, with either control token in each group.
GROUPS: Rows = [
    ([10, 11, 12, 13, 14], [3, 20, 21, 22, 1]),
    ([15, 16], [2, 23]),
    ([10, 11, 12, 13, 14], [2, 33]),
    ([17, 18, 19], [3, 24, 25, 26, 27, 28, 29, 30, 1]),
    ([15, 16], [3, 34, 35, 36]),
    ([10, 11, 12, 13, 14], [3, 37, 38, 1]),
]


class Attention(torch.nn.Module):
    """What sdpa asks an attention layer for."""

    num_key_value_groups = 2
    is_causal = True


def build(
    make: Callable[[], PreTrainedModel], backend: Backend, *, share: bool = False
) -> tuple[PreTrainedModel, Scorer]:
    """The same weights every time."""
    torch.manual_seed(0)
    model = make().eval()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    scorer = Scorer(MODES, backend, share=share)
    scorer.attach(model)
    return model, scorer


def scores(
    make: Callable[[], PreTrainedModel], backend: Backend, rows: Rows = ROWS, *, share: bool = False
) -> TokenScores:
    model, scorer = build(make, backend, share=share)
    with torch.no_grad():
        return scorer.score(model, scorer.lay_out(*batch_of(rows)))


def gradient(
    make: Callable[[], PreTrainedModel], backend: Backend, rows: Rows = ROWS, *, share: bool = False
) -> torch.Tensor:
    """Of a sum in which every score has another weight."""
    model, scorer = build(make, backend, share=share)
    found = scorer.score(model, scorer.lay_out(*batch_of(rows)))
    loss = torch.zeros(())
    for part in (found.per_token_logps, found.mode_logps, found.log_mass):
        loss = loss + (part * torch.linspace(0.5, 1.5, part.numel()).view(part.shape)).sum()
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def assert_same_scores(found: TokenScores, expected: TokenScores) -> None:
    for name in ("per_token_logps", "entropies", "mode_logps", "log_mass"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)


def assert_same_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 1
    assert (found - expected).norm() < 1e-5 * expected.norm()


def loop_over_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What `varlen_attn` is documented to compute, one sequence after the other; q, k, v have shape (S, heads, D)."""
    assert torch.equal(starts, key_starts)
    assert starts.dtype == torch.int32
    assert longest == longest_key == int(starts.diff().max())
    assert query.shape == key.shape == value.shape
    assert starts[-1] == len(query)
    left, right = window_size
    outputs = []
    for first, end in itertools.pairwise(starts.tolist()):
        behind = torch.arange(end - first)[:, None] - torch.arange(end - first)
        seen = (behind >= -right) & ((behind <= left) | (left == -1))
        part = [x[first:end].transpose(0, 1) for x in (query, key, value)]
        attended = torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def varlen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", loop_over_sequences)


# ---- which back end ----------------------------------------------------------------------------------------------


PACKED = [name for name, backend in BACKENDS.items() if backend.packed]


def test_auto_on_a_cpu_is_sdpa_and_says_why() -> None:
    backend, line = choose_backend("auto", "cpu", torch.float32)
    assert backend is BACKENDS["sdpa"]
    assert not backend.packed
    others = "; ".join(f"{name}: needs a CUDA device" for name in PACKED)
    assert line == f"attention: sdpa, sorted by length ({others})"


def test_a_back_end_that_was_asked_for_needs_no_reason() -> None:
    assert choose_backend("sdpa", "cpu", torch.float32) == (BACKENDS["sdpa"], "attention: sdpa, sorted by length")
    backend, line = choose_backend("varlen", "cuda", torch.bfloat16)
    assert (backend.name, backend.packed, line) == ("varlen", True, "attention: varlen, packed")


@pytest.mark.parametrize("name", PACKED)
def test_asking_for_a_missing_back_end_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(RecipeError) as error:
        choose_backend(name, "cpu", torch.bfloat16)
    assert str(error.value) == f"rl.attention: {name}: needs a CUDA device; use auto or sdpa"


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError) as error:
        choose_backend("flashy", "cuda", torch.bfloat16)
    names = "auto, flash_attention_3, flash_attention_2, varlen, flex, sdpa, eager"
    assert str(error.value) == f"rl.attention: 'flashy' is not one of {names}"


def test_kernels_of_half_precision_refuse_float32() -> None:
    with pytest.raises(RecipeError, match=r"^rl\.attention: varlen: computes in bf16 or fp16 only; use auto or sdpa$"):
        choose_backend("varlen", "cuda", torch.float32)


def test_auto_takes_the_first_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    able = {name: replace(BACKENDS[name], missing=lambda device, dtype: None) for name in ("varlen", "flex")}
    monkeypatch.setattr(attention, "BACKENDS", BACKENDS | able)
    backend, line = choose_backend("auto", "cpu", torch.float32, LlamaConfig(**SHAPE))
    assert backend.name == "varlen"
    assert line.startswith("attention: varlen, packed (flash_attention_3: needs a CUDA device; flash_attention_2: ")


def test_auto_leaves_flex_out_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted rows are faster there; asked for by name it is used."""
    able = {"flex": replace(BACKENDS["flex"], missing=lambda device, dtype: None)}
    unable = {name: replace(BACKENDS[name], missing=lambda device, dtype: "is out") for name in PACKED[:3]}
    monkeypatch.setattr(attention, "BACKENDS", BACKENDS | able | unable)
    backend, line = choose_backend("auto", "cuda", torch.float32)
    assert backend is BACKENDS["sdpa"]
    out = "; ".join(f"{name}: is out" for name in PACKED[:3])
    assert line == f"attention: sdpa, sorted by length ({out}; flex: slower than sorted rows in float32)"
    for share in (False, True):
        assert choose_backend("auto", "cuda", torch.float32, share=share)[0].name == "sdpa"
        assert choose_backend("flex", "cuda", torch.float32, share=share)[0].name == "flex"
        assert choose_backend("auto", "cuda", torch.bfloat16, share=share)[0].name == "flex"


def test_auto_on_a_cpu_shares_prompts_through_sdpa() -> None:
    backend, line = choose_backend("auto", "cpu", torch.float32, LlamaConfig(**SHAPE), share=True)
    assert backend is BACKENDS["sdpa"]
    others = "; ".join(f"{name}: needs a CUDA device" for name in PACKED)
    assert line == f"attention: sdpa, sorted by length, shared prompts ({others})"


def test_auto_passes_over_what_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    able = {name: replace(backend, missing=lambda device, dtype: None) for name, backend in BACKENDS.items()}
    monkeypatch.setattr(attention, "BACKENDS", able)
    backend, line = choose_backend("auto", "cuda", torch.bfloat16, share=True)
    assert backend.name == "flex"
    others = "; ".join(f"{name}: cannot share prompts" for name in PACKED[:3])
    assert line == f"attention: flex, packed, shared prompts ({others})"
    # Negative control: without sharing the first is taken.
    assert choose_backend("auto", "cuda", torch.bfloat16)[0].name == "flash_attention_3"


@pytest.mark.parametrize("name", BACKENDS)
def test_only_flex_and_sdpa_share_prompts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    able = {name: replace(BACKENDS[name], missing=lambda device, dtype: None)}
    monkeypatch.setattr(attention, "BACKENDS", BACKENDS | able)
    if name in ("flex", "sdpa"):
        assert ", shared prompts" in choose_backend(name, "cuda", torch.bfloat16, share=True)[1]
        return
    with pytest.raises(RecipeError) as error:
        choose_backend(name, "cuda", torch.bfloat16, share=True)
    advice = "use attention: auto or share_prompts: false"
    assert str(error.value) == f"rl.share_prompts: {name}: cannot share prompts; {advice}"
    assert choose_backend(name, "cuda", torch.bfloat16)[0].name == name


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SHAPE, sliding_window=3), "has no sliding window here"),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, layer_types=SLIDING),
            "has no sliding window here",
        ),
        (
            Qwen3NextConfig(num_hidden_layers=4),
            "layers of type linear_attention would carry state over sequence boundaries",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_models_whose_layers_cannot_follow_a_tree_refuse_to_share(config: PreTrainedConfig, reason: str) -> None:
    """Neither windows nor recurrent layers know that a completion comes right behind its prompt."""
    assert unsuited(BACKENDS["sdpa"], config, share=True) == reason
    assert unsuited(BACKENDS["flex"], config, share=True) == reason
    assert unsuited(BACKENDS["sdpa"], config) is None  # negative control: rows of their own are no matter
    for wanted in ("auto", "sdpa"):
        with pytest.raises(RecipeError) as error:
            choose_backend(wanted, "cpu", torch.float32, config, share=True)
        message = str(error.value)
        assert message.startswith("rl.share_prompts: ")
        assert f"sdpa: {reason}" in message
        assert message.endswith("; use attention: auto or share_prompts: false")
        assert "\n" not in message


def test_a_model_without_sdpa_goes_through_eager_attention() -> None:
    """Sinks (gpt-oss) and capped logits are computed by eager and flash attention alone; the rest would drop them."""
    config = GptOssConfig(**SHAPE, num_local_experts=2, layer_types=["full_attention"] * 2)
    model = GptOssForCausalLM(config)  # its weights are not used
    assert not model._supports_sdpa
    backend, line = choose_backend("auto", "cuda", torch.float32, config, model)
    assert backend.name == "eager"
    assert "flex: the model has attention sinks" in line or "flex: the package triton" in line
    with pytest.raises(RecipeError, match="varlen: the model has attention sinks or capped logits"):
        choose_backend("varlen", "cuda", torch.bfloat16, config, model)


def test_a_window_without_layer_types_is_seen() -> None:
    assert unsuited(BACKENDS["flex"], MistralConfig(**SHAPE, sliding_window=3)) == "has no sliding window here"
    assert unsuited(BACKENDS["flex"], MistralConfig(**SHAPE, sliding_window=None)) is None
    assert unsuited(BACKENDS["varlen"], MistralConfig(**SHAPE, sliding_window=3)) is None


def test_recurrent_layers_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their state knows no boundaries."""
    config = Qwen3NextConfig(num_hidden_layers=4)
    assert "linear_attention" in (config.layer_types or [])
    able = {name: replace(backend, missing=lambda device, dtype: None) for name, backend in BACKENDS.items()}
    monkeypatch.setattr(attention, "BACKENDS", able)
    backend, line = choose_backend("auto", "cuda", torch.bfloat16, config)
    assert backend.name == "sdpa"
    reason = "layers of type linear_attention would carry state over sequence boundaries"
    assert line.count(reason) == len(PACKED)
    for name in PACKED:
        with pytest.raises(RecipeError, match=f"^rl.attention: {name}: {reason}; use auto or sdpa$"):
            choose_backend(name, "cuda", torch.bfloat16, config)
    # Negative control: attention alone goes to the first.
    assert choose_backend("auto", "cuda", torch.bfloat16, Qwen3Config(**SHAPE))[0].name == "flash_attention_3"


@pytest.mark.parametrize(
    ("config", "refusing"),
    [
        (Qwen3Config(**SHAPE), set()),
        (LlamaConfig(**SHAPE), set()),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, layer_types=SLIDING), {"flex"}),
        (Gemma2Config(num_hidden_layers=2, attn_logit_softcapping=50.0), {"varlen", "flex"}),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_what_a_back_end_does_not_compute_it_refuses(config: PreTrainedConfig, refusing: set[str]) -> None:
    """Sliding windows and capped logits."""
    assert {name for name, backend in BACKENDS.items() if unsuited(backend, config)} == refusing
    assert not any(unsuited(backend, None) for backend in BACKENDS.values())


# ---- FlexAttention -----------------------------------------------------------------------------------------------


def test_flex_attends_where_the_mask_says_and_at_the_given_scale() -> None:
    """Heads of 8 would be scaled by 0.35; the outcome is sdpa's under the mask written out."""
    torch.manual_seed(0)
    pack = lay_out(*batch_of([([4], [2]), ([5, 6], [3])]), packed=True)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    found, _ = flex_forward(Attention(), query, key, value, None, scaling=0.9, **block_mask(pack))
    dense = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril()).bool()[None, None]
    expected, _ = sdpa_attention_forward(Attention(), query, key, value, dense, scaling=0.9)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    otherwise, _ = flex_forward(Attention(), query, key, value, None, scaling=None, **block_mask(pack))
    assert (otherwise - expected).abs().max() > 1e-2


# ---- packed rows are exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [BACKENDS["flex"], BACKENDS["varlen"], PACKED_SDPA], ids=lambda b: b.name)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("varlen_kernel")
def test_packed_rows_score_as_padded_ones_and_as_alone(name: str, backend: Backend) -> None:
    padded = scores(MODELS[name], BACKENDS["sdpa"])
    packed = scores(MODELS[name], backend)
    assert_same_scores(packed, padded)
    for i, row in enumerate(ROWS):
        alone = scores(MODELS[name], BACKENDS["sdpa"], [row])
        real = len(row[1])
        torch.testing.assert_close(packed.per_token_logps[i, :real], alone.per_token_logps[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(packed.mode_logps[i], alone.mode_logps[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", [BACKENDS["varlen"], PACKED_SDPA], ids=lambda b: b.name)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("varlen_kernel")
def test_packed_rows_move_the_weights_as_padded_ones(name: str, backend: Backend) -> None:
    """Not FlexAttention: it has no backward pass on the CPU."""
    assert_same_gradient(gradient(MODELS[name], backend), gradient(MODELS[name], BACKENDS["sdpa"]))


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.usefixtures("varlen_kernel")
def test_sliding_windows_hold_inside_packed_sequences(name: str) -> None:
    """Windows of three tokens in sequences of up to twelve."""
    make = WINDOWED[name]
    padded = scores(make, BACKENDS["sdpa"])
    assert_same_scores(scores(make, BACKENDS["varlen"]), padded)
    assert_same_gradient(gradient(make, BACKENDS["varlen"]), gradient(make, BACKENDS["sdpa"]))
    # Negative control: without the window, tokens that have more than three before them score otherwise.
    without = scores(make, replace(BACKENDS["flex"], name="without window"))
    assert (without.per_token_logps - padded.per_token_logps).abs().max() > 1e-2


@pytest.mark.usefixtures("varlen_kernel")
def test_gradient_checkpointing_changes_nothing() -> None:
    """Layers run again in the backward pass, when `packed_row` is over: the boundaries must come along."""

    def checkpointed() -> PreTrainedModel:
        model = MODELS["qwen3"]().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    model, scorer = build(checkpointed, BACKENDS["varlen"])
    model.train()
    assert model.is_gradient_checkpointing
    found = scorer.score(model, scorer.lay_out(*batch_of(ROWS)))
    parts = torch.autograd.grad(found.per_token_logps.sum(), list(model.parameters()))
    plain, scorer = build(MODELS["qwen3"], BACKENDS["sdpa"])
    expected = scorer.score(plain, scorer.lay_out(*batch_of(ROWS)))
    wanted = torch.autograd.grad(expected.per_token_logps.sum(), list(plain.parameters()))
    assert_same_gradient(*(torch.cat([part.flatten() for part in both]) for both in (parts, wanted)))


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_without_boundaries_scores_otherwise(name: str) -> None:
    """Negative control: every sequence but the first sees its neighbours."""
    open_ends = replace(BACKENDS["varlen"], arguments=lambda pack: {})
    gaps = (scores(MODELS[name], open_ends).mode_logps - scores(MODELS[name], BACKENDS["sdpa"]).mode_logps).abs()
    assert gaps[0].max() < 1e-5
    assert (gaps[1:].amax(1) > 1e-2).all()


@pytest.mark.parametrize("backend", [BACKENDS["flex"], BACKENDS["varlen"], PACKED_SDPA], ids=lambda b: b.name)
@pytest.mark.usefixtures("varlen_kernel")
def test_disagreement_of_layouts_shows_lost_boundaries(backend: Backend) -> None:
    """The trainer's own look at its back end: rounding for a right one, nats for one that mixes sequences up."""
    model, scorer = build(MODELS["qwen3"], backend)
    assert scorer.disagreement(model, *batch_of(ROWS)) < 1e-5
    running = replace(BACKENDS["varlen"], arguments=lambda pack: {})
    model, scorer = build(MODELS["qwen3"], running)
    assert scorer.disagreement(model, *batch_of(ROWS)) > 0.1
    assert scorer.disagreement(model, *batch_of(ROWS[:1])) < 1e-5  # one sequence has no neighbour


@pytest.mark.usefixtures("varlen_kernel")
def test_boundaries_one_place_off_score_otherwise() -> None:
    """Negative control of the loop that stands for the kernel."""

    def shifted(pack: Any) -> dict[str, Any]:
        given = boundaries(pack)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            given[name] = given[name].clone()
            given[name][1] -= 1
        return given

    gaps = scores(MODELS["qwen3"], replace(BACKENDS["varlen"], arguments=shifted)).per_token_logps
    gaps = (gaps - scores(MODELS["qwen3"], BACKENDS["sdpa"]).per_token_logps).abs()
    assert gaps[1].max() > 1e-2
    assert gaps[2:].max() < 1e-5


def test_the_kernel_gets_half_precision_and_repeated_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings leave float32 under autocast. Key heads 0 and 1 serve query heads 0, 1 and 2, 3."""
    given: list[Any] = []

    def kernel(*args: Any, **settings: Any) -> torch.Tensor:
        given.extend([*args, settings])
        return args[0]

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    value = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    output, _ = varlen_forward(
        Attention(), query, key, value, None, scaling=0.5, cu_seq_lens_q=ends, max_length_q=3, sliding_window=4
    )
    assert output.shape == (1, 5, 4, 8)
    assert all(x.dtype == torch.bfloat16 and x.shape == (5, 4, 8) for x in given[:3])
    assert torch.equal(given[0], query[0].transpose(0, 1).bfloat16())
    for head, of in enumerate((0, 0, 1, 1)):
        assert torch.equal(given[1][:, head], key[0, of].bfloat16())
        assert torch.equal(given[2][:, head], value[0, of])
    # A window of 4 counts the token itself: 3 to the left, none to the right.
    assert given[-1] == {"scale": 0.5, "window_size": (3, 0)}


# ---- shared prompts are exact ------------------------------------------------------------------------------------

SHARING = [BACKENDS["flex"], BACKENDS["sdpa"]]


@pytest.mark.parametrize("backend", SHARING, ids=lambda b: b.name)
@pytest.mark.parametrize("name", MODELS)
def test_rollouts_that_share_a_prompt_score_as_padded_ones_and_as_alone(name: str, backend: Backend) -> None:
    padded = scores(MODELS[name], BACKENDS["sdpa"], GROUPS)
    shared = scores(MODELS[name], backend, GROUPS, share=True)
    assert_same_scores(shared, padded)
    for i, row in enumerate(GROUPS):
        alone = scores(MODELS[name], backend, [row], share=True)
        real = len(row[1])
        torch.testing.assert_close(shared.per_token_logps[i, :real], alone.per_token_logps[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(shared.mode_logps[i], alone.mode_logps[0], rtol=0, atol=1e-5)
    # Rows in another order score the same; rows of a group, which share their first position, agree in it.
    turned = scores(MODELS[name], backend, GROUPS[::-1], share=True)
    torch.testing.assert_close(turned.per_token_logps.flip(0), shared.per_token_logps, rtol=0, atol=1e-5)
    assert torch.equal(shared.mode_logps[0], shared.mode_logps[2])
    assert torch.equal(shared.log_mass[1], shared.log_mass[4])


@pytest.mark.parametrize("backend", SHARING, ids=lambda b: b.name)
@pytest.mark.parametrize("name", MODELS)
def test_groups_of_many_blocks_score_as_padded_ones(name: str, backend: Backend) -> None:
    """FlexAttention's blocks have 128 tokens; trees here have about as many, and begin and end inside blocks."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, 64, (count,), generator=draw).tolist()

    prompts = [tokens(count) for count in (40, 3, 30)]
    rows: Rows = [(prompts[i % 3], [2 + i % 2, *tokens((7, 20, 1, 13)[i % 4])]) for i in range(15)]
    padded = scores(MODELS[name], BACKENDS["sdpa"], rows)
    assert_same_scores(scores(MODELS[name], backend, rows, share=True), padded)
    if backend.packed:  # without sharing it has as many blocks again
        assert_same_scores(scores(MODELS[name], backend, rows), padded)


@pytest.mark.parametrize("name", MODELS)
def test_rollouts_that_share_a_prompt_move_the_weights_as_padded_ones(name: str) -> None:
    """Through sdpa: FlexAttention has no backward pass on the CPU."""
    shared = gradient(MODELS[name], BACKENDS["sdpa"], GROUPS, share=True)
    assert_same_gradient(shared, gradient(MODELS[name], BACKENDS["sdpa"], GROUPS))
    # Negative control: one rollout less is another gradient.
    fewer = gradient(MODELS[name], BACKENDS["sdpa"], GROUPS[:-1])
    assert (shared - fewer).norm() > 1e-2 * shared.norm()


@pytest.mark.parametrize("backend", SHARING, ids=lambda b: b.name)
@pytest.mark.parametrize("name", MODELS)
def test_shared_prompts_without_their_mask_score_otherwise(name: str, backend: Backend) -> None:
    """Negative control: the second and third completion of a group (rows 2, 4 and 5) see what is not theirs."""
    padded = scores(MODELS[name], BACKENDS["sdpa"], GROUPS)
    lost = scores(MODELS[name], replace(backend, arguments=lambda pack: {}), GROUPS, share=True)
    gaps = (lost.per_token_logps - padded.per_token_logps).abs()[:, 1:].amax(1)
    assert (gaps[[2, 4, 5]] > 1e-2).all()
    if not backend.packed:  # in rows of trees the first completion still sees its prompt and nothing else
        assert gaps[[0, 1, 3]].max() < 1e-5


@pytest.mark.parametrize("backend", SHARING, ids=lambda b: b.name)
def test_disagreement_of_layouts_shows_a_lost_tree(backend: Backend) -> None:
    model, scorer = build(MODELS["qwen3"], backend, share=True)
    assert scorer.disagreement(model, *batch_of(GROUPS)) < 1e-5
    lost = replace(backend, arguments=lambda pack: {})
    model, scorer = build(MODELS["qwen3"], lost, share=True)
    assert scorer.disagreement(model, *batch_of(GROUPS)) > 0.1
    assert scorer.disagreement(model, *batch_of(GROUPS[:1])) < 1e-5  # one rollout shares with nobody


def test_gradient_checkpointing_changes_nothing_for_shared_prompts() -> None:
    """Layers run again in the backward pass: the mask must come along."""

    def checkpointed() -> PreTrainedModel:
        model = MODELS["qwen3"]()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    model, scorer = build(checkpointed, BACKENDS["sdpa"], share=True)
    model.train()
    found = scorer.score(model, scorer.lay_out(*batch_of(GROUPS)))
    parts = torch.autograd.grad(found.per_token_logps.sum(), list(model.parameters()))
    plain, scorer = build(MODELS["qwen3"], BACKENDS["sdpa"])
    expected = scorer.score(plain, scorer.lay_out(*batch_of(GROUPS)))
    wanted = torch.autograd.grad(expected.per_token_logps.sum(), list(plain.parameters()))
    assert_same_gradient(*(torch.cat([part.flatten() for part in both]) for both in (parts, wanted)))


# ---- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [varlen_forward, flex_forward])
@pytest.mark.parametrize("masked", [True, False])
def test_without_boundaries_both_are_sdpa(forward: Callable[..., Any], masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = None
    if masked:  # two columns of padding on the left of row 0
        mask = torch.ones(6, 6).tril().bool().repeat(2, 1, 1, 1)
        mask[0, :, 2:, :2] = False
    module = Attention()
    found, weights = forward(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert torch.equal(found, expected)
    assert weights is None


def test_masks_are_left_out_inside_packed_rows_only() -> None:
    settings = {"batch_size": 1, "q_length": 3, "kv_length": 3, "attention_mask": torch.tensor([[False, True, True]])}
    assert no_mask_when_packed(**settings) is not None
    with packed_row():
        assert no_mask_when_packed(**settings) is None
    assert no_mask_when_packed(**settings) is not None
    with pytest.raises(KeyError), packed_row():
        raise KeyError
    assert no_mask_when_packed(**settings) is not None


@pytest.mark.parametrize("implementation", ["siesta_varlen", "siesta_flex"])
@pytest.mark.parametrize("make", [*MODELS.values(), WINDOWED["mistral"]], ids=[*MODELS, "mistral"])
def test_generation_is_that_of_sdpa(make: Callable[[], PreTrainedModel], implementation: str) -> None:
    """Greedy, prompts of different lengths padded on the left, and the same logits of a padded batch."""
    prompts = [prompt for prompt, _ in ROWS]
    ids, mask, _ = batch_of([(prompt, [2]) for prompt in prompts])
    written, logits = [], []
    for name in ("sdpa", implementation):
        torch.manual_seed(0)
        model = make().eval()
        model.set_attn_implementation(name)
        settings = {"temperature": None, "batch_size": 4, "pad_id": 0, "eos_id": 1}
        written.append(complete(model, prompts, MODES[1], **settings))
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    assert written[0] == written[1]
    assert len({tuple(response) for response in written[0]}) > 1
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", ["varlen", "flex"])
@pytest.mark.usefixtures("varlen_kernel")
def test_a_model_generates_the_same_before_and_after_a_packed_pass(name: str) -> None:
    model, scorer = build(MODELS["qwen3"], BACKENDS[name])
    prompts = [prompt for prompt, _ in ROWS]
    settings = {"temperature": None, "batch_size": 4, "pad_id": 0, "eos_id": 1}
    before = complete(model, prompts, MODES[1], **settings)
    with torch.no_grad():
        scorer.score(model, scorer.lay_out(*batch_of(ROWS)))
    assert complete(model, prompts, MODES[1], **settings) == before
