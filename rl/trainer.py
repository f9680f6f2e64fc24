"""DeGRPOTrainer: TRL's GRPOTrainer with the mode plan in front of the rollouts and the weighted token sum as its loss.

What is overridden, and why (tests/test_trl_contract.py holds TRL to it):

- `_generate_single_turn`: a control token is put behind each prompt, each mode is generated under its own cap.
- `_get_per_token_logps_and_entropies`: old and reference log-probabilities come from the same function as the loss.
- `_prepare_inputs`: a generation batch is split over ranks and micro-batches by tokens instead of rows.
- `_generate_and_score_completions`: TRL's advantages are replaced by mode and response advantages, weights, targets.
- `_compute_loss`: the sum of `rl/loss.py`, in as many passes as the token budget asks for.
- `training_step`, `_calculate_rewards`, `_save_checkpoint`: timed, nothing else.
- `log`: means are taken without dropping NaN.
- `_get_train_sampler`: an epoch's order depends on its number alone, so that a resumed run has it too.

`FiniteSteps` adds that a step which is not finite is skipped; checkpoints are those of `siesta.rl.resumable`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from transformers import GenerationConfig
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from siesta.data.prompts import pad_id
from siesta.rl.advantages import Credit, Rollouts, assign_credit, control_factors, kl_weights, token_weights
from siesta.rl.config import DeGRPOConfig, check_method
from siesta.rl.engines import caps_per_mode, check_logp_gap
from siesta.rl.generation import Writer, inference, mode_policy, replaced, respond, sampling_config
from siesta.rl.guards import FiniteSteps
from siesta.rl.judge import Judge, RewardFunction
from siesta.rl.loss import kl_loss, mass_loss, mode_target_loss, policy_loss, token_ratio
from siesta.rl.metrics import hack_metrics, rollout_metrics
from siesta.rl.modes import Mode, Modes
from siesta.rl.passes import Passes, without_prompts
from siesta.rl.resumable import EpochOrder, ResumableTrainer
from siesta.rl.rollout import ModePlan, annealed_floor, draw_modes
from siesta.rl.scoring import TokenScores
from siesta.rl.sharding import whole_weights
from siesta.rl.spread import Batch, sequence_lengths
from siesta.rl.timing import OptimizerPhase, Phases


class DeGRPOTrainer(FiniteSteps, ResumableTrainer, GRPOTrainer):
    """Decoupled GRPO with mode targets.

    Args:
        model: Path or model, as for GRPOTrainer.
        judge: Scores and prices completions; knows the modes.
        args: See `DeGRPOConfig`.
        kwargs: Passed to GRPOTrainer. Rows of the data set have `prompt`, `answer` and `verifier`.
    """

    _tag_names = ["trl", "degrpo", "siesta"]  # noqa: RUF012

    def __init__(self, model, judge: Judge, args: DeGRPOConfig, **kwargs):
        self.modes: Modes = judge.modes
        check_method(args, len(self.modes))
        args.max_completion_length = 1 + max(mode.max_tokens for mode in self.modes)
        self.reward_function = RewardFunction(judge)
        super().__init__(
            model=model, reward_funcs=[self.reward_function], args=args, processing_class=judge.tokenizer, **kwargs
        )
        # Trackers have their callbacks by now. TRL would also hand them its timings and its table of completions by
        # itself, past what keeps their failures from the run. Ours are `time/...` and samples (`SampleFile`).
        args.report_to = []
        self.method = args
        self.max_skipped_steps = args.max_skipped_steps
        self.group = args.group
        # DeepSpeed has wrapped the reference model already, and not yet the trained one.
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        self.passes = self._make_passes(cast(list[torch.nn.Module], models))
        self.phases = Phases(self.accelerator.device, lambda phase: self.reached(phase))
        self.reward_function.done = lambda: self.reached("rewards are there")
        self.add_callback(OptimizerPhase(self.phases))
        self._logged_step = self._bad_rewards = 0

    def _make_passes(self, models: Sequence[torch.nn.Module]) -> Passes:
        """What runs the passes of the trained model and, if there is one, of the reference model."""
        return Passes(self.accelerator, self.method, self.modes, models)

    # ---- rollouts ----------------------------------------------------------------------------------------------

    def _plan_modes(self, prompt_ids: list[list[int]]) -> ModePlan:
        """Exact pi_old of each prompt of this rank, and a mode for each rollout."""
        log_policy, mass = self._policy(prompt_ids)
        first = self.accelerator.process_index * len(prompt_ids)
        modes, sampled = draw_modes(
            log_policy.exp(),
            (torch.arange(len(prompt_ids)) + first) % self.group,
            group=self.group,
            sampling=self.method.mode_sampling,
            floor=annealed_floor(self.method.mode_floor, self.state.global_step, self.method.mode_floor_steps),
        )
        return ModePlan(modes, log_policy.exp(), sampled, mass)

    def _policy(self, prompt_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi_old(m given x), (B, M), and the mass on control tokens, (B,), from each unique prompt once."""
        unique = [list(ids) for ids in dict.fromkeys(map(tuple, prompt_ids))]
        row = {tuple(ids): i for i, ids in enumerate(unique)}
        # Every rank runs as many batches as the one with the most prompts: a forward pass can be a collective.
        most = int(self._gathered(torch.tensor([len(unique)])).max())
        unique += [unique[0]] * (most - len(unique))
        log_policy, mass = mode_policy(
            cast(torch.nn.Module, self.model_wrapped),
            unique,
            self.modes,
            temperature=self.temperature,
            batch_size=self.args.per_device_train_batch_size,
            pad_id=pad_id(self._tokenizer),
            device=self.accelerator.device,
        )
        rows = [row[tuple(ids)] for ids in prompt_ids]
        return log_policy[rows], mass[rows]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self.phases("verify"):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Completions that open with the planned control token; each within the cap of its mode."""
        with self.phases("mode_plan", sum(map(len, set(map(tuple, prompt_ids))))):
            self._plan = self._plan_modes(prompt_ids)
        tokens = [self.modes.token_ids[column] for column in self._plan.modes.tolist()]
        with self.phases("rollout"):
            if self.use_vllm:
                opened = [[*ids, token] for ids, token in zip(prompt_ids, tokens, strict=True)]
                with caps_per_mode(self.vllm_generation, self.modes):
                    # num_generations=1: with forced tokens the rows of a group differ, and vLLM must not fold them.
                    written, logps = super()._generate_single_turn(opened, images, multimodal_fields, 1)
                for column in range(len(self.modes)):
                    self._verify(column, written)
            else:
                written, logps = self._generate_locally(prompt_ids), None
        self.phases.tokens["rollout"] += sum(map(len, written))
        completions = [[token, *ids] for token, ids in zip(tokens, written, strict=True)]
        # No log-probability for the forced token: TRL reads None as an importance ratio of 1.
        return completions, None if logps is None else [[None, *row] for row in logps]

    def _generate_locally(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Responses with `generate`, mode by mode: a short one does not wait for a long one."""
        responses: list[list[int]] = [[] for _ in prompt_ids]
        with self._writer() as write:
            for column, mode in enumerate(self.modes):
                rows = (self._plan.modes == column).nonzero().flatten().tolist()
                written = self._respond(write, prompt_ids, rows, mode) if rows else []
                for i, response in zip(rows, written, strict=True):
                    responses[i] = response
                self._verify(column, responses)
        return responses

    def _respond(self, write: Writer, prompt_ids: list[list[int]], rows: Sequence[int], mode: Mode) -> list[list[int]]:
        """Responses to the prompts of some rows in one mode."""
        return write([prompt_ids[i] for i in rows], mode, temperature=self.temperature)

    @contextmanager
    def _writer(self) -> Iterator[Writer]:
        """What writes one batch of responses with `generate` and the weights of this step, whole on every rank."""
        eos_ids = cast(list[int], self.eos_token_ids)
        with (
            whole_weights(
                cast(torch.nn.Module, self.model_wrapped),
                self.accelerator,
                cast(dict | None, self.args.gradient_checkpointing_kwargs),
            ) as model,
            inference(model),
            replaced(model, "generation_config", GenerationConfig()),
        ):

            def write(prompts: Sequence[list[int]], mode: Mode, *, temperature: float | None) -> list[list[int]]:
                config = sampling_config(temperature, pad_id(self._tokenizer), eos_ids)
                return respond(model, prompts, mode, config, eos_ids)

            yield write

    def _verify(self, column: int, responses: list[list[int]]) -> None:
        """Start on the verdicts of one mode while the rest of the step goes on."""
        rows = (self._plan.modes == column).nonzero().flatten().tolist()
        if rows:
            self.reward_function.begin(self.modes[column], rows, [responses[i] for i in rows], self._examples)

    # ---- log-probabilities -------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused
    ):
        """Log-probabilities of completions, in as many passes as the token budget asks for."""
        phase = "reference_logps" if model is self.ref_model else "old_logps"
        with self.phases(phase, int(attention_mask.sum())):
            batch = self._sequences(input_ids, attention_mask, logits_to_keep)
            return self.passes.log_probabilities(model, batch), None, None

    def _sequences(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> Batch:
        """Rows of the generation batch in hand, as the passes take them."""
        return without_prompts(input_ids, attention_mask, completion_length)

    # ---- credit ------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        """TRL's rollout batch with our advantages and weights. Outcomes are gathered first: all counts are global."""
        self._examples = inputs
        batch = super()._generate_and_score_completions(inputs)
        if gaps := self._current_metrics["sampling/sampling_logp_difference/mean"]:
            check_logp_gap(gaps[-1])
        plan = self._plan
        own = torch.stack([plan.modes.float(), plan.importance, plan.mass], dim=1)
        local = torch.cat([self.reward_function.outcomes, own, plan.mode_probs], dim=1)
        rollouts = Rollouts.from_columns(self._gathered(local), self.group)
        given = assign_credit(rollouts, self.method, prior=[mode.prior for mode in self.modes], tau=self._tau())
        first = self.accelerator.process_index * len(inputs)
        self._add_weights(batch, rollouts, given, slice(first, first + len(inputs)))
        # A NaN from the mode table or a price, not that of a verifier that failed: then there is no score.
        self._bad_rewards = int((~rollouts.rewards.isfinite() & ~rollouts.scores.isnan()).sum())
        numbers = rollout_metrics(self.modes.names, rollouts, given)
        numbers |= hack_metrics(self.modes.names, rollouts.modes, self._gathered(self.reward_function.flags))
        for name, value in numbers.items():
            self._current_metrics[name].append(value)
        return batch

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks, in rank order, on the CPU."""
        return cast(torch.Tensor, self.accelerator.gather(rows.to(self.accelerator.device))).cpu()

    @property
    def _current_metrics(self) -> dict[str, list[float]]:
        """Where TRL collects numbers until the next log."""
        return self._metrics["train" if cast(torch.nn.Module, self.model).training else "eval"]

    def _add_weights(self, batch: dict, rollouts: Rollouts, given: Credit, own: slice) -> None:
        """Put this rank's advantages and weights, (B, T) each, and mode targets, (B, M), into the batch."""
        mask = batch["completion_mask"]
        # N: rollouts of one optimizer step. A generation batch feeds steps_per_generation micro-batches.
        steps = cast(int, self.method.steps_per_generation) / self.args.gradient_accumulation_steps
        num_rollouts = rollouts.scorable.sum().item() / steps
        scorable = rollouts.scorable[own].to(mask.device)
        control = control_factors(rollouts.importance[own], self.method)
        advantages = given.response_advantages[own, None].repeat(1, mask.shape[1])
        advantages[:, 0] = given.mode_advantages[own]
        batch["advantages"] = advantages.to(mask.device)
        batch["weights"] = token_weights(
            mask, scorable, num_rollouts, control=control.to(mask.device), decoupled=self.method.decoupled
        )
        batch["mass_weights"] = self.method.mass_weight * scorable.float() / max(num_rollouts, 1.0)
        batch["kl_weights"] = kl_weights(mask, scorable, num_rollouts)
        if given.targets is not None:
            batch["mode_targets"] = given.targets[own].to(mask.device)
            known = (given.target_known[own] & rollouts.scorable[own]).float().to(mask.device)
            batch["mode_target_weights"] = self.method.alpha * known / max(num_rollouts, 1.0)

    def _tau(self) -> float:
        """Temperature of the mode target at this step: linear from `tau_start` over the first half of the run."""
        start, end = self.method.tau_start, self.method.tau
        if start is None:
            return end
        progress = min(1.0, 2 * self.state.global_step / max(1, self.state.max_steps))
        return start + (end - start) * progress

    # ---- loss --------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward; the phases inside take their own time out of it."""
        with self.phases("forward_backward"):
            return super().training_step(model, inputs, num_items_in_batch)

    def _save_checkpoint(self, model, trial):
        with self.phases("save"):
            super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, dataset=None):
        order = cast(RepeatSampler, super()._get_train_sampler(dataset))
        return EpochOrder(order, order, self._epoch)

    def _progress(self):
        """Of rollouts that are trained on more than once or over several steps, those in use as well."""
        used_up = self._step % (cast(int, self.method.steps_per_generation) * self.num_iterations) == 0
        rollouts = (
            None if used_up else [{k: v.clone() for k, v in rows.items()} for rows in self._buffered_inputs or []]
        )
        own = {"step": self._step, "rollouts": rollouts, "means_step": self._logged_step, "flops": self.passes.flops}
        own["judged"] = None if used_up else self.reward_function.state_dict()
        return super()._progress() | own | {"seconds": dict(self.phases.seconds), "tokens": dict(self.phases.tokens)}

    def _go_on(self, progress):
        super()._go_on(progress)
        rollouts, device = progress["rollouts"], self.accelerator.device
        self._buffered_inputs = rollouts and [
            {key: value.to(device) for key, value in rows.items()} for rows in rollouts
        ]
        if progress["judged"] is not None:
            self.reward_function.load_state_dict(progress["judged"])
        self._step = progress["step"]
        self._logged_step, self.passes.flops = progress["means_step"], progress["flops"]
        self.phases.seconds.update(progress["seconds"])
        self.phases.tokens.update(progress["tokens"])

    def _prepare_inputs(self, generation_batch):
        """The micro-batch at hand; a new generation batch is dealt out by tokens when the last one is used up."""
        if not cast(torch.nn.Module, self.model).training:
            return super()._prepare_inputs(generation_batch)
        steps = cast(int, self.method.steps_per_generation)
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            with self.phases("prepare"):
                batch = self._generate_and_score_completions(cast(list[dict], generation_batch))
                # Not self._step: that one starts at 0 again in a resumed run.
                self._buffered_inputs = self.passes.deal(batch, seed=self.args.seed + self.state.global_step)
        return self._buffered_inputs[self._step % steps]

    def _compute_loss(self, model, inputs):
        """Sum over this micro-batch of the weighted terms; the weights already hold every denominator."""
        sums = []  # of each pass, for the log
        self.phases.tokens["forward_backward"] += sum(sequence_lengths(inputs))

        def loss_of(rows: Batch) -> torch.Tensor:
            loss, logged = self._pass_loss(self.passes.score(model, rows), rows)
            sums.append(logged)
            # Ranks average their gradients; N counts the rollouts of all of them.
            return loss * self.accelerator.num_processes

        loss = self.passes.accumulate(model, inputs, loss_of)
        *logged, faulty = cast(torch.Tensor, self.accelerator.reduce(torch.stack(sums).sum(0), "sum")).tolist()
        self._log_loss(logged)
        return self.with_faults(loss, {"reward": self._bad_rewards, "log-probability": int(faulty)})

    def _pass_loss(self, scores: TokenScores, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of some rollouts, the sums that `_log_loss` takes, and of how many tokens the new or the old
        log-probability is not finite.
        """
        new, weights = scores.per_token_logps, inputs["weights"]
        old = inputs.get("old_per_token_logps")
        old = new.detach() if old is None else old
        if "importance_sampling_ratio" in inputs:  # vLLM's sampler against the trainer's forward pass
            weights = weights * inputs["importance_sampling_ratio"]
        clip = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        loss = policy_loss(new, old, inputs["advantages"], weights, **clip)
        if "mode_targets" in inputs:
            loss = loss + mode_target_loss(scores.mode_logps, inputs["mode_targets"], inputs["mode_target_weights"])
        loss = loss + mass_loss(scores.log_mass, inputs["mass_weights"])
        kl = new.new_zeros(())
        if self.beta != 0.0:
            kl = kl_loss(new, inputs["ref_per_token_logps"], inputs["kl_weights"])
            loss = loss + self.beta * kl
        with torch.no_grad():
            # A pass without rows of its own (all weights 0) is not counted.
            mask = inputs["completion_mask"][:, 1:] * (inputs["kl_weights"] > 0).any()
            advantages = inputs["advantages"][:, 1:]
            entropies = cast(torch.Tensor, scores.entropies)[:, 1:]
            ratio = token_ratio(new, old, weights)[:, 1:]
            low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
            high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
            logged = [mask.sum(), *((x * mask).sum() for x in (entropies, low, high)), kl.detach()]
            logged.append((~(new + old).isfinite() & inputs["completion_mask"].bool()).sum())
            return loss, torch.stack([x.float() for x in logged])

    def _log_loss(self, sums: list[float]) -> None:
        """Entropy and clip ratios over response tokens, and the KL term, from sums over all ranks."""
        count, *totals, divergence = sums
        metrics = self._current_metrics
        for name, total in zip(("entropy", "clip_ratio/low", "clip_ratio/high"), totals, strict=True):
            metrics[name].append(total / max(count, 1.0))
        if self.beta != 0.0:
            # The micro-batches of an optimizer step add up to its KL; the log averages over them.
            metrics["kl"].append(divergence * self.args.gradient_accumulation_steps)

    def log(self, logs, start_time=None):
        """Average the step's metrics. TRL leaves NaN out of these means; here a NaN shows."""
        metrics = self._current_metrics
        logs.update({name: sum(values) / len(values) for name, values in metrics.items() if values})
        metrics.clear()
        steps = self.state.global_step - self._logged_step
        if steps and cast(torch.nn.Module, self.model).training:
            self._logged_step = self.state.global_step
            logs.update(self.passes.speed(self.phases.collect(steps), steps))
        super().log(logs, start_time)
