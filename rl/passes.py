"""The training pass of DeGRPOTrainer: forward and backward passes of at most `token_budget` tokens.

A micro-batch of the Trainer is a matter of bookkeeping; what fits into memory at once is a matter of tokens. So each
is split again by tokens, and the passes add their gradients up before the Trainer sees the last one. Every rank makes
as many passes as the rank that needs most: forward and backward can be collectives.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from siesta.data.errors import ModelError
from siesta.rl.attention import choose_backend
from siesta.rl.config import DeGRPOConfig, optimizer_steps
from siesta.rl.generation import inference, replaced
from siesta.rl.machine import compute_dtype
from siesta.rl.modes import Modes
from siesta.rl.packing import (
    Unit,
    make_units,
    same_prompts,
    saved_prompts,
    sequence_cost,
    split_packed,
    split_sorted,
)
from siesta.rl.scoring import Scorer, TokenScores
from siesta.rl.spread import Batch, select, sequence_lengths, spread
from siesta.rl.timing import model_flops, peak_flops

# Mean difference of log-probabilities between layouts, in nats a token; in bf16 rounding makes about 0.01.
MAX_DISAGREEMENT = 0.1
# What a pass costs beside its tokens, in tokens: an accelerator waits for its kernels to be launched.
PASS_COST, PASS_COST_CPU = 1024, 128


class Passes:
    """Runs the passes of a trainer.

    Args:
        models: The trained model, and the reference model if there is one; their attention is set here.
    """

    def __init__(self, accelerator: Accelerator, args: DeGRPOConfig, modes: Modes, models: Sequence[torch.nn.Module]):
        self.accelerator = accelerator
        self.args = args
        models = [without_adapters(model) for model in models]
        dtype = compute_dtype(self.args, models[0].dtype)
        device, share = self.accelerator.device, self.args.share_prompts
        backend, self.line = choose_backend(
            self.args.attention, device.type, dtype, models[0].config, models[0], share=share
        )
        self.scorer = Scorer(modes, backend, share=share)
        for model in models:
            self.scorer.attach(model)
        if self.args.compile_layers and backend.packed and not is_deepspeed_zero3_enabled():
            for layer in (layer for model in models for layer in layers_of(model)):
                layer.compile(dynamic=True)  # one graph for packs of any length
            self.line += ", compiled layers"
        self._checked = not (backend.packed or share)
        self.config = models[0].config
        self.peak_flops = peak_flops(self.accelerator.device, dtype)
        self.flops = 0.0  # of the model in training passes since the last log
        text = self.config.get_text_config()
        # A transformer block has about 12 h^2 weights; attention over n tokens costs n (heads * head size) a token.
        head = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
        self.tokens_per_doubling = 12 * text.hidden_size**2 / (text.num_attention_heads * head)

    def cost(self, length: int) -> float:
        """Work of a sequence."""
        return sequence_cost(length, self.tokens_per_doubling)

    def units(self, batch: Batch, **most: Any) -> list[Unit]:
        """Rollouts that stay together: those of a prompt if it is shared, else each alone."""
        prompt_ids, prompt_mask = batch["prompt_ids"], batch["prompt_mask"]
        names = same_prompts(prompt_ids, prompt_mask).tolist() if self.scorer.share else range(len(prompt_ids))
        prompts = list(zip(names, prompt_mask.sum(1).tolist(), strict=True))
        return make_units(sequence_lengths(batch), prompts, self.cost, **most)

    def groups(self, batch: Batch) -> list[Unit]:
        """Units of a generation batch: no more rows in any than a group has, so that steps can be of equal rows."""
        return self.units(batch, rows=self.args.group)

    def deal(self, batch: Batch, seed: int) -> list[Batch]:
        """The micro-batches of a generation batch; see `siesta.rl.spread.spread`."""
        steps = optimizer_steps(self.args)
        return spread(
            batch,
            self.accelerator,
            steps=steps,
            accumulation=cast(int, self.args.steps_per_generation) // steps,
            units=self.groups,
            seed=seed,
        )

    def split(self, batch: Batch) -> list[list[int]]:
        """Rows of each pass; as many passes on every rank, some of them perhaps without rows."""
        budget, device = self.args.token_budget, batch["prompt_ids"].device
        units = self.units(batch, rows=len(batch["prompt_ids"]), tokens=budget)
        tokens = [unit.tokens for unit in units]
        if self.scorer.backend.packed:
            parts = split_packed(tokens, [unit.cost for unit in units], budget)
        else:
            parts = split_sorted(tokens, budget, PASS_COST_CPU if device.type == "cpu" else PASS_COST)
        number = torch.tensor([len(parts)], device=self.accelerator.device)
        most = int(cast(torch.Tensor, self.accelerator.gather(number)).max())
        rows = [[row for i in part for row in units[i].rows] for part in parts]
        return rows + [[] for _ in range(most - len(rows))]

    def score(self, model: torch.nn.Module, rows: Batch) -> TokenScores:
        """Scores of a batch in one training pass."""
        return self.scores(model, rows, counted=self.peak_flops is not None)

    def scores(self, model: torch.nn.Module, rows: Batch, *, counted: bool = False) -> TokenScores:
        """Scores of a batch in one pass, whose FLOPs are counted or not."""
        ids, mask = with_prompts(rows)
        pack = self.scorer.lay_out(ids, mask, rows["completion_ids"].shape[1])
        if counted:
            self.flops += model_flops(self.config, pack.lengths.tolist(), len(pack.targets) + len(pack.lengths))
            self.flops -= model_flops(self.config, saved_prompts(pack), 0)
        with self.accelerator.autocast():
            return self.scorer.score(model, pack)

    def speed(self, times: dict[str, float], steps: int) -> dict[str, float]:
        """`times` of a step of this rank, with its tokens per second and share of the chip's matrix units."""
        trained = times.get("tokens/forward_backward", 0.0)
        speed = {"speed/tokens_per_second": trained / times["time/step"]}
        if self.peak_flops is not None and (seconds := times.get("time/forward_backward")):
            speed["speed/mfu"] = self.flops / steps / seconds / self.peak_flops
        self.flops = 0.0
        return times | speed

    def accumulate(
        self, model: torch.nn.Module, batch: Batch, loss_of: Callable[[Batch], torch.Tensor]
    ) -> torch.Tensor:
        """Loss of a micro-batch. All passes but the last have gone backward when it returns; the last is its graph."""
        self._check(model, batch)
        *parts, last = self.split(batch)
        done = torch.zeros((), device=self.accelerator.device)
        # The Trainer scales the same way: DeepSpeed would divide by the accumulation steps once more.
        scale = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        for rows in parts:
            with self.accelerator.no_sync(model), replaced(self.accelerator, "sync_gradients", False):
                loss = loss_of(select(batch, rows))
                self.accelerator.backward(loss, **scale)
            done += loss.detach()
        return loss_of(select(batch, last)) + done

    def _check(self, model: torch.nn.Module, batch: Batch) -> None:
        """Compare the layout with padded rows once: one that mixes sequences up would train without a complaint.

        Raises:
            ModelError: They differ by more than rounding.
        """
        if self._checked:
            return
        self._checked = True
        smallest = sorted(self.groups(batch), key=lambda unit: unit.tokens)[:4]
        rows = select(batch, [row for unit in smallest for row in unit.rows[:2]])
        ids, mask = with_prompts(rows)
        # Not in training mode: dropout would differ. Nothing is compiled there, and FlexAttention complains of it.
        with self.accelerator.autocast(), inference(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            gap = self.scorer.disagreement(model, ids, mask, rows["completion_ids"].shape[1])
        if not gap <= MAX_DISAGREEMENT:
            raise ModelError(
                f"attention {self.scorer.backend.name}: rows as it takes them score {gap:.3f} nats a token off padded "
                f"ones for this model (at most {MAX_DISAGREEMENT}); set rl.attention: sdpa, rl.share_prompts: false"
            )

    def log_probabilities(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Log-probabilities of completions, (B, T), without gradient."""
        logps = torch.zeros(batch["completion_ids"].shape, device=batch["completion_ids"].device)
        for rows in self.split(batch):
            part = rows or [0]
            with torch.no_grad():
                logps[part] = self.scores(model, {key: value[part] for key, value in batch.items()}).per_token_logps
        return logps


def without_prompts(ids: torch.Tensor, mask: torch.Tensor, completion_length: int) -> Batch:
    """Prompts and completions of whole sequences, (B, P + T): the inverse of `with_prompts`."""
    cut = ids.shape[1] - completion_length
    return {
        "prompt_ids": ids[:, :cut],
        "prompt_mask": mask[:, :cut],
        "completion_ids": ids[:, cut:],
        "completion_mask": mask[:, cut:],
    }


def with_prompts(rows: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of whole sequences, (B, P + T)."""
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    return ids, torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The blocks that transformers would checkpoint one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def without_adapters(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    return model if isinstance(model, PreTrainedModel) else cast(Any, model).get_base_model()
