"""B5: what sleep costs and what it saves: bytes of a state against keys and values, seconds of sleep against wake.

    python -m benchmarks.sleep_cost --out docs/results/sleep_cost/b5_0.6b.json    # one CUDA device
    python -m benchmarks.sleep_cost --cpu --out docs/results/sleep_cost/b5_cpu.json

One context, one query. `wake` opens the state, reads the query and writes some tokens; `none` does so with the whole
prompt, and `raw` must write the same. A latent state is as large after any passes, so its wake is timed once. Weights
are random, so nothing is said about how good answers from a state are.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks import shapes
from benchmarks.timing import environment, measure, write_json
from siesta.data.prompts import pad_id
from siesta.data.schema import Example
from siesta.data.tasks import hop
from siesta.rl.generation import decode, inference, replaced, sampling_config
from siesta.rl.modes import Mode
from siesta.rl.sleep.factory import Way, build_consolidator
from siesta.rl.sleep.protocol import State
from siesta.rl.sleep_section import SleepSection


def sections(shape: str, options: argparse.Namespace) -> dict[str, SleepSection]:
    """The ways to sleep that a shape has, by their names in the table."""
    ways = {"none": SleepSection(), "raw": SleepSection(mechanism="raw")}
    if shape in shapes.HYBRIDS:
        for form in ("carry_h", "reread"):
            for passes in options.passes:
                ways[f"latent {form}, N = {passes}"] = SleepSection(mechanism="latent", form=form, passes=passes)
        return ways
    ways[f"gist, {options.slots} slots"] = SleepSection(mechanism="gist", slots=options.slots)
    if find_spec("titans_pytorch") is not None:
        ways["memory"] = SleepSection(mechanism="memory", segment=options.segment)
    return ways


def words(count: int, seed: int) -> str:
    """So many words of the embedded tokenizer, a token each."""
    return " ".join(Random(seed).choices(hop.WORDS, k=count))


def wake(model: PreTrainedModel, way: Way, state: State, query: Example, mode: Mode) -> list[int]:
    """Tokens written from a state."""
    kwargs = way.attach(state, [query])
    caller: Any = model
    cache = caller(**kwargs, use_cache=True, logits_to_keep=1).past_key_values
    never = [model.config.get_text_config().vocab_size]  # no token ends a response, so that all are equally long
    config = sampling_config(None, pad_id(way.tokenizer), never)
    return decode(model, cache, kwargs["attention_mask"], mode, config, never)[0]


def compare(shape: str, model: PreTrainedModel, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every way to sleep on one context of `length` tokens."""
    device = "cpu" if options.cpu else "cuda"
    judge = shapes.judge(options.tokens)
    mode, tokenizer = judge.modes[1], judge.tokenizer
    context, question = words(length, 0), words(options.query, 1)
    query = Example("q", context, question, "")
    found, arms, answers, woken = {}, {}, {}, {}
    for name, section in sections(shape, options).items():
        way = build_consolidator(section, tokenizer, model)
        night = way.sleep(model, [context], passes=section.passes)
        found[name] = {"bytes": night.cost.state_bytes[0], "flops": night.cost.flops[0]}
        answers[name] = wake(model, way, night.state, query, mode)
        woken[name] = f"{section.mechanism}/wake"
        arms[woken[name]] = lambda way=way, state=night.state: wake(model, way, state, query, mode)
        if name != "none":
            passes = section.passes
            arms[f"{name}/sleep"] = lambda way=way, passes=passes: way.sleep(model, [context], passes=passes)
    times = measure(arms, warmups=options.warmups, repeats=options.repeats, device=device)
    for name, row in found.items():
        row |= {"wake": times[woken[name]]} | ({} if name == "none" else {"sleep": times[f"{name}/sleep"]})
        print(f"{shape} {length} {name:24s} {row['bytes']:12,} bytes, wake {row['wake']['median']:.4f} s", flush=True)
    return {"shape": shape, "length": length, "raw_agrees": answers["raw"] == answers["none"], "ways": found}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="tiny models and shorter contexts on the CPU")
    parser.add_argument("--shapes", nargs="+", choices=[*shapes.SHAPES, *shapes.HYBRIDS])
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of the context")
    parser.add_argument("--passes", nargs="+", type=int, default=[1, 2, 4], help="N of latent sleep")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--query", type=int, default=32, help="tokens of the query")
    parser.add_argument("--tokens", type=int, default=8, help="that are written")
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    options.shapes = options.shapes or (["tiny", "tiny-hybrid"] if options.cpu else ["0.6b", "0.8b-hybrid"])
    options.lengths = options.lengths or ([64, 256, 1024] if options.cpu else [1024, 4096, 16_384])
    device, dtype = ("cpu", torch.float32) if options.cpu else ("cuda", torch.bfloat16)
    if options.cpu:
        torch.set_num_threads(1)
    rows = []
    for shape in options.shapes:
        model = shapes.build(shape, dtype, device)
        with inference(model), replaced(model, "generation_config", GenerationConfig()):
            for length in options.lengths:
                rows.append(compare(shape, model, length, options))
                if options.out:
                    content = {"settings": vars(options), "environment": environment(device), "rows": rows}
                    write_json(options.out, content)


if __name__ == "__main__":
    main()
