"""An exported model behind `vllm serve`: are modes obeyed, are greedy tokens those of transformers, what takes a mode?

    python -m benchmarks.serving outputs/real/smollm2_135m/target-0 --out docs/results/serving/smollm2_135m.json
    python -m benchmarks.serving outputs/quickstart --url http://localhost:8000 --out quickstart.json  # a server's

The same test items are asked with mode `auto`, each mode by name, and a threshold: the median of p(think), so that
both sides of it are asked for. First one after the other, which gives the milliseconds; then all at once in a drawn
order with bad requests in between, which must be refused and must not disturb the others. transformers answers the
same prompts under `ModeLogitsProcessor`, at two batch sizes: how often rounding alone turns a token.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from benchmarks.serving_tables import write_page
from siesta.data.prompts import Messages, messages, pad_id, prompt_ids
from siesta.rl.context import Context
from siesta.rl.generation import cut_after_eos, inference, left_pad
from siesta.rl.precision import default_device
from siesta.rl.recipe import load_recipe
from siesta.rl.run import Run
from siesta.rl.serving import AUTO, Choice, ModeLogitsProcessor, Rules, above, find_rules

BATCHES = (25, 10)  # of transformers: the reference, and another one
AT_ONCE = 32
BAD = ({"mode": "slow"}, {"threshold": 1.5}, {"mode": "think", "threshold": 0.5})
NAME = "siesta"
START = 300  # seconds that a server may take


@dataclass(frozen=True)
class Answer:
    """What a server said. `ids` open with the control token and end before the end of sequence; empty unless 200."""

    status: int
    prompt: list[int]
    ids: list[int]
    milliseconds: float


# ---- transformers ---------------------------------------------------------------------------------------------------


class Reference:
    """The exported folder in transformers."""

    def __init__(self, folder: Path, rules: Rules, device: str):
        self.rules = rules
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model: Any = loaded.to(device).eval()

    def policy(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """pi(m given x), (P, M)."""
        rows = []
        with inference(self.model):
            for prompt in prompts:
                logits = self.model(torch.tensor([prompt], device=self.model.device), logits_to_keep=1).logits[0, -1]
                rows.append(torch.softmax(logits[self.rules.token_ids].float(), dim=0))
        return torch.stack(rows).cpu()

    def written(self, prompts: Sequence[list[int]], choice: Choice, batch_size: int) -> list[list[int]]:
        """Greedy responses under a choice."""
        found: list[list[int]] = []
        most = 1 + max(mode.max_tokens for mode in self.rules.modes)
        for start in range(0, len(prompts), batch_size):
            ids, mask = left_pad(prompts[start : start + batch_size], pad_id(self.tokenizer))
            processor = ModeLogitsProcessor(self.rules, ids.shape[1], choice)
            with inference(self.model):
                output = self.model.generate(
                    ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    logits_processor=LogitsProcessorList([processor]),
                    max_new_tokens=most,
                    do_sample=False,
                )
            found += [without_end(row, self.rules.eos_id) for row in output[:, ids.shape[1] :].tolist()]
        return found


def without_end(ids: Sequence[int], eos_id: int) -> list[int]:
    """A response up to its end of sequence."""
    return [token for token in cut_after_eos(ids, [eos_id]) if token != eos_id]


# ---- the server -----------------------------------------------------------------------------------------------------


def ask(url: str, conversation: Messages, wishes: dict, eos_id: int) -> Answer:
    """A greedy request, in token ids."""
    body = {"model": NAME, "messages": conversation, "temperature": 0.0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body | {"vllm_xargs": wishes}).encode(),
        {"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=START) as reply:
            said = json.load(reply)
    except urllib.error.HTTPError as error:
        return Answer(error.code, [], [], 1000 * (time.perf_counter() - start))
    took = 1000 * (time.perf_counter() - start)
    return Answer(200, said["prompt_token_ids"], without_end(said["choices"][0]["token_ids"], eos_id), took)


@contextmanager
def server(folder: Path, port: int, arguments: Sequence[str]) -> Iterator[str]:
    """`vllm serve` on an exported folder until the block ends; its URL."""
    url = f"http://localhost:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen([*command, "--served-model-name", NAME, *arguments], stdout=sys.stderr)
    try:
        deadline = time.monotonic() + START
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vllm serve {folder} did not come up; what it said is above")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_up(url: str) -> bool:
    """Does a server answer?"""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


# ---- what is measured -----------------------------------------------------------------------------------------------


def wished(rules: Rules, policy: torch.Tensor, threshold: float) -> dict[str, tuple[dict, list[int]]]:
    """Kind of request -> what it says, and the control token that it should get for each prompt."""
    ids = torch.tensor(rules.token_ids)
    kinds = {AUTO: ({"mode": AUTO}, ids[policy.argmax(dim=1)].tolist())}
    kinds |= {mode.name: ({"mode": mode.name}, [mode.token_id] * len(policy)) for mode in rules.modes}
    taken = [rules.token_ids[above(row, threshold)] for row in policy]
    return kinds | {f"threshold {threshold:.3f}": ({"threshold": threshold}, taken)}


def row(expected: list[int], reference: list[list[int]], alone: list[Answer], mixed: list[Answer], ids: list[int]):
    """Numbers of one kind of request.

    Args:
        expected: Control token that each prompt should get.
        reference: What transformers wrote.
        alone, mixed: What the server wrote, asked one by one and all at once.
        ids: All control tokens.
    """
    answers = [*alone, *mixed]
    modes = [answer.ids[:1] for answer in answers]
    times = [answer.milliseconds for answer in alone]
    return {
        "requests": len(answers),
        "answered": sum(answer.status == 200 for answer in answers),
        "opened_by_a_mode": float(np.mean([bool(set(mode) & set(ids)) for mode in modes])),
        "obeyed": float(np.mean([mode == [want] for mode, want in zip(modes, expected * 2, strict=True)])),
        "same_as_transformers": same([answer.ids for answer in alone], reference),
        "mixed_same_as_transformers": same([answer.ids for answer in mixed], reference),
        "last_mode": float(np.mean([mode == [ids[-1]] for mode in modes])),
        "tokens": float(np.mean([len(answer.ids) for answer in alone])),
        "milliseconds": [float(value) for value in np.percentile(times, [25, 50, 75])],
    }


def same(found: Sequence[list[int]], reference: Sequence[list[int]]) -> float:
    """Share of responses that are equal token for token."""
    return float(np.mean([mine == other for mine, other in zip(found, reference, strict=True)]))


def measure(url: str, asked: Sequence[Messages], reference: Reference) -> dict:
    """All requests to a server, beside what transformers writes."""
    rules = reference.rules
    prompts = [prompt_ids(reference.tokenizer, each) for each in asked]
    policy = reference.policy(prompts)
    threshold = float(policy[:, -1].median())
    kinds = wished(rules, policy, threshold)
    ask(url, asked[0], {}, rules.eos_id)  # the first one also sets things up
    alone = {kind: [ask(url, each, wishes, rules.eos_id) for each in asked] for kind, (wishes, _) in kinds.items()}
    jobs = [(kind, place, wishes) for kind, (wishes, _) in kinds.items() for place in range(len(asked))]
    jobs += [("bad", place, BAD[place % len(BAD)]) for place in range(len(asked))]
    Random(0).shuffle(jobs)
    start = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda job: ask(url, asked[job[1]], job[2], rules.eos_id), jobs))
    took = time.perf_counter() - start
    by_job = {job[:2]: answer for job, answer in zip(jobs, found, strict=True)}
    rows, rounding = {}, {}
    for kind, (wishes, expected) in kinds.items():
        choice = rules.choice(wishes)
        written = [reference.written(prompts, choice, size) for size in BATCHES]
        rounding[kind] = same(*written)
        mixed = [by_job[kind, place] for place in range(len(asked))]
        rows[kind] = row(expected, written[0], alone[kind], mixed, rules.token_ids)
    refused = [by_job["bad", place].status for place in range(len(asked))]
    return {
        "requests": rows,
        "transformers_at_two_batch_sizes": rounding,
        "same_prompts": same([answer.prompt for answer in alone[AUTO]], prompts),
        "near_threshold": int(((policy[:, -1] - threshold).abs() < 0.01).sum()),
        "bad": {"requests": len(refused), "status": {str(code): refused.count(code) for code in sorted(set(refused))}},
        "at_once": {"requests": len(jobs), "in_flight": AT_ONCE, "seconds": took},
    }


def installed(*names: str) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first `--`, where argparse would refuse another program's options."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run; what is served is its export/")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--url", help="of a server that is up; left out: one is started")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, required=True, help="JSON; the page beside its folder is filled")
    parser.epilog = "What stands behind -- is for vllm serve."
    own, vllm = split_at_dashes(sys.argv[1:])
    options = parser.parse_args(own)
    recipe = load_recipe(options.run / "recipe.yaml", [f"tracking.output_dir={options.run.parent}"])
    folder = options.run / "export"
    reference = Reference(folder, find_rules(str(folder)), default_device())
    examples = Context(Run(recipe), print).examples("test", options.items)
    asked = [messages(example, reference.rules.instruction) for example in examples]
    if options.url:
        result = measure(options.url, asked, reference)
    else:
        with server(folder, options.port, vllm) as url:
            result = measure(url, asked, reference)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result["machine"] = {"device": device} | installed("vllm", "transformers", "torch", "siesta-rl")
    result["items"] = len(asked)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_page(options.out, result)


if __name__ == "__main__":
    main()
