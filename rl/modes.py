"""Modes and their control tokens: the only place that knows which token opens a completion and what it names.

A mode is one way to answer. Its control token is a single token, the first of every completion, so the mode of a
rollout is read from one id at position 0, never from text. An existing token is reused (`<think>` of Qwen3 and of the
R1 distillations); a missing one is added as a plain token, because special tokens vanish when completions are decoded
for reward functions. The chat template is cut so that generation starts right at the control token, and
`check_prompts` proves at start-up that every stage sees the same prompt ids.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jinja2
import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import ModelError


@dataclass(frozen=True)
class Mode:
    """One way to answer.

    Args:
        name: What tables and metrics call it.
        token: Text of its control token.
        token_id: Id of its control token.
        max_tokens: Cap on response tokens after the control token, end-of-sequence token included.
        correct, wrong: Reward of a right and of a wrong answer, before the price.
        answer_after: Text that closes the work; the solution is what follows its last occurrence. None: everything.
        prior: Weight of the mode in the mode target pi* (proportional to prior * exp(Q / tau)).
    """

    name: str
    token: str
    token_id: int
    max_tokens: int
    correct: float = 1.0
    wrong: float = -1.0
    answer_after: str | None = None
    prior: float = 1.0


class Modes(Sequence[Mode]):
    """The modes of a run, in the recipe's order. Column m of every (..., M) tensor is `modes[m]`."""

    def __init__(self, modes: Sequence[Mode]):
        self._modes = list(modes)
        self.token_ids = [mode.token_id for mode in self._modes]
        if not self._modes or len(set(self.token_ids)) != len(self._modes):
            raise ModelError("modes: at least one mode is needed, and no two with the same control token")

    def __getitem__(self, index):
        return self._modes[index]

    def __len__(self) -> int:
        return len(self._modes)

    def __iter__(self) -> Iterator[Mode]:
        return iter(self._modes)

    @property
    def names(self) -> list[str]:
        return [mode.name for mode in self._modes]

    def index(self, name: str) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Column of the mode called `name`."""
        return self.names.index(name)

    def of(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Mode of each completion, from its first id. (B, T) -> (B,) long; -1 where it opens with no control token."""
        first = completion_ids[:, 0]
        columns = torch.full_like(first, -1)
        for column, token_id in enumerate(self.token_ids):
            columns[first == token_id] = column
        return columns

    def log_policy(self, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Log mode policy, log pi(m given x): log-softmax over the control tokens alone. (..., V) -> (..., M)."""
        return torch.log_softmax(logits[..., self.token_ids].float() / temperature, dim=-1)

    def mass(self, logits: torch.Tensor) -> torch.Tensor:
        """Probability that an unrestricted sampler would open with a control token. (..., V) -> (...)."""
        return torch.softmax(logits.float(), dim=-1)[..., self.token_ids].sum(-1)


def add_control_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Make every text in `tokens` a single token of `tokenizer`; return those that were added."""
    added = []
    for token in tokens:
        known = tokenizer.get_vocab().get(token)
        if known is None:
            # normalized=False and no stripping: the token must match byte for byte and leave its surroundings alone.
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
            added.append(token)
        elif known in tokenizer.all_special_ids or (
            known in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[known].special
        ):
            raise ModelError(
                f"modes: {token!r} is a special token of this tokenizer and would vanish when completions are "
                "decoded; choose another control token"
            )
    return added


def grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Sequence[str]) -> None:
    """Give added tokens embedding rows (input and output), started at the mean of the existing rows.

    A mean row makes a new token about as likely as an average one, whatever the scale of the embeddings; a random row
    can start out dominating the softmax.
    """
    if not added:
        return
    ids = [tokenizer.get_vocab()[token] for token in added]
    first_new = min(ids)
    if len(tokenizer) > cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = cast(torch.Tensor, cast(torch.nn.Module, layer).weight)
            weight[ids] = weight[:first_new].mean(dim=0)


