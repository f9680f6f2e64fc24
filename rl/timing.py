"""Where the time of a training step goes, in seconds and tokens per phase."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig, TrainerCallback
from trl.trainer.utils import get_peak_flops


class Phases:
    """A stopwatch with one hand: entering a phase stops the one around it until it is left.

    Args:
        device: Work on it is waited for at the borders of a phase, so that a phase holds its own work.
        entered: Is told of each phase that begins.
    """

    def __init__(self, device: torch.device, entered: Callable[[str], None] = lambda phase: None):
        self.device, self.entered = device, entered
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.tokens: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def enter(self, phase: str) -> None:
        """Time goes to `phase` from now on."""
        self._charge()
        self._running.append(phase)
        self.entered(phase)

    def leave(self) -> None:
        """Time goes to the phase around the one at hand."""
        self._charge()
        self._running.pop()

    @contextmanager
    def __call__(self, phase: str, tokens: int = 0) -> Iterator[None]:
        """Inside, time goes to `phase`, which handles `tokens`."""
        self.tokens[phase] += tokens
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def collect(self, steps: int) -> dict[str, float]:
        """Seconds and tokens of each phase per optimizer step since the last call, and their total in seconds."""
        rows = {f"time/{phase}": seconds / steps for phase, seconds in self.seconds.items()}
        rows |= {f"tokens/{phase}": tokens / steps for phase, tokens in self.tokens.items() if tokens}
        rows["time/step"] = sum(self.seconds.values()) / steps
        self.seconds.clear()
        self.tokens.clear()
        return rows


class OptimizerPhase(TrainerCallback):
    """Charges the optimizer's step to its own phase. DeepSpeed steps inside its backward pass: there it stays."""

    def __init__(self, phases: Phases):
        self.phases = phases

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.phases.enter("optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.phases.leave()


def model_flops(config: PreTrainedConfig, lengths: list[int], scored: int) -> float:
    """FLOPs of a forward and backward pass over sequences without padding or recomputation (PaLM, appendix B, with
    causal attention); NaN for a model that is not a dense one with gated MLPs.

    Args:
        config: Of the model.
        lengths: Tokens of each sequence.
        scored: Positions that go through the head.
    """
    text = config.get_text_config()
    keys = text.to_dict()
    if not {"intermediate_size", "num_key_value_heads"} <= keys.keys() or keys.keys() & {"num_experts", "n_embd"}:
        return float("nan")
    head_size = keys.get("head_dim") or text.hidden_size // text.num_attention_heads
    query, key = (heads * head_size for heads in (text.num_attention_heads, text.num_key_value_heads))
    weights = text.hidden_size * (2 * query + 2 * key + 3 * text.intermediate_size)
    attention = sum(2 * query * length**2 for length in lengths)  # half of the square, two products
    layers = text.num_hidden_layers * (2 * weights * sum(lengths) + attention)
    return 3.0 * (layers + 2 * text.hidden_size * text.vocab_size * scored)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of the device's matrix units for dense matrices; None if it is not in TRL's table."""
    if device.type != "cuda":
        return None
    return get_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))


class Profile(TrainerCallback):
    """Writes a trace of two optimizer steps, the third and the fourth, for chrome://tracing or Perfetto."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(
                str(self.folder / f"trace-rank{args.process_index}.json.gz")
            ),
            profile_memory=True,
        )
        self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.profiler.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.stop()
