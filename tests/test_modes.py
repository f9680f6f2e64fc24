"""Modes on two kinds of tokenizer and on the chat templates of the models people start from."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from siesta.data.errors import ModelError
from siesta.data.prompts import messages, prompt_ids, response_ids
from siesta.rl import embedded
from siesta.rl.generation import mode_policy
from siesta.rl.models import build_modes
from siesta.rl.modes import (
    Mode,
    Modes,
    add_control_tokens,
    check_prompts,
    check_stage_ids,
    cut_generation_prompt,
    grow_embeddings,
    prepare_tokenizer,
)
from siesta.rl.recipe import ModeSection
from tests.helpers import calc_examples

TOKENS = ["<short>", "<think>"]
USER = [{"role": "user", "content": "2 + 2?"}]

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# As in Qwen3: a history that is split at </think>, and an empty thought where thinking is switched off.
QWEN3 = (
    "{%- for m in messages %}{%- set content = m['content'].split('</think>')[-1] %}"
    "{{- '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
)
# As in later Qwen models: the thought is opened where thinking is on.
QWEN_OPEN = QWEN3.replace("{%- endif %}\n{%- endif %}", "{%- else %}{{- '<think>\\n' }}{%- endif %}\n{%- endif %}")
# As in the distillations of R1: every generation opens with a thought.
R1 = (
    "{% set ns = namespace(is_tool=false) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}{% else %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
CHATML_PROMPT = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES = {
    "chatml": (CHATML, CHATML_PROMPT),
    "qwen3": (QWEN3, CHATML_PROMPT),
    "qwen-open": (QWEN_OPEN, CHATML_PROMPT),
    "r1-distill": (R1, "<｜User｜>2 + 2?<｜Assistant｜>"),
    "double-quotes": (
        CHATML.replace("'<|im_start|>assistant\\n'", '"<|im_start|>assistant\\n<think>\\n"'),
        CHATML_PROMPT,
    ),
    "control-first": (CHATML.replace("assistant\\n' }}", "assistant\\n' }}{{ '<short>' }}"), CHATML_PROMPT),
}


def byte_level(*, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like those of Qwen and Llama, trained on a sentence."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special],
        show_progress=False,
    )
    core.train_from_iterator(["a short thought, a long thought, think again"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.add_tokens(list(plain))
    return tokenizer


BUILDERS = {"embedded": embedded.build_tokenizer, "byte-level": byte_level}


@pytest.fixture(params=BUILDERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return BUILDERS[request.param]()


def two_modes(tokenizer: PreTrainedTokenizerFast) -> Modes:
    return build_modes({name: ModeSection(token=f"<{name}>", max_tokens=4) for name in ("short", "think")}, tokenizer)


# ---- control tokens ------------------------------------------------------------------------------------------------


def test_added_tokens_are_single_plain_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    size = len(tokenizer)
    assert add_control_tokens(tokenizer, TOKENS) == TOKENS
    assert len(tokenizer) == size + 2
    tokenizer.save_pretrained(tmp_path)
    for own in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for token in TOKENS:
            (token_id,) = own.encode(token, add_special_tokens=False)
            assert token_id == own.get_vocab()[token]
            assert token_id >= size
            assert token_id not in own.all_special_ids
            ids = [token_id, *response_ids(own, "7")]
            assert str(own.decode(ids, skip_special_tokens=True)).split() in ([token, "7"], [f"{token}7"])


def test_a_control_token_leaves_its_surroundings_alone() -> None:
    tokenizer = byte_level()
    before = tokenizer.encode("a ", add_special_tokens=False), tokenizer.encode(" b", add_special_tokens=False)
    add_control_tokens(tokenizer, TOKENS)
    ids = tokenizer.encode("a <short> b", add_special_tokens=False)
    assert ids == [*before[0], tokenizer.get_vocab()["<short>"], *before[1]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a <short> b"


def test_an_existing_token_is_used_again() -> None:
    tokenizer = byte_level(plain=("<think>", "</think>"))
    known, size = tokenizer.get_vocab()["<think>"], len(tokenizer)
    assert add_control_tokens(tokenizer, TOKENS) == ["<short>"]
    assert tokenizer.get_vocab()["<think>"] == known
    assert len(tokenizer) == size + 1
    assert add_control_tokens(tokenizer, TOKENS) == []
    assert len(tokenizer) == size + 1


def test_a_special_token_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'<\|im_end\|>' is a special token .* choose another control token"):
        add_control_tokens(byte_level(), ["<short>", "<|im_end|>"])
    with pytest.raises(ModelError, match="'<eos>' is a special token"):
        add_control_tokens(embedded.build_tokenizer(), ["<eos>"])


def test_a_special_token_without_a_role_is_refused() -> None:
    """Reserved tokens, as Llama 3 has them: marked special, so they vanish, but the tokenizer has no name for them."""
    tokenizer = byte_level(special=("<|reserved_0|>",))
    reserved = tokenizer.get_vocab()["<|reserved_0|>"]
    assert tokenizer.decode([reserved], skip_special_tokens=True) == "", "it would vanish"
    with pytest.raises(ModelError, match=r"'<\|reserved_0\|>' is a special token"):
        add_control_tokens(tokenizer, ["<|reserved_0|>"])


# ---- embeddings ----------------------------------------------------------------------------------------------------


def tiny_llama(rows: int, *, tied: bool, hidden_size: int = 16, heads: int = 2) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
    ).eval()


@pytest.mark.parametrize("padding", [0, 64], ids=["exact", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_new_rows_are_the_mean_and_old_ones_stay(build, tied: bool, padding: int) -> None:
    """`padded`: many models have more embedding rows than tokens, so there is nothing to resize."""
    tokenizer = build()
    known = len(tokenizer)
    model = tiny_llama(known + padding, tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 9, 3, 17]])
    with torch.no_grad():
        logits = model(ids).logits
    grow_embeddings(model, tokenizer, add_control_tokens(tokenizer, TOKENS))
    with torch.no_grad():
        grown = model(ids).logits
    assert grown.shape[-1] == max(known + padding, known + 2)
    assert torch.equal(grown[..., :known], logits[..., :known])
    heads = {
        "model.embed_tokens.weight": model.get_input_embeddings(),
        "lm_head.weight": model.get_output_embeddings(),
    }
    for name, layer in heads.items():
        weight = layer.weight.detach()
        assert torch.equal(weight[:known], before[name][:known])
        mean = before[name][:known].mean(dim=0)
        for token in TOKENS:
            torch.testing.assert_close(weight[tokenizer.get_vocab()[token]], mean)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == grown.shape[-1]


def test_nothing_grows_without_new_tokens() -> None:
    tokenizer = byte_level(plain=("<short>", "<think>"))
    model = tiny_llama(len(tokenizer), tied=True)
    before = model.get_input_embeddings().weight.detach().clone()
    grow_embeddings(model, tokenizer, add_control_tokens(tokenizer, TOKENS))
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_new_modes_start_out_equally_likely() -> None:
    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer), tied=False)
    grow_embeddings(model, tokenizer, prepare_tokenizer(tokenizer, TOKENS))
    modes = two_modes(tokenizer)
    log_policy, mass = mode_policy(
        model, [prompt_ids(tokenizer, USER)], modes, temperature=1.0, batch_size=4, pad_id=0, device="cpu"
    )
    assert log_policy.exp().tolist() == [pytest.approx([0.5, 0.5])]
    assert 0 < mass.item() < 0.1, "about as likely as an average token"


# ---- chat templates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "prompt"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_prompt_ends_where_the_control_token_goes(template: str, prompt: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    prepare_tokenizer(tokenizer, TOKENS)
    assert tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False) == prompt
    for thinking in (True, False):
        text = tokenizer.apply_chat_template(
            USER, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        assert text == prompt, "no switch of the template decides the mode"
    assert prompt_ids(tokenizer, USER) == tokenizer.encode(prompt, add_special_tokens=False)
    check_prompts(tokenizer, two_modes(tokenizer), {"user": prompt_ids(tokenizer, USER)})


@pytest.mark.parametrize("template", [QWEN3, QWEN_OPEN, R1])
def test_negative_control_uncut_templates_decide_the_mode(template: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    add_control_tokens(tokenizer, TOKENS)
    text = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert "<think>" in text


def test_only_the_generation_prompt_is_cut() -> None:
    cut = cut_generation_prompt(R1, TOKENS)
    start = R1.rfind("add_generation_prompt")
    assert cut[:start] == R1[:start]
    tokenizer = byte_level()
    tokenizer.chat_template = cut
    turn = [*USER, {"role": "assistant", "content": "<think>\nhm\n</think>4"}, *USER]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=False, tokenize=False)
    assert text == "<｜User｜>2 + 2?<｜Assistant｜>4<｜User｜>2 + 2?"


def test_a_template_without_control_tokens_is_left_as_it_is() -> None:
    assert cut_generation_prompt(CHATML, TOKENS) == CHATML
    assert cut_generation_prompt(cut_generation_prompt(R1, TOKENS), TOKENS) == cut_generation_prompt(R1, TOKENS)


def test_a_template_without_a_generation_prompt_is_refused() -> None:
    with pytest.raises(ModelError, match="no generation prompt"):
        cut_generation_prompt(TURNS, TOKENS)
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no single chat template; point model\.chat_template at a Jinja file"):
        prepare_tokenizer(tokenizer, TOKENS)
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML}
    with pytest.raises(ModelError, match="no single chat template"):
        prepare_tokenizer(tokenizer, TOKENS)


def test_a_response_must_be_able_to_end() -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = None
    prepare_tokenizer(tokenizer, TOKENS)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        prepare_tokenizer(tokenizer, TOKENS)


@pytest.mark.parametrize(
    "generation",
    [
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "{{ '<|im_start|>assistant\\n<think>\\n' if add_generation_prompt else '' }}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}<think>{{ '\\n' }}{% endif %}",
    ],
    ids=["bare-text", "inline-if", "bare-text-between-literals"],
)
def test_a_template_is_cut_or_refused(generation: str) -> None:
    """What must not happen is a prompt that neither we nor the model's makers wrote."""
    tokenizer = byte_level()
    tokenizer.chat_template = TURNS + generation
    try:
        prepare_tokenizer(tokenizer, TOKENS)
        check_prompts(tokenizer, two_modes(tokenizer), {"user": prompt_ids(tokenizer, USER)})
    except ModelError:
        return
    assert tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False) == CHATML_PROMPT


