"""The arms of the Rule 110 benchmark: training, controls, schedule and budget, RL on the mode, the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import rule110, rule110_arm, rule110_modes, rule110_rows, rule110_speed, rule110_tables
from benchmarks.rule110 import FULL, Budget
from benchmarks.rule110_arm import Arm
from benchmarks.rule110_model import Hybrid, Shape
from siesta.data.errors import DataError
from siesta.data.tasks.rule110 import step

SIZES = rule110_arm.TINY
DOCS = Path(__file__).parents[1] / "docs" / "results"
MODES = Arm((1, 2), 2, 4e-3, 0, 2, True)


def run_arm(arm: Arm) -> dict:
    return rule110_arm.run(arm, SIZES, "cpu")


def test_an_arm_says_the_same_twice_and_its_controls_are_measured() -> None:
    first, again = run_arm(MODES), run_arm(MODES)
    assert first["training"]["losses"] == again["training"]["losses"]
    assert first["test"] == again["test"]
    assert first["modes"] == again["modes"]
    assert first["tokens"] == 2 * 16 * (4 * 8 + 4)
    assert set(first["test"]) == {"1", "2"}
    for scores in first["test"].values():
        assert set(scores) == {"slept", "zeroed", "shuffled", "majority"}
        assert scores["majority"]["each"] >= 0.5


def test_weights_and_rows_depend_on_the_seed_and_not_on_passes() -> None:
    a, b, c = (rule110_rows.make(n, 24, [8], "train", seed) for n, seed in ((20, 0), (50, 0), (20, 1)))
    torch.testing.assert_close(a.rows, b.rows[:20])  # a longer run sees the same rows first
    torch.testing.assert_close(a.labels, b.labels[:20])
    assert (a.rows != c.rows).any()
    same = zip(Hybrid(SIZES.shape, 0).parameters(), Hybrid(SIZES.shape, 0).parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in same)
    assert not torch.equal(Hybrid(SIZES.shape, 0).place, Hybrid(SIZES.shape, 1).place)


class Oracle(Hybrid):
    """Its state holds the rows, and it answers and thinks from them without a fault."""

    def __init__(self, shape: Shape, blind: bool = False):
        super().__init__(shape, 0)
        self.blind = blind

    def sleep(self, bits: torch.Tensor, depth: torch.Tensor, passes: int) -> list[torch.Tensor]:
        return [torch.cat([bits.flatten(1), depth[:, None]], 1).float() + 1]

    def bits_of(self, states: list[torch.Tensor]) -> torch.Tensor:
        return (states[0][:, :-1] - 1).round().long().unflatten(1, (4, -1))

    def logits(self, bits: torch.Tensor) -> torch.Tensor:
        certain = F.one_hot(bits.clamp(0, 1), 2).float() * 20
        return torch.cat([certain, torch.zeros_like(certain)], -1)

    def answer(self, states: list[torch.Tensor]) -> torch.Tensor:
        rows = (self.bits_of(states) << torch.arange(self.shape.bits)).sum(-1)
        steps = torch.tensor(rule110_modes.DEPTHS)[(states[0][:, -1] - 1).long().clamp(min=0)]
        first = torch.zeros_like(rows)
        for done in range(1, int(steps.max()) + 1):
            rows: Any = step(rows, self.shape.bits)  # pyright: ignore[reportArgumentType]
            first = torch.where(steps[:, None] == done, rows & 1, first)
        return self.logits(1 - first if self.blind else first)

    def recalled(self, states: list[torch.Tensor], which: torch.Tensor) -> torch.Tensor:
        row = self.bits_of(states)[torch.arange(len(which)), which]
        return self.logits(row.roll(self.shape.bits // 2, -1))

    def written(self, states: list[torch.Tensor], which: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Only what a causal window can know: the first two places are always 0."""
        left, right = row.roll(1, 1), row.roll(-1, 1)
        after = (row | right) & ~(left & row & right) & 1
        return self.logits(after * (torch.arange(row.shape[1]) >= rule110_arm.BLIND))


def test_with_a_true_state_all_is_right_and_without_it_no_better_than_a_guess() -> None:
    rows = rule110_rows.make(2000, 24, [2, 8], "test", 0)
    for scores in rule110_arm.evaluate(Oracle(Shape()), rows, 1, 512).values():
        assert scores["slept"]["all"] == scores["slept"]["each"] == 1
        for control in ("zeroed", "shuffled"):
            assert scores[control]["each"] <= scores["majority"]["each"] + 0.02
            assert scores[control]["all"] <= scores["majority"]["all"] + 0.02


