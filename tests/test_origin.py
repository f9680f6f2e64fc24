"""Where models come from: folders, hub names at a commit, GGUF files, adapters; and their weights afterwards."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from siesta.data.errors import ModelError
from siesta.data.prompts import prompt_ids
from siesta.rl import models, origin
from siesta.rl.export import export_checkpoint
from siesta.rl.models import load_model, load_tokenizer, make_model, make_tokenizer, model_config
from siesta.rl.origin import Origin, check_adapter, find_origin, fits, hub_commit, read_origin, recipe_origin
from siesta.rl.recipe import Recipe, load_recipe
from tests.helpers import save_tiny_model, tiny_model
from tests.test_modes import USER, byte_level, tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    hub_commit.cache_clear()
    return tmp_path


def recipe(path: str, *overrides: str) -> Recipe:
    return load_recipe("smoke", [f"model.path={path}", "tracking.output_dir=outputs", *overrides])


def made(path: str, *overrides: str) -> Path:
    """The folder that the `model` stage would leave."""
    one = recipe(path, *overrides)
    make_model(one, one.run_dir / "model")
    return one.run_dir / "model"


# ---- the hub -------------------------------------------------------------------------------------------------------


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


REFUSALS = {
    "misspelt": (
        errors.RepositoryNotFoundError("x", response=answer(404)),
        r"model.path: o/m: no such folder here, and the hub has no such model; check the spelling",
    ),
    "gated": (errors.GatedRepoError("x", response=answer(403)), r"model.path: o/m: .* licence .* HF_TOKEN"),
    "revision": (
        errors.RevisionNotFoundError("x", response=answer(404)),
        r"model.revision: v9: o/m has no such branch, tag or commit",
    ),
    "offline": (errors.LocalEntryNotFoundError("x"), r"model.path: o/m: no such folder here, and the hub cannot be"),
    "not-a-name": (errors.HFValidationError("x"), r"model.path: o/m: .* not the name of a hub repository"),
    "no-config": (errors.RemoteEntryNotFoundError("x", response=answer(404)), r"model.path: o/m: .*no config.json"),
    "server": (errors.HfHubHTTPError("busy\nnow", response=answer(503)), r"model.path: o/m: .*hub refuses: busy now"),
}


@pytest.mark.parametrize(("error", "line"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_hub_refuses_is_one_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: str, **kwargs: str) -> None:
        raise error

    monkeypatch.setattr(origin, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=line) as caught:
        find_origin("o/m", "v9")
    assert "\n" not in str(caught.value)


class Hub:
    """A hub with one repository, `o/m`, whose files are those of a folder; notes the revision of every request."""

    def __init__(self, folder: Path, commit: str):
        self.folder, self.commit = folder, commit
        self.asked: list[tuple[str, str | None]] = []

    def download(self, name: str, file: str, revision: str | None = None) -> str:
        self.asked.append((file, revision))
        return f"cache/snapshots/{self.commit}/{file}"

    def serve(self, auto: type, monkeypatch: pytest.MonkeyPatch) -> None:
        load = auto.from_pretrained

        def from_pretrained(path: str, revision: str | None = None, **kwargs):
            if path != "o/m":
                return load(path, **kwargs)
            self.asked.append((auto.__name__, revision))
            return load(self.folder, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    served = Hub(save_tiny_model(folder / "remote"), COMMIT)
    monkeypatch.setattr(origin, "hf_hub_download", served.download)
    for auto in (AutoTokenizer, AutoConfig, AutoModelForCausalLM):
        served.serve(auto, monkeypatch)
    return served


def test_everything_is_loaded_at_one_commit_which_the_run_records(hub: Hub) -> None:
    one = recipe("o/m", "model.revision=main")
    tokenizer, _ = make_tokenizer(one)
    model_config(one, tokenizer)
    saved = made("o/m", "model.revision=main")
    assert hub.asked[0] == ("config.json", "main")
    assert set(hub.asked[1:]) == {(auto, COMMIT) for auto in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM")}
    assert read_origin(saved) == Origin("o/m", revision=COMMIT)
    one.tracking.run = "smoke"
    (one.run_dir / "recipe.yaml").write_text("base: smoke\nmodel: {path: o/m}\ntracking: {output_dir: outputs}\n")
    export_checkpoint(saved, Path("out"), run=one.run_dir)
    assert f"o/m at commit {COMMIT}" in Path("out/README.md").read_text()


def test_a_run_that_goes_on_keeps_its_commit_when_the_hub_moves(hub: Hub) -> None:
    made("o/m")
    hub_commit.cache_clear()
    hub.commit = "f" * 40
    assert recipe_origin(recipe("o/m")) == Origin("o/m", revision=COMMIT)
    assert recipe_origin(recipe("o/m", "tracking.run=another")) == Origin("o/m", revision="f" * 40)


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    save_tiny_model(folder / "here")
    assert find_origin("here") == Origin("here")
    with pytest.raises(ModelError, match=r"model\.revision: v1: here is no hub repository"):
        find_origin("here", "v1")


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ModelError, match=r"model\.path: empty: no model in this folder \(config\.json is missing\)"):
        find_origin("empty")


def test_code_of_a_repository_is_not_run(folder: Path) -> None:
    own = save_tiny_model(folder / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "configuration_own.py").write_text("open('canary', 'w')\n")
    one = recipe("own")
    with pytest.raises(ModelError, match=r"model\.path: own: it brings Python code .* model\.trust_remote_code: true"):
        model_config(one, make_tokenizer(one)[0])
    assert not Path("canary").exists()


def test_quantised_weights_are_refused(folder: Path) -> None:
    packed = save_tiny_model(folder / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (packed / "config.json").write_text(json.dumps(config))
    one = recipe("packed")
    with pytest.raises(ModelError, match=r"model\.path: packed: its weights are quantised"):
        model_config(one, make_tokenizer(one)[0])


# ---- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_becomes_an_ordinary_folder(folder: Path, dtype: str) -> None:
    pytest.importorskip("gguf")
    from tests.gguf_file import write_gguf

    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer), tied=True, hidden_size=32, heads=4)
    unpacked = write_gguf(folder / "tiny.gguf", model, tokenizer)
    saved = made("tiny.gguf", f"model.dtype={dtype}")
    assert read_origin(saved) == Origin(".", gguf_file="tiny.gguf")
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    loaded = load_model(saved, dtype=dtype)
    for name, weight in loaded.named_parameters():
        wanted = torch.tensor(unpacked[name]).to(getattr(torch, dtype))
        assert torch.equal(weight[: len(wanted)], wanted), name
    grown = load_tokenizer(saved)
    assert len(grown) == len(tokenizer) + 2
    assert prompt_ids(grown, USER) == prompt_ids(tokenizer, USER)
    if dtype == "float32":  # the same network, too: heads, rotary order, norms
        model.load_state_dict({name: torch.tensor(weight) for name, weight in unpacked.items()}, strict=False)
        ids = torch.tensor([prompt_ids(tokenizer, USER)])
        with torch.no_grad():
            wanted, found = model(ids).logits, loaded(ids).logits[..., : len(tokenizer)]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_gguf_file_says_itself_what_ends_a_response(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tokenizer that transformers makes of it takes for the end (5.17: the first special token)."""
    pytest.importorskip("gguf")
    from tests.gguf_file import write_gguf

    tokenizer = byte_level()
    write_gguf(folder / "tiny.gguf", tiny_llama(len(tokenizer), tied=True, hidden_size=32, heads=4), tokenizer)
    load = AutoTokenizer.from_pretrained

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        found.eos_token = found.pad_token = found.convert_ids_to_tokens(5)
        return found

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", mistaken)
    made = make_tokenizer(recipe("tiny.gguf"))[0]
    assert (made.eos_token, made.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert made.eos_token_id != 5


def test_a_gguf_file_must_exist_and_be_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"model\.path: weights/none\.gguf: no such file"):
        find_origin("weights/none.gguf")
    Path("junk.gguf").write_bytes(b"junk" * 100)
    monkeypatch.setattr(origin, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"model\.path: junk\.gguf: .* pip install 'siesta-rl\[gguf\]'"):
        find_origin("junk.gguf")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match=r"model\.path: .*junk\.gguf: "):
        make_tokenizer(recipe("junk.gguf"))


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder: Path) -> Path:
    """A base model in `base` and an adapter of it, with embeddings of its own, in `adapter`."""
    save_tiny_model(folder / "base")
    torch.manual_seed(3)
    settings = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), settings)
    adapted.save_pretrained("adapter")
    return folder / "adapter"


