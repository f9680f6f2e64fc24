"""What DeGRPOTrainer takes for granted about TRL. When one of these fails, TRL has changed: read its release notes,
mend the override named in the message, then move the pin in pyproject.toml."""

import importlib.metadata
import inspect
import re
from typing import Any, cast

import pytest
import torch
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback
from trl import GRPOConfig, GRPOTrainer, SFTTrainer
from trl.extras.profiling import ProfilingContext, profiling_context
from trl.trainer.grpo_trainer import shuffle_sequence_dict, split_tensor_dict
from trl.trainer.utils import RepeatSampler

from siesta.rl.config import REFUSED
from siesta.rl.guards import FiniteSteps
from siesta.rl.resumable import ResumableTrainer
from siesta.rl.sleep.context_trainer import ContextTrainer
from siesta.rl.tracking import EVENTS
from siesta.rl.trainer import DeGRPOTrainer

SEAMS = {
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_generate_and_score_completions": ["inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_save_checkpoint": ["model", "trial"],
    "_compute_loss": ["model", "inputs"],
    "log": ["logs", "start_time"],
    "_get_train_sampler": ["dataset"],
}


def test_trl_is_the_pinned_version():
    assert importlib.metadata.version("trl") == "1.16.0"


@pytest.mark.parametrize("seam", SEAMS)
def test_overridden_methods_keep_their_parameters(seam):
    parameters = list(inspect.signature(getattr(GRPOTrainer, seam)).parameters)[1:]
    assert parameters == SEAMS[seam], f"DeGRPOTrainer.{seam} overrides a method whose parameters changed"
    assert seam in vars(DeGRPOTrainer)


def test_sleep_overrides_the_order_of_rows():
    parameters = list(inspect.signature(GRPOTrainer._get_train_sampler).parameters)[1:]
    assert parameters == ["dataset"], "ContextTrainer._get_train_sampler overrides a method whose parameters changed"
    assert "_get_train_sampler" in vars(ContextTrainer)
    order = list(RepeatSampler(cast(Any, range(5)), mini_repeat_count=1, batch_size=2, repeat_count=2, seed=0))
    for start in range(0, len(order), 4):
        assert order[start : start + 2] == order[start + 2 : start + 4], "a batch is repeated as a whole"


def test_the_gradient_norm_is_asked_for_before_every_optimizer_step():
    """`FiniteSteps._get_grad_norm` drops the gradients there; a step that finds none moves no weight."""
    assert list(inspect.signature(Trainer._get_grad_norm).parameters)[1:] == ["model", "grad_norm"]
    assert "_get_grad_norm" in vars(FiniteSteps)
    assert GRPOTrainer._get_grad_norm is Trainer._get_grad_norm
    source = inspect.getsource(Trainer._run_epoch)
    assert source.count("self._get_grad_norm(") == source.count("self.optimizer.step()") == 1
    assert source.index("self._get_grad_norm(") < source.index("self.optimizer.step()")


def test_a_callback_may_stop_and_save_at_the_end_of_a_step():
    """`StopOnSignal`: the checkpoint is written after `on_step_end`, and `on_train_end` comes after that."""
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index(".on_step_end(") < source.index("self._maybe_log_save_evaluate(")
    assert source.index("self._maybe_log_save_evaluate(") < source.index("self.control.should_training_stop")
    assert ".on_train_end(" in inspect.getsource(Trainer._finalize_training)


