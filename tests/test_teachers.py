"""Teachers: which settings make sense, what becomes of a text, and that engines answer what they were asked."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from siesta.data.errors import ModelError, RecipeError
from siesta.data.prompts import messages, prompt_ids
from siesta.data.sources import TaskSource
from siesta.rl import engines
from siesta.rl.modes import Mode
from siesta.rl.recipe import Recipe, dump_recipe, load_recipe
from siesta.rl.teachers import Draft, check_teachers, open_teacher, shaped
from tests.teaching import MODES, greedy, save_teacher

SHORT = Mode("short", "<short>", 7, 2)
THINK = Mode("think", "<think>", 8, 12, answer_after="</think>")
EXAMPLES = list(TaskSource("calc", "train", 6))
TAGS = ("<think>", "</think>")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """Loads a recipe on `calc` with the teachers given in YAML."""

    def loader(short: str = "{from: written}", think: str = "{from: written}", *overrides: str) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(MODES + f"data: {{task: calc}}\nteachers:\n  short: {short}\n  think: {think}\n")
        return load_recipe(file, overrides)

    return loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows the worked answer to six examples."""
    answers = [(example, example.meta["responses"]["think"]) for example in EXAMPLES]
    return save_teacher(tmp_path_factory.mktemp("teacher"), answers)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "message"),
    [
        ("{}", "teachers.short.from: Field required"),
        ("{from: nobody}", "teachers.short.from: Input should be 'written', 'model' or 'self'"),
        ("{form: written}", "teachers.short.form: unknown key; did you mean 'from'?"),
        ("{from: model}", "`from: model` needs a `path`"),
        ("{from: written, samples: 2}", "samples: no effect with `from: written`"),
        (
            "{from: self, path: x, dtype: float32}",
            "dtype, path: no effect with `from: self`; the model section has them",
        ),
        ("{from: self, samples: 2}", "`samples` need a `temperature`"),
        ("{from: self, vllm: {seed: 1}}", "`vllm` has no effect with `engine: generate`"),
        ("{from: self, engine: vllm, batch_size: 3}", "`batch_size` has no effect with `engine: vllm`"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(load: Callable, short: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(short)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_teacher_of_no_mode_is_refused(load: Callable) -> None:
    with pytest.raises(RecipeError, match=r"teachers\.thnk: unknown key; did you mean 'think'"):
        load("{from: written}", "{from: written}", "teachers.thnk={from: written}")


def test_the_example_of_the_docs_is_a_recipe(load: Callable) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "warmup.md").read_text()
    teachers = yaml.safe_load("teachers:" + page.partition("```yaml\nteachers:")[2].partition("```")[0])["teachers"]
    recipe = load(*map(json.dumps, teachers.values()))
    assert [section.origin for section in recipe.teachers.values()] == ["model", "model"]


def test_a_recipe_with_teachers_survives_the_dump(load: Callable, tmp_path: Path) -> None:
    recipe = load("{from: self, temperature: 1, samples: 3, thought: [a, b]}", "{from: model, path: x, thought: null}")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy, ["tracking.run=recipe"]) == recipe


def test_what_cannot_work_is_found_before_a_model_is_loaded(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    check_teachers(load())
    recipe = load()
    del recipe.teachers["think"]
    with pytest.raises(RecipeError, match=r"teachers: mode 'think' has none; .*teachers\.think=\{from: written\}"):
        check_teachers(recipe)
    with pytest.raises(RecipeError, match=r"teachers\.short\.from: self: the embedded model has learnt nothing yet"):
        check_teachers(load("{from: self}"))

    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(engines, "version", nowhere)
    with pytest.raises(RecipeError) as error:
        check_teachers(load("{from: written}", "{from: model, path: nowhere, engine: vllm}"))
    assert str(error.value) == (
        "teachers.think.engine: vLLM is not installed; pip install 'siesta-rl[vllm]' or set engine: generate"
    )


# ---- from a teacher's text to a response ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mode", "response", "ended"),
    [
        ("<think>\n1 + 1\n</think>\n\n2", THINK, "1 + 1\n</think>\n2", True),
        ("1 + 1\n</think>\n\n2", THINK, "1 + 1\n</think>\n2", True),  # the template has opened the thought
        ("<think>\n1 + 1\n</think>\n\n2", SHORT, "2", True),
        ("<think>\n\n</think>\n\n2", SHORT, "2", True),
        ("<think>a</think>b</think>2", THINK, "a</think>b\n</think>\n2", True),  # the answer follows the last
        ("<think><think>a</think>2", THINK, "<think>a\n</think>\n2", True),  # nested: refused later, by its token
        ("<think> and then", SHORT, "<think> and then", False),
        (" 2 ", SHORT, "2", True),
        ("1 = 2", THINK, "1 = 2", True),
    ],
)
def test_thought_tags_give_way_to_the_mode(text: str, mode: Mode, response: str, ended: bool) -> None:
    assert shaped(Draft(text), mode, TAGS) == Draft(response, ended)
    assert not shaped(Draft(text, ended=False), mode, TAGS).ended, "what was cut off stays cut off"


def test_other_tags_and_none() -> None:
    marked = Mode("think", "<think>", 8, 12, answer_after="=")
    assert shaped(Draft("[W] 1 [/W] 2"), marked, ("[W]", "[/W]")) == Draft("1\n=\n2")
    assert shaped(Draft(" <think>1</think>2 "), THINK, None) == Draft("<think>1</think>2")


# ---- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["model", "self"])
def test_a_batch_answers_as_one_question_at_a_time(load: Callable, folder: Path, origin: str) -> None:
    settings = {"model": f"path: {folder}, dtype: float32, ", "self": ""}[origin]
    recipe = load("{from: written}", f"{{from: {origin}, {settings}batch_size: 4}}", f"model.path={folder}")
    mode = Mode("think", "<think>", 0, 9, answer_after="=")
    drafts = open_teacher(recipe, mode)(EXAMPLES, 0)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for example, each in zip(EXAMPLES, drafts, strict=True):
        ids = greedy(model, tokenizer, prompt_ids(tokenizer, messages(example)), mode.max_tokens)
        ended = ids[-1] == tokenizer.eos_token_id
        assert each == [Draft(tokenizer.decode(ids[:-1] if ended else ids), ended)]
    assert {each[0].ended for each in drafts} == {True, False}, "one is longer than the cap of 9"


def test_the_teachers_own_cap_and_end_tokens_hold(load: Callable, folder: Path, tmp_path: Path) -> None:
    """A model may end a turn by any of several tokens: here by "=", too."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.get_vocab()["="]]
    model.save_pretrained(tmp_path / "two_ends")
    tokenizer.save_pretrained(tmp_path / "two_ends")
    recipe = load("{from: written}", f"{{from: model, path: {tmp_path}/two_ends, dtype: float32, max_tokens: 40}}")
    drafts = open_teacher(recipe, THINK)(EXAMPLES, 0)
    work = [example.meta["responses"]["think"].partition(" =")[0] for example in EXAMPLES]
    assert [each[0] for each in drafts] == [Draft(text) for text in work]


def test_samples_are_grouped_and_drawn_by_the_seed(load: Callable, folder: Path) -> None:
    settings = "dtype: float32, temperature: 3, samples: 5, batch_size: 4"
    teacher = open_teacher(load("{from: written}", f"{{from: model, path: {folder}, {settings}}}"), THINK)
    drafts = teacher(EXAMPLES, 1)
    assert [len(each) for each in drafts] == [5] * len(EXAMPLES)
    assert any(len(set(each)) > 1 for each in drafts)
    assert teacher(EXAMPLES, 1) == drafts
    assert teacher(EXAMPLES, 2) != drafts


def test_a_missing_teacher_is_named_by_its_key(load: Callable, tmp_path: Path) -> None:
    recipe = load(f"{{from: model, path: {tmp_path}/nowhere}}")
    with pytest.raises(ModelError, match=rf"teachers\.short\.path: {tmp_path}/nowhere: "):
        open_teacher(recipe, SHORT)


def test_a_model_that_cannot_be_asked_is_refused(load: Callable, folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    LlamaConfig().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"teachers\.short\.path: .*/base: the tokenizer has no chat template"):
        open_teacher(load(f"{{from: model, path: {tmp_path}/base}}"), SHORT)


# ---- vLLM ----------------------------------------------------------------------------------------------------------


def test_vllm_is_asked_in_one_call_and_its_drafts_are_read(
    load: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class LLM:
        """Stands for vLLM's LLM: notes what it is asked."""

        def __init__(self, **settings: Any) -> None:
            asked["llm"] = settings

        def generate(self, prompts: list[dict], params: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
            asked["prompts"], asked["params"] = prompts, vars(params)
            pair = [
                SimpleNamespace(text="1 = 2", finish_reason="stop"),
                SimpleNamespace(text="1", finish_reason="length"),
            ]
            return [SimpleNamespace(outputs=pair) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))  # type: ignore
    settings = "engine: vllm, temperature: 0.6, samples: 2, vllm: {tensor_parallel_size: 2}"
    recipe = load("{from: written}", f"{{from: model, path: {folder}, instruction: '7 ;', {settings}}}")
    drafts = open_teacher(recipe, THINK)(EXAMPLES[:3], 5)
    assert drafts == [[Draft("1 = 2"), Draft("1", ended=False)]] * 3
    assert asked["llm"] == {
        "model": str(folder),
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "tensor_parallel_size": 2,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [prompt_ids(tokenizer, messages(example, "7 ;")) for example in EXAMPLES[:3]]
    assert asked["prompts"] == [{"prompt_token_ids": ids} for ids in expected]
    params = {"n": 2, "temperature": 0.6, "max_tokens": 12, "seed": 5, "skip_special_tokens": False}
    assert asked["params"] == params
