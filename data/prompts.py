"""The only home of the prompt template: how an example becomes messages, and messages become token ids.

Every stage (warm-up, rollout, evaluation, export) gets its prompt ids from `prompt_ids`, and the completion follows
them directly: control token first. Text that was once tokens is never tokenised again.
"""

from typing import TYPE_CHECKING, Any, cast

import jinja2

from siesta.data.errors import ModelError
from siesta.data.schema import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def messages(example: Example, *instructions: str, system: str = "") -> Messages:
    """The conversation that asks `example`: one user turn of context, query and instructions, those that are empty
    left out; before it a system turn if there is one.
    """
    parts = [part for part in (example.context, example.query, *instructions) if part]
    asked = [{"role": "user", "content": "\n".join(parts)}]
    return [{"role": "system", "content": system}, *asked] if system else asked


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Messages, **template: Any) -> list[int]:
    """Token ids of `prompt` up to the place where the control token goes; `template` goes to the chat template."""
    try:
        rendered = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )
    except jinja2.TemplateError as error:
        raise ModelError(f"model: the chat template fails on {prompt[-1]['content'][:60]!r}: {error}") from error
    return cast(dict[str, list[int]], rendered)["input_ids"]


def context_ids(tokenizer: "PreTrainedTokenizerBase", context: str) -> list[int]:
    """Token ids of a bare context, begun as the tokenizer begins a text: what a latent sleep reads. No chat template,
    because nobody speaks yet.
    """
    return tokenizer.encode(context)


def response_ids(tokenizer: "PreTrainedTokenizerBase", response: str) -> list[int]:
    """Token ids of a written response, end-of-sequence token included; they follow the control token."""
    return [*tokenizer.encode(response, add_special_tokens=False), end_id(tokenizer)]


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Id that ends a response."""
    return cast(int, tokenizer.eos_token_id)


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Id that fills batches; often the same as `end_id`, so masks come from lengths, never from ids."""
    return cast(int, tokenizer.pad_token_id)