def test_an_adapter_is_merged_into_its_base(adapter: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        wanted = AutoPeftModelForCausalLM.from_pretrained("adapter")(ids).logits
        merged = load_model(made("adapter"))(ids).logits
        base = AutoModelForCausalLM.from_pretrained("base")(ids).logits
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged, base, atol=1e-2)
    assert read_origin(Path("outputs/smoke/model")) == Origin("base", adapter="adapter")


@pytest.mark.parametrize(
    ("shape", "fault"),
    [
        ({"hidden_size": 32}, r"weight is \[\d+, 16\], \S+\.weight is \[\d+, 32\]"),
        ({"num_hidden_layers": 1}, r"it adapts model\.layers\.1\.\S+\.weight, which that model lacks"),
    ],
)
def test_an_adapter_of_another_base_is_refused(adapter: Path, shape: dict, fault: str) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | shape | {"head_dim": None}))
    one = recipe("adapter")
    line = rf"model\.path: adapter: made for another base model than the one it names, base: .*{fault}"
    with pytest.raises(ModelError, match=line) as caught:
        model_config(one, make_tokenizer(one)[0])
    assert "\n" not in str(caught.value)


def test_negative_control_the_right_base_passes(adapter: Path) -> None:
    check_adapter(find_origin("adapter"), AutoConfig.from_pretrained("base"))


