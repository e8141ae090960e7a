"""Noise belongs to a picture of an example: in the layouts of transformers' own processors, whatever its batch."""

import importlib
import re

import numpy as np
import pytest
import torch
import transformers as hf
import zoo
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from zoo import one_thread  # noqa: F401

from hkdfast.batch import derive_seed, noised
from hkdfast.hf import SeedTrainer
from hkdfast.hf.seed import placeholders
from hkdfast.noise import normal, survival
from hkdfast.seed import isolate

PLACES = {"image": zoo.IMAGE, "video": 7}


def processor(family, kind, **options):
    """A processor of transformers that needs no torchvision."""
    name = f"transformers.models.{family}.image_processing_pil_{family}"
    return getattr(importlib.import_module(name), f"{kind}ImageProcessorPil")(**options)


def picture(height, width):
    draw = np.random.default_rng(height * width)
    return Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))


SMALL, TALL, WIDE = picture(40, 48), picture(64, 24), picture(24, 72)
ONE_EACH = [[SMALL], [TALL], [WIDE]]
SEVERAL = [[SMALL], [TALL, WIDE], [SMALL]]
# name: (processor, whether it takes pictures by example, examples, placeholders of a picture by its own output)
LAYOUTS = {
    "a picture each": (lambda: zoo.processor().image_processor, False, ONE_EACH, lambda x: 16),
    "several pictures": (lambda: zoo.processor().image_processor, False, SEVERAL, lambda x: 16),
    "patches": (
        lambda: processor("qwen2_vl", "Qwen2VL", patch_size=8, size=dict(shortest_edge=256, longest_edge=4096)),
        False, SEVERAL, lambda x: len(x["pixel_values"]) // 4,
    ),
    "padded tiles": (
        lambda: processor("smolvlm", "SmolVLM", size=dict(longest_edge=64), max_image_size=dict(longest_edge=32)),
        True, SEVERAL, lambda x: 4 * x["pixel_values"].shape[1],
    ),
    "padded pixels": (
        lambda: processor("idefics2", "Idefics2", size=dict(shortest_edge=16, longest_edge=64)),
        True, SEVERAL, lambda x: 64,
    ),
    "padded pixels of pictures": (
        lambda: processor("pixtral", "Pixtral", patch_size=8, size=dict(longest_edge=64)),
        True, SEVERAL, lambda x: x["image_sizes"].prod().item() // 64,
    ),
    "precision": (
        lambda: processor(
            "got_ocr2", "GotOcr2", size=dict(height=32, width=32), crop_to_patches=True, min_patches=1, max_patches=4
        ),
        False, SEVERAL, lambda x: 4 * len(x["pixel_values"]),
    ),
    "padded tiles of pictures": (
        lambda: processor(
            "llava_next", "LlavaNext", size=dict(shortest_edge=32), crop_size=dict(height=32, width=32),
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        ),
        False, ONE_EACH, lambda x: 16 * x["pixel_values"].shape[1] + 5,
    ),
}  # fmt: skip


def batches(layout, channel="placeholders", **extra):
    """The examples of a layout in one batch, and each in its own."""
    make, nested, examples, tokens = LAYOUTS[layout]
    images = make()
    counts = [sum(tokens(call(images, [[one]], nested)) for one in example) for example in examples]
    ids = torch.zeros(len(examples), max(counts) + 2, dtype=torch.long)
    for row, count in zip(ids, counts, strict=True):
        row[1 : count + 1] = zoo.IMAGE
    whole = call(images, examples, nested) | {"input_ids": ids}
    alone = [call(images, [x], nested) | {"input_ids": ids[i : i + 1]} for i, x in enumerate(examples)]
    if channel == "kinds":
        for batch in (whole, *alone):
            batch["mm_token_type_ids"] = (batch["input_ids"] == zoo.IMAGE).int()
    return whole, alone


def call(images, examples, nested):
    found = images(examples if nested else [x for example in examples for x in example], return_tensors="pt")
    # what the processor of images and text keeps to itself
    return {name: x for name, x in found.items() if name not in ("num_patches", "rows", "cols")}


