"""Tiny vision-language models of many families, and a batch with pictures for each; those of `zoo` are others."""

import torch
import transformers as hf
from zoo import GROUPED, IMAGE, LAYERS, PATCH, PATCHES, SIZE, WIDTH, clip, llama, qwen

IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIGLIP = dict(model_type="siglip_vision_model", **LAYERS, image_size=SIZE, patch_size=PATCH, vision_use_head=False)
NO_TOKENS = dict(image_token_id=IMAGE, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7)
TILES = PATCHES + 4 * 5  # a thumbnail, and one tile whose rows of patches end in a mark


def pictures(*shape):
    return torch.randn(2, *shape, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def gemma(kind, **others):
    one = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    return dict(model_type=kind, **one, num_key_value_heads=1, vocab_size=61, **IDS, **others)


def llava_siglip():
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config=qwen(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=PATCHES,
    )
    return hf.LlavaForConditionalGeneration(config), PATCHES, dict(pixel_values=pictures())


def llava_next(text=None):
    config = hf.LlavaNextConfig(
        vision_config=clip(),
        text_config=text or llama(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[SIZE, SIZE]],
    )
    sizes = torch.tensor([[SIZE, SIZE]] * 2)
    return hf.LlavaNextForConditionalGeneration(config), TILES, dict(pixel_values=pictures(2), image_sizes=sizes)


def llava_next_granite():
    """Granite's scale is in the configuration, and LLaVA-NeXT does not apply it."""
    return llava_next(hf.GraniteConfig(**GROUPED, **IDS, vocab_size=61, logits_scaling=8.0))


def llava_onevision():
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=qwen(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[SIZE, SIZE]],
    )
    sizes = torch.tensor([[SIZE, SIZE]] * 2)
    inputs = dict(pixel_values=pictures(2), image_sizes=sizes, batch_num_images=torch.tensor([1, 1]))
    return hf.LlavaOnevisionForConditionalGeneration(config), TILES, inputs


def rotary(**others):
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2], **others)


def patches():
    flat = torch.randn(2 * PATCHES, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(0))
    return dict(pixel_values=flat, image_grid_thw=torch.tensor([[1, SIZE // PATCH, SIZE // PATCH]] * 2))


def qwen2_5_vl():
    vision = dict(
        depth=2, hidden_size=WIDTH, intermediate_size=48, num_heads=4, patch_size=PATCH, out_hidden_size=WIDTH
    )
    config = hf.Qwen2_5_VLConfig(
        text_config=dict(**GROUPED, **IDS, vocab_size=61, rope_parameters=rotary()),
        vision_config=vision | dict(window_size=SIZE, fullatt_block_indexes=[1]),
        **NO_TOKENS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), PATCHES // 4, patches()


def qwen3_vl():
    vision = dict(
        depth=3, hidden_size=WIDTH, intermediate_size=48, num_heads=4, patch_size=PATCH, out_hidden_size=WIDTH
    )
    text = GROUPED | dict(num_hidden_layers=3, head_dim=8, rope_parameters=rotary(mrope_interleaved=True))
    config = hf.Qwen3VLConfig(
        text_config=dict(**text, **IDS, vocab_size=61),
        vision_config=vision | dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        **NO_TOKENS,
    )
    return hf.Qwen3VLForConditionalGeneration(config), PATCHES // 4, patches()


def smolvlm(config=hf.SmolVLMConfig, model=hf.SmolVLMForConditionalGeneration):
    made = config(
        vision_config=dict(**LAYERS, image_size=SIZE, patch_size=PATCH),
        text_config=llama(),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return model(made), PATCHES // 4, dict(pixel_values=pictures(1))


def idefics3():
    return smolvlm(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration)


def paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP | {"projection_dim": WIDTH},
        text_config=gemma("gemma"),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config), PATCHES, dict(pixel_values=pictures(), token_type_ids=None)


def gemma3(**others):
    text = gemma("gemma3_text", sliding_window=32, **others)
    config = hf.Gemma3Config(
        vision_config=SIGLIP,
        text_config={name: x for name, x in text.items() if name != "model_type"},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=5,
        eoi_token_index=6,
    )
    return hf.Gemma3ForConditionalGeneration(config), 4, dict(pixel_values=pictures(), token_type_ids=None)


def gemma3_ignored_softcap():
    return gemma3(final_logit_softcapping=3.0)


def mistral3():
    vision = dict(model_type="pixtral", **LAYERS, image_size=SIZE, patch_size=PATCH, head_dim=8)
    config = hf.Mistral3Config(
        vision_config=vision,
        text_config=dict(model_type="mistral", **GROUPED, **IDS, vocab_size=61, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    sizes = torch.tensor([[SIZE, SIZE]] * 2)
    return hf.Mistral3ForConditionalGeneration(config), PATCHES // 4, dict(pixel_values=pictures(), image_sizes=sizes)


def aya_vision():
    """Cohere's scale is in the configuration, and Aya Vision does not apply it."""
    text = dict(model_type="cohere2", **GROUPED, **IDS, vocab_size=61, logit_scale=0.25, sliding_window=32)
    config = hf.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config=text,
        image_token_index=IMAGE,
        downsample_factor=2,
        vision_feature_layer=-1,
    )
    return hf.AyaVisionForConditionalGeneration(config), PATCHES // 4, dict(pixel_values=pictures())


MODELS = {
    made.__name__: made
    for made in (
        llava_siglip, llava_next, llava_next_granite, llava_onevision, qwen2_5_vl, qwen3_vl, smolvlm, idefics3,
        paligemma, gemma3, gemma3_ignored_softcap, mistral3, aya_vision,
    )
}  # fmt: skip


def build(name):
    """(model, batch of two examples with a picture each)."""
    torch.manual_seed(0)
    model, image_tokens, inputs = MODELS[name]()
    with torch.no_grad():  # at 0.02 the usual initialization leaves logits that are all alike
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.02)  # Gemma 3 begins with a projector of zeros
            if parameter.dim() > 1:
                parameter.mul_(4)
    words = torch.randint(8, 61, (2, 8), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:, :1], torch.full((2, image_tokens), IMAGE), words[:, 1:]], 1)
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return model.eval(), dict(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
