"""Real weights: SmolLM2-135M learns when to think, on four reasoning-gym families and on GSM8K, beside its baselines.

    python -m siesta.data.pregenerate chain_sum spell_backward aiw family_relationships --exact \\
      --levels 1 2 3 --weights 2 1 1 --train 120000 --validation 600 --test 600 --out outputs/items
    python -m benchmarks.real --data outputs/items --jobs 6 --gpus 0  # warm-up, 12 arms, the page
    python -m benchmarks.real --recipe smollm2_gsm8k --data outputs/gsm8k --jobs 4
    python -m benchmarks.real --tables                                    # the page alone, from what is finished

An arm is a recipe and some settings, run as `siesta train` runs it, from one warmed-up model a seed. Baselines are
their own recipe files. Finished runs are skipped and interrupted ones go on from their last checkpoint: give the same
options again. Runs share a card, so seconds of a step say nothing here.
"""

import argparse
import os
from pathlib import Path

from benchmarks.mode_selection import GROUP, STRATIFIED
from benchmarks.real_tables import START, write_results
from benchmarks.runs import Job, Place, run_all
from siesta.rl.recipe import RECIPES, load_recipe

BASE = "smollm2_135m"
FORMS = {"group": GROUP, "per_mode": STRATIFIED}
ALPHAS = ("1e-4", "1e-3", "1e-2", "1e-1")
SWEEP_STEPS = 80

# arm -> (the baseline's own recipe, or None for the base; settings)
MAIN: dict[str, tuple[str | None, list[str]]] = {
    "target": (None, []),
    "grpo": ("baseline_grpo", []),
    "adaptthink": ("baseline_adaptthink", []),
    "dler": ("baseline_dler", []),
}
SWEEP: dict[str, tuple[str | None, list[str]]] = {
    f"alpha_{alpha}_{form}": (None, [*settings, f"rl.alpha={alpha}", f"rl.max_steps={SWEEP_STEPS}"])
    for form, settings in FORMS.items()
    for alpha in ALPHAS
}
ARMS = MAIN | SWEEP

WARM_ONLY = ["rl.enabled=false", "export.enabled=false"]
# GPUs are paid by the minute: what is cut off loses little.
WARM_ONLY += ["warmup.save_strategy=steps", "warmup.save_steps=600", "warmup.save_total_limit=1"]
# A mode less leaves mass on the other's token, so the gate, which the warm-up has passed, asks for nothing here.
FROM_WARM = ["warmup.enabled=false", "warmup.min_share=0", "warmup.min_mass=0", "warmup.check_items=20"]
FROM_WARM += ["rl.save_steps=25", "rl.guard.action=warn", "export.enabled=false", "evaluate.before=false"]
FROM_WARM += ["evaluate.every=40", "evaluate.every_samples=1"]  # by `generate`, and so dear
# RL sees 64 questions a step, and a tenth of the items is its own; to prepare all 120,000 for each arm wastes minutes.
FROM_WARM += ["data.train_size=60000"]
# Six training passes of the recipe's size do not fit on a card together. The share is what must be free when an engine
# starts, no more: its cache is given.
SIDE_BY_SIDE = ["rl.token_budget=8192", "rl.vllm_gpu_memory_utilization=0.1"]
BESIDE = ("-m", "benchmarks.beside")