def test_the_embedded_template_needs_no_cut() -> None:
    tokenizer = embedded.build_tokenizer()
    prepare_tokenizer(tokenizer, TOKENS)
    (example,) = calc_examples(1)
    ids = prompt_ids(tokenizer, messages(example))
    assert tokenizer.convert_ids_to_tokens(ids) == [*example.query.split(), "<q>"]
    check_prompts(tokenizer, two_modes(tokenizer), {"example": prompt_ids(tokenizer, messages(example))})


# ---- proofs at start-up --------------------------------------------------------------------------------------------


def test_a_prompt_that_holds_a_control_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    prepare_tokenizer(tokenizer, TOKENS)
    bad = [{"role": "user", "content": "say <think> please"}]
    with pytest.raises(ModelError, match="row 7: the prompt already holds the control token '<think>'"):
        check_prompts(
            tokenizer, two_modes(tokenizer), {"good": prompt_ids(tokenizer, USER), "row 7": prompt_ids(tokenizer, bad)}
        )


def test_a_control_token_that_is_not_one_id_is_refused() -> None:
    tokenizer = byte_level()
    modes = Modes([Mode("short", "<short>", 5, 4), Mode("think", "<think>", 6, 4)])
    with pytest.raises(ModelError, match=r"modes\.short: '<short>' does not encode to the single id 5"):
        check_prompts(tokenizer, modes, {})


