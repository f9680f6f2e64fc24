"""The baselines: `raw` answers as the whole prompt does, `none` is the whole prompt, in every kind of layer."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from siesta.data.errors import DataError, ModelError
from siesta.data.prompts import messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl.sleep import raw
from siesta.rl.sleep.raw import NoSleep, RawSleep, RawState, shared_ids, whole_ids
from siesta.rl.sleep.tensors import TensorState
from tests.hybrids import COMMON, FAMILIES, TOKENIZER, context, hybrid, query

SLIDING = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
EVERY = pytest.mark.parametrize("family", ["qwen3", "gemma3", *FAMILIES])
INSTRUCTION = "7 7"


def setting(family: str = "qwen3") -> tuple[Any, RawSleep]:
    """A tiny model in float64 and the way to keep its cache; gemma3 has windows shorter than the contexts."""
    set_seed(0)
    model: Any
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8))
    elif family == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, **SLIDING))
    else:
        model = hybrid(family)
    return model.to(torch.float64).eval(), RawSleep(TOKENIZER, model.config, instruction=INSTRUCTION, batch_size=2)


def wake(model: Any, way: Any, state: TensorState, queries: list[Example]) -> torch.Tensor:
    return model(**way.attach(state, queries)).logits


def whole(model: PreTrainedModel, text: str, asked: Example, last: int) -> torch.Tensor:
    """Logits at the last tokens of the whole prompt, (last, V)."""
    ids = prompt_ids(TOKENIZER, messages(replace(asked, context=text), INSTRUCTION))
    return cast(Any, model)(input_ids=torch.tensor([ids])).logits[0, -last:]


@EVERY
@pytest.mark.parametrize("words", [1, 3, 9])
def test_raw_equals_the_whole_prompt(family: str, words: int) -> None:
    """Contexts shorter and longer than windows and convolutions."""
    model, way = setting(family)
    with torch.no_grad():
        ours = wake(model, way, way.sleep(model, [context(words)], passes=1).state, [query(4)])[0]
        expected = whole(model, context(words), query(4), len(ours))
        other = wake(model, way, way.sleep(model, [context(words, 1)], passes=1).state, [query(4)])[0]
    tolerance = 1e-10 if family == "qwen3" else 1e-5
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    assert (other - expected).abs().max() > 1e-3


@EVERY
def test_gradients_are_those_of_the_whole_prompt(family: str) -> None:
    model, way = setting(family)
    weights = [weight for weight in model.model.parameters() if weight.requires_grad]
    ours = wake(model, way, way.sleep(model, [context(6)], passes=1).state, [query(3)])[0, -1]
    grads = [
        torch.autograd.grad(x.square().mean(), weights, allow_unused=True)
        for x in (ours, whole(model, context(6), query(3), 1)[0])
    ]
    scale = max(x.abs().max().item() for x in grads[1] if x is not None)
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * scale)


def test_contexts_and_queries_of_any_length_share_a_batch_where_attention_is_all() -> None:
    model, way = setting()
    contexts, asked = [context(7), context(3, 1), context(9, 2)], [query(2), query(5, 1), query(3, 2), query(4, 3)]
    with torch.no_grad():
        state = cast(RawState, way.sleep(model, contexts, passes=1).state).select([0, 1, 2, 1])
        together = wake(model, way, state, asked)
        for row, (text, each) in enumerate(zip([*contexts, contexts[1]], asked, strict=True)):
            alone = whole(model, text, each, way.attach(state, asked)["attention_mask"][row, 9:].sum())
            torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=1e-9, atol=1e-9)
        few = wake(model, way, state.select([1]), [asked[1]])  # what fills the batch goes with the longer contexts
        torch.testing.assert_close(few[0], together[1, -few.shape[1] :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gemma3", *FAMILIES])
def test_other_layers_take_equal_lengths_only(family: str) -> None:
    model, way = setting(family)
    with torch.no_grad():
        state = way.sleep(model, [context(7), context(3, 1), context(7, 2)], passes=1).state
        for i in (0, 2):
            alone = wake(model, way, way.sleep(model, [context(7, i)], passes=1).state, [query(3)])
            batch = wake(model, way, state.select([0, 2]), [query(3)] * 2)
            torch.testing.assert_close(batch[i // 2], alone[0], rtol=1e-5, atol=1e-5)
        short = wake(model, way, state.select([1]), [query(3)])[0]
        torch.testing.assert_close(short, whole(model, context(3, 1), query(3), len(short)), rtol=1e-5, atol=1e-5)
        for rows, asked in (([0, 1], [query(3)] * 2), ([0, 2], [query(3), query(2)])):
            with pytest.raises(DataError, match="for which padding is not neutral"):
                way.attach(state.select(rows), asked)


@EVERY
def test_generate_writes_what_it_writes_behind_the_whole_prompt(family: str) -> None:
    model, way = setting(family)
    plain = NoSleep(TOKENIZER, model.config, instruction=INSTRUCTION)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    asked = replace(query(3), context=context(9))
    with torch.no_grad():
        written = []
        for each in (way, plain):
            kwargs = each.attach(each.sleep(model, [context(9)], passes=1).state, [asked])
            written.append(model.generate(**kwargs, **options)[0, kwargs["input_ids"].shape[1] :].tolist())
        ids = torch.tensor([whole_ids(TOKENIZER, asked, INSTRUCTION)])
        written.append(model.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist())
    assert written[0] == written[1] == written[2]


def test_none_keeps_nothing_and_reads_what_the_query_brings() -> None:
    model, _ = setting()
    plain = NoSleep(TOKENIZER, model.config, instruction=INSTRUCTION)
    out = plain.sleep(model, ["", context(5)], passes=1)
    assert (len(out.state), out.cost.tokens, out.cost.state_bytes) == (2, [0, 0], [0, 0])
    bare, full = replace(query(3), context=""), replace(query(3), context=context(5))
    assert plain.attach(out.state.select([0, 1, 1]), [bare, full, bare])["attention_mask"].sum(1).tolist() == [
        6,
        11,
        6,
    ]
    with torch.no_grad():
        logits = wake(model, plain, out.state, [bare, full])[1]
        torch.testing.assert_close(logits, whole(model, context(5), full, len(logits)))


@EVERY
def test_a_state_survives_a_file(family: str, tmp_path: Path) -> None:
    model, way = setting(family)
    with torch.no_grad():
        state = cast(RawState, way.sleep(model, [context(7), context(3, 1)], passes=1).state)
    save_file(state.tensors(), tmp_path / "state.safetensors")
    restored = way.restore(load_file(tmp_path / "state.safetensors"))
    assert restored.prefixes == state.prefixes
    assert restored.parts.keys() == state.parts.keys()
    assert all(torch.equal(part, state.parts[name]) for name, part in restored.parts.items())
    assert {len(part) for part in state.tensors().values()} == {2}


def test_what_is_kept_and_what_it_cost() -> None:
    """Four layers, keys and values, one head of 8, in float64; what fills the batch does not count."""
    model, way = setting()
    out = way.sleep(model, [context(7), context(4)], passes=1)
    assert out.cost.tokens == [7, 4]
    assert out.cost.state_bytes == out.state.nbytes() == [4 * 2 * n * 8 * 8 for n in (7, 4)]
    model, way = setting("qwen3_5")
    kept = way.sleep(model, [context(7)], passes=1).state
    # Two layers of attention; two of 2 heads of 8 x 8 in float32 and convolutions over 4 of 48 channels in float64.
    assert kept.nbytes() == [2 * 2 * 7 * 8 * 8 + 2 * (2 * 8 * 8 * 4 + 48 * 4 * 8)]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and a token for a full stop with what follows it: `.` and newline, and those two with an `x`."""
    from tokenizers import Tokenizer, models

    words = ["<pad>", "<eos>", "<unk>", *"abc1(?.x", "\n", ".\n", ".\nx"]
    merges = [(".", "\n"), (".\n", "x")]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    template = "{{ messages[0]['content'] }}"
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)


