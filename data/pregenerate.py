"""Write items of reasoning-gym families to files, for machines on which the package is not installed.

    python -m siesta.data.pregenerate chain_sum gcd --levels 1 2 3 --weights 3 1 1 --train 5000 --test 400 --out items

writes items/train.jsonl, validation.jsonl and test.jsonl with the columns id, query, answer, verifier, level, and
solution for the families that have worked solutions. With `--exact` the answer is reasoning-gym's own and is compared
as text, so that scoring does not need the package either; right only for families with one right answer.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from siesta.data.errors import UserError
from siesta.data.families import FamilySource
from siesta.data.sources import Split


def row_of(example, *, exact: bool) -> dict:
    """The columns of an item."""
    row = {"id": example.id, "query": example.query, "level": example.level}
    if "solution" in example.meta:
        row["solution"] = example.meta["solution"]
    if exact:
        return row | {"answer": str(json.loads(example.answer)["answer"]), "verifier": "exact"}
    return row | {"answer": example.answer, "verifier": example.verifier}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="+", help="names in reasoning-gym")
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 2, 3, 4], help="curriculum levels, from 1")
    parser.add_argument("--weights", nargs="+", type=float, help="share of each of these levels; equal by default")
    parser.add_argument("--train", type=int, default=10_000, help="items")
    parser.add_argument("--validation", type=int, default=400, help="items")
    parser.add_argument("--test", type=int, default=400, help="items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="plain answers, compared as text")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args(arguments)
    shares = options.weights or [1.0] * len(options.levels)
    if len(shares) != len(options.levels):
        parser.error(f"--weights: {len(options.levels)} levels and {len(shares)} weights")
    weights = dict(zip(options.levels, shares, strict=True))
    try:
        for split in get_args(Split):
            source = FamilySource(
                options.families, split, vars(options)[split], seed=options.seed, level_weights=weights
            )
            lines = [json.dumps(row_of(example, exact=options.exact)) for example in source]
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{options.out / f'{split}.jsonl'}: {len(lines)} items")
    except UserError as error:
        print(f"siesta: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
