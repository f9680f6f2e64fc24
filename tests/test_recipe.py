"""A recipe is checked in full: what is accepted means what it says, and everything else is refused with its path."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import GRPOConfig, SFTConfig

from siesta.data.errors import RecipeError
from siesta.rl.config import REFUSED, DeGRPOConfig, check_method
from siesta.rl.context import Context
from siesta.rl.recipe import ELSEWHERE, RECIPES, Recipe, dump_recipe, find_recipe, load_recipe
from siesta.rl.run import Run
from siesta.rl.stages import rl_config

MINIMAL = """\
modes:
  short: {token: "<short>", max_tokens: 2}
  think: {token: "<think>", max_tokens: 12, correct: 0.5, answer_after: "="}
data: {task: calc}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """Loads the minimal recipe, or the text given, with overrides; runs would lie under the test's folder."""

    def loader(*overrides: str, text: str = MINIMAL) -> Recipe:
        file = tmp_path / "minimal.yaml"
        file.write_text(text, encoding="utf-8")
        return load_recipe(file, [*overrides, f"tracking.output_dir={tmp_path}/outputs"])

    return loader


def method(recipe: Recipe) -> DeGRPOConfig:
    """What the run would check before any work."""
    config = rl_config(Context(Run(recipe), lambda line: None))
    check_method(config, len(recipe.modes))
    return config


# ---- a recipe based on another --------------------------------------------------------------------------------------


def test_keys_of_a_section_replace_those_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "under.yaml").write_text(
        MINIMAL + "seed: 7\nwarmup: {stop: {think: 0.9, short@1: 0.8}, max_steps: 5}\n"
    )
    (tmp_path / "middle.yaml").write_text("base: under\nwarmup: {stop: {think: 0.5}}\nrl: {tau: 0.3}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: middle\nmodes:\n  short: {token: '<short>', max_tokens: 9}\nrl: {alpha: 2}\n")
    recipe = load_recipe(top, ["rl.tau=0.2"])
    assert recipe.seed == 7
    assert recipe.warmup.stop == {"think": 0.5}, "a mapping is replaced, not merged"
    assert recipe.warmup.trainer_fields()["max_steps"] == 5
    assert (recipe.modes["short"].max_tokens, recipe.modes["think"].max_tokens) == (9, 12)
    assert list(recipe.modes) == ["short", "think"]
    assert recipe.rl.trainer_fields() == {"tau": 0.2, "alpha": 2.0}
    assert recipe.tracking.run == "top"


