"""The chat templates of the model families people start from, each through every stage that makes prompt ids.

The templates lie in tests/templates; each gets a small tokenizer with its family's special tokens, and with the
beginning-of-sequence token put in front of whatever is encoded where the real tokenizer does that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from siesta.data.errors import ModelError
from siesta.data.prompts import messages, prompt_ids, response_ids
from siesta.rl.context import Context
from siesta.rl.export import export_checkpoint
from siesta.rl.modes import check_prompts, check_stage_ids, prepare_tokenizer
from siesta.rl.recipe import load_recipe
from siesta.rl.run import Run
from siesta.rl.stages import check_first_batch, model_stage, rl_config, rl_dataset, warmup_trainer
from siesta.rl.trainer import DeGRPOTrainer
from tests.test_bad_input import FILES, write_rows

FOLDER = Path(__file__).parent / "templates"
TOKENS = ["<short>", "<think>"]
THOUGHT = ("<think>", "</think>")
USER = [{"role": "user", "content": "2 + 2?"}]


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer is made of, and the prompt that asks `2 + 2?`, written out by hand."""

    prompt: str
    eos: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str | None = None
    adds_bos: bool = False
    spaces: str = "byte-level"


QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CHATML = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
IM = ("<|endoftext|>", "<|im_start|>")
FAMILIES = {
    "qwen2_5": Family(
        QWEN + CHATML,
        "<|im_end|>",
        IM,
    ),
    "qwen3": Family(CHATML, "<|im_end|>", IM, THOUGHT),
    "qwen3_5_think": Family(CHATML, "<|im_end|>", IM, THOUGHT),
    "qwen3_5_nothink": Family(CHATML, "<|im_end|>", IM, THOUGHT),
    "smollm2": Family(
        SMOL + CHATML,
        "<|im_end|>",
        IM,
        bos="<|im_start|>",
    ),
    "deepseek_r1_distill": Family(
        "<｜begin▁of▁sentence｜><｜User｜>2 + 2?<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
        THOUGHT,
        bos="<｜begin▁of▁sentence｜>",
        adds_bos=True,
    ),
    "llama3": Family(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
    "gemma3": Family(
        "<bos><start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n",
        "<eos>",
        ("<pad>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        adds_bos=True,
        spaces="sentencepiece",
    ),
}
LEFT_OPEN = ["qwen3_5_think", "deepseek_r1_distill"]  # the generation prompt opens a thought
SKIPPED = ["qwen3_5_nothink"]  # or shows an empty one


def build_tokenizer(name: str) -> Any:
    """A small BPE tokenizer with the family's special tokens and template."""
    family = FAMILIES[name]
    special = list(dict.fromkeys([family.eos, *([family.bos] if family.bos else []), *family.special]))
    core = Tokenizer(models.BPE())
    if family.spaces == "byte-level":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as Gemma: spaces become a letter, the text is not split beforehand
        core.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
        core.decoder = decoders.Replace("▁", " ")  # pyright: ignore[reportAttributeAccessIssue]
        alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 40,
        initial_alphabet=alphabet,
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(["a short thought, a long thought, think again"] * 3, trainer)
    if family.bos is not None and family.adds_bos:
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{family.bos} $A", special_tokens=[(family.bos, core.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token="<pad>" if "<pad>" in special else None,
        additional_special_tokens=list(family.special),
        chat_template=(FOLDER / f"{name}.jinja").read_text(encoding="utf-8"),
    )
    tokenizer.add_tokens(list(family.plain))
    return tokenizer


def rendered(tokenizer: Any, **switches: bool) -> str:
    return str(tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False, **switches))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_template_has_a_family_and_an_origin() -> None:
    files = {file.stem for file in FOLDER.glob("*.jinja")}
    assert files == set(FAMILIES)
    origins = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in files if f"`{name}.jinja`" not in origins] == []


def test_the_prompt_ends_where_the_control_token_goes(family: str) -> None:
    tokenizer, wanted = build_tokenizer(family), FAMILIES[family].prompt
    prepare_tokenizer(tokenizer, TOKENS)
    assert rendered(tokenizer) == wanted
    for thinking in (True, False):
        assert rendered(tokenizer, enable_thinking=thinking) == wanted, "no switch of the template decides the mode"
    ids = prompt_ids(tokenizer, USER)
    assert ids == tokenizer.encode(wanted, add_special_tokens=False)
    assert tokenizer.decode(ids) == wanted
    for token in (*TOKENS, "</think>"):
        assert tokenizer.convert_tokens_to_ids(token) not in ids
    for token in FAMILIES[family].special:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1


def test_the_beginning_of_sequence_is_written_once(family: str) -> None:
    tokenizer = build_tokenizer(family)
    prepare_tokenizer(tokenizer, TOKENS)
    if FAMILIES[family].adds_bos:
        ids = prompt_ids(tokenizer, USER)
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
        # Negative control: the rendered text, encoded the usual way, has it twice.
        assert tokenizer.encode(FAMILIES[family].prompt).count(tokenizer.bos_token_id) == 2
        assert tokenizer.bos_token_id not in response_ids(tokenizer, "4"), "nor does it stand inside a completion"


