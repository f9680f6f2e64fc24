"""Fills the marked blocks of docs/results/sleep_rule110.md from the JSON of finished arms.

    python -m benchmarks.rule110_tables        # reads docs/results/rule110/*.json

Which learning rate was chosen, and which arm has the compute of which, is read from the arms themselves: rates from
the loss on validation rows of those of one depth, N, seed and number of steps, of which the first seed has several.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from pathlib import Path

from benchmarks.mode_selection_tables import cell, replace_block
from benchmarks.speed_tables import DOCS, table

NOTHING = "Not measured yet."
HEADER = "# A longer sleep on Rule 110\n"
MARGIN = 0.01  # by which a control may exceed the more frequent answer
CONTROLS = ("slept", "zeroed", "shuffled", "majority")


def read_results(folder: Path) -> dict[str, dict]:
    """Arm -> its JSON."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {name: content for name, content in found.items() if "arm" in content}


def validation_loss(result: dict, depth: int) -> float:
    """Mean loss of `short` on validation rows of one depth."""
    return result["validation"][str(depth)]["slept"]["loss"]


def plain(results: dict[str, dict], depth: int) -> list[dict]:
    """The arms of one depth without modes."""
    return [r for r in results.values() if r["arm"]["depths"] == [depth] and not r["arm"]["modes"]]


def depths_of(results: dict[str, dict]) -> list[int]:
    """Every t that has arms of its own."""
    return sorted({r["arm"]["depths"][0] for r in results.values() if not r["arm"]["modes"]})


def equal_tokens(arms: Sequence[dict]) -> dict[int, list[dict]]:
    """N -> the arms at its chosen rate, one a seed, all with the fewest steps that any arm of the depth has."""
    steps = min(arm["arm"]["steps"] for arm in arms)
    short = [arm for arm in arms if arm["arm"]["steps"] == steps]
    found: dict[int, list[dict]] = {}
    for n in sorted({arm["arm"]["passes"] for arm in short}):
        mine = [arm for arm in short if arm["arm"]["passes"] == n]
        first = min(arm["arm"]["seed"] for arm in mine)
        tuned = [arm for arm in mine if arm["arm"]["seed"] == first]
        best = min(tuned, key=lambda arm: validation_loss(arm, arm["arm"]["depths"][0]))
        found[n] = [arm for arm in mine if arm["arm"]["rate"] == best["arm"]["rate"]]
    return found


def equal_compute(arms: Sequence[dict], passes: int) -> list[dict]:
    """The arms of N = 1 with as many passes over windows as those of `passes` at equal tokens, one a seed."""
    steps = min(arm["arm"]["steps"] for arm in arms) * (4 * passes + 1) // 5
    return [arm for arm in arms if (arm["arm"]["passes"], arm["arm"]["steps"]) == (1, steps)]


def percent(arms: Iterable[dict], depth: int, control: str, kind: str, split: str = "test") -> str:
    """Mean and range over seeds of an accuracy on rows of a split; "not run" without arms."""
    values: list[float | None] = [100 * arm[split][str(depth)][control][kind] for arm in arms]
    return cell(values, 1) if values else "not run"


def accuracy(results: dict[str, dict], speed: dict | None) -> str:
    """The main table: N at equal tokens, N = 1 at the compute of that N, what waking costs."""
    rows = []
    for depth in depths_of(results):
        arms = plain(results, depth)
        for n, mine in equal_tokens(arms).items():
            more = equal_compute(arms, n) if n > 1 else []
            line = [depth, n, f"{mine[0]['arm']['rate']:g}", f"{mine[0]['tokens'] / 1e6:.0f}", len(mine)]
            for kind in ("all", "each"):
                line += [percent(mine, depth, "slept", kind), percent(more, depth, "slept", kind) if n > 1 else "="]
            line.append(percent(mine, depth, "slept", "all", "train"))
            if speed and str(n) in speed["passes"]:
                wake = speed["passes"][str(n)]["wake_one"]["median"]
                line += [f"{1000 * wake:.3f}", f"{speed['shape']['state_bytes']:,}"]
            else:
                line += ["not run", "not run"]
            rows.append(line)
    header = ["t", "N", "rate", "tokens, M", "seeds", "all four %, equal tokens", "all four %, N = 1 at equal compute"]
    header += ["each %, equal tokens", "each %, N = 1 at equal compute", "all four %, training patterns"]
    header += ["wake, ms a query", "state, bytes"]
    return table(header, rows) if rows else NOTHING


def controls(results: dict[str, dict]) -> str:
    """Answers from the state, from no state and from another context's, beside the more frequent answer."""
    rows, above = [], []
    for depth in depths_of(results):
        for n, mine in equal_tokens(plain(results, depth)).items():
            cells = [percent(mine, depth, control, kind) for kind in ("all", "each") for control in CONTROLS]
            rows.append([depth, n, *cells])
            for name in ("zeroed", "shuffled"):
                gaps = [arm["test"][str(depth)] for arm in mine]
                if max(gap[name]["each"] - gap["majority"]["each"] for gap in gaps) > MARGIN:
                    above.append(f"{name} at t = {depth}, N = {n}")
    header = ["t", "N", *(f"{kind} %, {control}" for kind in ("all four", "each") for control in CONTROLS)]
    verdict = f"More than a point above the more frequent answer (each): {', '.join(above) or 'none'}."
    return f"{table(header, rows)}\n\n{verdict}" if rows else NOTHING