def test_stages_must_see_the_same_ids() -> None:
    check_stage_ids("rollout", [[1, 2, 3], [4]], [[1, 2, 3], [4]])
    with pytest.raises(ModelError) as caught:
        check_stage_ids("rollout", [[7], [1, 2, 3, 4]], [[7], [1, 2, 9, 4]])
    message = "rollout: prompt 1 has other ids than data/prompts.py gives, from position 2 on"
    assert str(caught.value) == f"{message} ([3, 4] expected, [9, 4] found)"
    with pytest.raises(ModelError, match=r"warm-up: prompt 0 .* position 2 on \(\[\] expected, \[3\] found\)"):
        check_stage_ids("warm-up", [[1, 2]], [[1, 2, 3]])
    with pytest.raises(ModelError, match=r"position 1 on \(\[2\] expected, \[\] found\)"):
        check_stage_ids("warm-up", [[1, 2]], [[1]])


# ---- Modes ---------------------------------------------------------------------------------------------------------

THREE = Modes([Mode("short", "<short>", 4, 2), Mode("think", "<think>", 2, 8), Mode("wide", "<wide>", 0, 16)])


def test_modes_are_columns_in_the_order_of_the_recipe() -> None:
    assert THREE.names == ["short", "think", "wide"]
    assert THREE.token_ids == [4, 2, 0]
    assert [THREE.index(name) for name in THREE.names] == [0, 1, 2]
    assert [mode.name for mode in THREE] == [THREE[i].name for i in range(len(THREE))]