def rewrite(adapter: Path, **settings: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_an_adapter_without_a_usable_base_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: str, **kwargs: str) -> None:
        raise errors.LocalEntryNotFoundError("x")

    monkeypatch.setattr(origin, "hf_hub_download", offline)
    rewrite(adapter, base_model_name_or_path="gone/base")
    with pytest.raises(ModelError, match=r"model\.path: adapter: its base model: gone/base: no such folder here, and"):
        find_origin("adapter")
    rewrite(adapter, base_model_name_or_path=None)
    with pytest.raises(ModelError, match=r"model\.path: adapter: adapter_config\.json names no base model"):
        find_origin("adapter")
    rewrite(adapter, base_model_name_or_path="adapter2")
    Path("adapter2").symlink_to("adapter")
    rewrite(adapter, base_model_name_or_path="base", peft_type="IA3")
    with pytest.raises(ModelError, match=r"model\.path: adapter: only LoRA adapters"):
        find_origin("adapter")


def test_an_adapter_on_an_adapter_is_refused(adapter: Path) -> None:
    import shutil

    shutil.copytree("adapter", "second")
    rewrite(Path("second"), base_model_name_or_path="adapter")
    with pytest.raises(ModelError, match=r"model\.path: second: its base model adapter is an adapter, too"):
        find_origin("second")


@pytest.mark.parametrize(
    ("part", "shape", "wanted"),
    [
        ("A.weight", [2, 5], True),  # r = 2, (out, in) = (7, 5)
        ("A.weight", [2, 7], False),
        ("B.weight", [7, 2], True),
        ("B.weight", [5, 2], False),
        ("magnitude_vector", [7], True),
        ("magnitude_vector", [5], False),
        ("embedding_A", [2, 7], True),  # 7 rows of 5 columns
        ("embedding_A", [2, 5], False),
        ("embedding_B", [5, 2], True),
        ("embedding_B", [7, 2], False),
        ("", [7, 5], True),
        ("", [5, 7], False),
    ],
)
def test_shapes_of_an_adapter_by_hand(part: str, shape: list[int], wanted: bool) -> None:
    assert fits(shape, part, [7, 5]) is wanted


def test_the_embedded_model_has_no_origin() -> None:
    one = load_recipe("smoke", ["tracking.output_dir=outputs"])
    assert recipe_origin(one) is None
    assert models.model_config(one, make_tokenizer(one)[0]).vocab_size >= tiny_model().config.vocab_size - 2


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_weights_are_whole_where_a_trainer_shards_its_own(tmp_path: Path) -> None:
    """Under ZeRO-3 transformers loads shards: the first embedding look-up of the gate would fail."""
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        model = load_model(save_tiny_model(tmp_path))
        assert [parameter.dim() for parameter in model.get_input_embeddings().parameters()] == [2]
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    del settings  # transformers holds it weakly