def rebased(baseline: str, recipe: str, out: Path) -> tuple[str, list[str]]:
    """A baseline over another base, as docs/recipes.md says: a copy with another first line, and caps to match.

    Its caps stand to the new base's as they did to the old one's.
    """
    if recipe == BASE:
        return baseline, []
    text = (RECIPES / f"{baseline}.yaml").read_text(encoding="utf-8")
    assert f"\nbase: {BASE}\n" in text, baseline
    file = out / f"{baseline}.yaml"
    file.write_text(text.replace(f"\nbase: {BASE}\n", f"\nbase: {recipe}\n"), encoding="utf-8")
    old, new = load_recipe(BASE).modes, load_recipe(recipe).modes
    own = load_recipe(baseline).modes
    caps = {name: mode.max_tokens * new[name].max_tokens // old[name].max_tokens for name, mode in own.items()}
    return str(file), [f"modes.{name}.max_tokens={cap}" for name, cap in caps.items()]


def data_settings(folder: Path | None, recipe: str) -> list[str]:
    """Files in the place of the recipe's own data; without a validation file it is the tail of the training rows."""
    if folder is None:
        return []
    form = ", format: gsm8k" if "gsm8k" in recipe else ""
    files = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    named = [f"data.{split}={{path: {file}{form}}}" for split, file in files.items() if file.exists()]
    return ["data.families=null", "data.level_weights=null", *named]


def places(gpus: list[int], jobs: int, kv_gib: float) -> list[Place]:
    """`jobs` places on each card; neighbours in the list are on different cards."""
    threads = max(1, (os.cpu_count() or 1) // (jobs * len(gpus)))
    return [
        {
            "CUDA_VISIBLE_DEVICES": str(gpu),
            "MASTER_PORT": str(29600 + 16 * gpu + slot),  # TRL's engine opens one
            "OMP_NUM_THREADS": str(threads),
            "SIESTA_KV_GIB": str(kv_gib),
        }
        for slot in range(jobs)
        for gpu in gpus
    ]


def unfinished(jobs: list[Job]) -> list[Job]:
    """Jobs whose last stage has not left its file; starting a process only to find that out takes half a minute."""
    return [job for job in jobs if not (job.folder / "report.md").exists()]


def measure(options: argparse.Namespace, out: Path) -> None:
    """The warm-up of each seed, then all arms."""
    out.mkdir(parents=True, exist_ok=True)
    own = [*data_settings(options.data, options.recipe), *options.set]
    warm = [Job(options.recipe, START, seed, [*own, *WARM_ONLY], out, BESIDE) for seed in options.seeds]
    run_all(unfinished(warm), places(options.gpus, 1, options.kv_gib), gap=options.gap)
    shared = [*FROM_WARM, *(SIDE_BY_SIDE if options.jobs > 1 else [])]
    jobs = []
    for seed in options.seeds:
        start = f"model.path={out / f'{START}-{seed}' / 'warmup'}"
        for arm in options.arms:
            baseline, settings = ARMS[arm]
            recipe, caps = rebased(baseline, options.recipe, out) if baseline else (options.recipe, [])
            jobs.append(Job(recipe, arm, seed, [*shared, *caps, *settings, *own, start], out, BESIDE))
    run_all(unfinished(jobs), places(options.gpus, options.jobs, options.kv_gib), gap=options.gap)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=[BASE, "smollm2_gsm8k"], default=BASE)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="all; on GSM8K those of the main table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, help="folder with train.jsonl, test.jsonl and perhaps validation.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each card")
    parser.add_argument("--gpus", nargs="+", type=int, default=[0])
    parser.add_argument("--gap", type=float, default=20, help="seconds between two starts")
    parser.add_argument("--kv-gib", type=float, default=4, help="vLLM's cache, GiB a run")
    parser.add_argument("--set", nargs="+", default=[], help="settings of every run, section.key=value")
    parser.add_argument("--runs", type=Path, default=Path("outputs/real"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where results/ and figures/ are written")
    parser.add_argument("--tables", action="store_true", help="write the page, run nothing")
    options = parser.parse_args(arguments)
    options.arms = options.arms or list(ARMS if options.recipe == BASE else MAIN)
    runs = options.runs / options.recipe
    try:
        if not options.tables:
            measure(options, runs)
    finally:  # what is finished is shown even if an arm failed
        write_results(runs, options.out, options.recipe, {"main": list(MAIN), "sweep": list(SWEEP)}, options.seeds)


if __name__ == "__main__":
    main()