@pytest.mark.parametrize("name", [*LEFT_OPEN, *SKIPPED])
def test_negative_control_as_shipped_these_templates_decide_the_mode(name: str) -> None:
    shipped = rendered(build_tokenizer(name))
    assert shipped.removeprefix(FAMILIES[name].prompt) == (
        "<think>\n" if name in LEFT_OPEN else "<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill", "qwen3_5_think"])
def test_negative_control_a_rendered_history_loses_its_thoughts(name: str) -> None:
    """What these templates would do to our completions if anyone rendered them; that is why completions stay ids."""
    tokenizer = build_tokenizer(name)
    prepare_tokenizer(tokenizer, TOKENS)
    history = [*USER, {"role": "assistant", "content": "<think>\nhm hm\n</think>\n\n4"}, *USER]
    assert "hm hm" not in str(tokenizer.apply_chat_template(history, tokenize=False))


# ---- through the stages --------------------------------------------------------------------------------------------


@pytest.fixture
def context(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A run on a tiny model with the family's tokenizer, its `model` stage done."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer(family)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained("start")
    tokenizer.save_pretrained("start")
    responses = {"short": "4", "think": "hm hm\n</think>\n\n4"}
    for name, count, first in (("train.jsonl", 40, 0), ("test.jsonl", 4, 100)):
        rows = [{"query": f"2 + {first + i}?", "answer": "4", "responses": responses} for i in range(count)]
        write_rows(name, rows)
    Path("files.yaml").write_text(FILES.replace('"="', '"</think>"'))
    small = ["rl.per_device_train_batch_size=4", "rl.num_generations=4", "warmup.pairing=paired"]
    context = Context(Run(load_recipe("files.yaml", ["model.path=start", *small])), lambda line: None)
    context.run.prepare()
    model_stage(context)
    return context


def test_every_stage_sees_the_same_prompt_ids(context: Context, family: str, tmp_path: Path) -> None:
    examples = context.train_examples[:4]
    expected = context.prompts(examples)
    check_prompts(context.tokenizer, context.modes, {str(i): ids for i, ids in enumerate(expected)})

    warmup = warmup_trainer(context, [])
    check_first_batch(context, warmup)
    row = cast(Dataset, warmup.train_dataset)[1]  # paired: the first example in its second mode
    think = context.modes[1].token_id
    written = response_ids(context.tokenizer, "hm hm\n</think>\n\n4")
    assert row["input_ids"] == [*expected[0], think, *written], "the thought stands as it was written"

    args = rl_config(context)
    trainer = DeGRPOTrainer(model="start", judge=context.judge, args=args, train_dataset=rl_dataset(context))
    found, _, _ = trainer._tokenize_prompts([messages(example) for example in examples])
    check_stage_ids("rollout", expected, found)

    export_checkpoint(context.path / "model", tmp_path / "out", run=context.path)
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    check_stage_ids("export", expected, [prompt_ids(served, messages(example)) for example in examples])
    assert served.encode("<think>", add_special_tokens=False) == [think]
    assert served.eos_token == FAMILIES[family].eos


# ---- templates that cannot be cut ----------------------------------------------------------------------------------

TURNS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("tail", "left"),
    [
        ("{% if add_generation_prompt %}A:<think>\n{% endif %}", "already holds the control token '<think>'"),
        ("{{ 'A:<think>' if add_generation_prompt else '' }}", "already holds the control token '<think>'"),
        ("{% if add_generation_prompt %}{{ 'A:<think>' }}{{ '.' }}{% endif %}", r"'A:\.' is left of 'A:<think>\.'"),
        ("{% if add_generation_prompt %}{{ 'A:<think>' + '.' }}{% endif %}", r"'A:\.' is left of 'A:<think>\.'"),
        ("{% if add_generation_prompt %}{{ 'A:' ~ ['<thi', 'nk>'] | join }}{% endif %}", "already holds the control"),
        ("{% if add_generation_prompt %}{{ messages.nothing.at_all }}{% endif %}", "fails on one user turn"),
        ("{% if add_generation_prompt %}{{ 1 + 'A' }}{% endif %}", "fails on one user turn"),
        ("", "no generation prompt"),
    ],
    ids=["bare-text", "inline-if", "two-literals", "a-sum", "built", "undefined", "wrong-type", "none"],
)
def test_what_cannot_be_cut_is_refused_in_one_line(tail: str, left: str) -> None:
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = TURNS + tail
    with pytest.raises(ModelError, match=left) as caught:
        prepare_tokenizer(tokenizer, TOKENS)
    assert "\n" not in str(caught.value)


def test_negative_control_the_same_prompt_in_one_literal_is_cut() -> None:
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = TURNS + ("{% if add_generation_prompt %}{{ 'A:<think>.' }}{% endif %}")
    prepare_tokenizer(tokenizer, TOKENS)
    assert rendered(tokenizer) == "2 + 2?A:"