def test_the_mode_is_read_from_the_first_id() -> None:
    completions = torch.tensor([[2, 4, 4], [4, 2, 0], [0, 0, 0], [3, 2, 4]])
    assert THREE.of(completions).tolist() == [1, 0, 2, -1]
    assert THREE.of(completions).dtype == torch.long


def test_log_policy_and_mass_by_hand() -> None:
    # V = 5; the control tokens stand at 4, 2, 0 with weights 1, 2, 5; the others have 3 and 1 of a total of 12.
    logits = torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0]).log()
    assert THREE.log_policy(logits).exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert THREE.mass(logits).item() == pytest.approx(8 / 12)
    # At temperature 1/2 the weights are squared: 1, 4, 25.
    assert THREE.log_policy(logits, 0.5).exp().tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30])
    batch = logits.expand(2, 3, 5)
    assert THREE.log_policy(batch).shape == (2, 3, 3)
    assert THREE.mass(batch).shape == (2, 3)


def test_log_policy_is_exact_for_bfloat16_and_extreme_logits() -> None:
    logits = torch.tensor([0.0, 0.0, 100.0, 0.0, -100.0], dtype=torch.bfloat16)
    log_policy = THREE.log_policy(logits)
    assert log_policy.dtype == torch.float32
    assert log_policy.tolist() == pytest.approx([-200.0, 0.0, -100.0])
    assert math.isfinite(THREE.mass(logits).item())


@pytest.mark.parametrize("modes", [[THREE[0], Mode("twin", "<twin>", 4, 2)], []])
def test_modes_must_differ(modes: list[Mode]) -> None:
    with pytest.raises(ModelError, match="at least one mode is needed, and no two with the same"):
        Modes(modes)


def test_three_modes_go_the_whole_way(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = [mode.token for mode in THREE]
    assert prepare_tokenizer(tokenizer, tokens) == tokens
    sections = {mode.name: ModeSection(token=mode.token, max_tokens=mode.max_tokens) for mode in THREE}
    modes = build_modes(sections, tokenizer)
    assert modes.names == THREE.names
    assert [tokenizer.decode([mode.token_id], skip_special_tokens=True) for mode in modes] == tokens
    check_prompts(tokenizer, modes, {"user": prompt_ids(tokenizer, USER)})
    model = tiny_llama(len(tokenizer), tied=True)
    prompts = [prompt_ids(tokenizer, USER), prompt_ids(tokenizer, [{"role": "user", "content": "1"}])]
    log_policy, mass = mode_policy(model, prompts, modes, temperature=1.0, batch_size=2, pad_id=0, device="cpu")
    assert log_policy.shape == (2, 3)
    assert log_policy.exp().sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert mass.shape == (2,)
