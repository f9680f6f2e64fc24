"""The whole road on the smoke recipe, through the command line's own main: stages, reruns, export, LoRA, guard."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siesta.data.prompts import messages, prompt_ids
from siesta.data.sources import TaskSource
from siesta.rl.export import main as export_main
from siesta.rl.train import main
from siesta.rl.trainer import DeGRPOTrainer

SHORT = ["warmup.max_steps=6", "warmup.check_every=6", "rl.max_steps=2", "rl.save_steps=1", "rl.logging_steps=1"]
SMALL = ["model.embedded={layers: 1, hidden_size: 16, heads: 2}", "data.train_size=400", "evaluate.items=16"]


def arguments(folder: Path, *extra: str) -> list[str]:
    return ["smoke", f"tracking.output_dir={folder}", *SHORT, *SMALL, *extra]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    assert main(arguments(folder)) == 0
    return folder / "smoke"


def logits(model, tokenizer) -> torch.Tensor:
    prompts = [prompt_ids(tokenizer, messages(example)) for example in TaskSource("calc", "test", 4)]
    with torch.no_grad():
        return model(input_ids=torch.tensor(prompts)).logits


def test_a_run_leaves_everything_it_promises(run):
    for name in ("recipe.yaml", "evaluation.json", "report.md", "curves.png", "metrics.jsonl", "samples.jsonl"):
        assert (run / name).stat().st_size > 0, name
    export = {file.name for file in (run / "export").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= export
    assert list(json.loads((run / "stages.json").read_text())) == [
        "model",
        "warmup",
        "rl",
        "evaluate",
        "export",
        "report",
    ]


def test_evaluation_holds_every_policy_both_ways(run):
    results = json.loads((run / "evaluation.json").read_text())
    assert list(results) == ["before", "after"]
    for decoding in ("greedy", "sampled"):
        rows = results["after"][decoding]
        assert list(rows) == ["always-short", "always-think", "random", "free", "oracle"]
        assert rows["oracle"]["regret"] == 0
        assert rows["random"]["shares"]["think"] == pytest.approx(rows["free"]["shares"]["think"])
        assert set(rows["free"]["levels"]) == {str(level) for level in range(1, 9)}
        low, high = rows["free"]["interval"]["accuracy"]
        assert low <= rows["free"]["accuracy"] <= high


def test_metrics_file_is_json_and_names_every_stage(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"warmup", "rl"}
    last = [row for row in rows if row["stage"] == "rl" and "mode/mass" in row][-1]
    for name in ("share", "prob", "accuracy", "tokens", "reward", "advantage", "truncated"):
        assert f"mode/think/{name}" in last
    assert any("validation/regret" in row for row in rows)
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"step", "prompt", "mode", "response", "tokens", "score", "reward", "hacks"}
    assert {"hack/hidden_thinking/short", "hack/nested_control/think"} <= set(last)


def test_export_gives_identical_logits_and_a_prompt_that_ends_at_the_control_token(run):
    trained = AutoModelForCausalLM.from_pretrained(run / "rl")
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert torch.equal(logits(trained, tokenizer), logits(exported, tokenizer))
    for token in ("<short>", "<think>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
        assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == token
    assert exported.generation_config.eos_token_id == tokenizer.eos_token_id
    card = (run / "export" / "README.md").read_text()
    for part in ("always-think", "num_generations", "trl 1.16.0", "<think>"):
        assert part in card


def test_any_checkpoint_can_be_exported(run, tmp_path, capsys):
    assert export_main([str(run / "rl" / "checkpoint-1"), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    checkpoint = AutoModelForCausalLM.from_pretrained(run / "rl" / "checkpoint-1")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(checkpoint, tokenizer), logits(exported, tokenizer))
    assert export_main([str(run / "rl" / "checkpoint-99"), str(tmp_path / "no")]) == 2
    assert "checkpoint-99" in capsys.readouterr().err


def test_a_rerun_skips_finished_stages_and_prints_the_table(run, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr(DeGRPOTrainer, "train", refuse)
    assert main(arguments(run.parent)) == 0
    out = capsys.readouterr().out
    assert out.count("finished before, skipped") == 6
    assert "always-think" in out


def test_a_rerun_with_other_settings_is_refused(run, capsys):
    assert main(arguments(run.parent, "rl.alpha=0.5")) == 2
    message = capsys.readouterr().err
    assert "'rl'" in message
    assert "tracking.run" in message


def test_training_goes_on_from_the_last_checkpoint(run, tmp_path):
    """A run that lost everything after its first checkpoint ends with the weights of the undisturbed one."""
    import shutil

    copy = tmp_path / "smoke"
    shutil.copytree(run, copy)
    record = json.loads((copy / "stages.json").read_text())
    (copy / "stages.json").write_text(json.dumps({name: record[name] for name in ("model", "warmup")}))
    shutil.rmtree(copy / "rl" / "checkpoint-2")
    for file in (copy / "rl").glob("*.*"):
        file.unlink()
    assert main(arguments(tmp_path)) == 0
    undisturbed = AutoModelForCausalLM.from_pretrained(run / "rl").state_dict()
    resumed = AutoModelForCausalLM.from_pretrained(copy / "rl").state_dict()
    for name, weight in undisturbed.items():
        assert torch.equal(weight, resumed[name]), name
    assert logged_steps(copy) == logged_steps(run)


def logged_steps(run: Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"]) for row in rows if "train_runtime" not in row]


def test_validating_more_often_does_not_change_the_training(run, tmp_path):
    assert main(arguments(tmp_path, "evaluate.every=1", "evaluate.every_samples=3")) == 0
    quiet = AutoModelForCausalLM.from_pretrained(run / "rl").state_dict()
    watched = AutoModelForCausalLM.from_pretrained(tmp_path / "smoke" / "rl").state_dict()
    for name, weight in quiet.items():
        assert torch.equal(weight, watched[name]), name


def test_lora_is_merged_in_the_export(tmp_path):
    lora = "model.lora={r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}"
    assert main(arguments(tmp_path, lora)) == 0
    run = tmp_path / "smoke"
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "rl" / "adapter")
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    torch.testing.assert_close(logits(exported, tokenizer), logits(adapted, tokenizer), atol=1e-5, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(run / "warmup")
    assert torch.equal(*control_rows(AutoModelForCausalLM.from_pretrained(run / "model"), tokenizer))  # at the mean
    assert not torch.allclose(*control_rows(base, tokenizer))  # and the warm-up told them apart
    assert not torch.equal(logits(base, tokenizer), logits(exported, tokenizer))


def control_rows(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    short, think = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(["<short>", "<think>"])]
    return short, think


def test_guard_can_stop_a_run(tmp_path, capsys):
    guard = "rl.guard={min_share: 0.999, window: 1, action: stop}"
    assert main(arguments(tmp_path, guard, "rl.max_steps=4")) == 3
    assert "collapse guard stopped the run at step 1" in capsys.readouterr().err
    assert (tmp_path / "smoke" / "rl" / "model.safetensors").exists()
