"""The command `siesta sleep`: consolidate contexts before their queries come, and keep the states.

    siesta sleep recipe.yaml --contexts contexts.jsonl --out states sleep.mechanism=latent sleep.passes=4

A row of contexts.jsonl is `{"id": ..., "context": ...}`. Contexts are consolidated one at a time, so that a state does
not depend on its neighbours and a run that was killed goes on to the same bytes. More rows may be added later: what is
there stays. All rows are checked before the first one is slept on.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from siesta.data.errors import DataError, RecipeError
from siesta.data.sources import BLANK, read_rows
from siesta.rl.console import progress, quiet_libraries
from siesta.rl.generation import inference
from siesta.rl.precision import training_autocast
from siesta.rl.recipe import Recipe, load_recipe
from siesta.rl.sleep.factory import Sleeper, open_sleeper
from siesta.rl.sleep.store import StateStore, digest, identity

UNTRAINED = (
    "the model has no weights of its own for this mechanism (they are new): train it first, its states say nothing"
)


def fields(file: str, names: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a file that have these fields, as text; blank lines are empty rows, so that rows count as in an editor.

    Raises:
        DataError: The file is missing or holds nothing, a field is missing, empty or no text, or an id stands twice.
    """
    rows: list[dict[str, str]] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(read_rows(file), start=1):
        rows.append({})
        if row is BLANK:
            continue
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number}: an object is expected, this is a {type(row).__name__}")
        for name in names:
            value = row.get(name)
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise DataError(
                    f"{file}, row {number}: {name!r} is missing or no text; each row has {', '.join(names)}"
                )
            if not str(value).strip():
                raise DataError(f"{file}, row {number}: {name!r} is empty")
            rows[-1][name] = str(value)
        own = rows[-1]["id"]
        if own in seen:
            raise DataError(f"{file}, row {number}: id {own!r} stands in row {seen[own]}, too")
        seen[own] = number
    if not seen:
        raise DataError(f"{file}: no rows")
    return rows


def check_contexts(
    file: str, rows: Sequence[dict[str, str]], sleeper: Sleeper, store: StateStore, passes: int
) -> None:
    """Refuse what would end the night half-way.

    Raises:
        DataError: A context is longer than the model takes, or another than the one that was slept on before.
    """
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        try:
            sleeper.way.check(sleeper.model, [row["context"]], passes)
        except DataError as error:
            raise DataError(f"{file}, row {number}: {error}") from error
        before = store.entries.get(row["id"])
        if before is not None and before.context != digest(row["context"].encode()):
            raise DataError(
                f"{file}, row {number}: {store.folder} has a state of another context with id {row['id']!r}; give "
                "this one a new id"
            )


def make(recipe: Recipe, contexts: str, out: Path, model: str | None, console: Console) -> None:
    """Sleep on every context that has no state yet.

    Raises:
        UserError: The recipe, the model, a row or the folder cannot be used.
    """
    section = recipe.sleep
    if section.mechanism == "none":
        raise RecipeError("sleep.mechanism: none keeps no state; say which one to make, such as sleep.mechanism=raw")
    rows = fields(contexts, ("id", "context"))
    sleeper = open_sleeper(recipe, model)
    if not sleeper.trained:
        console.print(f"sleep.mechanism: {section.mechanism}: {UNTRAINED}", markup=False)
    store = StateStore.begin(out, identity(section, sleeper.model, sleeper.tokenizer))
    check_contexts(contexts, rows, sleeper, store, section.passes)
    rows = [row for row in rows if row]
    missing = [row for row in rows if row["id"] not in store.entries]
    start = time.perf_counter()
    with (
        progress(console, "sleep", len(rows), len(rows) - len(missing)) as advance,
        inference(sleeper.model),
        training_autocast(recipe.rl, sleeper.model.device),
    ):
        for row in missing:
            draw = torch.Generator(sleeper.model.device).manual_seed(recipe.seed)
            night = sleeper.way.sleep(sleeper.model, [row["context"]], passes=section.passes, generator=draw)
            store.add(row["id"], row["context"], night.state.tensors(), night.cost)
            advance(1)
    entries = [store.entries[row["id"]] for row in missing]
    console.print(
        f"{out}: {len(rows)} contexts, {len(missing)} of them now: {sum(x.tokens for x in entries):,} tokens, "
        f"{sum(x.flops for x in entries):.3g} FLOPs, {sum(x.bytes for x in entries):,} bytes of states, "
        f"{time.perf_counter() - start:.1f} s",
        markup=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="siesta sleep", description="Consolidate contexts before queries come.")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--contexts", required=True, help='file of rows {"id": ..., "context": ...}')
    parser.add_argument("--out", type=Path, required=True, help="folder of the states; the same command goes on in it")
    parser.add_argument("--model", help="folder or hub name; the export of the recipe's run if left out")
    options = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    recipe = load_recipe(options.recipe, options.overrides)
    make(recipe, options.contexts, options.out, options.model, Console(soft_wrap=True, highlight=False))
    return 0
