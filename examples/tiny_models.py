"""Tiny models and a tokenizer, made from configurations, for the examples beside this file.

Yours: AutoModelForCausalLM.from_pretrained(name) and AutoTokenizer.from_pretrained(name), or the names alone.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = "<pad> </s> <unk> user assistant : ? is there a cat dog cow in the image yes no <image>".split()
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
IMAGE_CHAT = (
    "{% for m in messages %}{{ m.role }} : {% for part in m.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
SIZE, PATCH = 32, 8  # pixels of an image's side, and of a patch's


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


def vision_language_model(width: int = 32) -> LlavaForConditionalGeneration:
    """A LLaVA of this hidden size; `image_processor` makes its batches."""
    torch.manual_seed(width)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=4)
    text = LlamaConfig(**sizes, vocab_size=32, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    vision = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=PATCH, projection_dim=width)
    patches = (SIZE // PATCH) ** 2
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=WORDS.index("<image>"),
            image_seq_length=patches,
            vision_feature_layer=-1,
        )
    )


def image_processor() -> LlavaProcessor:
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    square = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE_CHAT,
    )