CHECKPOINT_SEAMS = {
    "_save_checkpoint": ["model", "trial"],
    "_get_output_dir": ["trial"],
    "_save_rng_state": ["output_dir"],
    "_load_rng_state": ["checkpoint"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
}


@pytest.mark.parametrize("seam", CHECKPOINT_SEAMS)
def test_checkpoints_override_methods_that_keep_their_parameters(seam):
    parameters = list(inspect.signature(getattr(Trainer, seam)).parameters)[1:]
    assert parameters == CHECKPOINT_SEAMS[seam], f"ResumableTrainer.{seam} overrides a method that has changed"
    assert seam in vars(ResumableTrainer)


def test_everything_of_a_checkpoint_goes_where_the_seam_says_and_generators_last():
    source = inspect.getsource(Trainer._save_checkpoint)
    assert source.count("self._get_output_dir(trial=trial)") == 1
    places = ["self.save_model(output_dir", "_save_optimizer_and_scheduler(output_dir", "_save_rng_state(output_dir"]
    found = [source.index(text) for text in [*places, "TRAINER_STATE_NAME", "output_dir=run_dir"]]
    assert found == sorted(found)


def test_what_is_taken_up_again_is_kept_where_it_was():
    source = inspect.getsource(Trainer._inner_training_loop)
    begins = source.index("callback_handler.on_train_begin")
    for name in ("self._tr_loss = torch.tensor(0.0", "self._globalstep_last_logged = self.state.global_step"):
        assert source.index(name) < begins, name
    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.count("self._load_rng_state(resume_from_checkpoint)") == 2
    assert epoch.rindex("self._load_rng_state(resume_from_checkpoint)") < epoch.index("self.training_step(")
    for kind, name in ((GRPOTrainer, "_step"), (GRPOTrainer, "_buffered_inputs"), (SFTTrainer, "_total_train_tokens")):
        assert f"self.{name} = " in inspect.getsource(kind.__init__)
        assert 'self._metrics = {"train": defaultdict(list)' in inspect.getsource(kind.__init__)


def test_a_training_that_had_ended_can_be_told_before_its_first_step():
    """`ResumableTrainer._run_epoch` is called by names, and its request to stop is heard."""
    source = inspect.getsource(Trainer._inner_training_loop)
    called = source.index("self._run_epoch(\n                model=model,")
    assert called < source.index("resume_from_checkpoint=resume_from_checkpoint,\n", called)
    assert called < source.index("if self.control.should_training_stop:\n                break")


def test_transformers_loads_nothing_but_data():
    for name in ("_load_rng_state", "_load_optimizer_and_scheduler", "_load_scaler", "_load_from_checkpoint"):
        source = inspect.getsource(getattr(Trainer, name))
        assert source.count("torch.load(") == source.count("weights_only=True") > 0, name


def test_an_order_of_rows_can_be_drawn_again():
    order = RepeatSampler(cast(Any, range(5)), mini_repeat_count=1, seed=7)
    assert (order.shuffle, order.seed, order.num_samples) == (True, 7, 5)
    assert order.generator.initial_seed() == 7
    assert inspect.getsource(RepeatSampler.__iter__).count("torch.randperm(") == 1


def test_log_probabilities_are_asked_for_as_we_answer():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters[1:6] == ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    unpacked = re.findall(r"(\w+), _, _ = self\._get_per_token_logps_and_entropies\(", source)
    assert set(unpacked) == {"old_per_token_logps", "ref_per_token_logps"}


def test_loss_is_not_divided_again_by_accumulation_steps():
    """TRL scales its own loss and keeps the Trainer from doing it; our weights hold every denominator."""
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_none_log_probability_means_ratio_one():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert 'float("nan") if x is None else x' in source
    assert "torch.nan_to_num(per_token_logps_diff, nan=0.0)" in source


def test_batch_entries_are_shuffled_and_split_by_row():
    """Our weights (B, T) and targets (B, M) must follow their rollouts."""
    batch: dict[str, Any] = {
        "rows": torch.arange(6),
        "weights": torch.arange(6)[:, None].repeat(1, 3),
        "count": torch.tensor(6),
    }
    parts: list[Any] = split_tensor_dict(cast(Any, shuffle_sequence_dict(batch)), 3)
    assert len(parts) == 3
    for part in parts:
        assert (part["weights"] == part["rows"][:, None]).all()
        assert part["count"] == 6


@pytest.mark.parametrize("kind", [WandbCallback, TensorBoardCallback, TrackioCallback])
def test_trackers_do_nothing_at_other_events_of_a_training(kind: type):
    """Those in EVENTS are guarded; there is no evaluation, no prediction and no push."""
    others = {"on_evaluate", "on_predict", "on_push_begin"}
    assert {name for name in vars(kind) if name.startswith("on_")} - others <= set(EVENTS)


def test_trl_asks_report_to_before_it_sends_anything_itself():
    source = inspect.getsource(GRPOTrainer.log)
    assert source.count("logging_backends.append") == source.count("if self.args.report_to and") == 2
    source = inspect.getsource(ProfilingContext)
    assert len(re.findall(r"(?:wandb|mlflow|trackio)\.log", source)) == source.count("in self.report_to") == 3
    assert "report_to=trainer.args.report_to" in inspect.getsource(profiling_context)


def test_refused_settings_exist():
    names = set(inspect.signature(GRPOConfig).parameters)
    assert set(REFUSED) <= names
