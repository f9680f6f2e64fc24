"""Which objective learns when to think? Every arm from the same warmed-up models on `calc`, several seeds.

    python -m benchmarks.mode_selection                     # all arms, 3 seeds; writes docs/results/quickstart.*
    python -m benchmarks.mode_selection --arms target grpo --seeds 0 --out /tmp/results

Each arm is recipes/quickstart.yaml with a few settings replaced, run through `siesta.rl.train` like any user's run.
Finished runs are skipped, so an interrupted measurement goes on where it stopped.
"""

import argparse
import json
import os
from pathlib import Path

from benchmarks.mode_selection_tables import write_results
from benchmarks.runs import Job, run_all

RECIPE = "quickstart"
GROUP = ["rl.mode_objective=policy_gradient", "rl.mode_sampling=free", "rl.advantage=group"]
STRATIFIED = ["rl.mode_objective=policy_gradient", "rl.mode_sampling=stratified", "rl.advantage=per_mode"]
# Seven times the weight on level 1 of 8: half of the items.
HALF_EASY = ["data.level_weights={1: 7, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}"]
PAPER = [*GROUP, "rl.alpha=0.001", "rl.beta=0.001"]
PLAIN = [*GROUP, "rl.decoupled=false", "rl.scale_rewards=group"]

# arm -> (start, settings); a start is a warmed-up model: as it is, or collapsed onto one mode.
ARMS: dict[str, tuple[str, list[str]]] = {
    "grpo": ("warm", PLAIN),
    "degrpo_paper": ("warm", PAPER),
    "per_mode_pg": ("warm", [*STRATIFIED, "rl.alpha=0.1"]),
    "target": ("warm", []),
    "target_from_think": ("all_think", []),
    "target_from_short": ("all_short", []),
    "degrpo_alpha_1e-2": ("warm", [*GROUP, "rl.alpha=0.01"]),
    "degrpo_alpha_1e-1": ("warm", [*GROUP, "rl.alpha=0.1"]),
    "target_tau_0.03": ("warm", ["rl.tau=0.03"]),
    "target_tau_0.3": ("warm", ["rl.tau=0.3"]),
    "target_tau_1": ("warm", ["rl.tau=1.0"]),
    "target_tau_annealed": ("warm", ["rl.tau=0.03", "rl.tau_start=1.0"]),
    "target_shrinkage_2": ("warm", ["rl.value_shrinkage=2.0"]),
    "target_group_4": ("warm", ["rl.num_generations=4"]),
    "target_group_4_shrinkage_2": ("warm", ["rl.num_generations=4", "rl.value_shrinkage=2.0"]),
    "target_group_16": ("warm", ["rl.num_generations=16"]),
    "target_alpha_0.3": ("warm", ["rl.alpha=0.3"]),
    "target_alpha_1": ("warm", ["rl.alpha=1.0"]),
    "target_floor_1": ("warm", ["rl.mode_sampling=floor", "rl.mode_floor=1"]),
    "grpo_half_easy": ("warm", [*PLAIN, *HALF_EASY]),
    "degrpo_paper_half_easy": ("warm", [*PAPER, *HALF_EASY]),
    "per_mode_pg_half_easy": ("warm", [*STRATIFIED, "rl.alpha=0.1", *HALF_EASY]),
    "target_half_easy": ("warm", HALF_EASY),
}

# start -> settings of the warm-up that makes it from `warm`: a short supervised phase at lopsided shares.
LOPSIDED = ["warmup.max_steps=100", "warmup.warmup_steps=0", "warmup.stop={}", "warmup.min_share=0.0"]
COLLAPSED = {
    "all_think": [*LOPSIDED, "warmup.learning_rate=3.0e-4", "warmup.shares={short: 0.005, think: 0.995}"],
    "all_short": [*LOPSIDED, "warmup.learning_rate=3.0e-4", "warmup.shares={short: 0.995, think: 0.005}"],
}


def start_path(start: str, seed: int, out: Path) -> Path:
    """Folder of the model an arm starts from."""
    return out / f"start_{start}-{seed}" / "warmup"


def measure(arms: list[str], seeds: list[int], out: Path, workers: int) -> None:
    """Warm-ups, collapsed starts, then the arms."""
    out.mkdir(parents=True, exist_ok=True)
    starts = sorted({ARMS[arm][0] for arm in arms} - {"warm"})
    run_all(
        [Job(RECIPE, "start_warm", seed, ["rl.enabled=false", "export.enabled=false"], out) for seed in seeds], workers
    )
    collapsed = [(f"start_{start}", COLLAPSED[start]) for start in starts]
    run_all(
        [
            Job(
                RECIPE,
                name,
                seed,
                ["rl.enabled=false", "export.enabled=false", f"model.path={start_path('warm', seed, out)}", *extra],
                out,
            )
            for name, extra in collapsed
            for seed in seeds
        ],
        workers,
    )
    fixed = ["warmup.enabled=false", "warmup.min_share=0.0", "warmup.stop={}"]
    fixed += ['rl.save_strategy="no"', "rl.guard.action=warn", "export.enabled=false", "evaluate.before=false"]
    fixed += ["evaluate.every_items=320", "evaluate.every_samples=4"]
    run_all(
        [
            Job(RECIPE, arm, seed, [f"model.path={start_path(ARMS[arm][0], seed, out)}", *fixed, *ARMS[arm][1]], out)
            for seed in seeds
            for arm in arms
        ],
        workers,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("outputs/mode_selection"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where results/ and figures/ are written")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    measure(options.arms, options.seeds, options.runs, options.workers)
    write_results(options.runs, options.out, options.arms, options.seeds)
    print(json.dumps({"arms": len(options.arms), "seeds": options.seeds, "results": str(options.out)}))


if __name__ == "__main__":
    main()
