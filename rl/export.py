"""Export a checkpoint as a folder that `from_pretrained` and `vllm serve` take as it is.

siesta export outputs/quickstart/rl/checkpoint-75 exported     # any checkpoint, LoRA or not
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig

from siesta.data.errors import ModelError
from siesta.data.prompts import end_id, pad_id
from siesta.rl.console import quiet_libraries
from siesta.rl.exits import DEBUG_HELP, command
from siesta.rl.models import build_modes, load_tokenizer, save_model
from siesta.rl.origin import Origin, read_origin
from siesta.rl.recipe import Recipe, dump_recipe, load_recipe
from siesta.rl.serving import write_rules
from siesta.rl.sleep.factory import load_whole

PACKAGES = ("siesta-rl", "torch", "transformers", "trl", "accelerate", "peft")


def find_run(checkpoint: Path) -> Path:
    """The run directory a checkpoint lies in: the nearest folder above it with a recipe."""
    for folder in checkpoint.resolve().parents:
        if (folder / "recipe.yaml").exists():
            return folder
    raise ModelError(f"{checkpoint}: no run directory above it (recipe.yaml is missing)")


def export_checkpoint(checkpoint: Path, out: Path, *, run: Path, dtype: str | None = None) -> None:
    """Write weights, tokenizer, generation config and model card.

    Args:
        checkpoint: A stage's folder or a `checkpoint-N`; an adapter is merged.
        out: Folder to write.
        run: The run it belongs to; gives recipe, template and evaluation.
        dtype: Of the weights; as trained by default.

    Raises:
        ModelError: There is no model in `checkpoint`.
    """
    recipe = load_recipe(run / "recipe.yaml")
    model = load_whole(checkpoint, recipe, dtype)
    tokenizer = load_tokenizer(run / "model")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=recipe.rl.setting("temperature"),
        top_k=0,
        max_new_tokens=1 + max(mode.max_tokens for mode in recipe.modes.values()),
        eos_token_id=end_id(tokenizer),
        pad_token_id=pad_id(tokenizer),
    )
    save_model(model, tokenizer, out)
    modes = build_modes(recipe.modes, tokenizer)
    write_rules(out, modes, eos_id=end_id(tokenizer), instruction=recipe.data.instruction)
    evaluation = run / "evaluation.json"
    results = json.loads(evaluation.read_text()) if evaluation.exists() else None
    card = model_card(recipe, checkpoint, results, read_origin(run / "model"))
    (out / "README.md").write_text(card, encoding="utf-8")


def model_card(recipe: Recipe, checkpoint: Path, results: dict | None, origin: Origin | None) -> str:
    """What was trained, how, with which versions, and what it scored."""
    base = origin or recipe.model.path or "an embedded model, built from scratch"
    tokens = ", ".join(f"`{mode.token}` ({name})" for name, mode in recipe.modes.items())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    parts = [
        "---\nlibrary_name: transformers\ntags: [siesta, degrpo, grpo]\n---",
        f"# {recipe.tracking.run}",
        f"Trained with siesta from {base}; this is `{checkpoint.name}` of the run. The first token of every answer is "
        f"a control token that names its mode: {tokens}. The chat template ends right before it.",
    ]
    if results:
        last = list(results)[-1]
        parts += [
            "## Evaluation",
            "Of the run's final checkpoint, on its test items.",
            markdown_table(results[last]),
        ]
    parts += [
        "## Versions",
        versions,
        "## Recipe",
        "```yaml\n" + dump_recipe(recipe) + "```",
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(result: dict, decoding: str = "greedy") -> str:
    """One decoding of `policies.table` in Markdown."""
    rows = result[decoding]
    last = list(rows["free"]["shares"])[-1]
    levels = list(rows["free"]["levels"]) if len(rows["free"]["levels"]) > 1 else []
    header = [
        "policy",
        "accuracy % [95 %]",
        "tokens",
        f"{last} %",
        "regret",
        *(f"{last} % L{level}" for level in levels),
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, row in rows.items():
        low, high = row["interval"]["accuracy"]
        cells = [
            name,
            f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            f"{row['tokens']:.1f}",
            f"{100 * row['shares'][last]:.0f}",
            f"{row['regret']:.3f}",
            *(f"{100 * row['levels'][level]['shares'][last]:.0f}" for level in levels),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\n{result['items']} items, {decoding} decoding; brackets: 95 % bootstrap interval over items.")
    return "\n".join(lines)


@command
def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="siesta export", description="Export a checkpoint of a run.", epilog=DEBUG_HELP
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    quiet_libraries()
    export_checkpoint(options.checkpoint, options.out, run=find_run(options.checkpoint), dtype=options.dtype)
    print(f"exported to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