@pytest.mark.parametrize("channel", ["placeholders", "kinds"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_example_has_the_same_noise_in_every_batch(layout, channel):
    whole, alone = batches(layout, channel)
    ids = PLACES if channel == "placeholders" else None
    together = noised(whole, 999, seed=7, placeholders=ids)["pixel_values"]
    start, seen = 0, []
    for i, one in enumerate(alone):
        own = noised(one, 999, seed=7, first=i, placeholders=ids)["pixel_values"]
        corner = (slice(start, start + len(own)), *(slice(size) for size in own.shape[1:]))
        assert torch.equal(together[corner], own) and not torch.equal(own, one["pixel_values"])
        start += len(own)
        seen.append((own - survival()[999] ** 0.5 * one["pixel_values"]).flatten()[:100])
    assert start == len(together)
    assert not torch.allclose(seen[0], seen[-1], atol=0.1)  # the same picture, where there are several


def test_noise_of_a_still_picture_is_that_of_its_copies():
    """Both frames of a patch are one picture: what adds them up sees the whole variance."""
    whole, _ = batches("patches")
    for seed in (None, 3):
        noisy = noised(whole, 999, seed=seed, placeholders=PLACES)["pixel_values"].view(-1, 3, 2, 64)
        assert torch.equal(noisy[:, :, 0], noisy[:, :, 1])
        noise = noisy.mean(2) - survival()[999] ** 0.5 * whole["pixel_values"].view(-1, 3, 2, 64)[:, :, 0]
        assert noise.var().item() == pytest.approx(1 - survival()[999], rel=0.05)


def frames(layout):
    """Two grids of four patches: the first of a video's frames 0 and 1, the second of its last twice."""
    first, second, last = torch.randn(3, 4, 3, 64)
    pairs = [torch.stack(pair, 2 if layout == "channels first" else 1) for pair in ((first, second), (last, last))]
    return torch.cat(pairs).flatten(1)


@pytest.mark.parametrize("layout", ["channels first", "frames first"])
def test_frames_of_a_video_have_noise_of_their_own_but_copies(layout):
    video = frames(layout)
    batch = dict(input_ids=torch.ones(1, 4), pixel_values_videos=video, video_grid_thw=torch.tensor([[2, 2, 2]]))
    noise = noised(batch, sigma=1.0, seed=1)["pixel_values_videos"] - video
    noise = noise.view(2, 4, *((3, 2) if layout == "channels first" else (2, 3)), 64)
    once, again = noise.unbind(3 if layout == "channels first" else 2)
    assert torch.allclose(once[1], again[1], atol=1e-5) and not torch.allclose(once[0], again[0], atol=1)
    channels = once[1].unbind(1)
    assert not torch.allclose(channels[0], channels[1], atol=1)


def test_one_frame_in_a_row_of_patches_is_left_alone():
    flat = torch.zeros(4, 3 * 1 * 8 * 8)  # of one color: whatever is compared with whatever is equal
    batch = dict(input_ids=torch.ones(1, 4), pixel_values=flat, image_grid_thw=torch.tensor([[1, 2, 2]]))
    assert len(noised(batch, seed=1)["pixel_values"].unique()) > 760


def smolvlm():
    vision = dict(**zoo.LAYERS, image_size=32, patch_size=8)
    config = hf.SmolVLMConfig(vision_config=vision, text_config=zoo.llama(), image_token_id=zoo.IMAGE, scale_factor=2)
    return hf.SmolVLMForConditionalGeneration(config).eval()


@pytest.mark.parametrize("seed", [None, 3])
def test_padding_stays_what_the_model_takes_for_padding(seed):
    whole, alone = batches("padded tiles")
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    padding = (whole["pixel_values"] == 0).flatten(2).all(-1)
    noisy = noised(whole, seed=seed)
    assert padding.any() and torch.equal((noisy["pixel_values"] == 0).flatten(2).all(-1), padding)
    torch.manual_seed(0)
    model = smolvlm()
    with torch.no_grad():
        logits = model(**noisy).logits
        if seed is not None:
            one = noised(alone[0], seed=seed)
            torch.testing.assert_close(model(**one).logits[0], logits[0], atol=1e-4, rtol=1e-4)


def qwen():
    text = dict(zoo.GROUPED, vocab_size=61, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2]))
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=8, out_hidden_size=32, window_size=32,
        spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[1],
    )  # fmt: skip
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=zoo.IMAGE, video_token_id=7, vision_start_token_id=5
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config).eval()


