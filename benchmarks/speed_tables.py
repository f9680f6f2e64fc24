"""Fills the marked blocks of docs/results/speed.md from the JSON files that the benchmarks wrote.

    python -m benchmarks.speed_tables        # reads docs/results/speed/*.json

A file's name up to its first `_` says which benchmark wrote it; its whole name is that of the block.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.mode_selection_tables import replace_block
from benchmarks.step_time import PHASES

DOCS = Path(__file__).parents[1] / "docs" / "results"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def seconds(arm: dict) -> str:
    """Median and quartiles."""
    return f"{arm['median']:.3f} [{arm['low']:.3f}, {arm['high']:.3f}]"


def train_pass(content: dict) -> str:
    """B1: a line a share of short; MFU and memory if it was a GPU, comparisons if stock was among the arms."""
    first = content["rows"][0]
    on_gpu, compared = first["arms"]["siesta"]["mfu"] == first["arms"]["siesta"]["mfu"], "stock" in first["arms"]
    rows = []
    for row in content["rows"]:
        arms = [row["arms"][name] for name in ("stock", "siesta") if name in row["arms"]]
        line = [f"{row['share_short']:.1f}", *map(seconds, arms), f"{arms[-1]['tokens_per_second']:,.0f}"]
        if compared:
            line.append(f"{arms[0]['median'] / arms[1]['median']:.2f}")
        if on_gpu:
            line += [
                " / ".join(f"{arm['mfu']:.3f}" for arm in arms),
                " / ".join(f"{arm['pass_gib']:.1f}" for arm in arms),
            ]
        if compared:
            line += [f"{row['agreement']['cosine']:.10f}", f"{row['agreement']['relative_l2']:.1e}"]
            line.append(f"{row['logp_gap']['stock']['mean']:.1e} / {row['logp_gap']['siesta']['mean']:.1e}")
        rows.append(line)
    both = "stock / siesta" if compared else "siesta"
    header = [
        "share of short",
        *["stock TRL, s"] * compared,
        "siesta, s",
        "siesta, tokens/s",
        *["speed-up"] * compared,
    ]
    header += [f"MFU, {both}", f"GiB for the pass, {both}"] * on_gpu
    header += ["gradient cosine", "relative L2", "log-prob. off fp32 eager, stock / siesta"] * compared
    return table(header, rows) + "\n\n" + f"Ours: {first['backend'].split(' (')[0]}."


def memory(content: dict) -> str:
    """B2: peaks of equal content and the estimate, or the longest rollouts."""
    if content["longest"]:
        longest = [[row["shape"], f"{row['stock']:,}", f"{row['siesta']:,}"] for row in content["longest"]]
        return table(["shape", "longest rollout, stock", "longest rollout, siesta"], longest)
    cells = [
        [row["shape"], row["weights"].removeprefix("torch."), row["checkpointing"], f"{row['tokens']:,}"]
        + ["does not fit" if row[arm] is None else f"{row[arm]:.1f}" for arm in ("stock", "siesta")]
        + [f"{row['estimate']:.1f}"]
        for row in content["peaks"]
    ]
    header = ["shape", "weights", "checkpointing", "tokens of a pass", "stock, GiB", "siesta, GiB", "estimate, GiB"]
    return table(header, cells)


def generate(content: dict) -> str:
    """B3 with `generate`."""
    rows = [[name, seconds(arm), f"{arm['tokens_per_second']:,.0f}"] for name, arm in content["arms"].items()]
    return table(["arm", "s", "tokens/s"], rows) + f"\n\nRow-steps needed in a static batch: {content['needed']:.2f}."


def shared_prompt(content: dict) -> str:
    """B4: a line a point of the grid."""
    arms = list(content["rows"][0]["arms"])
    rows = []
    for row in content["rows"]:
        line = [row["prompt"], row["response"], row["group"], *(seconds(row["arms"][arm]) for arm in arms)]
        line += [f"{row['arms']['shared']['speed_up']:.2f}", f"{row['ideal']:.2f}"]
        rows.append([*line, f"{row['agreement']['cosine']:.10f}"])
    header = ["prompt", "response", "G", *(f"{arm}, s" for arm in arms), "speed-up", "ideal", "gradient cosine"]
    return table(header, rows)


def step_time(content: dict) -> str:
    """B6: a line a point of the grid, and the fit."""
    rows = []
    for row in content["rows"]:
        line = [row["group"], row["cap"], f"{row['time/step']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"]
        rows.append([*line, *(f"{row.get(f'time/{phase}', 0.0):.3f}" for phase in PHASES)])
    fit = content["fit"]
    line = f"Fit: {fit['a']:.3f} s + {1000 * fit['b']:.3f} ms x cap + {1e6 * fit['c']:.1f} us x trained token"
    return table(["G", "cap", "step, s", *PHASES], rows) + f"\n\n{line} (explains {100 * fit['explained']:.1f} %)."


def end_to_end(content: dict) -> str:
    """Whole steps with colocated vLLM, B3, and the rewards of both arms."""
    rows, more = [], []
    for name, arm in content["arms"].items():
        middle = sorted(arm["seconds"][2:])[len(arm["seconds"][2:]) // 2]
        rewards = [row["reward"] for row in arm["steps"]]
        gap = max(row.get("sampling/sampling_logp_difference/mean", 0.0) for row in arm["steps"])
        rows.append([name, f"{middle:.2f}", f"{rewards[0]:.4f}", f"{rewards[-1]:.4f}", f"{gap:.4f}"])
    curves = [[row["reward"] for row in arm["steps"]] for arm in content["arms"].values()]
    if len({len(curve) for curve in curves}) == 1 < len(curves):
        gaps = [max(step) - min(step) for step in zip(*curves, strict=True)]
        more.append(
            f"The rewards of a step differ by {sum(gaps) / len(gaps):.4f} on average and by {max(gaps):.4f} at most, "
            f"over {len(gaps)} steps."
        )
    header = ["arm", "median s a step", "first reward", "last reward", "largest mean log-prob. gap to vLLM"]
    return "\n\n".join([table(header, rows), *more])


def plain_vllm(arms: dict[str, dict]) -> str:
    """B3: vLLM by itself and through our trainer, tokens a second."""
    rates = {name: arm["tokens"] / arm["median"] for name, arm in arms.items()}
    rows = [[name, seconds(arm), f"{arm['tokens']:,.0f}", f"{rates[name]:,.0f}"] for name, arm in arms.items()]
    others = [f"{100 * rates['ours'] / rate:.1f} % of {name}" for name, rate in rates.items() if name != "ours"]
    share = f"Ours writes, in tokens a second, {', '.join(others)}."
    return table(["arm", "s", "tokens", "tokens/s"], rows) + "\n\n" + share


def phases(content: dict) -> str:
    """Steps of runs side by side."""
    names = list(dict.fromkeys(key for run in content["runs"].values() for key in run if key not in ("low", "high")))
    rows = []
    for run, row in content["runs"].items():
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        cells[0] += f" [{row['low']:.3f}, {row['high']:.3f}]"
        rows.append([run, *cells])
    return table(["run", *(f"{name}, s" for name in names)], rows)


TABLES: dict[str, Callable[[dict], str]] = {
    "b1": train_pass,
    "b2": memory,
    "b3": generate,
    "b4": shared_prompt,
    "b6": step_time,
    "e2e": end_to_end,
    "phases": phases,
    "plain": lambda content: plain_vllm(content["arms"]["siesta"]["plain_vllm"]),
}


def fill(page: Path, tables: dict[str, Callable[[dict], str]]) -> None:
    """Write the blocks of a page from the files in the folder of its name."""
    text = page.read_text(encoding="utf-8")
    for file in sorted(page.with_suffix("").glob("*.json")):
        content = json.loads(file.read_text())
        found = content["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in found.items() if name != "device")
        text = replace_block(
            text, file.stem, f"{tables[file.stem.split('_')[0]](content)}\n\n{found['device']}; {versions}."
        )
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with speed.md and speed/")
    fill(parser.parse_args().docs / "speed.md", TABLES)


if __name__ == "__main__":
    main()
