"""Models of published shapes with random weights, and the trainers that are compared on them."""

import copy
import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3_5TextConfig, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from siesta.rl.config import DeGRPOConfig
from siesta.rl.embedded import build_tokenizer
from siesta.rl.judge import Judge, build_judge
from siesta.rl.models import build_modes
from siesta.rl.modes import prepare_tokenizer
from siesta.rl.recipe import ModeSection
from siesta.rl.trainer import DeGRPOTrainer

VOCABULARY = 151_936
SHAPES = {
    "tiny": Qwen3Config(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1024,
        tie_word_embeddings=True,
    ),
    "0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    ),
    "0.6b": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    ),
    "1.5b": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    ),
}
# Like Qwen3.5: three layers of gated DeltaNet to one of attention.
HYBRIDS = {
    "tiny-hybrid": Qwen3_5TextConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=[*["linear_attention"] * 3, "full_attention"],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        vocab_size=1024,
        tie_word_embeddings=True,
    ),
    "0.8b-hybrid": Qwen3_5TextConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * 6,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    ),
}


def build(shape: str, dtype: torch.dtype, device: str, seed: int = 0) -> PreTrainedModel:
    """A model of a shape; the same weights for the same seed. Trainers write into the config of their model."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy((SHAPES | HYBRIDS)[shape]), dtype=dtype)
    return model.train()


def judge(think_tokens: int, short_tokens: int = 256) -> Judge:
    """Modes over the embedded tokenizer; its ids are valid in every shape's vocabulary."""
    tokenizer = build_tokenizer()
    sections = {
        "short": ModeSection(token="<short>", max_tokens=short_tokens),
        "think": ModeSection(token="<think>", max_tokens=think_tokens),
    }
    prepare_tokenizer(tokenizer, [section.token for section in sections.values()])
    modes = build_modes(sections, tokenizer)
    return build_judge(tokenizer, modes, {"exact"}, price_per_token=0.0, verifier_timeout=10.0)


def common_settings(folder: Path, device: str, rollouts: int, micro: int) -> dict:
    """Settings that both trainers share."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rollouts // micro,
        "use_cpu": device == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "num_generations": 8,
        "learning_rate": 1e-6,
        "dataloader_pin_memory": False,
    }


def stock_trainer(model: PreTrainedModel, settings: dict) -> GRPOTrainer:
    """TRL's trainer with the loss that weighs tokens as plain GRPO does."""
    args = GRPOConfig(**settings, loss_type="grpo", scale_rewards="none", max_completion_length=4096)
    return GRPOTrainer(
        model=model,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=args,
        train_dataset=_rows(),
        processing_class=judge(8).tokenizer,
    )


def siesta_trainer(model: PreTrainedModel, settings: dict, **more: object) -> DeGRPOTrainer:
    """DeGRPOTrainer as plain GRPO, so that its gradient can be compared with TRL's."""
    method = {
        "mode_objective": "policy_gradient",
        "mode_sampling": "free",
        "advantage": "group",
        "decoupled": False,
        "mass_weight": 0.0,
    }
    args = DeGRPOConfig(**settings, **method, **more)  # pyright: ignore[reportArgumentType]
    return DeGRPOTrainer(model=model, judge=judge(4095), args=args, train_dataset=_rows())


def _rows() -> Dataset:
    return Dataset.from_list([{"prompt": "3 +4", "answer": "7", "verifier": "exact"}] * 8)


def completion_lengths(share_short: float, rollouts: int, seed: int, scale: float = 1.0) -> list[int]:
    """Completion tokens: `share_short` of them around 120, the others around 2,500, times `scale`."""
    draw = random.Random(seed)
    short = round(share_short * rollouts)
    lengths = [max(16, int(draw.gauss(120, 40))) for _ in range(short)]
    lengths += [max(400, int(draw.gauss(2500, 600))) for _ in range(rollouts - short)]
    draw.shuffle(lengths)
    return [max(2, int(length * scale)) for length in lengths]


def rollout_batch(
    lengths: list[int], prompt: int, vocabulary: int, control: list[int], device: str, seed: int
) -> dict:
    """A generation batch as GRPOTrainer hands it to its loss: padded to the longest, random tokens and advantages.

    Advantages are per token, (B, T), and 0 on the control token, whose log-probability the two trainers define
    differently. `weights` is what plain GRPO gives each token, 1 / (N T_i).
    """
    draw = torch.Generator().manual_seed(seed)
    longest, count = max(lengths), len(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    completions = torch.randint(64, vocabulary, (count, longest), generator=draw)
    completions[:, 0] = torch.tensor(control)[torch.tensor(lengths).gt(400).long()]
    advantages = torch.randn((count, 1), generator=draw).repeat(1, longest)
    advantages[:, 0] = 0
    batch = {
        "prompt_ids": torch.randint(64, vocabulary, (count, prompt), generator=draw),
        "prompt_mask": torch.ones(count, prompt, dtype=torch.long),
        "completion_ids": completions * mask,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "weights": mask / (count * torch.tensor(lengths)[:, None]),
        "mass_weights": torch.zeros(count),
        "kl_weights": torch.zeros(count, longest),
        "num_items_in_batch": mask.sum(),
    }
    return {key: value.to(device) for key, value in batch.items()}
