"""Tiny models and a tokenizer, made from configurations, for the examples beside this file.

Yours: AutoModelForCausalLM.from_pretrained(name) and AutoTokenizer.from_pretrained(name), or the names alone.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "<pad> </s> <unk> user assistant : ? is there a cat dog cow in the image yes no".split()
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def language_model(width: int, spread: float = 0.02) -> LlamaForCausalLM:
    """A model of this hidden size. A teacher has more to say with a larger spread, the deviation of its head."""
    torch.manual_seed(width)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, pad_token_id=0, bos_token_id=None, eos_token_id=1))
    torch.nn.init.normal_(model.lm_head.weight, std=spread)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, padding_side="left", **special)
