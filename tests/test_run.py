"""A run goes on where it stopped, and never with settings other than the ones its finished stages were made with."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks.faults_injectors import flip, truncate
from siesta.data.errors import CheckpointError, RecipeError
from siesta.rl import resumable
from siesta.rl.heartbeat import RankLost
from siesta.rl.recipe import Recipe, load_recipe
from siesta.rl.resumable import agreed
from siesta.rl.run import DEPENDS, Run, write_atomically
from siesta.rl.stages import STAGES
from siesta.rl.warmup import GateError

RECIPE = """\
modes:
  short: {token: "<short>", max_tokens: 2}
  think: {token: "<think>", max_tokens: 12}
data: {task: calc}
tracking: {run: night}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    def loader(*overrides: str) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE, encoding="utf-8")
        return load_recipe(file, [*overrides, f"tracking.output_dir={tmp_path}/outputs"])

    return loader


def nothing() -> None:
    pass


def finish(run: Run, *stages: str) -> None:
    run.prepare()
    for stage in stages:
        assert run.stage(stage, nothing)


def interrupted() -> None:
    raise KeyboardInterrupt


# ---- skipping ------------------------------------------------------------------------------------------------------


def test_finished_stages_are_skipped_when_a_run_is_started_again(recipe: Callable) -> None:
    done: list[str] = []
    for attempt in range(2):
        run = Run(recipe())
        run.check()
        run.prepare()
        results = [run.stage(name, lambda name=name: done.append(name)) for name in STAGES]
        assert results == [attempt == 0] * len(STAGES)
    assert done == list(STAGES)
    assert list(Run(recipe()).finished()) == list(STAGES)


def test_an_interrupted_run_goes_on_at_the_stage_that_failed(recipe: Callable) -> None:
    run = Run(recipe())
    finish(run, "model")
    with pytest.raises(KeyboardInterrupt):
        run.stage("warmup", interrupted)
    again = Run(recipe())
    again.check()
    assert list(again.finished()) == ["model"]
    assert not again.stage("model", interrupted)
    assert again.stage("warmup", nothing)


def test_a_new_run_has_finished_nothing(recipe: Callable) -> None:
    run = Run(recipe())
    assert run.finished() == {}
    run.check()
    assert not run.path.exists(), "looking makes nothing"


def test_prepare_writes_the_resolved_recipe(recipe: Callable) -> None:
    run = Run(recipe("rl.tau=0.3"))
    run.prepare()
    assert run.path.name == "night"
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["rl"]["tau"] == 0.3
    assert load_recipe(run.path / "recipe.yaml") == run.recipe


# ---- changed settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finished", "override", "stage", "section"),
    [
        (["model"], "seed=1", "model", "seed"),
        (["model"], "model.embedded.layers=2", "model", "model"),
        (["model"], "modes.think.correct=0.5", "model", "modes"),
        (["model", "warmup"], "data.train_size=7", "warmup", "data"),
        (["model", "warmup"], "warmup.learning_rate=1e-3", "warmup", "warmup"),
        (["model", "warmup", "rl"], "rl.tau=0.3", "rl", "rl"),
        (["model", "warmup", "rl"], "rl.guard.window=3", "rl", "rl"),
        (["model", "warmup", "rl", "evaluate"], "evaluate.items=3", "evaluate", "evaluate"),
        (["model", "warmup", "rl", "evaluate", "export"], "export.dtype=bfloat16", "export", "export"),
        (list(STAGES), "rl.tau=0.3", "rl", "rl"),
    ],
)
def test_a_changed_section_is_refused_by_name(
    recipe: Callable, finished: list[str], override: str, stage: str, section: str
) -> None:
    finish(Run(recipe()), *finished)
    changed = Run(recipe(override))
    with pytest.raises(RecipeError) as caught:
        changed.check()
    message = str(caught.value)
    assert message.startswith(f"{changed.path}: stage {stage!r} was made with another {section}; ")
    assert "tracking.run=..." in message
    assert "\n" not in message
    Run(recipe()).check()


def test_all_changed_sections_are_named(recipe: Callable) -> None:
    finish(Run(recipe()), "model", "warmup")
    with pytest.raises(RecipeError, match="stage 'model' was made with another seed and modes;"):
        Run(recipe("seed=1", "modes.think.correct=0.5", "warmup.max_steps=3")).check()


@pytest.mark.parametrize(
    ("finished", "overrides"),
    [
        (list(STAGES), ["tracking.samples=0", "tracking.project=other", "tracking.report_to=[tensorboard]"]),
        (["model"], ["data.train_size=7", "warmup.max_steps=3", "rl.tau=0.3", "evaluate.items=3"]),
        (["model", "warmup"], ["rl.tau=0.3", "evaluate.items=3", "export.enabled=false"]),
        (["model", "warmup", "rl"], ["evaluate.items=3", "export.enabled=false"]),
    ],
    ids=["tracking", "later sections", "after warm-up", "after rl"],
)
def test_sections_that_nothing_finished_depends_on_may_change(
    recipe: Callable, finished: list[str], overrides: list[str]
) -> None:
    finish(Run(recipe()), *finished)
    Run(recipe(*overrides)).check()


def test_a_run_of_another_name_is_another_run(recipe: Callable) -> None:
    finish(Run(recipe()), *STAGES)
    other = Run(recipe("tracking.run=day", "rl.tau=0.3"))
    other.check()
    assert other.finished() == {}


