"""Settings of DeGRPO: everything GRPOConfig has, plus the mode objective. This is the recipe's `rl:` section."""

from dataclasses import dataclass, field, fields
from math import gcd
from typing import cast

from trl import GRPOConfig

from siesta.data.errors import RecipeError
from siesta.rewards.hacking import FLAGS
from siesta.rewards.isolated import MEMORY

NO_BONUS = "the loss has no entropy bonus"
OTHER_LOSS = "it belongs to a loss_type that is not used"
# GRPOConfig fields whose effect DeGRPO does not have. Setting one would silently do nothing or bias the loss.
REFUSED = {
    "loss_type": "the loss is the weighted token sum of rl/loss.py; use `decoupled: false` for plain GRPO",
    "importance_sampling_level": "ratios are per token",
    "multi_objective_aggregation": "there is one reward",
    "reward_weights": "there is one reward",
    "delta": "two-sided clipping is not part of the loss",
    "top_entropy_quantile": "the loss has no entropy mask",
    "off_policy_mask_threshold": "the loss has no off-policy mask",
    "use_bias_correction_kl": "the KL term is the plain k3 estimator",
    **dict.fromkeys(("entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"), NO_BONUS),
    **dict.fromkeys(("use_adaptive_entropy", "entropy_target"), NO_BONUS),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), OTHER_LOSS),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), OTHER_LOSS),
    "mask_truncated_completions": "a truncated response is verified like any other",
    "generation_kwargs": "a truncated sampler is not the policy in the loss; the rest has settings of its own",
    "use_liger_kernel": "there is one loss path",
    "use_transformers_continuous_batching": "it casts the trained weights to bf16 during rollouts",
    "use_transformers_paged": "it casts the trained weights to bf16 during rollouts",
    "top_p": "a truncated sampler is not the policy in the loss",
    "top_k": "a truncated sampler is not the policy in the loss",
    "min_p": "a truncated sampler is not the policy in the loss",
    "repetition_penalty": "a penalised sampler is not the policy in the loss",
    "ds3_gather_for_generation": "ranks write responses of their own length, so they need whole weights",
    "max_completion_length": "caps are per mode: modes.<name>.max_tokens",
    "num_generations_eval": "evaluation has its own section",
    "eval_strategy": "evaluation has its own section: evaluate.every",
    "do_eval": "evaluation has its own section: evaluate.every",
}


@dataclass
class DeGRPOConfig(GRPOConfig):
    """Decoupled GRPO. Reproduces Thinkless with `mode_objective: policy_gradient, mode_sampling: free,
    advantage: group, alpha: 0.001`; plain GRPO is that with `decoupled: false`.
    """

    mode_objective: str = field(
        default="target",
        metadata={"help": "`target`: cross-entropy to pi* ~ prior exp(Q / tau). `policy_gradient`: Thinkless' term."},
    )
    mode_sampling: str = field(
        default="stratified",
        metadata={"help": "`free`: the model draws; `stratified`: equal shares; `floor`: free above `mode_floor`."},
    )
    mode_floor: int = field(default=1, metadata={"help": "Rollouts of each mode that `floor` forces in every group."})
    mode_floor_steps: int = field(
        default=0, metadata={"help": "Anneal the floor to 0 over this many steps; 0 keeps it. Policy gradient only."}
    )
    advantage: str = field(
        default="per_mode",
        metadata={
            "help": "`group`: r - group mean on every token. `per_mode`: mode and response credit apart. "
            "`reference`: r - mean of the group's rollouts in the last mode."
        },
    )
    decoupled: bool = field(
        default=True, metadata={"help": "False: plain GRPO, the control token weighs as any other, 1 / (T + 1)."}
    )
    alpha: float = field(default=1.0, metadata={"help": "Weight of the control token's term."})
    mass_weight: float = field(
        default=1.0, metadata={"help": "Weight of - log mass, which keeps first-token probability on control tokens."}
    )
    tau: float = field(default=0.1, metadata={"help": "Mode target: price of certainty, in reward units."})
    tau_start: float | None = field(
        default=None, metadata={"help": "Anneal tau linearly from here to `tau` over the first half of the run."}
    )
    value_shrinkage: float = field(
        default=0.0, metadata={"help": "Pull Q(x, m) towards its batch mean, as if this many rollouts had shown it."}
    )
    price_per_token: float = field(default=0.0, metadata={"help": "Reward units paid per response token."})
    hack_prices: dict[str, float] | None = field(
        default=None, metadata={"help": "Reward units that a flag of siesta.rewards.hacking costs a response."}
    )
    hack_alarm: float = field(
        default=0.1, metadata={"help": "Share of a mode's rollouts with a flag at which the log says so loudly."}
    )
    verifier_timeout: float = field(default=10.0, metadata={"help": "Seconds a verifier may take for one answer."})
    verifier_workers: int = field(
        default=2, metadata={"help": "Processes per rank for verifiers that run in one (`math`, dotted paths)."}
    )
    verifier_memory: float = field(
        default=MEMORY, metadata={"help": "GiB of address space that each of these processes may take."}
    )
    attention: str = field(
        default="auto", metadata={"help": "Of the training pass: `auto`, or a name of siesta.rl.attention.BACKENDS."}
    )
    share_prompts: bool = field(
        default=False,
        metadata={"help": "Compute a prompt once for all rollouts of its group; pays where prompts are long."},
    )
    profile: bool = field(
        default=False, metadata={"help": "Write a torch profiler trace of two steps to <run>/rl/profile."}
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={"help": "Optimizer steps in a row that may be skipped because a number is not finite."},
    )
    compile_layers: bool = field(
        default=True, metadata={"help": "torch.compile the layers for packed rows. Not under ZeRO-3."}
    )
    token_budget: int = field(
        default=16_384, metadata={"help": "Tokens, prompts included, of one forward and backward pass on a device."}
    )

    # Other defaults than TRL's.
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation: `none`, of the `group`, or of the `batch`."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "Per token; sequence-level correction drops long rollouts first."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "False: a NaN loss is shown as NaN."})

    def __post_init__(self):
        for name, reason in REFUSED.items():
            default = next(f.default for f in fields(GRPOConfig) if f.name == name)
            if getattr(self, name) != default:
                raise RecipeError(f"rl.{name}: not a setting of DeGRPO: {reason}")
        if self.num_generations is not None and self.num_generations < 2:
            raise RecipeError(
                f"rl.num_generations: {self.num_generations} rollout has no group to be better than; use at least 2"
            )
        super().__post_init__()

    @property
    def group(self) -> int:
        """G: rollouts that are compared with each other."""
        return cast(int, self.num_generations)