def test_rows_written_from_the_middle_answer_up_to_eleven_steps_in_spite_of_the_blind_places() -> None:
    model = Oracle(Shape())
    rows = rule110_rows.make(500, 24, [1, 2, 8, 10], "test", 0)
    states, _, label = rule110_modes.asked(model, rows, 1)
    assert (rule110_modes.think(model, states, rows.which, rows.depth) == label).all()
    deep = rule110_rows.make(500, 24, [14], "test", 0)  # the control: by now the error has reached the middle
    states, _, label = rule110_modes.asked(model, deep, 1)
    assert (rule110_modes.think(model, states, deep.which, deep.depth) == label).float().mean() < 0.9
    assert max(rule110.MIXTURE) <= 11


def test_policies_of_models_whose_short_answers_are_known() -> None:
    rows = rule110_rows.make(400, 24, [2, 8], "test", 0)
    knows = rule110_modes.policies(Oracle(Shape()), rows, 1, 128)
    blind = rule110_modes.policies(Oracle(Shape(), blind=True), rows, 1, 128)
    for t, passes in (("2", 4), ("8", 10)):
        assert knows[t]["always-short"] == {"accuracy": 1, "passes": 1, "think": 0, "reward": pytest.approx(0.98)}
        assert knows[t]["always-think"]["reward"] == pytest.approx(1 - 0.02 * passes)
        assert (knows[t]["oracle"]["think"], blind[t]["oracle"]["think"]) == (0, 1)
        assert (blind[t]["always-short"]["accuracy"], blind[t]["oracle"]["accuracy"]) == (0, 1)
        assert knows[t]["prob_think"] == 0.5


class Known(Oracle):
    """The oracle with mode logits that learn."""

    def answer(self, states: list[torch.Tensor]) -> torch.Tensor:
        logits = super().answer(states)
        modes = self.head[:2, 0] + self.head[2:, 0] * (states[0][:, -1:] > 3)  # t over 2
        return torch.cat([logits[..., :2], modes[:, None].expand(-1, 4, -1)], -1)


