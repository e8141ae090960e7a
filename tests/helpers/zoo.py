"""Tiny vision-language models with random weights, their processors and pictures: all made offline in milliseconds."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hkdfast.hf import SeedConfig

SIZE, PATCH, WIDTH = 32, 8, 32  # pixels a side, pixels a patch, hidden size
PATCHES = (SIZE // PATCH) ** 2
IMAGE = 4  # id of the image token
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<start>", "<end>", "<video>")
WORDS = (
    "user",
    "assistant",
    ":",
    "is",
    "there",
    "a",
    "cat",
    "dog",
    "cow",
    "in",
    "the",
    "image",
    "?",
    "yes",
    "no",
    "one",
    "word",
)
CHAT = (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}MARK {% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LAYERS = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(**LAYERS, num_key_value_heads=2)


def llama(vocab=61, **others):
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return hf.LlamaConfig(**GROUPED, **ids, vocab_size=vocab, max_position_embeddings=128, **others)


def qwen(vocab=61, **others):
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return hf.Qwen2Config(**GROUPED, **ids, vocab_size=vocab, max_position_embeddings=128, **others)


def clip():
    return hf.CLIPVisionConfig(**LAYERS, image_size=SIZE, patch_size=PATCH, projection_dim=WIDTH)


def llava(text=None):
    config = hf.LlavaConfig(
        vision_config=clip(),
        text_config=text or llama(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def internvl(text=None):
    vision = hf.InternVLVisionConfig(**LAYERS, image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH])
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=text or qwen(),
        image_token_id=IMAGE,
        image_seq_length=PATCHES // 4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )
    return hf.InternVLForConditionalGeneration(config).eval()


def paligemma_softcap():
    """Gemma 2 under PaliGemma: the wrapper leaves the softcap to the text model, which applies it."""
    vision = dict(model_type="siglip_vision_model", **LAYERS, image_size=SIZE, patch_size=PATCH, vision_use_head=False)
    text = dict(model_type="gemma2", **GROUPED, vocab_size=61, head_dim=8, final_logit_softcapping=5.0, pad_token_id=0)
    config = hf.PaliGemmaConfig(
        vision_config=vision | {"projection_dim": WIDTH},
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config).eval()


def llava_ignored_scale():
    """Granite under LLaVA: the configuration names a logit scale that nobody applies."""
    return llava(
        hf.GraniteConfig(**GROUPED, vocab_size=61, logits_scaling=8.0, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )


def instructblip():
    """A model that is its own base_model and shows no hidden states."""
    vision = dict(**LAYERS, image_size=SIZE, patch_size=PATCH)
    former = dict(**LAYERS, vocab_size=61, encoder_hidden_size=WIDTH)
    config = hf.InstructBlipConfig(
        vision_config=vision,
        qformer_config=former,
        text_config=llama().to_dict(),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return hf.InstructBlipForConditionalGeneration(config).eval()


MODELS = {f.__name__: f for f in (llava, internvl, paligemma_softcap, llava_ignored_scale, instructblip)}
IMAGE_TOKENS = {
    "llava": PATCHES,
    "internvl": PATCHES // 4,
    "paligemma_softcap": PATCHES,
    "llava_ignored_scale": PATCHES,
}
IMAGE_TOKENS["instructblip"] = 4


def build(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():  # at 0.02 the usual initialization leaves nothing to distill
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def batch(name="llava", size=4, extra=6, seed=1, answers=None, pad=None):
    """A batch of prompts for a model of the zoo. `answers` labels the last so many tokens, `pad` ("left" or "right")
    makes row i shorter by i words."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(8, 61, (size, extra), generator=draw)
    ids = torch.cat([words[:, :1], torch.full((size, IMAGE_TOKENS[name]), IMAGE), words[:, 1:]], 1)
    mask = torch.ones_like(ids)
    if pad:
        # a shorter prompt each: its last words go, for the first ones are followed by the image
        kept = [row[: len(row) - i] for i, row in enumerate(ids)]
        ids = torch.stack(
            [torch.nn.functional.pad(row, (i, 0) if pad == "left" else (0, i)) for i, row in enumerate(kept)]
        )
        mask = (ids != 0).long()
    found = dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(size, 3, SIZE, SIZE, generator=draw))
    if name == "instructblip":
        found |= dict(qformer_input_ids=words, qformer_attention_mask=torch.ones_like(words))
    if name == "paligemma_softcap":
        found |= dict(token_type_ids=torch.zeros_like(ids))
    if answers:
        labels = torch.full_like(ids, -100)
        labels[:, -answers:] = ids[:, -answers:]
        found["labels"] = labels.masked_fill(mask == 0, -100)
    return found


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = dict(
        image_token="<image>", start_image_token="<start>", end_image_token="<end>", context_image_token="<image>",
        video_token="<video>",
    )  # fmt: skip
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=extra,
    )


class StillInternVLProcessor(hf.InternVLProcessor):
    """InternVL's own processor, without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)


def processor(name="llava"):
    if name == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        images = GotOcr2ImageProcessorPil(size={"height": SIZE, "width": SIZE}, crop_to_patches=False)
        return StillInternVLProcessor(
            images, tokenizer(), image_seq_length=PATCHES // 4, chat_template=CHAT.replace("MARK", "<image>")
        )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("MARK", "<image>"),
    )


def picture(seed):
    """A picture of color and noise."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (40, 48, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost these tiny models more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Rows(torch.utils.data.Dataset):
    """The rows of a batch as examples."""

    def __init__(self, batch):
        self.rows = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["input_ids"]))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def config(folder, **options):
    """A SeedConfig of one quiet step on the CPU, unless the options say otherwise."""
    quiet = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=1, learning_rate=1e-3)
    return SeedConfig(str(folder), **(quiet | options))


WORKER = """
import os, sys
sys.path[:0] = {path!r}
import torch, zoo
torch.set_num_threads(1)
FOLDER = {folder!r}
{body}
# in order: a process whose peer is gone while its own group still lives is aborted by gloo
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# what still holds the group (DDP) would end it with the interpreter, where gloo's threads may abort: pytorch#190489
sys.stdout.flush()
os._exit(0)
"""


def two_processes(folder, body):
    """Run Python code, which knows torch, zoo and FOLDER, in two processes that form a group."""
    codes, errors = processes(folder, body, 2)
    assert codes == [0, 0], "\n".join(error[-2000:] for error in errors)


def processes(folder, body, count, timeout=300):
    """(exit codes, texts on stderr) of so many processes that run the code as `two_processes` does."""
    helpers = Path(__file__).parent
    script = folder / "worker.py"
    script.write_text(
        WORKER.format(
            path=[str(helpers.parents[1]), *(str(helpers.parent / name) for name in ("helpers", "hf"))],
            folder=str(folder),
            body=body,
        )
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    workers = [
        subprocess.Popen(
            [sys.executable, script],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    try:
        errors = [worker.communicate(timeout=timeout)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], errors