def test_a_model_names_its_placeholders():
    assert placeholders(qwen().config) == {"image": zoo.IMAGE, "video": 7}
    assert placeholders(zoo.build("llava").config) == {"image": zoo.IMAGE, "video": None}
    whole, alone = batches("patches")
    seen = []
    model = lambda batch: seen.append(batch["pixel_values"])  # noqa: E731
    isolate(model, whole, seed=2, placeholders=placeholders(qwen().config))
    isolate(model, alone[0], seed=2)
    assert torch.equal(seen[0][: len(seen[1])], seen[1])


def joined(examples):
    ids = pad_sequence([x["input_ids"][0] for x in examples], batch_first=True, padding_side="left")
    batch = {name: torch.cat([x[name] for x in examples]) for name in ("pixel_values", "image_grid_thw")}
    return batch | dict(input_ids=ids, attention_mask=(ids > 0).long(), mm_token_type_ids=(ids == zoo.IMAGE).int())


def test_a_step_is_the_same_however_it_is_split(tmp_path):
    """Pictures of unequal numbers of patches, and several of them: a step's gradient knows nothing of its batches."""
    _, alone = batches("patches")
    for x in alone:
        pictures = [[5, *[zoo.IMAGE] * (grid.prod().item() // 4)] for grid in x["image_grid_thw"]]
        x["input_ids"] = torch.tensor([[*sum(pictures, []), 9, 10]])
    losses = []
    for size, steps in ((3, 1), (1, 3)):
        torch.manual_seed(0)
        args = zoo.config(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, alpha=3.0)
        trainer = SeedTrainer(qwen(), args, train_dataset=alone, data_collator=joined)
        trainer.train()
        losses.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm", "contrast_weight")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][1] > 0


def test_no_two_examples_of_a_step_share_their_noise(tmp_path):
    """The last batch of an epoch, on several GPUs of one process: fewer examples than a batch, more than one GPU's."""
    trainer = SeedTrainer(zoo.build("llava"), zoo.config(tmp_path, per_device_train_batch_size=4))
    trainer._train_batch_size = 8
    assert [trainer.next_noise(size)["first"] for size in (8, 8, 5)] == [0, 8, 16]


@pytest.mark.parametrize("layout", ["precision", "padded tiles of pictures"])
def test_rows_that_could_be_anybodys_are_refused(layout):
    whole, alone = batches(layout)
    if layout == "padded tiles of pictures":  # of what sizes the pictures of an example are, its tokens do not tell
        whole["pixel_values"] = torch.cat([whole["pixel_values"], whole["pixel_values"][:1]])
        whole["image_sizes"] = torch.cat([whole["image_sizes"], whole["image_sizes"][:1]])
    rows = len(whole["pixel_values"])
    ids = None if layout == "precision" else PLACES
    with pytest.raises(ValueError, match=f"pixel_values has {rows} rows for 3 examples.*batches of one example"):
        noised(whole, seed=1, placeholders=ids)
    noised(whole)  # torch's own generator follows no example
    noised(alone[1], seed=1)


def test_an_example_without_a_picture_takes_nobodys():
    ids = torch.tensor([[4, 4, 1], [1, 1, 1], [4, 1, 1]])
    batch = dict(input_ids=ids, pixel_values=torch.randn(3, 3, 8, 8))
    noisy = noised(batch, seed=5, placeholders=PLACES)["pixel_values"]
    last = noised(dict(input_ids=ids[2:], pixel_values=batch["pixel_values"][2:]), seed=5, first=2)["pixel_values"]
    assert torch.equal(noisy[2:], last)
    with pytest.raises(ValueError, match="does not show which rows belong to which"):  # of unequal sizes
        ids = torch.tensor([[4, 4, 4], [1, 1, 1], [4, 4, 1]])
        noised(batch | {"input_ids": ids}, seed=5, placeholders=PLACES)


def test_the_number_of_pictures_may_be_in_the_batch():
    batch = dict(
        input_ids=torch.ones(2, 3, dtype=torch.long), pixel_values=torch.randn(3, 2, 3, 8, 8),
        image_sizes=torch.full((3, 2), 8), batch_num_images=torch.tensor([1, 2]),
    )  # fmt: skip
    noisy = noised(batch, seed=5)["pixel_values"]
    second = dict(input_ids=batch["input_ids"][1:], pixel_values=batch["pixel_values"][1:])
    assert torch.equal(noisy[1:], noised(second, seed=5, first=1)["pixel_values"])


def test_every_image_of_the_batch_has_noise():
    ids, x = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, 8, 8)
    names = ("pixel_values", "pixel_values_videos", "high_res_pixel_values", "image_pixel_values")
    noisy = noised(dict(input_ids=ids, **dict.fromkeys(names, x)), seed=1)
    assert all(noisy[name].std() > 0.4 for name in names)
    assert not torch.equal(noisy["pixel_values"], noisy["high_res_pixel_values"])  # nor the same one


@pytest.mark.parametrize("nested", [False, True])
def test_images_may_be_a_list_with_an_entry_for_each_example(nested):
    one, two = torch.randn(3, 8, 8), torch.randn(3, 16, 4).bfloat16()
    images = [[one, two], [two]] if nested else [one, two]
    ids = torch.ones(2, 3, dtype=torch.long)
    noisy = noised(dict(input_ids=ids, pixel_values=images), seed=1)["pixel_values"]
    again = noised(dict(input_ids=ids[1:], pixel_values=images[1:]), seed=1, first=1)["pixel_values"]
    last, same = (x[-1][-1] if nested else x[-1] for x in (noisy, again))
    assert torch.equal(last, same) and last.dtype == torch.bfloat16 and not torch.equal(last, two)
    assert nested == isinstance(noisy[0], list)


BAD = {
    "pixel_values is a list of 1, expected one entry for each of 2 examples": [torch.zeros(3, 4, 4)],
    "pixel_values[1] must be a floating point tensor, as a processor normalizes them, got ndarray": [
        torch.zeros(3, 4, 4), np.zeros((3, 4, 4)),
    ],
    "pixel_values must be a floating point tensor, as a processor normalizes them, got torch.uint8": torch.zeros(
        2, 3, 4, 4, dtype=torch.uint8
    ),
    "pixel_values must be a floating point tensor, as a processor normalizes them, got ndarray": np.zeros((2, 3, 4, 4)),
    "expected 'pixel_values', got input_ids, pixel_values alone": None,
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_images(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        noised(dict(input_ids=torch.ones(2, 3), pixel_values=BAD[message]), seed=1)


# the numbers


def test_numbers_follow_from_their_place_alone():
    whole = normal((5, 16, 9), 3)
    assert torch.equal(whole[:3, :8, :8], normal((3, 8, 8), 3)) and not torch.equal(whole, normal((5, 16, 9), 4))
    assert len(whole.unique()) == whole.numel()


def test_numbers_are_standard_normal():
    x = torch.stack([normal((3, 300, 400), seed) for seed in range(8)]).double()
    few = 5 / x.numel() ** 0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (x**power).mean().item() == pytest.approx(moment, abs=few * spread**0.5)
    for axis in range(4):  # neighbors, and the same place under another seed
        here, there = x.narrow(axis, 1, x.shape[axis] - 1), x.narrow(axis, 0, x.shape[axis] - 1)
        assert (here * there).mean().abs() < few * 1.2
    below = [(x < z).double().mean().item() for z in (-2, -0.5, 1, 3)]
    assert below == pytest.approx([0.02275, 0.30854, 0.84134, 0.99865], abs=few)
    assert 4.5 < x.abs().max() < 6


def test_numbers_are_those_of_splitmix():
    def mix(key):
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        return key ^ key >> 31

    for seed in (0, 3, derive_seed(1, "train")):
        got = normal((5, 16, 9), seed)
        for place in ((0, 0, 0), (4, 15, 8)):
            key = seed
            for i in place:
                key = mix((key + 0x9E3779B97F4A7C15 * (i + 1)) % 2**64)
            u, v = ((key >> 40) + 0.5) / 2**24, (key >> 8) % 2**24 / 2**24
            exact = (-2 * np.log(u)) ** 0.5 * np.cos(2 * np.pi * v)
            assert got[place].item() == pytest.approx(exact, abs=1e-5)