def cut_generation_prompt(template: str, tokens: Sequence[str]) -> str:
    """Chat template whose generation prompt ends where the control token goes.

    Reasoning models open their generation prompt with `<think>` (R1) or add an empty `<think></think>` (Qwen3). In the
    part of the template that writes the generation prompt, every string literal is cut at the first control token.
    """
    start = template.rfind("add_generation_prompt")
    if start < 0:
        raise ModelError("model: the chat template has no generation prompt (no use of add_generation_prompt)")
    if not any(token in template[start:] for token in tokens):
        return template
    control = "|".join(re.escape(token) for token in tokens)
    literal = re.compile(rf"^(['\"])(.*?)(?:{control}).*\1$", re.DOTALL)
    opening = "{% if "  # the block that `start` stands in
    try:
        pieces = list(jinja2.Environment(keep_trailing_newline=True).lex(opening + template[start:]))
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"model: the chat template cannot be cut: {error.message}") from error
    written = [literal.sub(r"\1\2\1", text) if kind == "string" else text for _, kind, text in pieces]
    return template[:start] + "".join(written).removeprefix(opening)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Add missing control tokens and cut the chat template; return the added tokens.

    A tokenizer without a padding token pads with its end-of-sequence token.

    Raises:
        ModelError: There is no chat template, or it cannot be cut, or there is no end-of-sequence token.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError("model: the tokenizer has no single chat template; point model.chat_template at a Jinja file")
    if tokenizer.eos_token is None:
        raise ModelError("model: the tokenizer has no end-of-sequence token, so a response could not end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    added = add_control_tokens(tokenizer, tokens)
    cut = cut_generation_prompt(tokenizer.chat_template, tokens)
    written = generation_prompt(tokenizer)
    tokenizer.chat_template = cut
    check_cut(written, generation_prompt(tokenizer), tokens)
    return added


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind a user's turn to open the answer."""
    turn = [{"role": "user", "content": "?"}]
    try:
        closed, opened = (
            cast(str, tokenizer.apply_chat_template(turn, add_generation_prompt=opened, tokenize=False))
            for opened in (False, True)
        )
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: the template expects another shape of messages
        raise ModelError(f"model: the chat template fails on one user turn: {' '.join(str(error).split())}") from error
    return opened.removeprefix(closed)


def check_cut(written: str, cut: str, tokens: Sequence[str]) -> None:
    """Prove that a cut generation prompt is the original one up to its first control token, no more and no less.

    Raises:
        ModelError: Something of the opened or skipped thought is left, or part of the turn's header is gone.
    """
    found = [token for token in tokens if token in cut]
    wanted = re.split("|".join(re.escape(token) for token in tokens), written, maxsplit=1)[0]
    if found or cut != wanted:
        fault = f"it already holds the control token {found[0]!r}" if found else f"{cut!r} is left of {written!r}"
        raise ModelError(
            f"model: the chat template cannot be cut to a generation prompt that ends where the control token goes: "
            f"{fault}; point model.chat_template at a Jinja file whose generation prompt ends there"
        )


def check_prompts(tokenizer: PreTrainedTokenizerBase, modes: Sequence[Mode], prompts: Mapping[str, list[int]]) -> None:
    """Prove that every control token is one id and that no prompt decides the mode beforehand.

    Args:
        modes: What can open a completion.
        prompts: Name of each prompt, for the message -> its ids.

    Raises:
        ModelError: A control token is not one id, or a prompt already holds one.
    """
    for mode in modes:
        if tokenizer.encode(mode.token, add_special_tokens=False) != [mode.token_id]:
            raise ModelError(
                f"modes.{mode.name}: {mode.token!r} does not encode to the single id {mode.token_id} but to "
                f"{tokenizer.tokenize(mode.token)}; choose a control token that is not in the vocabulary yet"
            )
    for name, ids in prompts.items():
        found = [mode.token for mode in modes if mode.token_id in ids]
        if found:
            raise ModelError(
                f"{name}: the prompt already holds the control token {found[0]!r}, which would decide the mode before "
                "the model can; remove it from the data or from the chat template"
            )


def check_stage_ids(stage: str, expected: Sequence[list[int]], found: Sequence[list[int]]) -> None:
    """Prove that a stage feeds the model the very prompt ids of `data/prompts.py`, followed by nothing else.

    Raises:
        ModelError: At the first prompt whose ids differ, with the place where they part.
    """
    for row, (want, have) in enumerate(zip(expected, found, strict=True)):
        if list(want) != list(have):
            pairs = zip(want, have, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(want), len(have)))
            raise ModelError(
                f"{stage}: prompt {row} has other ids than data/prompts.py gives, from position {at} on "
                f"({list(want[at : at + 4])} expected, {list(have[at : at + 4])} found)"
            )
