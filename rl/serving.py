"""What serving a trained model takes: a response opens with a control token and stays within its mode's budget.

A request names a mode, or leaves the choice to the model: `auto` draws from the mode policy at the request's
temperature, `auto` with a threshold takes the last mode if its probability lies above the threshold. One trained
model so serves a whole frontier of cost against accuracy. The exported folder says which tokens these are
(`modes.json`); `ModeLogitsProcessor` enforces them in transformers, `siesta.rl.serving_vllm` in vLLM.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.utils.hub import cached_file

from siesta.data.errors import ModelError, UserError
from siesta.rl.modes import Modes

FILE = "modes.json"
AUTO = "auto"


class RequestError(UserError, ValueError):
    """A request asks for what the model does not have. A ValueError, which a vLLM server answers with HTTP 400."""


@dataclass(frozen=True)
class Served:
    """A mode as its users see it: see `siesta.rl.modes.Mode`."""

    name: str
    token: str
    token_id: int
    max_tokens: int
    answer_after: str | None


@dataclass(frozen=True)
class Choice:
    """What a request asks for.

    Args:
        mode: A mode's name, or `auto`.
        threshold: With `auto`: the last mode is taken if its probability is above, else the likeliest of the others;
            0 always takes the last mode, 1 never.
    """

    mode: str = AUTO
    threshold: float | None = None


@dataclass(frozen=True)
class Rules:
    """The modes of an exported model.

    Args:
        modes: In the recipe's order; the last one is that of a threshold.
        eos_id: Ends a response.
        instruction: That every prompt of the training closed with.
    """

    modes: tuple[Served, ...]
    eos_id: int
    instruction: str = ""

    @property
    def token_ids(self) -> list[int]:
        """Ids of the control tokens."""
        return [mode.token_id for mode in self.modes]

    def mode_of(self, token_id: int) -> Served | None:
        """The mode that a first token opens."""
        return next((mode for mode in self.modes if mode.token_id == token_id), None)

    def choice(self, arguments: Mapping[str, Any]) -> Choice:
        """The choice that a request's arguments `mode` and `threshold` make; others are not ours.

        Raises:
            RequestError: An unknown mode, or a threshold that is none.
        """
        mode, threshold = arguments.get("mode", AUTO), arguments.get("threshold")
        names = [AUTO, *(own.name for own in self.modes)]
        if mode not in names:
            raise RequestError(f"mode: {mode!r} is unknown; this model has {', '.join(names)}")
        if threshold is None:
            return Choice(mode)
        if mode != AUTO:
            raise RequestError(f"threshold: belongs to mode {AUTO}, and {mode} was asked for; leave one out")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise RequestError(f"threshold: {threshold!r} is no number from 0 to 1")
        return Choice(mode, float(threshold))

    def allowed(self, choice: Choice, first: int | None, written: int, logits: torch.Tensor) -> list[int] | None:
        """Ids that may come next in a response; None if any may.

        Args:
            first: The response's first id; None before it is written.
            written: Ids that are written, the control token among them.
            logits: Of the next id, (V,).
        """
        if written == 0:
            return self._openers(choice, logits)
        mode = None if first is None else self.mode_of(first)
        # The end of sequence counts as the last response token, as in training.
        return [self.eos_id] if mode is not None and written >= mode.max_tokens else None

    def _openers(self, choice: Choice, logits: torch.Tensor) -> list[int]:
        if choice.mode != AUTO:
            return [mode.token_id for mode in self.modes if mode.name == choice.mode]
        if choice.threshold is None:
            return self.token_ids
        policy = torch.softmax(logits[self.token_ids].float(), dim=0)
        return [self.token_ids[above(policy, choice.threshold)]]


def above(policy: torch.Tensor, threshold: float) -> int:
    """Column that a threshold on the last mode's probability takes. `policy` is pi(m given x), (M,)."""
    last = len(policy) - 1
    if last == 0 or threshold == 0 or float(policy[last]) > threshold:
        return last
    return int(policy[:last].argmax())


def write_rules(folder: Path, modes: Modes, *, eos_id: int, instruction: str) -> None:
    """Write `modes.json` into an exported folder."""
    own = [field.name for field in fields(Served)]
    rows = [{name: vars(mode)[name] for name in own} for mode in modes]
    content = {"modes": rows, "eos_id": eos_id, "instruction": instruction}
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_rules(model: str, revision: str | None = None) -> Rules | None:
    """The rules of an exported folder or hub model; None if it has none: not a model of siesta.

    Raises:
        ModelError: modes.json is not what an export writes.
    """
    try:
        file = cached_file(model, FILE, revision=revision)
    except OSError:  # neither a folder with it nor a hub name, or the hub cannot be reached
        return None
    assert file is not None  # or an OSError
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        modes = tuple(Served(**row) for row in content.pop("modes"))
        return Rules(modes, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{file}: not the modes of an exported model ({error}); export the checkpoint again"
        ) from None


def find_rules(model: str) -> Rules:
    """Like `read_rules`, for a command that needs them.

    Raises:
        ModelError: There are none.
    """
    rules = read_rules(model)
    if rules is None:
        raise ModelError(
            f"{model}: no {FILE}, so no control tokens are known; name a folder that siesta wrote (RUN/export, or "
            "siesta export CHECKPOINT OUT)"
        )
    return rules


class ModeLogitsProcessor(LogitsProcessor):
    """The rules as a logits processor of transformers' `generate`.

    Args:
        prompt_length: Tokens of the (padded) prompts that `generate` is given.
        choices: One for each row, or one for all.
    """

    def __init__(self, rules: Rules, prompt_length: int, choices: Sequence[Choice] | Choice = Choice()):
        self.rules = rules
        self.prompt_length = prompt_length
        self.choices = choices

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) with -inf where an id may not come next; rows that are free stay as they are."""
        written = input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        for row in range(len(scores)):
            choice = self.choices if isinstance(self.choices, Choice) else self.choices[row]
            first = int(input_ids[row, self.prompt_length]) if written else None
            restrict(scores[row], self.rules.allowed(choice, first, written, scores[row]))
        return scores


def restrict(logits: torch.Tensor, allowed: list[int] | None) -> None:
    """Set the logits (V,) of all ids but the allowed ones to -inf, in place; of a single id the logit becomes 0."""
    if allowed is None:
        return
    kept = logits[allowed].clone() if len(allowed) > 1 else 0.0
    logits.fill_(-torch.inf)
    logits[allowed] = kept