def test_a_shipped_recipe_can_be_the_base_of_a_file_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: quickstart\nseed: 3\n")
    mine, shipped = load_recipe(file).model_dump(), load_recipe("quickstart").model_dump()
    assert (mine.pop("seed"), shipped.pop("seed")) == (3, 0)
    assert (mine["tracking"].pop("run"), shipped["tracking"].pop("run")) == ("mine", "quickstart")
    assert mine == shipped


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "base: nowhere\n"}, "a.yaml: base: nowhere: no such recipe"),
        ({"a": "base: a\n"}, "a.yaml: base: this recipe is, in the end, based on itself"),
        ({"a": "base: b\n", "b": "base: a\n"}, "a.yaml: base: this recipe is, in the end, based on itself"),
        ({"a": "base: b\n", "b": "- 1\n"}, "b.yaml: a recipe is a mapping of sections, this is a list"),
        ({"a": "base: b\nrl: {taau: 1}\n", "b": MINIMAL}, "a.yaml: rl.taau: unknown key; did you mean 'tau'?"),
    ],
)
def test_a_base_that_cannot_be_used_is_one_line(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "a.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- what is shipped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_sound(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, [f"tracking.output_dir={tmp_path}"])
    config = method(recipe)
    assert recipe.tracking.run == file.stem
    assert Path(str(config.output_dir)) == tmp_path / file.stem / "rl"
    assert find_recipe(file.stem) == find_recipe(file)


def test_there_are_shipped_recipes() -> None:
    assert (RECIPES / "quickstart.yaml").is_file()


def test_a_minimal_recipe_has_our_defaults(load: Callable) -> None:
    recipe = load()
    config = method(recipe)
    assert (config.mode_objective, config.mode_sampling, config.advantage) == ("target", "stratified", "per_mode")
    assert (config.scale_rewards, config.logging_nan_inf_filter, config.report_to) == ("none", False, [])
    assert recipe.run_dir.name == "minimal"
    assert not recipe.run_dir.exists()


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "meant"),
    [
        ("modle.path=x", "modle", "modes"),
        ("sede=1", "sede", "seed"),
        ("data.taks=calc", "data.taks", "task"),
        ("data.train.pth=x", "data.train.pth", "path"),
        ("model.embedded.layer=2", "model.embedded.layer", "layers"),
        ("modes.short.tokn=x", "modes.short.tokn", "token"),
        ("warmup.max_step=5", "warmup.max_step", "max_steps"),
        ("warmup.min_mas=0.5", "warmup.min_mas", "min_mass"),
        ("rl.learning_rat=1e-6", "rl.learning_rat", "learning_rate"),
        ("rl.taau=1", "rl.taau", "tau"),
        ("rl.enabeld=false", "rl.enabeld", "enabled"),
        ("rl.guard.windw=3", "rl.guard.windw", "window"),
        ("evaluate.itms=3", "evaluate.itms", "items"),
        ("export.dtyp=float32", "export.dtyp", "dtype"),
        ("tracking.reportto=[wandb]", "tracking.reportto", "report_to"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(
    load: Callable, override: str, path: str, meant: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(override, *(["data.train.path=x"] if "data.train" in override else []))
    assert str(caught.value).endswith(f"minimal.yaml: {path}: unknown key; did you mean {meant!r}?")


def test_a_misspelt_required_key_is_named(load: Callable) -> None:
    with pytest.raises(RecipeError, match=r"modes\.short\.tokn: unknown key; did you mean 'token'\?"):
        load(text=MINIMAL.replace("token:", "tokn:", 1))


def test_an_unknown_key_like_no_other_lists_the_known_ones(load: Callable) -> None:
    with pytest.raises(RecipeError, match=r"tracking\.zzz: unknown key; known here: output_dir, project, report_to"):
        load("tracking.zzz=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_size=0", "data.train_size: Input should be greater than or equal to 1, got 0"),
        ("model.dtype=float16", "model.dtype: Input should be 'float32' or 'bfloat16', got 'float16'"),
        ("modes.short.max_tokens=many", "modes.short.max_tokens: .* got 'many'"),
        ("modes.short.prior=0", "modes.short.prior: Input should be greater than 0, got 0"),
        ("rl.guard.action=cry", "rl.guard.action: .* got 'cry'"),
        ("warmup.pairing=triple", "warmup.pairing: Input should be 'paired' or 'cross', got 'triple'"),
        ("tracking.report_to=[wandbb]", r"tracking.report_to.0: .* got 'wandbb'"),
        ("data.task=null", "data: .*give one of `task`, `families` and `train`"),
        ("rl.learning_rate=fast", "rl.learning_rate: .*number.* got 'fast'"),
        ("warmup.max_steps=1.5", "warmup.max_steps: .* got 1.5"),
        ("rl.decoupled=maybe", "rl.decoupled: .* got 'maybe'"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(load: Callable, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("section", ["warmup", "rl"])
def test_settings_of_the_whole_run_are_pointed_to_their_place(load: Callable, section: str, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(f"{section}.{name}=x")
    assert str(caught.value).endswith(f"{section}.{name}: not a setting of this section: {ELSEWHERE[name]}")


# ---- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("warmup.shares={short: 1, thnk: 1}", "warmup.shares.thnk: unknown key; did you mean 'think'"),
        ("warmup.stop={thnk: 0.9}", "warmup.stop.thnk: unknown key; did you mean 'think'"),
        ("warmup.stop={shrt@1: 0.9}", "warmup.stop.shrt@1: unknown key; did you mean 'short'"),
        ("warmup.stop={short@x: 0.9}", "warmup.stop.short@x"),
        ("warmup.shares={short: 0, think: 0}", "warmup.shares"),
        ("warmup.max_level={shrt: 1}", "warmup.max_level.shrt: unknown key; did you mean 'short'"),
        ("warmup={pairing: paired, max_level: {short: 1}}", "warmup.max_level: .* use pairing: cross"),
        ("warmup.max_level={short: 1, think: 2}", "warmup.max_level: one mode that is shown has to be"),
        ("warmup={max_level: {short: 1}, shares: {short: 1}}", "warmup.max_level: one mode that is shown has to be"),
        ("warmup.shares={short: -1, think: 2}", "warmup.shares"),
        ("warmup={pairing: paired, shares: {short: 1, think: 2}}", "warmup.shares: .* use pairing: cross"),
        ("modes.short.token=<think>", "modes: two modes share a control token"),
        ("modes.short.token=''", "modes.short.token"),
    ],
)
def test_modes_must_fit_together(load: Callable, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(override)


ONE_MODE = ["modes.short=null", "rl.mode_objective=policy_gradient", "rl.mode_sampling=free", "rl.advantage=group"]


def test_a_mode_of_the_base_can_be_dropped_but_not_the_last(load: Callable) -> None:
    recipe = load(*ONE_MODE)
    assert list(recipe.modes) == ["think"]
    assert method(recipe).mode_sampling == "free"
    with pytest.raises(RecipeError, match="modes: at least one mode is needed"):
        load("modes.short=null", "modes.think=null")
    with pytest.raises(RecipeError, match=r"warmup\.stop\.short@1: unknown key"):
        load("modes.short=null", "warmup.stop={short@1: 0.5}")


@pytest.mark.parametrize("setting", ONE_MODE[1:])
def test_settings_that_choose_between_modes_need_two(load: Callable, setting: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(RecipeError) as caught:
        method(load(*(s for s in ONE_MODE if s != setting)))
    assert str(caught.value).startswith(f"{name}: ")
    assert str(caught.value).endswith(f"needs two modes and the recipe has one; set {name[3:]}: {value}")


def test_more_modes_can_be_declared(load: Callable) -> None:
    recipe = load("modes.wide.token=<wide>", "modes.wide.max_tokens=40", "warmup.stop={wide@2: 0.5}")
    assert list(recipe.modes) == ["short", "think", "wide"]
    assert method(recipe).num_generations == 8


# ---- pass-through --------------------------------------------------------------------------------------------------


def default_of(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("field", dataclasses.fields(GRPOConfig), ids=lambda field: field.name)
def test_every_trl_setting_is_accepted_at_its_default_or_refused_by_name(
    load: Callable, field: dataclasses.Field
) -> None:
    text = MINIMAL + yaml.safe_dump({"rl": {field.name: default_of(field)}})
    try:
        method(load(text=text))
        reason = ""
    except RecipeError as error:
        reason = str(error)
    assert not reason or field.name in reason
    assert "unknown key" not in reason


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("rl.learning_rate=1e-6", 1e-6),
        ("rl.learning_rate=3", 3.0),
        ("rl.max_steps=7", 7),
        ("rl.beta=0.04", 0.04),
        ("rl.use_cpu=true", True),
        ("rl.tau_start=null", None),
        ("rl.tau=0.3", 0.3),
        ("rl.gradient_checkpointing=false", False),
    ],
)
def test_values_reach_the_config_in_its_own_type(load: Callable, override: str, value: object) -> None:
    name = override.removeprefix("rl.").split("=")[0]
    recipe = load(override)
    for found in (vars(method(recipe))[name], recipe.rl.setting(name)):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_of_another_loss_are_refused_with_a_reason(load: Callable, name: str) -> None:
    default = next(default_of(f) for f in dataclasses.fields(GRPOConfig) if f.name == name)
    values = {bool: not default, int: 3, float: 0.5, str: "sequence", type(None): 0.5}
    special = {"reward_weights": [1.0], "eval_strategy": "steps", "num_generations_eval": 3}
    value = (special | {"generation_kwargs": {"top_p": 0.5}}).get(name, values[type(default)])
    recipe = load(text=MINIMAL + yaml.safe_dump({"rl": {name: value}}))
    with pytest.raises(RecipeError) as caught:
        method(recipe)
    assert str(caught.value) == f"rl.{name}: not a setting of DeGRPO: {REFUSED[name]}"


@pytest.mark.parametrize(
    "override",
    [
        "rl.generation_kwargs={top_p: 0.5}",  # a way round the refusal of rl.top_p
        "rl.sapo_temperature_neg=2.0",
        "rl.vespo_k_pos=5.0",
        "rl.entropy_target=0.5",
    ],
)
def test_settings_that_would_do_nothing_are_refused(load: Callable, override: str) -> None:
    with pytest.raises(RecipeError, match=override.split("=")[0]):
        method(load(override))


@pytest.mark.parametrize("field", dataclasses.fields(SFTConfig), ids=lambda field: field.name)
def test_every_warm_up_setting_is_accepted_at_its_default_or_refused_by_name(
    load: Callable, field: dataclasses.Field
) -> None:
    text = MINIMAL + yaml.safe_dump({"warmup": {field.name: default_of(field)}})
    if field.name in ELSEWHERE:
        with pytest.raises(RecipeError, match=f"warmup.{field.name}: not a setting of this section"):
            load(text=text)
    else:
        assert load(text=text).warmup.trainer_fields() == {field.name: default_of(field)}


# ---- the method ----------------------------------------------------------------------------------------------------

POLICY = "rl.mode_objective=policy_gradient"
# One prompt of eight rollouts, for two optimizer steps.
HALF_GROUPS = ["rl.per_device_train_batch_size=4", "rl.num_generations=8", "rl.steps_per_generation=2"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rl.mode_objective=tarrget"], "mode_objective"),
        (["rl.mode_sampling=forced"], "mode_sampling"),
        (["rl.advantage=both"], "advantage"),
        (["rl.scale_rewards=batches"], "scale_rewards"),
        (["rl.scale_rewards=batch"], "scale_rewards"),  # per_mode advantages are not scaled
        ([POLICY, "rl.mode_sampling=free", "rl.advantage=reference"], "mode_sampling"),
        (["rl.vllm_importance_sampling_mode=sequence_truncate"], "vllm_importance_sampling_mode"),
        (["rl.mode_sampling=free"], "mode_sampling"),
        (["rl.decoupled=false"], "decoupled"),
        (["rl.mode_sampling=floor", "rl.mode_floor=5"], "mode_floor"),
        ([POLICY, "rl.mode_sampling=floor", "rl.mode_floor=0"], "mode_floor"),
        (["rl.mode_sampling=floor", "rl.mode_floor_steps=10"], "mode_floor_steps"),
        (["rl.scale_rewards=group"], "scale_rewards"),
        (["rl.num_generations=1"], "num_generations"),
        (["rl.num_generations=2", "modes.wide.token=<w>", "modes.wide.max_tokens=4"], "num_generations"),
        (["rl.per_device_train_batch_size=12"], "num_generations"),
        (["rl.tau=0"], "tau"),
        (["rl.tau=-0.1"], "tau"),
        (["rl.tau=.nan"], "tau"),
        (["rl.tau_start=0"], "tau_start"),
        (["rl.alpha=0"], "alpha"),
        (["rl.alpha=.nan"], "alpha"),
        (["rl.verifier_timeout=0"], "verifier_timeout"),
        (["rl.temperature=0"], "temperature"),
        (["rl.temperature=-1"], "temperature"),
        (["rl.value_shrinkage=-1"], "value_shrinkage"),
        (["rl.lr_scheduler_type=cosin"], "SchedulerType"),
        ([*HALF_GROUPS, "rl.share_prompts=true"], "share_prompts"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else value,
)
def test_contradictory_settings_are_refused(load: Callable, overrides: list[str], key: str) -> None:
    recipe = load(*overrides)
    with pytest.raises(RecipeError, match=key) as caught:
        method(recipe)
    assert str(caught.value).startswith("rl")


@pytest.mark.parametrize(
    "overrides",
    [
        [POLICY, "rl.mode_sampling=free", "rl.advantage=group", "rl.alpha=0.001", "rl.beta=0.001"],
        [POLICY, "rl.mode_sampling=free", "rl.advantage=group", "rl.decoupled=false", "rl.scale_rewards=group"],
        [POLICY, "rl.mode_sampling=free", "rl.advantage=group", "rl.scale_rewards=batch"],
        [POLICY, "rl.mode_sampling=stratified", "rl.advantage=reference", "rl.decoupled=false"],
        [POLICY, "rl.mode_sampling=floor", "rl.mode_floor=2", "rl.mode_floor_steps=100"],
        ["rl.mode_sampling=floor", "rl.mode_floor=4"],
        ["rl.num_generations=2", "rl.tau_start=1.0"],
        HALF_GROUPS,  # without sharing, the rollouts of a group may be cut apart
        [*HALF_GROUPS, "rl.share_prompts=true", "rl.gradient_accumulation_steps=2"],
        [*HALF_GROUPS, "rl.share_prompts=true", "rl.per_device_train_batch_size=8"],
    ],
)
def test_the_methods_of_the_paper_and_ours_are_accepted(load: Callable, overrides: list[str]) -> None:
    method(load(*overrides))


def test_groups_that_cannot_be_dealt_evenly_are_refused_in_one_line(load: Callable) -> None:
    """Three prompts for two optimizer steps; a step of half a group would compute its prompt twice."""
    batch = ["rl.num_generations=4", "rl.generation_batch_size=12", "rl.per_device_train_batch_size=6"]
    method(load(*batch))
    with pytest.raises(RecipeError) as caught:
        method(load(*batch, "rl.share_prompts=true"))
    assert str(caught.value) == (
        "rl.share_prompts: 3 prompts of a generation batch cannot be dealt evenly to 2 optimizer steps; "
        "change rl.steps_per_generation"
    )


# ---- the file ------------------------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_one_most(load: Callable) -> None:
    text = MINIMAL + "rl: {tau: 0.2, guard: {window: 5}}\n"
    recipe = load("rl.tau=0.3", "rl.tau=0.4", "rl.guard.action=stop", "modes.short.correct=2", text=text)
    assert recipe.rl.trainer_fields() == {"tau": 0.4}
    assert (recipe.rl.guard.window, recipe.rl.guard.action) == (5, "stop")
    assert recipe.modes["short"].correct == 2.0
    assert recipe.modes["short"].token == "<short>"


def test_an_override_replaces_a_mapping(load: Callable) -> None:
    text = (
        MINIMAL.replace("task: calc", "task: calc, level_weights: {1: 2.0, 2: 1.0}")
        + "\nwarmup: {stop: {short: 0.9}}\n"
    )
    assert load("data.level_weights={1: 5}", text=text).data.level_weights == {1: 5.0}
    assert load("warmup.stop={}", text=text).warmup.stop == {}
    assert load("warmup.stop.think=0.8", text=text).warmup.stop == {"short": 0.9, "think": 0.8}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.tau", "override 'rl.tau' is not of the form section.key=value"),
        ("rl.tau=[1", "minimal.yaml: while parsing"),
        ("rl=3", "minimal.yaml: rl: Input should be a valid dictionary"),
        ("modes=[1, 2]", "minimal.yaml: "),
        ("rl.tau=${nowhere}", "minimal.yaml: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_bad_override_is_shown(load: Callable, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- modes\n- data\n", "a recipe is a mapping of sections"),
        ("quickstart\n", "minimal.yaml: "),
        ("", "minimal.yaml: modes: Field required"),
        ("modes: {short: [\n", "while parsing a flow"),
        (f"{MINIMAL}seed: 1\nseed: 2\n", "duplicate key seed"),
        ("modes: \x00\n", "minimal.yaml: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(load: Callable, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(text=text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_recipe_cannot_run_code(load: Callable, tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(RecipeError, match="could not determine a constructor for the tag"):
        load(text=f"{MINIMAL}seed: {tag} [{canary}]\n")
    with pytest.raises(RecipeError, match="could not determine a constructor for the tag"):
        load(f"seed={tag} [{canary}]")
    assert not canary.exists()


def test_a_missing_recipe_is_named_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"nope: no such recipe; give a YAML file or one of: .*quickstart"):
        load_recipe("nope")


# ---- the dump ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rl.learning_rate=1e-6", "rl.lr_scheduler_type=cosine", "rl.tau_start=1.0", "warmup.shares={think: 0.7}"],
        ["data.level_weights={1: 7, 2: 1}", "model.chat_template=x.jinja", "model.lora={r: 8, target_modules: [q]}"],
        ["data.task=null", "data.train.path=a/b", "data.test.path=c.jsonl", "data.columns={query: q}", "seed=3"],
        ["tracking.run=first", "tracking.report_to=[wandb]", "data.instruction='Answer: yes'"],
        ["data.instruction='null'", "modes.short.answer_after='on'"],
        ["tracking.run='1e-4'"],
    ],
)
def test_a_dumped_recipe_loads_as_the_same_recipe(load: Callable, tmp_path: Path, overrides: list[str]) -> None:
    recipe = load(*overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_survive_the_dump(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


# ---- levels of the warm-up -----------------------------------------------------------------------------------------


def test_the_warm_up_may_have_its_own_mix_of_levels(load: Callable) -> None:
    """RL keeps the mix of `data`; without a mix of its own, the warm-up takes the same examples."""
    recipe = load("warmup.level_weights={2: 1}", "data.train_size=40")
    context = Context(Run(recipe), lambda line: None)
    assert {example.level for example in context.warmup_examples} == {2}
    assert len({example.level for example in context.train_examples}) > 4
    plain = Context(Run(load("data.train_size=40")), lambda line: None)
    assert plain.warmup_examples is plain.train_examples