def test_a_query_that_changes_the_tokens_of_its_context_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = merging_tokenizer(), setting()[0]
    assert tokenizer.convert_ids_to_tokens(shared_ids(tokenizer, "ab.")) == ["a", "b", ".\n"]
    way = RawSleep(tokenizer, model.config)
    with torch.no_grad():
        state = way.sleep(model, ["ab."], passes=1).state
        assert way.prompts(state, [Example("q", "", "abc", "")]) == [tokenizer.encode("abc")]
        with pytest.raises(DataError, match="query q: its beginning changes the tokens of its context"):
            way.attach(state, [Example("q", "", "xa", "")])
        # Probed, it is no prefix any more.
        monkeypatch.setattr(raw, "PROBES", (*raw.PROBES, "x"))
        state = way.sleep(model, ["ab."], passes=1).state
        assert way.prompts(state, [Example("q", "", "xa", "")]) == [tokenizer.encode(".\nxa")]


def test_bad_input_is_one_line() -> None:
    model, way = setting()
    with pytest.raises(DataError, match="context 1: empty"):
        way.sleep(model, [context(3), " "], passes=1)
    with pytest.raises(DataError, match="a text of 65 tokens, the model takes 64"):
        way.sleep(model, [context(65)], passes=1)
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        way.sleep(model.train(), [context(3)], passes=1)
