"""Notes: the state is text that the policy writes itself, before the query comes.

A sleep-time agent rewrites one memory block (arXiv 2504.13171); there it is prompted, here it is the policy and
trained. Pass 1 reads the context, pass n > 1 the context and the notes so far. The completion opens with the sleep
token, which is forced like a control token but names no mode. Of what is written `kept` stays; wake reads that in the
place of the context, so a reader's prompt is a prompt like any other.

Text is sampled, so it has no gradient: its tokens are actions, see `siesta.rl.sleep.credit`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siesta.data.errors import DataError
from siesta.data.prompts import end_id, messages, pad_id, prompt_ids
from siesta.data.schema import Example
from siesta.rl.generation import Writer, complete, left_pad, positions
from siesta.rl.modes import Mode
from siesta.rl.sleep.protocol import SleepCost, SleepOut, SleepTokens
from siesta.rl.sleep.tensors import check_length, forward_flops
from siesta.rl.sleep_section import SleepSection


@dataclass(frozen=True)
class Notes:
    """The kept notes on P contexts."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> "Notes":
        """See `State.select`."""
        return Notes([self.texts[row] for row in rows])

    def to(self, device: torch.device | str) -> "Notes":
        """Text lies on no device."""
        return self

    def detach(self) -> "Notes":
        """Text has no graph."""
        return self

    def nbytes(self) -> list[int]:
        """Bytes of each text in UTF-8."""
        return [len(text.encode()) for text in self.texts]

    def tensors(self) -> dict[str, torch.Tensor]:
        """`utf8`, (P, longest) uint8, filled with 0 in front."""
        longest = max(self.nbytes(), default=0)
        rows = [list(text.encode().rjust(longest, b"\0")) for text in self.texts]
        return {"utf8": torch.tensor(rows, dtype=torch.uint8).view(len(self), longest)}


def kept_rows(text: str) -> list[str]:
    """What of written notes stays, row by row; rows end with `;` or with the line.

    Notes with a `=` in them hold work: of each row stays what follows its last `=`, and a row without one was never
    finished. Notes without any stay as they are.
    """
    if "=" not in text:
        return [text.strip()] if text.strip() else []
    found = [row.rpartition("=")[2].strip() for row in re.split(r"[;\n]", text) if "=" in row]
    return [row for row in found if row]


def kept(text: str) -> str:
    """What of written notes stays, as text; see `kept_rows`."""
    return " ".join(kept_rows(text))


def rows_right(written: str, taught: str) -> float:
    """Share of the taught notes' rows that the written ones have as well, in whatever order."""
    wanted = kept_rows(taught)
    return sum(row in kept_rows(written) for row in wanted) / len(wanted)


