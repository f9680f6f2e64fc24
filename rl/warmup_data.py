"""Warm-up data: for every training example a response in each mode, verified, from the teachers that the recipe names.

    siesta warmup-data recipe.yaml teachers.short='{from: written}' --out warmup_data
    siesta train recipe.yaml warmup.responses=warmup_data/responses.jsonl

    warmup_data/settings.json  parts/  responses.jsonl  card.md  card.json

Each mode is done in turn, so that one teacher is loaded at a time, in parts of a few hundred examples. A part is drawn
with a seed of its own and written whole, so a run that was killed goes on where it stopped and ends in the same bytes.
Every draft is judged as a rollout would be; the shortest right one is kept.
"""

import argparse
import gc
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from siesta.data.errors import DataError
from siesta.data.loading import skipped_rows
from siesta.data.prompts import response_ids
from siesta.data.schema import Example
from siesta.rl.console import progress, quiet_libraries
from siesta.rl.context import Context
from siesta.rl.judge import Judge
from siesta.rl.modes import Mode
from siesta.rl.recipe import Recipe, load_recipe
from siesta.rl.run import Run, write_atomically
from siesta.rl.teachers import Draft, check_teachers, open_teacher
from siesta.rl.warmup_card import card_numbers, card_text

PART = 256  # examples between two writes


@dataclass(frozen=True)
class Outcome:
    """What became of the drafts for an example in one mode.

    Args:
        text: The response that is kept, if any.
        tokens: Its length in tokens of the recipe's tokenizer, end of sequence included.
        drafts: `right`, `unscorable` or the reason of a rejection -> how many.
    """

    id: str
    text: str | None
    tokens: int
    drafts: dict[str, int]


def fault(draft: Draft, ids: Sequence[int], judge: Judge, mode: Mode) -> str | None:
    """Why a draft cannot be a response of `mode`, whatever its answer; None if it can.

    Args:
        ids: The draft in tokens of the recipe's tokenizer, end of sequence included.
    """
    if not draft.ended:
        return "unfinished"
    if not draft.text.strip():
        return "empty"
    # A second control token would name another mode; a special token would end the response, or cannot be read back.
    if {*judge.modes.token_ids, *judge.tokenizer.all_special_ids}.intersection(ids[:-1]):
        return "reserved token"
    if mode.answer_after is not None and mode.answer_after not in draft.text:
        return "no marker"
    if len(ids) > mode.max_tokens:
        return "too long"
    return None


def verified(examples: Sequence[Example], drafts: Sequence[list[Draft]], judge: Judge, mode: Mode) -> list[Outcome]:
    """The outcome of each example, by the judge of the rollouts: right is a full score."""
    places = [(row, draft) for row, each in enumerate(drafts) for draft in each]
    ids = [response_ids(judge.tokenizer, draft.text) for _, draft in places]
    faults = [fault(draft, own, judge, mode) for (_, draft), own in zip(places, ids, strict=True)]
    sound = [i for i, reason in enumerate(faults) if reason is None]
    asked = [examples[places[i][0]] for i in sound]
    names, answers = [example.verifier for example in asked], [example.answer for example in asked]
    scores = dict(zip(sound, judge.score(mode, [ids[i] for i in sound], names, answers), strict=True))
    counts: list[Counter[str]] = [Counter() if each else Counter(missing=1) for each in drafts]
    kept: dict[int, int] = {}
    for i, (row, _) in enumerate(places):
        verdict = faults[i] or ("unscorable" if scores[i] is None else "right" if scores[i] == 1 else "wrong")
        counts[row][verdict] += 1
        if verdict == "right" and (row not in kept or len(ids[i]) < len(ids[kept[row]])):
            kept[row] = i
    return [
        Outcome(example.id, places[kept[row]][1].text, len(ids[kept[row]]), dict(counts[row]))
        if row in kept
        else Outcome(example.id, None, 0, dict(counts[row]))
        for row, example in enumerate(examples)
    ]


def settings(recipe: Recipe, examples: Sequence[Example], limit: int | None) -> dict[str, str | int | None]:
    """What the result depends on: a fingerprint of each section, and of the examples themselves."""
    sections = recipe.model_dump(mode="json", include={"seed", "model", "modes", "data", "teachers"})
    content = sections | {"examples": [[x.id, x.text, x.answer, x.verifier, x.meta] for x in examples]}
    prints = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in content.items()}
    return prints | {"limit": limit, "part": PART}


