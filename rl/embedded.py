"""The embedded model: a word-level tokenizer and a Llama of under a million parameters, made on the spot.

With it the whole road (warm-up, RL, evaluation, export) runs on a CPU without a model hub. It goes through the same
code as a downloaded model: control tokens are added to it, its chat template is cut and checked.
"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed

from siesta.data.prompts import end_id, pad_id
from siesta.data.sources import TASKS
from siesta.data.tasks import calc, hop

# The question mark closes every prompt: the position from which the mode is chosen.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }} {% endif %}"
    "{% if message['role'] == 'user' %}{{ '<q>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


def build_tokenizer(task: str | None = None) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of calc and hop, and behind them those of `task`; words are separated by
    white space.
    """
    own = TASKS[task].WORDS if task else []
    words = list(dict.fromkeys(["<pad>", "<eos>", "<unk>", "<q>", *calc.WORDS, *hop.WORDS, *own]))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, *, seed: int, layers: int, hidden_size: int, heads: int, init: float
) -> LlamaForCausalLM:
    """Randomly initialised Llama with tied embeddings. 3 layers of 128 make 0.67M parameters."""
    set_seed(seed)
    return LlamaForCausalLM(model_config(tokenizer, layers=layers, hidden_size=hidden_size, heads=heads, init=init))


def model_config(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, hidden_size: int, heads: int, init: float
) -> LlamaConfig:
    """Shape of the embedded model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=init,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=end_id(tokenizer),
        bos_token_id=None,
    )
