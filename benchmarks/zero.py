"""ZeRO-2 and ZeRO-3 against one plain process: 20 steps of warm-up and 20 of RL, and how far their losses lie apart.

    python -m benchmarks.zero --model outputs/real/smollm2_135m/warm-0/warmup --data outputs/items --jobs 4  # bf16
    python -m benchmarks.zero --cpu --recipe smoke --steps 3    # embedded model, float32

How far is far? One run has the plain process cut every batch in two, which changes no number but by rounding. And
DeepSpeed keeps the model itself in bf16 where the plain process keeps it in float32 and casts what it multiplies;
`zero0` is DeepSpeed without any sharding, so that what sharding changes can be told from that.
Warm-up losses are of the same rows throughout. RL losses are of rollouts that each run draws itself: as soon as
rounding turns one token, the batches are different ones, in every run.
"""

import argparse
import json
from pathlib import Path

from benchmarks.mode_selection_tables import replace_block
from benchmarks.real import BASE, data_settings
from benchmarks.runs import ONE_THREAD, Job, run_all
from siesta.rl.recipe import RECIPES, load_recipe
from siesta.rl.report import read_metrics

STAGES = ("warmup", "rl")
PLAIN, ROUNDING, UNSHARDED = "plain", "plain, batches in two", "zero0"
NAMES = (PLAIN, ROUNDING, UNSHARDED, "zero2", "zero3")
CPU_LAUNCH = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{zero_stage: {stage}, zero3_init_flag: false, zero3_save_16bit_model: true,
  offload_optimizer_device: none, offload_param_device: none, deepspeed_multinode_launcher: standard}}
num_machines: 1
num_processes: 1
mixed_precision: 'no'
use_cpu: true
"""


def launcher(name: str, out: Path, port: int, *, cpu: bool) -> tuple[str, ...]:
    """`accelerate launch` with one process."""
    config = RECIPES / "accelerate" / f"{'cpu' if cpu else 'gpu'}.yaml"
    if name.startswith("zero"):
        config = RECIPES / "accelerate" / f"{name}.yaml"
        if cpu or name == UNSHARDED:
            text = CPU_LAUNCH.format(stage=name[-1])
            if not cpu:
                text = (RECIPES / "accelerate" / "zero2.yaml").read_text(encoding="utf-8")
                text = text.replace("zero_stage: 2", "zero_stage: 0")
            config = out / f"{name}.yaml"
            config.write_text(text, encoding="utf-8")
    own = ["--config_file", str(config), "--num_processes", "1", "--main_process_port", str(port)]
    return ("-m", "accelerate.commands.launch", *own, "-m", "siesta.rl.train")


def jobs(options: argparse.Namespace, out: Path) -> list[Job]:
    """The five runs."""
    recipe = load_recipe(options.recipe)
    steps = [f"warmup.max_steps={options.steps}", f"rl.max_steps={options.steps}"]
    logs = ["warmup.logging_steps=1", "rl.logging_steps=1", 'rl.save_strategy="no"', "rl.guard.action=warn"]
    # Nothing is judged here; what has to run is kept small.
    small = ["warmup.check_every=1000", "warmup.check_items=4", "warmup.min_mass=0", "warmup.min_share=0"]
    small += ["warmup.stop={}", "evaluate.every=0", "evaluate.items=4", "evaluate.samples=1", "evaluate.before=false"]
    small += ["evaluate.engine=generate", "export.enabled=false", "data.train_size=4000"]
    small += ["rl.use_vllm=false"]  # it is the training that is sharded; an engine takes longer to start than 20 steps
    shared = [*steps, *logs, *small, *data_settings(options.data, options.recipe)]
    shared += [f"model.path={options.model}"] if options.model else []
    batch = recipe.warmup.trainer_fields().get("per_device_train_batch_size", 8)
    halves = [f"warmup.per_device_train_batch_size={batch // 2}", "warmup.gradient_accumulation_steps=2"]
    halves += [f"rl.token_budget={recipe.rl.setting('token_budget') // 2}"]
    arms = {name: halves if name == ROUNDING else [] for name in NAMES}
    return [
        Job(
            options.recipe,
            arm.replace(", ", "_").replace(" ", "_"),
            0,
            [*shared, *settings, *options.set],
            out,
            launcher(arm, out, options.port + place, cpu=options.cpu),
        )
        for place, (arm, settings) in enumerate(arms.items())
    ]


def losses(run: Path, stage: str) -> list[float]:
    """Logged loss of each step."""
    return [float(row["loss"]) for row in read_metrics(run, stage) if "loss" in row]


def gaps(runs: dict[str, Path], steps: int) -> dict:
    """Of each run and stage: loss at the first and last step, largest and mean difference to the plain run, and of
    runs with DeepSpeed the mean difference to the one that shards nothing.
    """
    found: dict = {}
    for stage in STAGES:
        plain = losses(runs[PLAIN], stage)
        for name, run in runs.items():
            own = losses(run, stage)
            assert len(own) == len(plain) == steps, f"{run}: {len(own)} losses of {stage}, not {steps}"
            apart = [abs(a - b) for a, b in zip(own, plain, strict=True)]
            found.setdefault(stage, {})[name] = {
                "first": own[0],
                "last": own[-1],
                "first_difference": apart[0],
                "largest_difference": max(apart),
                "mean_difference": sum(apart) / steps,
            }
            if name.startswith("zero"):
                unsharded = losses(runs[UNSHARDED], stage)
                to_it = sum(abs(a - b) for a, b in zip(own, unsharded, strict=True)) / steps
                found[stage][name]["mean_difference_to_zero0"] = to_it
    return found


def table(found: dict) -> str:
    """Markdown: one row a stage and run."""
    columns = list(found[STAGES[0]][UNSHARDED])
    lines = ["| stage | run | " + " | ".join(name.replace("_", ", ") for name in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 2))
    for stage, rows in found.items():
        for name, row in rows.items():
            lines.append(
                f"| {stage} | {name} | "
                + " | ".join(f"{row[column]:.3g}" if column in row else "" for column in columns)
                + " |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default=BASE)
    parser.add_argument("--model", type=Path, help="start from this folder, a warmed-up model say")
    parser.add_argument("--data", type=Path, help="folder of files, as for benchmarks.real")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="float32, one run at a time")
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the card")
    parser.add_argument("--port", type=int, default=29700, help="of the first run; the others take the next ones")
    parser.add_argument("--set", nargs="+", default=[], help="settings of every run, section.key=value")
    parser.add_argument("--runs", type=Path, default=Path("outputs/zero"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    options.runs.mkdir(parents=True, exist_ok=True)
    work = jobs(options, options.runs)
    card = {} if options.cpu else {"CUDA_VISIBLE_DEVICES": options.gpu}
    run_all(work, [ONE_THREAD | card] * options.jobs)
    found = gaps({name: job.folder for name, job in zip(NAMES, work, strict=True)}, options.steps)
    print(table(found))
    page = options.out / "results" / "real.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else "# Real weights\n"
    page.write_text(replace_block(text, "zero", table(found)), encoding="utf-8")
    (page.parent / "real_zero.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
