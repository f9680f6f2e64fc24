"""Waking: answers to queries from states. And the command `siesta answer`, from the states that `siesta sleep` kept.

    siesta answer recipe.yaml --states states --queries queries.jsonl --out answers.jsonl

A row of queries.jsonl is `{"id": ..., "context_id": ..., "query": ...}`; the model chooses the mode of each answer
unless `--mode` names one. Decoding is greedy.
"""

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel

from siesta.data.errors import DataError
from siesta.data.prompts import end_id, pad_id
from siesta.data.schema import Example
from siesta.rl.console import progress, quiet_libraries
from siesta.rl.generation import decode, inference, replaced, sampling_config
from siesta.rl.modes import Mode, Modes
from siesta.rl.precision import training_autocast
from siesta.rl.recipe import Recipe, load_recipe
from siesta.rl.run import write_atomically
from siesta.rl.sleep.factory import Sleeper, Way, open_sleeper
from siesta.rl.sleep.night import fields
from siesta.rl.sleep.protocol import State
from siesta.rl.sleep.reading import alike, prefill
from siesta.rl.sleep.store import StateStore, identity


@dataclass(frozen=True)
class Answer:
    """What was answered to a query: the mode, and the ids behind its control token, end of sequence included."""

    mode: Mode
    ids: list[int]


def answer(
    model: PreTrainedModel,
    way: Way,
    state: State,
    queries: Sequence[Example],
    modes: Modes,
    *,
    mode: Mode | None = None,
) -> list[Answer]:
    """Greedy answers to P queries from P states, in order.

    Args:
        state: May be selected from fewer contexts; see `State.select`.
        mode: Of all answers; None is the likeliest one of each.

    Raises:
        DataError: A query does not fit its state.
    """
    answers: dict[int, Answer] = {}
    eos = [end_id(way.tokenizer)]
    config = sampling_config(None, pad_id(way.tokenizer), eos)
    with inference(model), replaced(model, "generation_config", GenerationConfig()):
        for batch in alike(way, state, queries):
            output, mask = prefill(model, way, state, queries, batch)
            chosen = modes.log_policy(output.logits[:, -1]).argmax(dim=1)
            if mode is not None:
                chosen = torch.full_like(chosen, modes.index(mode.name))
            columns = chosen.unique().tolist()
            for column in columns:
                rows, cache = (chosen == column).nonzero()[:, 0], output.past_key_values
                if len(columns) > 1:  # the rows of other modes go on from it, too
                    cache = copy.deepcopy(cache)
                    cache.reorder_cache(rows)
                written = decode(model, cache, mask[rows], modes[column], config, eos)
                answers |= {
                    batch[i]: Answer(modes[column], ids) for i, ids in zip(rows.tolist(), written, strict=True)
                }
    return [answers[i] for i in range(len(queries))]


def stored_answers(
    sleeper: Sleeper, store: StateStore, rows: Sequence[dict[str, str]], mode: Mode | None = None
) -> Iterator[tuple[dict[str, str], Answer]]:
    """Each row of queries with its answer from the stored state of its context, context by context.

    Raises:
        DataError: A state is truncated or altered.
    """
    by_context: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by_context[row["context_id"]].append(row)
    names = sorted(by_context, key=lambda name: store.entries[name].bytes)
    size = sleeper.way.batch_size
    for part in (names[start : start + size] for start in range(0, len(names), size)):
        asked = [(place, row) for place, name in enumerate(part) for row in by_context[name]]
        state = sleeper.way.restore(store.load(part)).to(sleeper.model.device)
        queries = [Example(row["id"], "", row["query"], "") for _, row in asked]
        found = answer(
            sleeper.model, sleeper.way, state.select([place for place, _ in asked]), queries, sleeper.modes, mode=mode
        )
        yield from zip((row for _, row in asked), found, strict=True)


def make(recipe: Recipe, options: argparse.Namespace, console: Console) -> None:
    """Answer every query.

    Raises:
        UserError: The recipe, the model, a row or a state cannot be used.
    """
    file = options.queries
    rows = fields(file, ("id", "context_id", "query"))
    sleeper = open_sleeper(recipe, options.model)
    store = StateStore(options.states, identity(recipe.sleep, sleeper.model, sleeper.tokenizer))
    for number, row in enumerate(rows, start=1):
        if row and row["context_id"] not in store.entries:
            raise DataError(
                f"{file}, row {number}: {options.states} has no state of context {row['context_id']!r}; put it into "
                "the contexts of siesta sleep"
            )
    if options.mode is not None and options.mode not in sleeper.modes.names:
        raise DataError(f"--mode {options.mode}: the recipe has the modes {', '.join(sleeper.modes.names)}")
    mode = None if options.mode is None else sleeper.modes[sleeper.modes.index(options.mode)]
    rows = [row for row in rows if row]
    answers: dict[str, Answer] = {}
    with progress(console, "answer", len(rows)) as advance, training_autocast(recipe.rl, sleeper.model.device):
        for row, found in stored_answers(sleeper, store, rows, mode):
            answers[row["id"]] = found
            advance(1)
    lines = []
    for row in rows:
        found = answers[row["id"]]
        text = sleeper.tokenizer.decode(found.ids, skip_special_tokens=True)
        own = {"id": row["id"], "context_id": row["context_id"], "mode": found.mode.name}
        lines.append(json.dumps(own | {"response": text, "tokens": len(found.ids)}) + "\n")
    write_atomically(options.out, "".join(lines))
    tokens = sum(len(found.ids) for found in answers.values())
    console.print(f"{options.out}: {len(rows)} answers, {tokens:,} tokens", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="siesta answer", description="Answer queries from the states of siesta sleep."
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe; as it was for siesta sleep")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--states", type=Path, required=True, help="folder that siesta sleep wrote")
    parser.add_argument("--queries", required=True, help='file of rows {"id": ..., "context_id": ..., "query": ...}')
    parser.add_argument("--out", type=Path, required=True, help="file of the answers")
    parser.add_argument("--model", help="folder or hub name; the export of the recipe's run if left out")
    parser.add_argument("--mode", help="of all answers; left out, the model chooses")
    options = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    make(load_recipe(options.recipe, options.overrides), options, Console(soft_wrap=True, highlight=False))
    return 0
