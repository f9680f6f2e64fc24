"""The model card: numbers, intervals and metadata that the hub reads back as they were; nothing that nobody said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import LocalEntryNotFoundError

from siesta.rl import licences
from siesta.rl.card import Facts, eval_results, gather, hub_datasets, markdown_table, model_card
from siesta.rl.cost import Cost
from siesta.rl.licences import Licence, licence_of, read_licence
from siesta.rl.origin import Origin
from siesta.rl.policies import table
from siesta.rl.recipe import Recipe, load_recipe
from tests.test_page import measured

COMMIT = "c" * 40


@pytest.fixture
def result() -> dict:
    """An evaluation as a run's file has it: keys are text."""
    return json.loads(json.dumps(table(measured(), resamples=50, seed=0)))


@pytest.fixture
def facts(result: dict) -> Facts:
    """A run of the embedded model."""
    costs = {
        "warmup": Cost(seconds=90, parts=1, joules=None, unmeasured="there is no CUDA device"),
        "rl": Cost(seconds=600, parts=2, killed=1, joules=7200, gpus=2),
        "evaluate": Cost(open=True),
    }
    sizes = {"train": 1200, "validation": 160, "test": 4, "overlap": 3}
    recipe = load_recipe("smoke", ["tracking.run=naps", "rl.tau=0.3"])
    return Facts(recipe, Path("naps/rl"), True, None, {"after": result}, sizes, costs)


def metadata(card: str) -> ModelCardData:
    """What the hub reads."""
    found = ModelCard(card).data
    assert isinstance(found, ModelCardData)
    return found


def with_sources(recipe: Recipe) -> Recipe:
    """The recipe on a data set of the hub and a file."""
    data = {"train": {"path": "openai/gsm8k", "revision": COMMIT}, "test": {"path": "my/test.jsonl"}}
    return recipe.model_copy(update={"data": type(recipe.data).model_validate(data)})


def test_the_hub_reads_the_results_back_as_they_were(facts: Facts) -> None:
    data = metadata(model_card(facts))
    assert data.eval_results == eval_results(facts)
    assert data.library_name == "transformers"
    assert {"siesta", "degrpo"} <= set(data.tags or [])
    found = {own.metric_name: (own.metric_value, own.metric_args) for own in data.eval_results or []}
    assert len(found) == 12, "three policies, two decodings, two metrics"
    value, arguments = found["accuracy, free, greedy"]
    assert value == 0.5, "items 1 and 3 of 4"
    assert arguments is not None
    low, high = arguments["interval_95"]
    assert 0 <= low <= 0.5 <= high <= 1


def test_numbers_have_intervals_and_costs_their_gaps(facts: Facts) -> None:
    card = model_card(facts)
    assert "| free | 50.0 [" in card
    assert "| train | task calc, generated | 1,200 |" in card
    assert "| `rl.tau` | 0.3 |" in card
    assert "[siesta_recipe.yaml](siesta_recipe.yaml)" in card
    assert "| warmup | 90 s | not measured |" in card
    assert "| rl | 10.0 min and 1 killed start(s), not counted | 2.00 Wh on 2 GPU(s) |" in card
    assert "| evaluate |" not in card, "nothing of it is over"
    assert "Energy: there is no CUDA device. Nothing is estimated." in card
    assert "trl 1.16.0" in card


def test_nothing_is_made_up(facts: Facts) -> None:
    bare = replace(facts, results=None, sizes=None, costs={})
    card = model_card(bare)
    data = metadata(card)
    assert (data.license, data.base_model, data.datasets, data.eval_results) == (None, None, None, None)
    assert "Not evaluated." in card
    assert "| train | task calc, generated | unknown |" in card
    assert "Not recorded." in card
    assert "This model: not named by those who trained it." in card
    assert "made from scratch" in card


def test_a_checkpoint_on_the_way_does_not_wear_the_final_numbers(facts: Facts) -> None:
    card = model_card(replace(facts, final=False))
    assert metadata(card).eval_results is None
    assert "These weights were not evaluated" in card
    assert "| free |" not in card


