"""siesta report: every part of the page from the run's files, nothing from the network, a page that browsers show."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from siesta.rl import cli
from siesta.rl.page import events, main, paired_samples, phase_seconds, policy_table, read_story, recipe_diff, render
from siesta.rl.policies import Measurement, table

RECIPE = "seed: {seed}\nrl:\n  tau: {tau}\n  max_steps: 30\ntracking:\n  run: x\n"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def measured() -> Measurement:
    """Four items of two levels: short is right on the first, think on three; the policy follows the level."""
    short, think = np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    scores, tokens = np.stack([short, think], 1), np.tile([2.0, 8.0], (4, 1))
    return Measurement(
        modes=["short", "think"],
        levels=np.array(["1", "1", "2", "2"]),
        mode_probs=np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]]),
        mass=np.ones(4),
        greedy_scores=scores,
        greedy_tokens=tokens,
        sampled_scores=scores,
        sampled_tokens=tokens,
        sampled_rewards=scores * [2.0, 1.5] - 1,
        truncated=np.zeros((4, 2)),
    )


def row(step: int) -> dict:
    """A log of RL."""
    found: dict = {"stage": "rl", "step": step, "time/step": 4.0, "time/rollout": 3.0, "time/verify": step / 10}
    for mode, share in (("short", 0.3), ("think", 0.7)):
        own = {"prob": share, "accuracy": share, "tokens": 5.0}
        found |= {f"mode/{mode}/{name}": value for name, value in own.items()}
    return found | {"rollout/accuracy": 0.5, "rollout/tokens": 4.0, "rollout/unscorable": 0.0}


def sample(step: int, prompt: str, mode: str, score: float | None) -> dict:
    """A sampled rollout."""
    turns = [{"role": "user", "content": prompt}]
    text = f"<script>alert('{mode}')</script> 7"
    own = {"step": step, "prompt": turns, "mode": mode, "response": text, "tokens": 3, "score": score}
    return own | {"reward": score, "hacks": []}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as training leaves it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.format(seed=0, tau=0.1))
    (folder / "evaluation.json").write_text(json.dumps({"after": table(measured(), resamples=50, seed=0)}))
    lines = [{"stage": "warmup", "step": 5, "loss": 1.0}, *map(row, (1, 2, 3))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rollouts = [sample(1, "3 + 4", "short", 1.0), sample(2, "a & b", "short", 0.0), sample(2, "a & b", "think", None)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rollouts))
    return folder


def test_every_part_by_hand(run: Path) -> None:
    story = read_story(run)
    assert (story.name, story.modes, len(story.rows)) == ("mine", ["short", "think"], 3)
    rows = policy_table(story)["rows"]
    free = next(cells for cells in rows if cells[:2] == ["free", "greedy"])
    assert free[2].startswith("50.0 ["), "items 1 and 3 of 4"
    assert free[3:] == ["5.0", "50", "0.375"], "item 2, answered at once and wrong, loses 1.5; of four items"
    assert phase_seconds(story) == {"rollout": 3.0, "verify": pytest.approx(0.25)}, "the first log aside"
    (pair,) = paired_samples(story)
    assert (pair["step"], pair["prompt"]) == (2, "a & b")
    assert [(own["mode"], own["score"], own["reward"]) for own in pair["responses"]] == [
        ("short", "wrong", "0"),
        ("think", "unscorable", "none"),
    ]


def test_what_siesta_eval_found_is_shown_too(run: Path) -> None:
    estimate = {"value": 0.75, "interval": [0.5, 1.0]}
    bins = [{"items": 3, "p": 0.2, "pays": estimate}, {"items": 0, "p": None, "pays": {"value": None}}]
    names = ("auroc", "hybrid_accuracy", "hybrid_chance")
    points = [{"tokens": tokens, "accuracy": tokens / 10} for tokens in (2, 5, 8)]
    found = {
        "frontier": {"greedy": {"area": {"value": None, "interval": None}, "points": points}},
        "calibration": dict.fromkeys(names, estimate) | {"bins": bins},
    }
    (run / "eval").mkdir()
    (run / "eval" / "evaluation.json").write_text(json.dumps({"checkpoints": {"mine": found}}))
    page = render([read_story(run)], "t")
    assert 'aria-label="does p(think) know when it pays?"' in page
    assert "AUROC of p(think): does it know where think pays? [0.500, 1.000]" in page
    assert "(chance 75.0) [50.0, 100.0]" in page
    assert "over random routing" not in page, "an estimate that is none"


def test_guards_and_faults_are_told_and_their_absence_too(run: Path) -> None:
    story = read_story(run)
    assert list(events(story)) == ["No guard fired, every rollout was scored, nothing was flagged."]
    bad = {"guard/skipped_steps": 2.0, "rollout/unscorable": 0.06, "hack/hidden_thinking/short": 0.2}
    troubled = replace(story, rows=[story.rows[0] | bad, *story.rows[1:]])
    assert list(events(troubled)) == [
        "2 steps were skipped because something was not finite.",
        "2.00 % of the rollouts could not be scored, on average.",
        "hidden thinking in up to 20.0 % of the short rollouts of a log.",
    ]


def test_where_the_time_goes_is_shown_from_the_first_log_on(run: Path) -> None:
    """A log that compiled is left out where there are others."""
    story = read_story(run)
    logs = [{"step": n, "time/step": 9.0, "time/rollout": seconds} for n, seconds in ((1, 8.0), (2, 1.0), (3, 3.0))]
    assert phase_seconds(replace(story, rows=logs)) == {"rollout": 2.0}
    assert phase_seconds(replace(story, rows=logs[:1])) == {"rollout": 8.0}
    without = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in story.rows]
    assert "where the time goes" in render([story], "t")
    assert "where the time goes" not in render([replace(story, rows=without)], "t")


def test_recipes_are_compared(run: Path) -> None:
    story = read_story(run)
    other = replace(story, path=run.parent / "other", recipe=RECIPE.format(seed=0, tau=0.3))
    lines = recipe_diff(story, other)["lines"]
    assert [line["text"] for line in lines if line["kind"]] == ["-  tau: 0.1", "+  tau: 0.3"]
    assert recipe_diff(story, story)["lines"] == []


def test_the_page_is_whole_and_holds_no_code_of_the_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert "report.html: 1 run," in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "&lt;script&gt;alert" in page
    assert "a &amp; b" in page
    # The names of SVG and XLink aside, no address: nothing is loaded.
    addresses = set(re.findall(r"(?:https?:)?//[\w./-]+", page))
    assert {address for address in addresses if "w3.org" not in address} == set()
    assert "<script" not in page
    assert "src=" not in page
    drawn = re.findall(r"<svg role.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 9, "frontier, three by level, three curves, phases, lengths"
    ids = [
        name for figure in drawn for name in set(re.findall(r'id="([^"]+)"', figure)) if name.startswith(("p", "m"))
    ]
    clips = [name for name in ids if re.fullmatch(r"[pm][0-9a-f]{10}", name)]
    assert len(clips) > 9, "every figure has some"
    assert len(clips) == len(set(clips)), "figures do not share the ids that they refer to"
    for figure in drawn:
        ElementTree.fromstring(figure)


def test_the_same_run_gives_the_same_numbers(run: Path) -> None:
    story = read_story(run)
    plain = [re.sub(r"(?s)<svg.*?</svg>", "", render([story], "t")) for _ in range(2)]
    assert plain[0] == plain[1]


def test_two_runs_stand_beside_each_other(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "recipe.yaml").write_text(RECIPE.format(seed=1, tau=0.1))
    (other / "samples.jsonl").unlink()
    (other / "metrics.jsonl").unlink()
    out = tmp_path / "deep" / "both.html"
    assert main([str(run), str(other), "--out", str(out), "--title", "A & B"]) == 0
    page = out.read_text()
    assert "<h1>A &amp; B</h1>" in page
    assert "mine (-) against other (+)" in page
    assert '<span class="plus">+seed: 1</span>' in page
    assert "No RL in this run." in page


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("recipe.yaml", None, "no run directory (recipe.yaml is missing)"),
        (
            "evaluation.json",
            None,
            "no evaluation.json, the run has not been evaluated; give its command again, to go on",
        ),
        ("evaluation.json", "{", "a file is damaged, "),
        ("samples.jsonl", "{\n", "a file is damaged, "),
    ],
)
def test_bad_runs_are_one_line(
    run: Path, name: str, content: str | None, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    assert cli.main(["report", str(run)]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert shown[0].startswith(f"siesta: error: {run}: {line}")
    assert not (run / "report.html").exists()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium, see .ci/run")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(run: Path, width: int) -> None:
    main([str(run)])
    file = run / "report.html"
    probe = "<script>document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth</script></body>"
    file.write_text(file.read_text().replace("</body>", probe))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # containers have little of it
        "--disable-quic",
        "--no-first-run",
        "--enable-logging=stderr",
    ]
    flags += [f"--user-data-dir={run / 'profile'}", f"--window-size={width},900", "--dump-dom", "--timeout=5000"]
    done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = re.search(r'data-wide="(-?\d+)"', done.stdout)
    assert found is not None
    assert int(found[1]) <= 0