class NotesSleep:
    """Sleep by writing.

    Args:
        tokenizer: The model's, with the sleep token.
        section: The recipe's; tells token, caps and whether the reader keeps the context.
        reserved: Ids of the control tokens: they are taken out of notes, since one would decide the reader's mode.
        instruction: Stands in a reader's prompt behind the query.
        temperature: Of the writer; None is greedy.
        batch_size: Most contexts in a batch.
    """

    name = "notes"
    differentiable = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        section: SleepSection,
        reserved: Sequence[int],
        *,
        instruction: str = "",
        temperature: float | None = None,
        batch_size: int = 64,
    ):
        self.tokenizer = tokenizer
        self.section = section
        self.instruction = instruction
        self.temperature = temperature
        self.batch_size = batch_size
        token_id = tokenizer.get_vocab()[section.token]
        # The section's cap counts the sleep token, a mode's does not.
        self.mode = Mode(name="sleep", token=section.token, token_id=token_id, max_tokens=section.max_tokens - 1)
        self._dropped = {token_id, *reserved}

    def writer_prompt(self, context: str, notes: str = "") -> list[int]:
        """Ids that a pass reads up to the sleep token: the context and, beyond the first pass, the notes so far."""
        return prompt_ids(self.tokenizer, messages(Example("", context, notes, "")))

    def text(self, response: Sequence[int]) -> str:
        """Written ids, without the sleep token, as text."""
        ids = [token for token in response if token not in self._dropped]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def keep(self, text: str) -> str:
        """What wake sees of written text: `kept`, at most `keep_tokens` tokens of it."""
        most = self.section.keep_tokens
        if most is None:
            return kept(text)
        ids = self.tokenizer.encode(kept(text), add_special_tokens=False)[:most]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def reader(self, example: Example, notes: str) -> Example:
        """The example as wake sees it: notes in the place of the context, or behind it and the sleep token, which
        tells where they begin.
        """
        if not self.section.keep_context:
            return replace(example, context=notes)
        return replace(example, context=f"{example.context}\n{self.mode.token} {notes}") if notes else example

    def write(self, write: Writer, contexts: Sequence[str], *, passes: int) -> tuple[Notes, list[SleepTokens]]:
        """Notes on each context, and the tokens of every pass; `write` answers prompts under the sleep token.

        Raises:
            DataError: A context is empty.
        """
        for row, context in enumerate(contexts):
            if not context.strip():
                raise DataError(f"context {row}: empty, there is nothing to sleep on")
        notes, actions = [""] * len(contexts), []
        for _ in range(passes):
            prompts = [self.writer_prompt(context, text) for context, text in zip(contexts, notes, strict=True)]
            written = write(prompts, self.mode, temperature=self.temperature) if prompts else []
            actions.append(SleepTokens(prompts, [[self.mode.token_id, *ids] for ids in written]))
            notes = [self.keep(self.text(ids)) for ids in written]
        return Notes(notes), actions

    def check(self, model: PreTrainedModel, contexts: Sequence[str], passes: int) -> None:
        """See `Consolidator.check`."""
        longest = max(len(self.writer_prompt(context)) for context in contexts) + self.section.max_tokens
        check_length(model, longest, "with its notes a text")

    def sleep(
        self,
        model: PreTrainedModel,
        contexts: Sequence[str],
        *,
        passes: int,
        generator: torch.Generator | None = None,
    ) -> SleepOut[Notes]:
        """See `Consolidator.sleep`. With a temperature it draws from torch's own generator, or from one seeded by
        `generator`.
        """
        self.check(model, contexts, passes)
        tokens = {"pad_id": pad_id(self.tokenizer), "eos_id": end_id(self.tokenizer)}
        write = partial(complete, model, batch_size=self.batch_size, **tokens)
        with torch.random.fork_rng(enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            state, actions = self.write(write, contexts, passes=passes)
        lengths = [
            [len(prompt) + len(ids) for prompt, ids in zip(step.prompt_ids, step.completion_ids, strict=True)]
            for step in actions
        ]
        flops = forward_flops(model)
        cost = SleepCost(
            tokens=[sum(own) for own in zip(*lengths, strict=True)],
            flops=[sum(map(flops, own)) for own in zip(*lengths, strict=True)],
            state_bytes=state.nbytes(),
        )
        return SleepOut(state, actions, cost)

    def prompts(self, state: Notes, queries: Sequence[Example]) -> list[list[int]]:
        """See `Consolidator.prompts`: queries behind the notes on their contexts."""
        read = [self.reader(query, text) for query, text in zip(queries, state.texts, strict=True)]
        return [prompt_ids(self.tokenizer, messages(example, self.instruction)) for example in read]

    def attach(self, state: Notes, queries: Sequence[Example]) -> dict[str, Any]:
        """See `Consolidator.attach`: prompts with the notes in them, (P, longest), padded on the left."""
        ids, mask = left_pad(self.prompts(state, queries), pad_id(self.tokenizer))
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> Notes:
        """See `Consolidator.restore`."""
        return Notes([bytes(row).lstrip(b"\0").decode() for row in tensors["utf8"].tolist()])


def note_tokens(actions: Sequence[SleepTokens]) -> list[int]:
    """Tokens written on each of P contexts in all passes, without the forced sleep tokens."""
    return [sum(len(ids) - 1 for ids in own) for own in zip(*(step.completion_ids for step in actions), strict=True)]
