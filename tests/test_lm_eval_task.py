"""The task that lm-eval gets: metrics of a response by hand, and files that say what lm-eval wants to know.

lm-eval itself is not needed: it calls `process_results` with a row and a text.
"""

import json
import math
from pathlib import Path

import pytest
import yaml

from siesta.rl.lm_eval_task import known_mean, main, process_results


class Loader(yaml.SafeLoader):
    """Reads `!function name` as the name."""


Loader.add_constructor("!function", lambda loader, node: node.value)

DOC = {
    "answer": "7",
    "verifier": "exact",
    "modes": [
        {"name": "short", "token": "<short>", "answer_after": None},
        {"name": "think", "token": "<think>", "answer_after": "="},
    ],
}


@pytest.mark.parametrize(
    ("text", "accuracy", "mode"),
    [
        ("<short>7", 1, "short"),
        (" <think> 3 4 = 7", 1, "think"),
        ("<think> 7", 0, "think"),  # an unfinished thought has no answer
        ("<short>8 <think> = 7", 0, "short"),  # only the first token names the mode
        ("7", 0, None),
    ],
)
def test_metrics_by_hand(text: str, accuracy: float, mode: str | None) -> None:
    found = process_results(DOC, [text])
    assert found["accuracy"] == accuracy
    for name in ("short", "think"):
        assert found[f"share_{name}"] == (name == mode)
        own = found[f"accuracy_{name}"]
        assert own == accuracy if name == mode else math.isnan(own)


def test_a_verifier_that_fails_says_nothing() -> None:
    found = process_results(DOC | {"answer": " "}, ["<short>7"])
    assert math.isnan(found["accuracy"])
    assert found["share_short"] == 1
    assert known_mean([1.0, math.nan, 0.0]) == 0.5
    assert math.isnan(known_mean([math.nan]))


def test_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "evaluate.items=8", "--out", str(tmp_path)]) == 0
    assert "--tasks siesta_quickstart" in capsys.readouterr().out
    task = yaml.load((tmp_path / "siesta_quickstart.yaml").read_text(), Loader)
    assert task["process_results"] == "siesta_helpers.process_results"
    rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert len(rows) == 8
    row = rows[0]
    assert row["prompt"].startswith("<calc>")
    found = process_results(row, [f"<short>{row['answer']}"])
    assert found["accuracy"] == 1
    assert [each["metric"] for each in task["metric_list"]] == list(found)
    assert {each["aggregation"] for each in task["metric_list"]} == {"siesta_helpers.known_mean"}
    assert task["generation_kwargs"]["max_gen_toks"] == 13
    assert main(["nowhere", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("siesta: error: nowhere: no such recipe")