def rates(results: dict[str, dict]) -> str:
    """The grids: loss on validation rows by which the rate was chosen, and accuracy on the same rows."""
    rows = []
    for depth in depths_of(results):
        arms = plain(results, depth)
        best = {n: mine[0]["arm"]["rate"] for n, mine in equal_tokens(arms).items()}
        steps, first = (min(arm["arm"][key] for arm in arms) for key in ("steps", "seed"))
        tuned = [arm for arm in arms if (arm["arm"]["steps"], arm["arm"]["seed"]) == (steps, first)]
        for arm in sorted(tuned, key=lambda arm: (arm["arm"]["passes"], arm["arm"]["rate"])):
            n, rate = arm["arm"]["passes"], arm["arm"]["rate"]
            scores = arm["validation"][str(depth)]["slept"]
            mark = "chosen" if rate == best[n] else ""
            rows.append([depth, n, f"{rate:g}", f"{scores['loss']:.4f}", f"{100 * scores['all']:.1f}", mark])
    return table(["t", "N", "rate", "validation loss", "all four %", ""], rows) if rows else NOTHING


def costs(speed: dict | None) -> str:
    """What grows with N and what does not."""
    if speed is None:
        return NOTHING
    batch, rows = speed["batch"], []
    for n, found in speed["passes"].items():
        ms = {name: 1000 * piece["median"] for name, piece in found.items()}
        wake = [f"{ms['wake_one']:.3f}", f"{ms['wake'] / (4 * batch):.5f}"]
        rows.append([n, f"{ms['train']:.1f}", f"{ms['sleep'] / batch:.4f}", *wake])
    header = ["N", "training step, ms", f"sleep of {batch}, ms a context", "wake, ms a query"]
    sizes = f"State: {speed['shape']['state_bytes']:,} bytes; keys and values: {speed['shape']['kv_bytes']:,} in bf16."
    lines = table([*header, f"of {4 * batch} at once, ms a query"], rows)
    return f"{lines}\n\n{sizes} {speed['parameters'] / 1e6:.2f}M parameters. {speed['environment']['device']}."


def mean_over(found: list[dict], stage: str, ts: list[str], *keys: str, scale: float = 100.0) -> str:
    """Mean and range over seeds of a number of `policies`, itself the mean over some t."""
    values: list[float | None] = []
    for run in found:
        numbers = [reduce(lambda part, key: part[key], keys, run[stage][t]) for t in ts]
        values.append(scale * sum(numbers) / len(numbers))
    return cell(values, 1)


def modes(results: dict[str, dict]) -> str:
    """P(think) and what every policy is worth by N and t, and over all t, before and after RL."""
    arms = [r for r in results.values() if r["arm"]["modes"]]
    rows = []
    for n in sorted({arm["arm"]["passes"] for arm in arms}):
        mine = [arm["modes"] for arm in arms if arm["arm"]["passes"] == n]
        every = list(mine[0]["after"])
        for name, ts in [*((t, [t]) for t in every), ("all", every)]:
            before = mean_over(mine, "before", ts, "prob_think")
            after = partial(mean_over, mine, "after", ts)
            cells = [before, after("prob_think"), after("free", "think"), after("oracle", "think")]
            cells += [after(policy, "accuracy") for policy in ("always-short", "always-think", "free")]
            rows.append([n, name, len(mine), *cells, after("free", "passes", scale=1.0)])
    header = ["N", "t", "seeds", "P(think) % before RL", "after", "chooses think %", "oracle thinks %"]
    header += ["always-short %", "always-think %", "free choice %", "its wake passes"]
    return table(header, rows) if rows else NOTHING


def write_page(docs: Path) -> None:
    """Fill the blocks of `docs`/sleep_rule110.md from `docs`/rule110/*.json, and print the main table."""
    results = read_results(docs / "rule110")
    file = docs / "rule110" / "speed.json"
    speed = json.loads(file.read_text()) if file.exists() else None
    page = docs / "sleep_rule110.md"
    text = page.read_text(encoding="utf-8") if page.exists() else HEADER
    blocks = {"accuracy": accuracy(results, speed), "controls": controls(results), "rates": rates(results)}
    for name, content in (blocks | {"costs": costs(speed), "modes": modes(results)}).items():
        text = replace_block(text, name, content)
    page.write_text(text, encoding="utf-8")
    print(blocks["accuracy"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with sleep_rule110.md and rule110/")
    write_page(parser.parse_args().docs)


if __name__ == "__main__":
    main()
