"""Talk to an exported model: each line is a question of its own; mode, probability, tokens and time of the answer.

    siesta chat outputs/quickstart/export
    echo "<calc> 3 +4 ; ; ; ; ; ; ;" | siesta chat outputs/quickstart/export --mode think

On a terminal `/mode think` forces a mode from there on, `/mode auto` ends that, `/threshold 0.3` takes the last mode
where its probability is above, `/quit` leaves.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, TextStreamer

from siesta.data.errors import ModelError
from siesta.data.prompts import messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl.console import quiet_libraries
from siesta.rl.generation import inference
from siesta.rl.precision import default_device
from siesta.rl.serving import AUTO, Choice, ModeLogitsProcessor, RequestError, Rules, Served, find_rules

COMMANDS = ("/mode", "/threshold", "/quit")


@dataclass(frozen=True)
class Reply:
    """An answer: its mode, the mode policy behind the prompt (M,), ids behind the control token, seconds."""

    mode: Served
    policy: list[float]
    ids: list[int]
    seconds: float

    def line(self, rules: Rules) -> str:
        """All but the text, for people."""
        policy = ", ".join(f"p({own.name}) {p:.3f}" for own, p in zip(rules.modes, self.policy, strict=True))
        return f"[{self.mode.name}] {policy}, {len(self.ids)} tokens, {1000 * self.seconds:.0f} ms"


class Chat:
    """An exported model that answers single questions.

    Args:
        model: Folder or hub name.

    Raises:
        ModelError: It has no modes, or cannot be loaded.
    """

    def __init__(self, model: str, device: str):
        self.rules = find_rules(model)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
            self.model: Any = loaded.to(device).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"{model}: cannot be loaded: {' '.join(str(error).split())}") from error
        for mode in self.rules.modes:
            if self.tokenizer.get_vocab().get(mode.token) != mode.token_id:
                raise ModelError(
                    f"{model}: its tokenizer does not have the control token {mode.token!r}; export again"
                )

    def reply(self, question: str, choice: Choice, *, temperature: float | None, streamer: Any = None) -> Reply:
        """Answer a question. `temperature` None decodes greedily; then `auto` takes the likeliest mode."""
        ids = prompt_ids(self.tokenizer, messages(Example("", "", question, ""), self.rules.instruction))
        start = time.perf_counter()
        prompt = torch.tensor([ids], device=self.model.device)
        sampling = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
        with inference(self.model):
            logits = self.model(prompt, logits_to_keep=1).logits[0, -1, self.rules.token_ids]
            output = self.model.generate(
                prompt,
                logits_processor=LogitsProcessorList([ModeLogitsProcessor(self.rules, len(ids), choice)]),
                streamer=streamer,
                max_new_tokens=1 + max(mode.max_tokens for mode in self.rules.modes),
                **sampling,
            )
        written = output[0, len(ids) :].tolist()
        mode = self.rules.mode_of(written[0])
        assert mode is not None  # the processor let nothing else open the response
        seconds = time.perf_counter() - start
        return Reply(mode, torch.softmax(logits.float(), dim=0).tolist(), written[1:], seconds)

    def text(self, ids: Sequence[int]) -> str:
        """A response as text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def commanded(line: str, choice: Choice, rules: Rules) -> Choice:
    """The choice after a line `/mode NAME` or `/threshold T`.

    Raises:
        RequestError: It is none of these, or its value is not one.
    """
    name, _, value = line.partition(" ")
    if name == "/mode":
        return rules.choice({"mode": value.strip()})
    if name == "/threshold":
        try:
            threshold = float(value)
        except ValueError:
            raise RequestError(f"threshold: {value!r} is no number") from None
        return rules.choice({"threshold": threshold})
    raise RequestError(f"{name}: unknown; there are {', '.join(COMMANDS)}")


def questions(console: Console) -> Iterator[str]:
    """Lines of standard input, asked for on a terminal; empty ones are left out."""
    asked = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold]> [/bold]") if asked else next(sys.stdin)
        except (EOFError, KeyboardInterrupt, StopIteration):
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def talk(chat: Chat, choice: Choice, temperature: float | None, console: Console) -> None:
    """Answer line after line."""
    streams = console.is_terminal
    for line in questions(console):
        if line.startswith("/"):
            try:
                choice = commanded(line, choice, chat.rules)
            except RequestError as error:
                console.print(str(error), markup=False, style="red")
            continue
        streamer = TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        found = chat.reply(line, choice, temperature=temperature, streamer=streamer)
        if not streams:
            console.print(chat.text(found.ids), markup=False)
        console.print(found.line(chat.rules), markup=False, style="dim")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="siesta chat", description="Talk to an exported model.")
    parser.add_argument("model", help="folder that siesta exported, or its name on the hub")
    parser.add_argument("--mode", default=AUTO, help="of all answers; auto: the model chooses")
    parser.add_argument("--threshold", type=float, help="take the last mode where its probability is above")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args(arguments)
    quiet_libraries()
    chat = Chat(options.model, options.device)
    given = {"mode": options.mode} | ({} if options.threshold is None else {"threshold": options.threshold})
    choice = chat.rules.choice(given)
    talk(chat, choice, options.temperature or None, Console(soft_wrap=True, highlight=False))
    return 0