@dataclass
class SleepConfig(DeGRPOConfig):
    """Groups below sleeps: TRL repeats a row for every rollout of every group that it belongs to, J * G times."""

    sleeps: int = field(default=2, metadata={"help": "J: notes drawn of each context."})

    @property
    def group(self) -> int:
        return cast(int, self.num_generations) // self.sleeps


def optimizer_steps(config: DeGRPOConfig) -> int:
    """Parts of a generation batch that are sure to fall into different optimizer steps."""
    number = cast(int, config.steps_per_generation)
    return number // gcd(number, config.gradient_accumulation_steps)


# What chooses between modes, and its value where there is nothing to choose.
ONE_MODE = {"mode_objective": "policy_gradient", "mode_sampling": "free", "advantage": "group"}


def check_one_mode(config: DeGRPOConfig) -> None:
    """Refuse what only two modes could give a meaning, so that a recipe with one mode does not seem to do more."""
    for name, value in ONE_MODE.items():
        if getattr(config, name) != value:
            raise RecipeError(
                f"rl.{name}: {getattr(config, name)} needs two modes and the recipe has one; set {name}: {value}"
            )


# The lowest value of a setting that is a count or a weight.
LEAST = {"verifier_workers": 1, "max_skipped_steps": 1, "value_shrinkage": 0, "mass_weight": 0, "price_per_token": 0}


def check_hacks(config: DeGRPOConfig) -> None:
    """Refuse prices of flags that nobody raises, or below 0: those would pay for hacks."""
    for flag, price in (config.hack_prices or {}).items():
        if flag not in FLAGS:
            raise RecipeError(f"rl.hack_prices.{flag}: not a flag; flags are {', '.join(FLAGS)}")
        if not price >= 0:
            raise RecipeError(f"rl.hack_prices.{flag}: {price} must be 0 or more")
    if not 0 < config.hack_alarm <= 1:
        raise RecipeError(f"rl.hack_alarm: {config.hack_alarm} is not a share above 0 and up to 1")


def check_method(config: DeGRPOConfig, num_modes: int) -> None:
    """Refuse combinations that train something else than they say.

    Raises:
        RecipeError: With the key to change.
    """
    choices = {
        "mode_objective": ("target", "policy_gradient"),
        "mode_sampling": ("free", "stratified", "floor"),
        "advantage": ("group", "per_mode", "reference"),
        "scale_rewards": ("none", "group", "batch"),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise RecipeError(f"rl.{name}: {getattr(config, name)!r} is not one of {', '.join(allowed)}")
    if num_modes == 1:
        check_one_mode(config)
    group = config.group
    target = config.mode_objective == "target"
    if group < num_modes:
        raise RecipeError(
            f"rl.num_generations: {group} rollouts cannot hold {num_modes} modes; use at least {num_modes}"
        )
    if config.mode_sampling == "floor" and not 1 <= config.mode_floor * num_modes <= group:
        raise RecipeError(
            f"rl.mode_floor: {config.mode_floor} of each of {num_modes} modes does not fit {group} rollouts"
        )
    if target and config.mode_sampling == "free":
        raise RecipeError("rl.mode_sampling: mode targets need every mode in every group; use stratified or floor")
    if target and config.mode_sampling == "floor" and config.mode_floor_steps:
        raise RecipeError("rl.mode_floor_steps: mode targets need the floor to the end; set it to 0")
    if target and not config.decoupled:
        raise RecipeError("rl.decoupled: plain GRPO has no mode target; set mode_objective: policy_gradient")
    if config.scale_rewards != "none" and config.advantage != "group":
        raise RecipeError(
            f"rl.scale_rewards: {config.advantage} advantages are not scaled; use advantage: group or "
            "scale_rewards: none"
        )
    if config.advantage == "reference" and config.mode_sampling == "free":
        raise RecipeError(
            "rl.mode_sampling: advantage: reference needs rollouts of the last mode in every group; use stratified "
            "or floor"
        )
    check_hacks(config)
    prompts, steps = cast(int, config.generation_batch_size) // group, optimizer_steps(config)
    if config.share_prompts and prompts % steps:
        raise RecipeError(
            f"rl.share_prompts: {prompts} prompts of a generation batch cannot be dealt evenly to {steps} optimizer "
            "steps; change rl.steps_per_generation"
        )
    for name in ("tau", "tau_start", "alpha", "verifier_timeout", "verifier_memory", "temperature"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise RecipeError(f"rl.{name}: {value} must be positive")
    for name, bound in LEAST.items():
        if not getattr(config, name) >= bound:
            raise RecipeError(f"rl.{name}: {getattr(config, name)} must be {bound} or more")