@pytest.mark.parametrize(("blind", "expected"), [(False, [0.31, 0.14]), (True, [1.0, 1.0])])
def test_the_mode_policy_goes_to_its_closed_form(blind: bool, expected: list[float]) -> None:
    """Short and think both right: Q differs by the price, pi*(think) = 1 / (1 + exp(price (t + 1) / tau))."""
    model = Known(Shape(), blind)
    optimizer = torch.optim.Adam([model.head], lr=0.2)
    rows = rule110_rows.make(64, 24, [2, 8], "train", 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        rule110_modes.rl_loss(model, rows, 1, generator).backward()
        optimizer.step()
    found = rule110_modes.policies(model, rows, 1, 64)
    for t, prob in zip(("2", "8"), expected, strict=True):
        closed = torch.sigmoid(torch.tensor(-0.02 * (int(t) + 1) / 0.1)).item() if not blind else 1.0
        assert found[t]["prob_think"] == pytest.approx(closed, abs=0.03) == pytest.approx(prob, abs=0.06)


def result(arm: Arm, loss: float, right: float, name: str = "") -> dict:
    """The JSON of an arm with one known loss and accuracy."""
    score = {"each": right, "all": right / 2}
    scores = {"slept": score | {"loss": loss}} | {c: {"each": 0.6, "all": 0.1} for c in rule110_tables.CONTROLS[1:]}
    found = {str(t): scores for t in arm.depths}
    fields = {name: getattr(arm, name) for name in Arm.__dataclass_fields__} | {"depths": list(arm.depths)}
    splits = dict.fromkeys(rule110_rows.SPLITS, found)
    return {"arm": fields | {"name": arm.name}, **splits, "tokens": arm.steps * 51200}


def store(folder: Path, results: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for content in results:
        (folder / f"{content['arm']['name']}.json").write_text(json.dumps(content))


def full_grid(folder: Path) -> list[dict]:
    """All of depth 8's grid: 4e-3 is best at N = 1, 8e-3 at N = 4, 2e-3 at N = 2."""
    best = {1: 4e-3, 2: 2e-3, 4: 8e-3}
    losses = [(arm, 0.1 if arm.rate == best[arm.passes] else 0.5) for arm in rule110.grid(FULL, 8)]
    results = [result(arm, loss, 0.8 + arm.passes / 100 if loss < 0.2 else 0.99) for arm, loss in losses]
    store(folder, results)
    return results


def test_rates_are_chosen_on_validation_rows_and_compute_is_counted_in_passes(tmp_path: Path) -> None:
    full_grid(tmp_path)
    best = rule110.chosen(FULL, 8, rule110_tables.read_results(tmp_path))
    assert {n: arm.rate for n, arm in best.items()} == {1: 4e-3, 2: 2e-3, 4: 8e-3}
    names = [arm.name for arm in rule110.other_seeds(FULL, best)]
    assert names == ["t8_n1_lr0.004_s1_400", "t8_n2_lr0.002_s1_400", "t8_n4_lr0.008_s1_400"]
    # 17 passes over windows a step against 5, and 9 against 5.
    names = [arm.name for arm in rule110.equal_compute(FULL, best, [4, 2])]
    assert names == [f"t8_n1_lr0.004_s{s}_{steps}" for steps in (1360, 720) for s in (0, 1)]


def test_waves_name_every_arm_once_and_the_deeper_grid_after_the_first_results(tmp_path: Path) -> None:
    waves = rule110.waves(FULL, tmp_path)
    assert next(waves) == rule110.grid(FULL, 8)
    full_grid(tmp_path)
    rest = [arm for wave in waves for arm in wave]
    assert len({arm.name for arm in rest}) == len(rest)
    assert {arm.depths for arm in rest if not arm.modes} == {(8,), (12,), (16,), (32,)}
    assert {(arm.passes, arm.seed, arm.rate) for arm in rest if arm.modes} == {
        (n, seed, rate) for n, rate in ((1, 4e-3), (2, 2e-3), (4, 8e-3)) for seed in (0, 1)
    }


def test_an_arm_that_does_not_fit_is_left_out_and_a_shorter_one_still_runs() -> None:
    budget = Budget(100)
    assert [budget.take(seconds) for seconds in (60, 60, 30, 30)] == [True, False, True, False]
    assert Budget(100, cards=2).take(99)
    assert not Budget(0).take(1)
    budget.start -= 40  # by the clock, 90 estimated seconds took 40
    budget.catch_up()
    assert [budget.take(seconds) for seconds in (61, 59)] == [False, True]


def test_finished_arms_are_skipped_and_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def process(module: str, arguments: list[str], file: Path, logs: Path, place: dict) -> int:
        started.append(file.stem)
        return 3 if "_n2_" in file.stem else 0

    monkeypatch.setattr(rule110, "run_process", process)
    arms = [Arm((1,), n, 1e-3, 0, 4) for n in (1, 2, 4)]
    (tmp_path / f"{arms[0].name}.json").write_text("{}")
    assert rule110.run_wave(arms, [{}, {}], Budget(1000), tmp_path, []) == [arms[1].name]
    assert sorted(started) == [arms[1].name, arms[2].name]
    rule110.run_wave([replace(arms[2], seed=7)], [{}], Budget(1), tmp_path, [])
    assert len(started) == 2  # no time


def test_the_page_says_what_the_arms_show(tmp_path: Path) -> None:
    folder = tmp_path / "rule110"
    full_grid(folder)
    best = rule110.chosen(FULL, 8, rule110_tables.read_results(folder))
    more = rule110.other_seeds(FULL, best) + rule110.equal_compute(FULL, best, [4])
    store(folder, [result(arm, 0.1, 0.9 if arm.steps == 1360 else 0.7) for arm in more])
    page = tmp_path / "sleep_rule110.md"
    page.write_text((DOCS / "sleep_rule110.md").read_text(encoding="utf-8"), encoding="utf-8")
    rule110_tables.write_page(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert (
        "| 8 | 4 | 0.008 | 20 | 2 | 38.5 (35.0-42.0) | 45.0 | 77.0 (70.0-84.0) | 90.0 | 38.5 (35.0-42.0) | not run |"
        in text
    )
    assert "| 8 | 2 | 0.002 | 20 | 2 | 38.0 (35.0-41.0) | not run |" in text
    assert "| 8 | 1 | 0.004 | 20 | 2 | 37.8 (35.0-40.5) | = |" in text
    assert "| 8 | 4 | 0.008 | 0.1000 | 42.0 | chosen |" in text
    assert "| 8 | 4 | 38.5 (35.0-42.0) | 10.0 | 10.0 | 10.0 |" in text
    assert "More than a point above the more frequent answer (each): none." in text
    assert text.count("Not measured yet.") == 2  # costs, modes


def test_a_control_that_knows_more_than_a_guess_and_means_over_depths_are_told() -> None:
    arm = Arm((8,), 1, 4e-3, 0, 500)
    leaks = result(arm, 0.1, 0.9)
    leaks["test"] = {"8": leaks["test"]["8"] | {"shuffled": {"each": 0.62, "all": 0.1}}}
    assert "(each): shuffled at t = 8, N = 1." in rule110_tables.controls({arm.name: leaks})

    def policies(think: float) -> dict:
        same = {"accuracy": think, "passes": 2.0, "think": think}
        return {"prob_think": think} | dict.fromkeys(("always-short", "always-think", "free", "oracle"), same)

    learned = result(MODES, 0.1, 0.9)
    learned["modes"] = {"before": {"1": policies(0.5), "2": policies(0.5)}}
    learned["modes"]["after"] = {"1": policies(0.1), "2": policies(0.7)}
    lines = rule110_tables.modes({MODES.name: learned}).splitlines()
    assert lines[2].startswith("| 2 | 1 | 1 | 50.0 | 10.0 | 10.0 |")
    assert lines[4] == "| 2 | all | 1 | 50.0 | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 | 2.0 |"


def test_the_command_runs_all_arms_fills_the_page_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def here(module: str, arguments: list[str], file: Path, logs: Path, place: dict) -> int:
        started.append(file.stem)
        run = {"benchmarks.rule110_speed": rule110_speed.main, "benchmarks.rule110_arm": rule110_arm.main}[module]
        return run([*arguments, "--out", str(file)]) or 0

    monkeypatch.setattr(rule110, "run_process", here)
    monkeypatch.setattr(rule110, "TINY", rule110.Schedule({1: rule110.Grid(2, (4e-3,))}, (1, 2), (0,), (1, 2), 2))
    for _ in range(2):
        rule110.main(["--cpu", "--tiny", "--out", str(tmp_path)])
    kinds = ["speed", "t1_n1_lr0.004_s0_2", "t1_n2_lr0.004_s0_2", "t1_n1_lr0.004_s0_3"]
    assert started == [*kinds, "modes_n1_lr0.004_s0_2", "modes_n2_lr0.004_s0_2"]
    assert not list((tmp_path / "rule110").glob("*.part"))
    text = (tmp_path / "sleep_rule110.md").read_text(encoding="utf-8")
    assert "Not measured yet." not in text
    assert "not run" not in text
    assert "State: 1,024 bytes; keys and values: 4,096 in bf16." in text
    for block in text.split("<!--"):
        assert len({row.count("|") for row in block.splitlines() if row.startswith("|")}) <= 1


def test_an_arm_is_a_process_and_what_it_says_is_in_its_log(tmp_path: Path) -> None:
    code = rule110.run_process("benchmarks.rule110_arm", ["{}", "--cpu"], tmp_path / "x.json", tmp_path, {})
    assert code == 2
    assert "give depths, passes, rate, seed, steps, modes as JSON" in (tmp_path / "x.log").read_text()


def test_a_wrong_arm_is_told_in_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert rule110_arm.main(['{"depth": 8}', "--out", str(tmp_path / "x.json"), "--cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith('arm {"depth": 8}: ')
    assert len(error.splitlines()) == 1
    with pytest.raises(DataError, match="passes"):
        rule110_arm.read_arm("[")


def test_the_page_of_the_repository_holds_what_its_files_say(tmp_path: Path) -> None:
    page = (DOCS / "sleep_rule110.md").read_text(encoding="utf-8")
    (tmp_path / "sleep_rule110.md").write_text(page, encoding="utf-8")
    if (DOCS / "rule110").exists():
        (tmp_path / "rule110").symlink_to(DOCS / "rule110")
    rule110_tables.write_page(tmp_path)
    assert (tmp_path / "sleep_rule110.md").read_text(encoding="utf-8") == page


def test_the_plan_names_the_seconds(capsys: pytest.CaptureFixture) -> None:
    rule110.main(["--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "    11  t8_n1_lr0.002_s0_400"  # 3 + 400 * (5 * 3.4 + 2) / 1000
    assert rule110.estimate(Arm((8,), 1, 2e-3, 0, 400)) == pytest.approx(10.6)
    assert len(lines) == len(set(lines)) == 56  # t = 8: 16, 12: 13, 16 and 32: 10 each, with modes: 6, and the sum