def test_base_model_and_data_are_named_with_their_licences(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[tuple[str, str | None, str], str] = {
        ("owner/base", COMMIT, "model"): "other",
        ("openai/gsm8k", COMMIT, "dataset"): "mit",
    }

    def licence(origin: Origin, kind: str = "model") -> Licence:
        return Licence(known[origin.path, origin.revision, kind])

    monkeypatch.setattr("siesta.rl.card.licence_of", licence)
    recipe = with_sources(facts.recipe)
    card = model_card(replace(facts, recipe=recipe, origin=Origin("owner/base", COMMIT), licence="apache-2.0"))
    data = metadata(card)
    assert (data.base_model, data.datasets, data.license) == ("owner/base", ["openai/gsm8k"], "apache-2.0")
    assert "- Base model: other." in card
    assert "- Data set openai/gsm8k: mit." in card
    assert "| test | file test.jsonl | 4 |" in card
    assert "3 training items also stood in an evaluation set" in card
    assert {own.dataset_type for own in data.eval_results or []} == {"siesta"}, "a file is no data set of the hub"


def test_a_name_with_a_dot_is_still_one_of_the_hub(facts: Facts) -> None:
    recipe = with_sources(facts.recipe)
    assert recipe.data.train is not None
    recipe.data.train.path = "owner/set-v1.5"
    assert hub_datasets(recipe) == {"owner/set-v1.5": COMMIT}


def test_which_folder_the_numbers_belong_to(tmp_path: Path, result: dict, facts: Facts) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"before": {}, "after": result}))
    (tmp_path / "data.json").write_text('{"train": 5}')
    for name, final in (("rl", True), ("rl/checkpoint-3", False), ("warmup", False)):
        own = gather(tmp_path, facts.recipe, tmp_path / name)
        assert (own.final, own.result == result) == (final, final)
    facts.recipe.rl.enabled = False
    assert gather(tmp_path, facts.recipe, tmp_path / "warmup").final
    assert gather(tmp_path, facts.recipe, tmp_path / "rl").sizes == {"train": 5}


def test_states_of_a_sleep_have_a_table(facts: Facts, result: dict) -> None:
    slept = result | {"states": {"own": result, "zeroed": result}}
    card = model_card(replace(facts, results={"after": slept}))
    assert "| own | 50.0 [" in card
    assert "| zeroed | 50.0 [" in card


def test_a_bar_in_a_cell_does_not_end_it(result: dict) -> None:
    lines = markdown_table(result).splitlines()
    assert {line.count("|") for line in lines[:-2]} == {lines[0].count("|")}
    assert "95 % bootstrap interval" in lines[-1]


# ---- licences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("---\nlicense: mit\n---\n", Licence("mit")),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", Licence("mit, cc-by-4.0")),
        ("---\nlicense: other\nlicense_name: l\nlicense_link: https://l\n---\n", Licence("other", "l", "https://l")),
        ("# no front matter\n", Licence()),
        ("---\nlicense: [\n---\n", Licence()),
    ],
)
def test_a_licence_is_what_the_card_says(tmp_path: Path, text: str, wanted: Licence) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_licence(tmp_path / "README.md") == wanted
    assert licence_of(Origin(str(tmp_path))) == wanted
    assert str(Licence()).startswith("licence unknown")


def test_a_hub_that_does_not_answer_leaves_it_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, file: str, **more) -> str:
        asked.append((name, file, more["revision"], more["repo_type"]))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(licences, "hf_hub_download", download)
    assert licence_of(Origin("owner/base", COMMIT)) == Licence()
    assert licence_of(Origin("owner/data"), "dataset") == Licence()
    assert asked == [("owner/base", "README.md", COMMIT, "model"), ("owner/data", "README.md", None, "dataset")]
    assert licence_of(Origin(str(tmp_path))) == Licence() == licence_of(None)