def begin(folder: Path, now: dict) -> None:
    """Make the folder, or go on in one that was begun with the same settings or in which nothing was written yet.

    Raises:
        DataError: It was begun with others, or holds something else.
    """
    file, parts = folder / "settings.json", folder / "parts"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [name for name, value in now.items() if before.get(name) != value]
        if changed and any(parts.glob("*.jsonl")):
            raise DataError(
                f"{folder}: begun with other settings ({', '.join(changed)}); name another folder with --out, or "
                "delete this one"
            )
    elif folder.exists() and (not folder.is_dir() or any(left.suffix != ".part" for left in folder.iterdir())):
        raise DataError(f"{folder}: holds other things; --out names a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(now, indent=1) + "\n")
    parts.mkdir(exist_ok=True)


def outcomes_of(
    mode: Mode, examples: Sequence[Example], recipe: Recipe, judge: Judge, folder: Path, console: Console
) -> list[Outcome]:
    """Outcomes of all examples in a mode, read from its parts once those that are missing have been written."""
    parts = {
        folder / "parts" / f"{mode.name}-{start // PART:05d}.jsonl": examples[start : start + PART]
        for start in range(0, len(examples), PART)
    }
    missing = {file: part for file, part in parts.items() if not file.exists()}
    if missing:
        done = len(examples) - sum(map(len, missing.values()))
        with progress(console, mode.name, len(examples), done) as advance:
            # Nothing outside refers to the teacher, so its model goes when this returns.
            teacher = open_teacher(recipe, mode)
            for number, (file, part) in enumerate(parts.items()):
                if file in missing:
                    outcomes = verified(part, teacher(part, recipe.seed + number), judge, mode)
                    write_atomically(file, "".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes))
                    advance(len(part))
    return [Outcome(**json.loads(line)) for file in parts for line in file.read_text().splitlines()]


def row_of(example: Example, responses: dict[str, str]) -> dict:
    """A line of responses.jsonl; `siesta.data.sources` reads it back without a column map."""
    known = {name: vars(example)[name] for name in ("id", "context", "query", "answer", "verifier")}
    return known | {"level": example.level, "responses": responses}


def make(recipe: Recipe, folder: Path, limit: int | None, console: Console) -> None:
    """Do what is not done yet; responses.jsonl comes last and stands for a finished folder.

    Raises:
        UserError: The recipe, the data or a teacher cannot be used, or no response is right.
    """
    check_teachers(recipe)
    context = Context(Run(recipe), lambda line: console.print(line, markup=False))
    for line in skipped_rows(recipe.data):
        context.say(line)
    examples = context.own_warmup_examples[:limit]
    begin(folder, settings(recipe, examples, limit))
    result = folder / "responses.jsonl"
    if result.exists():
        console.print(f"{result}: finished before", markup=False)
        return
    judge = context.judge_of(examples)
    outcomes: dict[str, list[Outcome]] = {}
    for mode in context.modes:
        outcomes[mode.name] = outcomes_of(mode, examples, recipe, judge, folder, console)
        release()
    for reason, count in judge.reasons.most_common(3):
        console.print(f"unscorable, {count} times: {reason}", markup=False)
    rows = []
    for i, example in enumerate(examples):
        texts = {name: text for name in outcomes if (text := outcomes[name][i].text) is not None}
        if texts:
            rows.append(row_of(example, texts))
    numbers = card_numbers(recipe, examples, {name: [asdict(x) for x in each] for name, each in outcomes.items()})
    if not rows:
        found = "; ".join(f"{name}: {of['drafts']}" for name, of in numbers["modes"].items())
        raise DataError(f"{folder}: no response was right, so there is nothing to train on ({found})")
    write_atomically(folder / "card.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(folder / "card.md", card_text(numbers))
    write_atomically(result, "".join(json.dumps(row) + "\n" for row in rows))
    console.print(card_text(numbers), markup=False)


def release() -> None:
    """Give back what the last teacher held, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="siesta warmup-data", description="Write verified warm-up responses.")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder; the same command goes on in it")
    parser.add_argument("--limit", type=int, help="only so many training examples, from the first")
    options = parser.parse_intermixed_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"argument --limit: at least 1, not {options.limit}")
    quiet_libraries()
    make(
        load_recipe(options.recipe, options.overrides),
        options.out,
        options.limit,
        Console(soft_wrap=True, highlight=False),
    )
    return 0
