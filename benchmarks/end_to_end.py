"""End to end and B3: training steps with colocated vLLM, TRL's GRPOTrainer against ours, at a given share of short.

    python -m benchmarks.end_to_end --shape 0.6b --share 0.8 --steps 20

Each arm runs in a process of its own (an engine holds its share of the GPU). Both write the same number of responses
of the same lengths: a prompt ends in a control token, and vLLM stops at that mode's cap; `short` is capped at 120
tokens, `think` at 2,500, and a model with random weights hardly ever ends by itself. The reward is the share of
response tokens with an even id, which both arms learn to raise.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from benchmarks import shapes
from benchmarks.timing import environment, measure, write_json
from siesta.rl.config import DeGRPOConfig
from siesta.rl.engines import caps_per_mode
from siesta.rl.judge import Judge, build_judge
from siesta.rl.models import build_modes
from siesta.rl.modes import Modes
from siesta.rl.recipe import ModeSection
from siesta.rl.rollout import ModePlan
from siesta.rl.trainer import DeGRPOTrainer

CAPS = {"short": 120, "think": 2500}


def full_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A word for every id of the vocabulary, control tokens included; prompts end as they are."""
    words = ["<pad>", "<eos>", "<unk>", "<short>", "<think>", *(f"w{i}" for i in range(5, size))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    )


def save_model(shape: str, device: str, folder: Path) -> PreTrainedTokenizerFast:
    """Write a model of this shape, float32, and its tokenizer, which is returned."""
    model, tokenizer = shapes.build(shape, torch.float32, device), full_tokenizer(shapes.SHAPES[shape].vocab_size)
    model.config.eos_token_id, model.config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_judge(tokenizer: PreTrainedTokenizerFast) -> Judge:
    """Even ids are right: a verifier that costs nothing and gives every rollout its own score."""
    sections = {name: ModeSection(token=f"<{name}>", max_tokens=cap, wrong=0.0) for name, cap in CAPS.items()}
    judge = build_judge(
        tokenizer, build_modes(sections, tokenizer), {"exact"}, price_per_token=0.0, verifier_timeout=10.0
    )
    judge.verifiers["exact"] = lambda solution, answer: even_share(solution)
    return judge


def even_share(text: str) -> float:
    """Share of words with an even number."""
    words = [word for word in text.split() if word[0] == "w"]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def is_short(prompt: int, share: float) -> bool:
    """Whether the prompt at this place of a batch of a multiple of ten is answered in short."""
    return prompt % 10 < 10 * share


def prompts(count: int, length: int, share: float, vocabulary: int, *, control: bool) -> Dataset:
    """Random prompts; with `control` they end in a control token, `share` of them in `<short>`."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        words = [f"w{draw.randrange(5, vocabulary)}" for _ in range(length)]
        mode = "<short>" if is_short(i, share) else "<think>"
        rows.append({"prompt": " ".join([*words, mode] if control else words), "answer": "", "verifier": "exact"})
    return Dataset.from_list(rows)


class CappedTRL(GRPOTrainer):
    """TRL's trainer; vLLM writes up to the cap of the control token that ends the prompt."""

    modes: Modes

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with caps_per_mode(self.vllm_generation, self.modes, text=True):
            return super()._generate_single_turn(*args, **kwargs)


