"""A small LLaVA, 1.4 million parameters unless told otherwise: its processor, its prompt, and a fast way to ask it
many questions."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from world.scenes import OBJECTS, SIZE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = [
    "user",
    "assistant",
    ":",
    "is",
    "there",
    "a",
    "an",
    "in",
    "the",
    "image",
    "?",
    "yes",
    "no",
    "describe",
    "shows",
    ",",
    ".",
]
PATCH = 16
PATCHES = (SIZE // PATCH) ** 2
WIDTH = 128
CHAT = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def named(index):
    name = OBJECTS[index]
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def question(index):
    return f"Is there {named(index)} in the image?"


def prompt(text):
    """What the processor is given beside the image; the chat template writes the same."""
    return f"USER: <image>\n{text} ASSISTANT:"


def make_processor(words=WORDS, silent=""):
    """The processor of a world of pictures.

    Args:
        words: of its language, beside the names of the objects.
        silent: characters that are no words.
    """
    vocabulary = (*SPECIAL, *words, *OBJECTS)
    by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    by_word.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(mark, " ") for mark in silent)]
    )
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    by_word.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(  # the one that needs no torchvision
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def make_config(tokenizer, layers=3, width=WIDTH, spread=0.02):
    """The configuration of a LLaVA.

    Args:
        tokenizer: of its processor.
        layers, width: of the language model; the tower is always the same size.
        spread: standard deviation of the language model's weights.
    """

    def blocks(number, size):
        return {
            "num_hidden_layers": number,
            "hidden_size": size,
            "intermediate_size": 3 * size,
            "num_attention_heads": 4,
        }

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(**blocks(4, WIDTH), image_size=SIZE, patch_size=PATCH, projection_dim=WIDTH)
    text = LlamaConfig(
        **blocks(layers, width),
        **ids,
        num_key_value_heads=4,
        initializer_range=spread,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )


def make_model(tokenizer, **sizes):
    """A LLaVA with random weights; sizes are options of `make_config`."""
    return LlavaForConditionalGeneration(make_config(tokenizer, **sizes))


def load_model(files, tokenizer, **sizes):
    """A model with the weights that files hold under the names of `stored`, in float32 whatever they are stored in."""
    model, report = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=make_config(tokenizer, **sizes),
        state_dict={name: weight for file in files for name, weight in load_file(file).items()},
        dtype=torch.float32,
        output_loading_info=True,
    )
    wrong = {what: names for what, names in report.items() if names}
    if wrong:
        raise ValueError(f"{' and '.join(map(str, files))} do not hold this model's weights: {wrong}")
    return model.eval()


def stored(model):
    """{name: weight} as `save_pretrained` names them, in half the bytes."""
    halves = {name: weight.half() for name, weight in model.state_dict().items()}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=halves)
        return load_file(Path(folder) / "model.safetensors")


def normalised(images):
    """(n, 64, 64, 3) bytes to (n, 3, 64, 64) floats in -1..1, as the processor does."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def see(model, pixels, batch=500):
    """(n, patches, width): what the vision tower makes of normalised pixels, which never gets a gradient."""
    tower = getattr(model, "model", model).vision_tower
    return torch.cat([tower(part).last_hidden_state[:, 1:] for part in pixels.split(batch)])


def read(model, tokenizer, pixels, ids, turn, places):
    """Hidden states of several turns about each image, every turn as if it stood alone.

    The turns about an image share one sequence: a turn sees the image and itself, so the image is read once.

    Args:
        pixels: (n, 3, 64, 64), normalised, or what `see` made of them.
        ids: (n, length), the tokens of all turns one after another.
        turn: (n or 1, length), which turn a token belongs to, from 1.
        places: (n or 1, length), the place of a token in its turn, from 0.

    Returns:
        (n, length, hidden)
    """
    model = getattr(model, "model", model)
    lead = torch.tensor(tokenizer("USER:").input_ids, device=ids.device)
    embed = model.get_input_embeddings()
    seen = model.multi_modal_projector(pixels if pixels.dim() == 3 else see(model, pixels))
    inputs = torch.cat([embed(lead).expand(len(ids), -1, -1), seen, embed(ids)], 1)
    before = len(lead) + PATCHES
    turn = torch.nn.functional.pad(turn, (before, 0))
    first = torch.arange(before, device=ids.device).expand(len(places), -1)
    visible = (turn[:, None, :] == 0) | (turn[:, :, None] == turn[:, None, :])
    visible = visible.tril()[:, None].expand(len(ids), -1, -1, -1)
    places = torch.cat([first, before + places], 1).expand(len(ids), -1)
    hidden = model.language_model(
        inputs_embeds=inputs, attention_mask=visible, position_ids=places, use_cache=False
    ).last_hidden_state
    return hidden[:, before:]


@torch.no_grad()
def ask(model, tokenizer, pixels, image, index, batch=64):
    """Logits of the first word of the answer to "Is there a X in the image?".

    Args:
        pixels: (images, 3, 64, 64), normalised, on the model's device.
        image: (n,) which image each question is about.
        index: (n,) which object it asks for.

    Returns:
        (n, vocabulary) float32 on the CPU; those that the model's own forward gives.
    """
    image, index = torch.as_tensor(image), torch.as_tensor(index)
    texts = [f"{question(i)} ASSISTANT:" for i in range(len(OBJECTS))]
    texts = torch.tensor(tokenizer(texts, add_special_tokens=False).input_ids)
    length = texts.shape[1]
    logits = torch.empty(len(image), len(tokenizer))
    for start in range(0, len(pixels), batch):
        chosen = ((image >= start) & (image < start + batch)).nonzero()[:, 0]
        chosen = chosen[image[chosen].argsort(stable=True)]
        if not len(chosen):
            continue
        rows = image[chosen] - start
        count = rows.bincount(minlength=min(batch, len(pixels) - start))
        slots = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
        most = int(count.max())
        ids = texts[0].repeat(len(count), most, 1)
        ids[rows, slots] = texts[index[chosen]]
        turn = torch.arange(1, most + 1).repeat_interleave(length)[None]
        places = torch.arange(length).repeat(most)[None]
        ids, turn, places = (tensor.to(pixels.device) for tensor in (ids.flatten(1), turn, places))
        hidden = read(model, tokenizer, pixels[start : start + batch], ids, turn, places)[:, length - 1 :: length]
        logits[chosen] = model.lm_head(hidden).float().cpu()[rows, slots]
    return logits
