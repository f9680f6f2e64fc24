"""What tests of warm-up data share: a tokenizer that spells anything, a model that knows a few answers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siesta.data.prompts import messages, prompt_ids, response_ids
from siesta.data.schema import Example
from siesta.rl import embedded
from siesta.rl.embedded import TEMPLATE

# A digit for short, digits after "=" for think, on the embedded tokenizer.
MODES = """\
modes:
  short: {token: "<short>", max_tokens: 2}
  think: {token: "<think>", max_tokens: 12, correct: 0.5, answer_after: "="}
"""


def save_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer with a token for each byte, so that lengths can be counted by hand, in a model's folder."""
    words = ["<pad>", "<eos>", "<unk>", "<q>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(words)).save_pretrained(folder)
    return folder


def save_teacher(folder: Path, answers: list[tuple[Example, str]], steps: int = 150) -> Path:
    """An embedded model, without control tokens, that has learnt these answers by heart."""
    tokenizer = embedded.build_tokenizer()
    model = embedded.build_model(tokenizer, seed=0, layers=1, hidden_size=32, heads=2, init=0.05)
    rows = [(prompt_ids(tokenizer, messages(x)), response_ids(tokenizer, text)) for x, text in answers]
    learn(model, rows, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learn(model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]], steps: int) -> None:
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt + response)] = torch.tensor(prompt + response)
        labels[i, len(prompt) : len(prompt + response)] = torch.tensor(response)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: int) -> list[int]:
    """Greedy ids one at a time, without cache or padding; they end with the end of sequence if it comes."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and (ids[-1] != tokenizer.eos_token_id or len(ids) == len(prompt)):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
