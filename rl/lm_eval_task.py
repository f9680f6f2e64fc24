"""A recipe's items as a task of lm-eval, with mode metrics, for whoever compares models with that harness.

    python -m siesta.rl.lm_eval_task quickstart --out tasks
    lm-eval run --model hf --model_args pretrained=outputs/quickstart/export --include_path tasks \\
        --tasks siesta_quickstart --apply_chat_template

The harness samples without restriction, from the whole vocabulary: a response that opens with no control token has no
mode and counts as wrong. Metrics are `accuracy`, and for each mode `share_<mode>` and `accuracy_<mode>`. Needs
`pip install 'siesta-rl[lm-eval]'` to run, not to write the task.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from siesta.data.loading import load_examples
from siesta.data.prompts import messages
from siesta.rewards.score import Unscorable, Verifier
from siesta.rewards.verifiers import build_verifier, solution_part
from siesta.rl.exits import DEBUG_HELP, command
from siesta.rl.recipe import Recipe, load_recipe
from siesta.rl.run import write_atomically

HELPERS = (
    "from siesta.rl.lm_eval_task import known_mean, process_results\n\n__all__ = ['known_mean', 'process_results']\n"
)


def process_results(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """Metrics of one response, as lm-eval asks for them; NaN where one says nothing of this response.

    Args:
        doc: A row of items.jsonl.
        results: The response.
    """
    text = results[0].lstrip()
    mode = next((mode for mode in doc["modes"] if text.startswith(mode["token"])), None)
    score = 0.0
    if mode is not None:
        solution = solution_part(text.removeprefix(mode["token"]), mode["answer_after"])
        try:
            score = float(verifier(doc["verifier"])(solution, doc["answer"]))
        except Unscorable:
            score = math.nan
    metrics = {"accuracy": score}
    for each in doc["modes"]:
        metrics[f"share_{each['name']}"] = float(each is mode)
        metrics[f"accuracy_{each['name']}"] = score if each is mode else math.nan
    return metrics


def known_mean(values: Sequence[float]) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@cache
def verifier(name: str) -> Verifier:
    """One for all responses: some hold processes."""
    return build_verifier(name, timeout=10.0)


def task(recipe: Recipe, items: Path) -> dict[str, Any]:
    """The task as lm-eval's YAML has it, but for the functions."""
    names = ["accuracy", *(f"{what}_{mode}" for mode in recipe.modes for what in ("share", "accuracy"))]
    return {
        "task": f"siesta_{recipe.tracking.run}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "max_gen_toks": 1 + max(mode.max_tokens for mode in recipe.modes.values()),
        },
        "metric_list": [{"metric": name, "aggregation": None, "higher_is_better": True} for name in names],
        "process_results": None,
        "metadata": {"version": 1.0},
    }


def write_task(recipe: Recipe, folder: Path) -> str:
    """Write items, task and helpers; returns the task's name.

    Raises:
        UserError: The data cannot be used.
    """
    examples = load_examples(recipe.data, "test", recipe.evaluate.items)
    modes = [
        {"name": name} | mode.model_dump(include={"token", "answer_after"}) for name, mode in recipe.modes.items()
    ]
    rows = [
        {"prompt": messages(example, recipe.data.instruction)[0]["content"], "modes": modes}
        | {name: vars(example)[name] for name in ("id", "answer", "verifier")}
        for example in examples
    ]
    folder.mkdir(parents=True, exist_ok=True)
    content = task(recipe, folder / f"{recipe.tracking.run}.jsonl")
    write_atomically(folder / f"{recipe.tracking.run}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    # A name behind `!function` is one of a module beside the YAML file.
    text = yaml.safe_dump(content, sort_keys=False)
    text = text.replace("process_results: null", "process_results: !function siesta_helpers.process_results")
    text = text.replace("aggregation: null", "aggregation: !function siesta_helpers.known_mean")
    write_atomically(folder / "siesta_helpers.py", HELPERS)
    write_atomically(folder / f"{content['task']}.yaml", text)
    return content["task"]


@command
def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="siesta.rl.lm_eval_task", description="Write a recipe's items for lm-eval.", epilog=DEBUG_HELP
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder for --include_path of lm-eval")
    options = parser.parse_intermixed_args(arguments)
    name = write_task(load_recipe(options.recipe, options.overrides), options.out)
    print(f"lm-eval run --model hf --include_path {options.out} --tasks {name} --apply_chat_template ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