class FixedShare(DeGRPOTrainer):
    """Ours with a plan that gives `share` of the prompts to short, as the prompts of the other arm do."""

    share: float

    def _plan_modes(self, prompt_ids: list[list[int]]) -> ModePlan:
        plan = super()._plan_modes(prompt_ids)
        modes = torch.tensor([int(not is_short(i // self.group, self.share)) for i in range(len(prompt_ids))])
        return ModePlan(modes, plan.mode_probs, torch.ones(len(modes)), plan.mass)


def settings(options: argparse.Namespace, folder: Path) -> dict:
    """What both arms share."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": options.steps,
        "num_generations": 8,
        "shuffle_dataset": False,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "gradient_checkpointing": False,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": options.vllm_share,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


def run_arm(options: argparse.Namespace) -> dict:
    """Train one arm; seconds and reward of every step."""
    folder = Path(tempfile.mkdtemp())
    vocabulary = shapes.SHAPES[options.shape].vocab_size
    tokenizer = save_model(options.shape, "cuda", folder / "model")
    torch.cuda.empty_cache()
    judge = make_judge(tokenizer)
    count = options.rollouts // 8 * options.steps
    data = prompts(count, options.prompt, options.share, vocabulary, control=options.arm == "stock")
    common = settings(options, folder)
    if options.arm == "stock":
        args = GRPOConfig(
            **common,
            per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=options.rollouts // options.micro,
            max_completion_length=max(CAPS.values()),
            scale_rewards="none",
            vllm_importance_sampling_mode="token_truncate",
        )
        trainer: GRPOTrainer = CappedTRL(
            model=str(folder / "model"),
            reward_funcs=[lambda completions, **_: [even_share(text) for text in completions]],
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.modes = judge.modes
    else:
        args = DeGRPOConfig(
            **common,
            per_device_train_batch_size=options.rollouts,
            mode_objective="policy_gradient",
            mode_sampling="free",
            advantage="group",
            decoupled=False,
            mass_weight=0.0,
            compile_layers=options.compile,
            token_budget=options.budget,
        )
        trainer = FixedShare(model=str(folder / "model"), judge=judge, args=args, train_dataset=data)
        trainer.share = options.share
    times = clock(trainer)
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    keep = ("reward", "step_time", "sampling/sampling_logp_difference/mean", "completions/mean_length")
    rows = [
        {k: v for k, v in row.items() if k in keep or k.startswith(("time/", "tokens/", "speed/"))} for row in history
    ]
    result = {"seconds": times, "steps": rows, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    write_json(options.out, result)  # what comes next is long, too
    if options.plain:
        result["plain_vllm"] = plain_vllm(trainer, options)
    return result


def clock(trainer: GRPOTrainer) -> list[float]:
    """Seconds of every step, filled while the trainer trains."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.start)

    trainer.add_callback(Clock())
    return times


def plain_vllm(trainer: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """B3: the same rollouts by vLLM alone and through our trainer, mode plan included, with an empty prefix cache.

    Returns:
        Of `alone` and `ours`: seconds of ten repeats after a warm-up, and the mean number of tokens written.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    engine = trainer.vllm_generation.llm
    rows = [trainer.train_dataset[i // 8]["prompt"] for i in range(options.rollouts)]
    ids = [trainer._tokenizer.encode(row, add_special_tokens=False) for row in rows]
    plan = trainer._plan_modes(ids)
    tokens = [trainer.modes.token_ids[column] for column in plan.modes.tolist()]
    requests = [{"prompt_token_ids": [*row, token]} for row, token in zip(ids, tokens, strict=True)]
    params = [
        SamplingParams(max_tokens=trainer.modes[column].max_tokens, temperature=1.0) for column in plan.modes.tolist()
    ]

    def alone() -> int:
        engine.reset_prefix_cache()
        outputs = engine.generate(requests, sampling_params=params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def with_logps() -> int:
        for each in params:
            each.logprobs = 0  # that of the token itself, which TRL asks for as well
        try:
            return alone()
        finally:
            for each in params:
                each.logprobs = None

    def ours() -> int:
        engine.reset_prefix_cache()
        trainer._examples = [{"answer": "", "verifier": "exact"}] * len(ids)
        return sum(len(row) - 1 for row in trainer._generate_single_turn(ids, None, {}, 8)[0])

    arms = {"alone": alone, "alone, with log-probs": with_logps, "ours": ours}
    written: dict[str, list[int]] = {name: [] for name in arms}
    runs = {name: lambda name=name, run=run: written[name].append(run()) for name, run in arms.items()}
    found = measure(runs, warmups=1, repeats=10, device="cuda")
    return {name: row | {"tokens": statistics.mean(written[name])} for name, row in found.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="0.6b", choices=list(shapes.SHAPES))
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rollouts", type=int, default=80, help="a multiple of 80")
    parser.add_argument("--prompt", type=int, default=199)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--vllm-share", type=float, default=0.3)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--plain", action="store_true", help="also B3")
    parser.add_argument("--arms", nargs="+", choices=["stock", "siesta"], default=["stock", "siesta"])
    parser.add_argument("--arm", help="internal: run this arm here")
    parser.add_argument("--out", type=Path, default=Path("end_to_end.json"))
    options = parser.parse_args()
    if options.arm:
        write_json(options.out, run_arm(options))
        return
    results = {}
    for arm in options.arms:
        file = Path(tempfile.mkdtemp()) / "arm.json"
        passed = [x for x in sys.argv[1:] if x != "--plain" or arm == "siesta"]
        command = [sys.executable, "-m", "benchmarks.end_to_end", *passed, "--arm", arm, "--out", str(file)]
        subprocess.run(command, check=True)
        results[arm] = json.loads(file.read_text())
        seconds = results[arm]["seconds"][2:] or results[arm]["seconds"]
        print(
            f"{arm}: {statistics.median(seconds):.2f} s a step, rewards "
            f"{[round(row['reward'], 4) for row in results[arm]['steps']]}",
            flush=True,
        )
        print(results[arm]["steps"][-1], results[arm].get("plain_vllm"), flush=True)
    if len(results) == 2:
        stock, ours = (statistics.median(results[arm]["seconds"][2:]) for arm in ("stock", "siesta"))
        print(f"speed-up {stock / ours:.2f}x")
    named = {key: str(value) for key, value in vars(options).items()}
    write_json(options.out, {"settings": named, "environment": environment("cuda"), "arms": results})


if __name__ == "__main__":
    main()