@pytest.mark.parametrize(("stage", "override"), [("warmup", "warmup.learning_rate=1e-3"), ("rl", "rl.tau=0.3")])
def test_a_half_trained_stage_is_not_continued_with_other_settings(
    recipe: Callable, stage: str, override: str
) -> None:
    """Training resumes from the last checkpoint it finds, and that one was made with the old settings."""
    run = Run(recipe())
    finish(run, *list(STAGES)[: list(STAGES).index(stage)])

    def killed_after_a_checkpoint() -> None:
        (run.path / stage / "checkpoint-75").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage(stage, killed_after_a_checkpoint)
    Run(recipe()).check()
    with pytest.raises(RecipeError, match=stage):
        Run(recipe(override)).check()


def test_every_stage_and_every_section_has_its_place() -> None:
    assert list(DEPENDS) == list(STAGES)
    placed = [section for sections in DEPENDS.values() for section in sections]
    assert sorted(placed) == sorted(set(Recipe.model_fields) - {"tracking", "teachers"})


# ---- atomic writes -------------------------------------------------------------------------------------------------


def test_a_write_that_dies_half_way_leaves_the_old_record(recipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(recipe())
    finish(run, "model")
    whole = run.record.read_text()
    write_text = Path.write_text

    def dies(file: Path, text: str, **kwargs: str) -> int:
        write_text(file, text[: len(text) // 2], **kwargs)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", dies)
        with pytest.raises(OSError, match="no space"):
            run.stage("warmup", nothing)
    assert run.record.read_text() == whole
    again = Run(recipe())
    assert list(again.finished()) == ["model"]
    assert again.stage("warmup", nothing), "and the stage is done again"
    assert list(again.finished()) == ["model", "warmup"]


def test_a_write_is_seen_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stages.json"
    write_atomically(file, "old")
    seen: list[str] = []
    replace = Path.replace

    def watched(part: Path, target: Path) -> Path:
        seen.extend([part.read_text(), target.read_text()])
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_atomically(file, "new")
    assert seen == ["new", "old"]
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("stages.json", "new")]


def test_the_record_is_json_with_a_fingerprint_per_section(recipe: Callable) -> None:
    run = Run(recipe())
    finish(run, "model", "warmup")
    record = json.loads(run.record.read_text())
    assert list(record["model"]) == ["seed", "model", "modes", "sleep"]
    assert list(record["warmup"]) == ["seed", "model", "modes", "sleep", "data", "warmup"]
    assert record["model"] == Run(recipe("rl.tau=0.3")).prints("model")
    assert record["model"]["seed"] != Run(recipe("seed=1")).prints("model")["seed"]


def test_a_file_in_the_way_of_the_run_directory_is_one_line(recipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    with pytest.raises(RecipeError) as caught:
        Run(recipe()).prepare()
    assert str(caught.value) == (
        f"tracking.output_dir: the run directory {tmp_path}/outputs/night cannot be written: Not a directory"
    )


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stages.json", "started.json"])
def test_a_damaged_record_is_one_line(recipe: Callable, name: str) -> None:
    run = Run(recipe())
    finish(run, "model")
    truncate(run.path / name)
    truncate(run.path / name)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*/{name}: damaged; put it back from a copy, or delete [^\n]*$"):
        Run(recipe()).check()


@pytest.mark.parametrize(
    ("damage", "said"),
    [(flip, "is changed"), (truncate, "is truncated"), (Path.unlink, "is missing")],
)
def test_a_damaged_model_of_a_finished_stage_is_named(recipe: Callable, damage: Callable, said: str) -> None:
    run = Run(recipe())

    def work() -> None:
        (run.path / "model").mkdir()
        (run.path / "model" / "model.safetensors").write_bytes(b"weights")

    run.prepare()
    run.stage("model", work)
    assert Run(recipe()).stage("warmup", nothing), "negative control"
    damage(run.path / "model" / "model.safetensors")
    again = Run(recipe())
    with pytest.raises(CheckpointError) as caught:
        again.stage("rl", nothing)
    assert str(caught.value).startswith(f"{run.path}/model: model.safetensors {said}")
    assert str(caught.value).endswith(f"or delete {run.path} to make the run again")
    assert "rl" not in again.finished()
    assert not again.stage("warmup", interrupted), "a stage that is finished reads nothing"


# ---- what the main process does for all --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "elsewhere"), [(GateError("say this once"), GateError), (KeyError("nobody expected it"), RankLost)]
)
def test_an_error_of_the_main_process_ends_every_rank_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, elsewhere: type[Exception]
) -> None:
    sent: list = []

    def work() -> None:
        raise raised

    monkeypatch.setattr(resumable, "PartialState", lambda: SimpleNamespace(is_main_process=True))
    monkeypatch.setattr(resumable, "broadcast_object_list", sent.extend)
    with pytest.raises(type(raised)) as error:
        agreed(work)
    assert error.value is raised

    def receive(result: list) -> None:
        result[:] = sent

    monkeypatch.setattr(resumable, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(resumable, "broadcast_object_list", receive)
    with pytest.raises(elsewhere) as error:
        agreed(lambda: pytest.fail("work of the main process alone"))
    assert not str(error.value)


def test_what_the_main_process_has_found_is_known_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(resumable, "broadcast_object_list", lambda result: result.__setitem__(0, 7))
    assert agreed(lambda: pytest.fail("work of the main process alone")) == 7
