"""Every family of transformers: the loss through its head against the loss of the model's own logits."""

import re
from importlib.util import find_spec
from pathlib import Path

import families
import peft
import pytest
import torch
import transformers
import vlms
import zoo
from zoo import one_thread  # noqa: F401

from hkdfast import distill_loss
from hkdfast.hf import LanguageHead, loss_in_head

# What keeps a family out, as its own code says it, and the families. One that runs must not be here.
NEEDS_INPUTS = {
    "missing 1 required positional argument: 'pixel_values'": ["blip", "blip-2"],
    "missing 2 required positional arguments: 'pixel_values' and 'qformer_input_ids'": [
        "instructblip",
        "instructblipvideo",
    ],
    "Exactly 1 of pixel_values, image_encoder_embeddings or perceiver_embeddings": ["idefics"],
    "You have to specify either `pixel_values` or `image_embeds`": ["kosmos-2"],
    "You have to specify flattened_patches": ["pix2struct"],
    "You must specify exactly one of encoder_outputs or pixel_values": ["pp_formulanet"],
    "Bbox is required": ["udop"],
}
NOT_SHRUNK = {
    "million parameters": ["blt", "florence2", "janus", "t5gemma2", "vision-encoder-decoder"],
    "'NoneType' object has no attribute 'get'": ["chameleon", "emu3"],
    "'full_attention'": ["cohere_compass", "cohere_compass_text"],
    "'DbrxAttentionConfig' object has no attribute 'rope_theta'": ["dbrx"],
    "'NoneType' object is not subscriptable": ["deepseek_ocr2"],
    "empty()": ["diffusion_gemma", "dots1"],
    "`per_layer_config` keys must be integer layer indices": ["dots3_note"],
    "The expanded size of the tensor (8)": ["ernie4_5_vl_moe"],
    "'model_type'": ["exaone4_5"],
    "The set of layer types producing a cache": ["gemma3n_text", "gemma4_unified_assistant"],
    "hidden_size_per_layer_input must be 0": ["gemma4_assistant"],
    "object of type 'NoneType' has no len()": ["granite4_vision"],
    "'NoneType' and 'float'": ["hunyuan_vl"],
    "must index the 2 layers": ["molmo2"],
    "has no attribute 'dropout'": ["musicgen", "musicgen_melody"],
    "has no attribute 'vision_start_token_id'": ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"],
    "make sure that `is_decoder=True`": ["reformer"],
    "Could not find a `sliding_window` argument": ["step3p7"],
    "The size of tensor a (4096)": ["xlstm"],
    "must be equal to the number of `layer_types`": ["zamba", "zamba2"],
}
NOT_ONE_HEAD = {
    "has no language-model head": ["pi0"],
    "sees hidden states (2, 2, 9, 64), expected (batch, positions, H)": ["prophetnet"],
}
SKIPPED = {
    name: reason
    for table in (NEEDS_INPUTS, NOT_SHRUNK, NOT_ONE_HEAD)
    for reason, names in table.items()
    for name in names
}
MODULES = {"fast_vlm": "timm", "gemma3n": "timm", "perception_lm": "timm", "inkling_mm_model": "scipy"}
NO_ADAPTER = {"marian": "The size of tensor a (58101)"}  # PEFT undoes the resizing by its own prediction head

LOSS, GRADIENT = 2e-6, 7e-5  # relative errors that float32 explains


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def batch_of(model):
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def eager(model, batch, rows, target):
    torch.manual_seed(0)
    log_q = model(**batch, use_cache=False).logits[rows].float().log_softmax(-1)
    loss = torch.nn.functional.kl_div(log_q, target.log_softmax(-1), log_target=True, reduction="batchmean")
    return loss.item(), gradients(model, loss)


def fused(model, batch, rows, target):
    head = LanguageHead(model)
    head.verify(model, batch)
    torch.manual_seed(0)
    loss, _ = loss_in_head(model, model, head, batch, rows, lambda h: (distill_loss(head.source(h), target), {}))
    return loss.item(), gradients(model, loss)


def errors(model, batch):
    """Relative errors of the loss and of the worst gradient, and the name of that gradient."""
    rows = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    rows[:, 3:] = True
    words = LanguageHead(model).matrices(adapted=True)[0].shape[0]
    target = 2 * torch.randn(int(rows.sum()), words, generator=torch.Generator().manual_seed(2))
    truth, found = eager(model, batch, rows, target), fused(model, batch, rows, target)
    assert truth[1].keys() - found[1].keys() <= {name for name, grad in truth[1].items() if not grad.any()}
    sizes = {name: grad.abs().max().item() for name, grad in truth[1].items()}
    largest = max(sizes.values())
    off = {}
    for name, grad in found[1].items():
        # a key's bias moves all scores of a row alike: its gradient is rounding
        least = largest if re.search(r"(k_proj|key)\.bias$", name) else 1e-3 * largest
        off[name] = (grad - truth[1][name]).abs().max().item() / max(sizes[name], least)
    worst = max(off, key=off.get)
    return abs(found[0] - truth[0]) / truth[0], off[worst], worst


def head_name(model):
    head = LanguageHead(model).module
    return next(name for name, module in model.named_modules() if module is head)


def adapted(model):
    torch.manual_seed(3)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=re.escape(head_name(model)), init_lora_weights=False)
    )


def check(model, batch):
    loss, gradient, name = errors(model, batch)
    assert loss <= LOSS and gradient <= GRADIENT, name


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family(family):
    if family in MODULES and find_spec(MODULES[family]) is None:
        pytest.skip(f"needs {MODULES[family]}")
    if family in SKIPPED:
        with pytest.raises(Exception, match=re.escape(SKIPPED[family])):
            model = families.build(family)
            errors(model, batch_of(model))
        return
    model = families.build(family)
    batch = batch_of(model)
    check(model, batch)
    model = adapted(model)
    if family in NO_ADAPTER:
        with pytest.raises(RuntimeError, match=re.escape(NO_ADAPTER[family])):
            check(model, batch)
        return
    check(model, batch)


def test_enough_families_are_compared():
    missing = (set(SKIPPED) | set(MODULES)) - set(families.FAMILIES)
    assert not missing, f"not in transformers {transformers.__version__}"
    assert len(set(families.FAMILIES) - set(SKIPPED) - set(MODULES)) >= 220


def test_the_docs_name_those_that_are_not_compared():
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text().split("### Which models")[1]
    named = [name for line in text.splitlines() if line.startswith("| `") for name in re.findall("`(.+?)`", line)]
    assert sorted(named) == sorted([*SKIPPED, *MODULES])
    counts = re.search(r"Of the (\d+) .* of transformers ([\d.]+), (\d+) are compared", text)
    if transformers.__version__.startswith(counts[2]):
        assert [int(counts[1]), int(counts[3])] == [len(families.FAMILIES), len(families.FAMILIES) - len(named)]
    assert f"from {len(vlms.MODELS) + len(zoo.MODELS)} configurations" in text


@pytest.mark.parametrize("name", [*vlms.MODELS, *zoo.MODELS])
def test_pictures(name):
    model, batch = vlms.build(name) if name in vlms.MODELS else (zoo.build(name), zoo.batch(name, size=2))
    with torch.no_grad():
        logits, others = (model(**batch, use_cache=False).logits for batch in (batch, negative(batch)))
    assert not torch.allclose(logits, others)  # the pictures matter
    check(model, batch)
    check(adapted(model), batch)


def negative(batch):
    return batch | {"pixel_values": -batch["pixel_values"]}
