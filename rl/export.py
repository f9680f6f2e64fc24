"""Export a checkpoint as a folder that `from_pretrained` and `vllm serve` take as it is.

siesta export outputs/quickstart exported                       # the run's final model
siesta export outputs/quickstart/rl/checkpoint-75 exported      # any checkpoint, LoRA or not
siesta export outputs/quickstart exported --push-to-hub me/my-model --private
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from transformers import GenerationConfig

from siesta.data.errors import ModelError
from siesta.data.prompts import end_id, pad_id
from siesta.rl.card import RECIPE_FILE, gather, model_card
from siesta.rl.console import quiet_libraries
from siesta.rl.exits import DEBUG_HELP, command
from siesta.rl.hub import Target, check_folder
from siesta.rl.models import build_modes, load_tokenizer, save_model
from siesta.rl.recipe import Recipe, dump_recipe, load_recipe
from siesta.rl.serving import write_rules
from siesta.rl.sleep.factory import load_whole


def find_run(checkpoint: Path) -> Path:
    """The run directory a checkpoint lies in: the nearest folder above it with a recipe."""
    for folder in checkpoint.resolve().parents:
        if (folder / "recipe.yaml").exists():
            return folder
    raise ModelError(f"{checkpoint}: no run directory above it (recipe.yaml is missing)")


def final_model(run: Path, recipe: Recipe, *, or_export: bool = False) -> Path:
    """The stage whose weights a run ends with; or its export, where only that was kept.

    Raises:
        ModelError: It has not come so far.
    """
    places = [run / name for name in (("rl",) if recipe.rl.enabled else ("warmup", "model"))]
    places += [run / "export"] if or_export else []
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
    started = sorted(run.glob("rl/checkpoint-*"), key=lambda each: each.stat().st_mtime)
    hint = f"name a checkpoint, such as {started[-1]}" if started else "train it first"
    names = ", ".join(f"{folder.name}/" for folder in places)
    raise ModelError(f"{run}: this run directory has no final model (looked in {names}); {hint}")


def find_model(path: Path) -> tuple[Path, Path]:
    """Run directory and checkpoint of a run directory (its final one) or of a checkpoint in one.

    Raises:
        ModelError: There is none.
    """
    if (path / "recipe.yaml").is_file():
        return path, final_model(path, load_recipe(path / "recipe.yaml"))
    return find_run(path), path


def export_checkpoint(
    checkpoint: Path, out: Path, *, run: Path, dtype: str | None = None, licence: str | None = None
) -> None:
    """Write weights, tokenizer, generation config, modes, recipe and model card.

    Args:
        checkpoint: A stage's folder or a `checkpoint-N`; an adapter is merged.
        out: Folder to write.
        run: The run it belongs to; gives recipe, template and evaluation.
        dtype: Of the weights; as trained by default.
        licence: Of the model, for its card.

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
    (out / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    card = model_card(gather(run, recipe, checkpoint, licence))
    (out / "README.md").write_text(card, encoding="utf-8")


@command
def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="siesta export", description="Export a checkpoint of a run.", epilog=DEBUG_HELP
    )
    parser.add_argument("checkpoint", type=Path, help="a run directory, or a stage or checkpoint in it")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; as trained if left out")
    parser.add_argument("--license", metavar="ID", help="of this model, for its card, such as apache-2.0")
    parser.add_argument("--push-to-hub", metavar="NAME", help="then upload the folder as this model (owner/name)")
    parser.add_argument("--private", action="store_true", help="in a repository that only its owner sees")
    options = parser.parse_args(arguments)
    if options.private and options.push_to_hub is None:
        parser.error("argument --private: belongs to --push-to-hub")
    quiet_libraries()
    target = None
    if options.push_to_hub is not None:
        target = Target.checked(HfApi(), options.push_to_hub, private=options.private)
        check_folder(options.out)
    run, checkpoint = find_model(options.checkpoint)
    export_checkpoint(checkpoint, options.out, run=run, dtype=options.dtype, licence=options.license)
    print(f"exported to {options.out}")
    if target is not None:
        print(f"uploaded to {target.upload(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
