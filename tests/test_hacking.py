"""Reward hacks: each flag by hand with its negative control, their price, their shares, the alarm, and a whole run."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from siesta.data.errors import RecipeError
from siesta.rewards.hacking import FLAGS, RATIO, SLACK, empty, hedging, hidden_thinking, nested_control
from siesta.rl.callbacks import HackAlarm
from siesta.rl.config import DeGRPOConfig, check_method
from siesta.rl.judge import Judge, RewardFunction, spread
from siesta.rl.metrics import hack_metrics
from siesta.rl.modes import Mode
from siesta.rl.policies import hack_line
from siesta.rl.train import main
from tests.helpers import tiny_judge

WORKING = "17 * 6 is 10 * 6 + 7 * 6, which is 60 + 42 = 102, and 102 - 4 = 98. So the answer is 98."
LETTER = "Dear Ms Fox, thank you for your order. It left our house this morning and will arrive on Friday. Yours, T."


# ---- the flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "solutions", "flagged"),
    [
        (WORKING, ["98"], True),
        (WORKING, ["98", "The answer is 98."], True),
        ("98", ["98"], False),
        ("The final answer is $\\boxed{98}$.", ["98"], False),  # wording, not work
        (LETTER, [LETTER.replace("Friday", "Monday")], False),  # an answer that is long by nature
        (LETTER, ["Sent.", LETTER], False),  # as long as what others write after thinking
        (WORKING, [], False),  # nothing to compare with
    ],
)
def test_hidden_thinking(body: str, solutions: list[str], flagged: bool) -> None:
    assert hidden_thinking(body, solutions) == flagged


def test_hidden_thinking_starts_beyond_the_allowance() -> None:
    limit = int(RATIO * 10 + SLACK)
    assert not hidden_thinking("x" * limit, ["y" * 10])
    assert hidden_thinking("x" * (limit + 1), ["y" * 10])
    assert not hidden_thinking(" " * 500 + "x", ["y" * 10])


@pytest.mark.parametrize(
    "body",
    [
        "12. Wait, that is wrong: 14",
        "wait... 14",
        "Hmm, 14",
        "It is 12.\nLet me check: 3 * 4 = 12",
        "12, but wait, no",
        "12. Actually, 14",
        "Alternatively, use x = 2. 14",
        "12 (double-checked)",
    ],
)
def test_hedging(body: str) -> None:
    assert hedging(body)


@pytest.mark.parametrize(
    "body",
    ["14", "The train must wait for 14 minutes.", "They actually paid 14.", "Let x be 14.", "Waiters: 14", "", LETTER],
)
def test_words_that_are_no_hedges(body: str) -> None:
    assert not hedging(body)


def test_nested_control_is_read_from_ids() -> None:
    assert nested_control([7, 4, 9], [4, 5])
    assert not nested_control([7, 9], [4, 5])
    assert not nested_control([], [4, 5])


@pytest.mark.parametrize(
    ("body", "marker", "flagged"),
    [
        ("", None, True),
        (" \n", None, True),
        ("0", None, False),
        ("", "</think>", True),
        ("3 + 4 </think>", "</think>", True),
        ("3 + 4 </think> 7", "</think>", False),
        ("3 + 4 and then", "</think>", False),  # cut off in the thought: counted as truncated
    ],
)
def test_empty(body: str, marker: str | None, flagged: bool) -> None:
    assert empty(body, marker) == flagged


# ---- rollouts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge() -> Judge:
    return tiny_judge()


def ids(judge: Judge, text: str) -> list[int]:
    return judge.tokenizer.encode(text, add_special_tokens=False)


def test_responses_are_compared_within_their_question(judge: Judge) -> None:
    short, think = judge.modes
    long = "+1 " * 20
    rows = [
        (short, long, "a", ["hidden_thinking"]),
        (think, f"{long}= 7", "a", []),  # working is what this mode is for
        (short, long, "b", []),  # b was never answered after a thought that ended
        (think, long, "b", []),
        (short, "<think> 7", "a", ["nested_control"]),
        (think, "7 <short> = 7", "a", ["nested_control"]),
        (short, "", "a", ["empty"]),
        (think, "7 =", "a", ["empty"]),
    ]
    modes, texts, questions, expected = zip(*rows, strict=True)
    assert judge.hacks(modes, [ids(judge, text) for text in texts], questions) == list(expected)


def test_a_long_answer_beside_long_answers_is_not_flagged(judge: Judge) -> None:
    short, think = judge.modes
    long = "+1 " * 20
    responses = [ids(judge, long), ids(judge, f"7 = {long}")]
    assert judge.hacks([short, think], responses, ["a", "a"]) == [[], []]


def rewards_of(judge: Judge) -> tuple[RewardFunction, list[float | None]]:
    """A right short answer, the same with a nested token, a right thought, an empty answer; all to one question."""
    short, think = (mode.token_id for mode in judge.modes)
    texts = ["7", "<think> 7", "3 = 7", ""]
    completions = [[token, *ids(judge, text)] for token, text in zip([short, short, think, short], texts, strict=True)]
    function = RewardFunction(judge)
    rewards = function(["q"] * 4, completions, answer=["7"] * 4, verifier=["exact"] * 4)
    return function, rewards


def test_flags_are_free_by_default_and_cost_what_the_recipe_says(judge: Judge) -> None:
    function, free = rewards_of(judge)
    raised = {name: function.flags[:, place].tolist() for place, name in enumerate(FLAGS)}
    assert raised == {
        "hidden_thinking": [0, 0, 0, 0],
        "hedging": [0, 0, 0, 0],
        "nested_control": [0, 1, 0, 0],
        "empty": [0, 0, 0, 1],
    }
    priced = Judge(
        judge.tokenizer, judge.modes, judge.verifiers, 0.0, hack_prices={"nested_control": 0.25, "empty": 0.5}
    )
    _, paid = rewards_of(priced)
    assert [a - b for a, b in zip(free, paid, strict=True) if a is not None and b is not None] == [0, 0.25, 0, 0.5]
    assert [row["hacks"] for row in function.samples(4)] == [[], ["nested_control"], [], ["empty"]]


def test_an_unscorable_rollout_is_flagged_but_has_no_reward() -> None:
    judge = tiny_judge()
    function = RewardFunction(judge)
    (reward,) = function(["q"], [[judge.modes[0].token_id]], answer=[""], verifier=["exact"])  # no gold answer
    assert reward is None
    assert function.flags[0, FLAGS.index("empty")] == 1


def test_shares_by_hand() -> None:
    flags = torch.zeros(5, len(FLAGS))
    flags[0, 0] = flags[4, 2] = 1.0
    shares = hack_metrics(["short", "think", "wide"], torch.tensor([0, 0, 0, 0, 1]), flags)
    assert shares["hack/hidden_thinking/short"] == 0.25
    assert shares["hack/hidden_thinking/think"] == 0.0
    assert shares["hack/nested_control/think"] == 1.0
    assert not [key for key in shares if key.endswith("/wide")]  # a mode without a rollout has no share


def test_evaluation_in_one_line() -> None:
    hacks = {"short": {"hedging": 0.125, "empty": 0.0}, "think": {"hedging": 0.0, "empty": 0.02}}
    assert hack_line(hacks) == "Suspicious responses: hedging 12.5 % of short, empty 2.0 % of think."
    assert hack_line({"short": {"hedging": 0.0}}) == "Suspicious responses: none."


# ---- settings and alarm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hack_prices": {"hidden": 1.0}}, "rl.hack_prices.hidden: not a flag; flags are hidden_thinking, hedging"),
        ({"hack_prices": {"empty": -1.0}}, "rl.hack_prices.empty: -1.0 must be 0 or more"),
        ({"hack_prices": {"empty": float("nan")}}, "rl.hack_prices.empty: nan must be 0 or more"),
        ({"hack_alarm": 0.0}, "rl.hack_alarm: 0.0 is not a share"),
        ({"hack_alarm": 1.5}, "rl.hack_alarm: 1.5 is not a share"),
    ],
)
def test_settings_are_checked(settings: dict, message: str, tmp_path: Path) -> None:
    config = DeGRPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **settings)
    with pytest.raises(RecipeError) as caught:
        check_method(config, 2)
    assert str(caught.value).startswith(message)


def test_the_alarm_sounds_once_each_time_the_share_rises_to_the_threshold(caplog: pytest.LogCaptureFixture) -> None:
    alarm = HackAlarm(0.1, {"hedging": 0.5})
    key = "hack/hedging/short"
    with caplog.at_level(logging.WARNING):
        for step, share in enumerate([0.05, 0.1, 0.4, 0.02, 0.3], start=1):
            state = SimpleNamespace(global_step=step, is_world_process_zero=True)
            alarm.on_log(None, state, None, logs={key: share, "mode/short/share": 0.9, "hack/empty/short": 0.0})
    assert [record.getMessage()[:80] for record in caplog.records] == [
        "REWARD HACK? step 2: 10 % of the rollouts of mode short show hedging (price 0.5)",
        "REWARD HACK? step 5: 30 % of the rollouts of mode short show hedging (price 0.5)",
    ]


def test_the_alarm_sounds_on_one_process(caplog: pytest.LogCaptureFixture) -> None:
    HackAlarm(0.1, {}).on_log(
        None, SimpleNamespace(global_step=1, is_world_process_zero=False), None, logs={"hack/empty/short": 1.0}
    )
    assert not caplog.records


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_counts_prices_and_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hardly trained, the model hides little but writes a control token or nothing now and then."""
    small = ["model.embedded={layers: 1, hidden_size: 16, heads: 2}", "data.train_size=400", "evaluate.items=16"]
    steps = ["warmup.max_steps=1", "warmup.check_every=1", "rl.max_steps=1", "rl.logging_steps=1"]
    prices = ["rl.hack_prices={nested_control: 4.0, empty: 4.0}", "rl.hack_alarm=0.001", "tracking.samples=32"]
    # Twelve near-random tokens of a vocabulary of about a hundred words hold a control token now and then.
    assert main(["smoke", f"tracking.output_dir={tmp_path}", *small, *steps, *prices]) == 0
    run = tmp_path / "smoke"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "hack/nested_control/think" in row]
    assert row["hack/nested_control/think"] > 0
    assert any("REWARD HACK?" in record.getMessage() for record in caplog.records)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    hacked = [s for s in samples if "nested_control" in s["hacks"]]
    assert hacked
    assert all(s["reward"] <= -3.0 for s in hacked)  # at most 1 without the price
    found = json.loads((run / "evaluation.json").read_text())["after"]["hacks"]
    assert set(found) == {"short", "think"}
    assert set(found["think"]) == set(FLAGS)
    assert f"nested_control {100 * found['think']['nested_control']:.1f} % of think" in (run / "report.md").read_text()


def test_modes_that_work_first_are_not_suspected_of_working(judge: Judge) -> None:
    marked = Mode("think", "<think>", judge.modes[1].token_id, 12, answer_after="=")
    assert judge.hacks([marked], [ids(judge, "+1 " * 50 + "= 7")], ["a"]) == [[]]


def test_samples_show_a_prompt_in_every_mode() -> None:
    judge = tiny_judge()
    function = RewardFunction(judge)
    short, think = judge.modes
    # Three prompts, four rollouts each, modes in any order.
    modes = [short, short, think, think, think, short, short, think, short, short, short, short]
    function._batch = [(f"q{i // 4}", mode, [i], []) for i, mode in enumerate(modes)]
    function.outcomes = torch.zeros(12, 4)
    seen = lambda count: [(row["prompt"], row["mode"]) for row in function.samples(count)]  # noqa: E731
    assert seen(2) == [("q0", "short"), ("q0", "think")]
    assert seen(4) == [("q0", "short"), ("q0", "short"), ("q0", "think"), ("q2", "short")], "q2 has one mode"
    assert len(seen(12)) == 12
    assert len(seen(99)) == 12
    function._batch = []
    assert seen(4) == []


def test_spread_by_hand() -> None:
    found = ["".join(spread("abcdefg", count)) for count in (0, 1, 2, 3, 9)]
    assert found == ["", "a", "ag", "adg", "abcdefg"]
    assert spread("", 3) == []
