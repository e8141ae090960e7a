"""Every causal and image-text family of transformers, built from its default configuration made small by one rule."""

import re

import torch
import transformers as hf
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB = 131
LARGEST = 40_000_000  # parameters of a model that is still small
FAMILIES = {  # {model type: name of its class}
    name: kind if isinstance(kind, str) else kind[0]
    for name, kind in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES).items()
}
SIZES = [  # (pattern of an option's name, its largest value); the first that fits holds
    (r"vocab_size.*|n_words", VOCAB),
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length", 128),
    (r"sliding_window.*|attention_window|local_attention", 32),
    (r".*(kv|q)_lora_rank|.*lora_rank|time_step_rank|.*_low_rank_dim", 16),
    (r".*(num_experts_per_tok|top_k.*|moe_k|experts_per_token|num_selected_experts)", 2),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 4),
    (r"n_group|topk_group|first_k_dense_replace|n_shared_experts|.*groups?", 1),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim|index_head_dim", 8),
    (r".*(head_dim|head_size|d_head|d_kv|d_state|state_size|state_dim)", 16),
    (r".*(key_value_heads|kv_heads|n_kv_head|num_kv_heads|multi_query_group_num)", 2),
    (r".*(num_.*heads|attention_heads|n_heads?|num_heads|.*mamba_n_heads)", 4),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|ff_dim|d_inner|inner_dim)", 96),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|hidden_dim|.*_embd|lru_width|width|projection_dim)",
        64,
    ),
    (r".*(num_.*layers|n_layers?|.*_layers|depth|num_blocks|block_count)", 2),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r".*num_query_tokens|num_latents|num_queries", 4),
    (r"num_mel_bins|n_mels", 16),
]
LISTED = r".*(layer_types|block_types?|layers_block_type|hybrid_override_pattern|attention_layers|layer_type_list)"
TOGETHER = {  # where the first option is, these have one size that fits it
    "kv_lora_rank": {"num_key_value_heads": 4, "head_dim": 8},
    "mamba_expand": {"mamba_n_heads": 8, "mamba_num_heads": 8},
    "mamba_d_ssm": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "expand": {"num_heads": 8, "mamba_num_heads": 8},
}
OWN = {  # what no rule finds
    "deepseek_v2": {"num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "mistral4"), {"head_dim": 16}),
    "nemotron": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xmod": {"default_language": "en_XX"},
}
MROPE = {  # parts of the rotary dimensions, where the default is a constant of the code
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), [2, 3, 3]),
    "glm4v_moe": [1, 1, 2],
}
DROPPED = {
    "per_layer_config",
    "architectures",
    "transformers_version",
    "model_type",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
}


def smaller(options):
    """The options of a configuration, made small; what follows from the number of layers is left to its defaults."""
    made, layers = {}, options.get("num_hidden_layers")
    for name, value in options.items():
        if name in DROPPED or name.startswith("_") or value is None or re.fullmatch(LISTED, name):
            continue
        if isinstance(value, dict):
            made[name] = smaller(value) if name.endswith("config") else value
            if "mrope_section" in value:
                made[name] = value | {"mrope_section": [2, 3, 3]}
        elif isinstance(value, int) and not isinstance(value, bool):
            made[name] = small_number(name, value)
        else:
            made[name] = value[:2] if isinstance(value, list) and len(value) == layers else value
    for sign, others in TOGETHER.items():
        if sign in made:
            made |= {name: value for name, value in others.items() if name in made}
    return made


def small_number(name, value):
    if re.search(r"token_(id|index)$", name):
        return value if value < VOCAB else 100 + sum(map(ord, name)) % 25
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    return min(value, size) if value > 0 else value


def parts(config):
    """A configuration and those within it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from parts(getattr(config, name))


def build(family):
    """A model of a family with random weights, float32, in eval mode.

    Raises:
        Exception: whatever its code makes of the small configuration. ValueError if it is still large.
    """
    kind = hf.CONFIG_MAPPING[family]
    options = smaller(kind().to_dict()) | OWN.get(family, {})
    if family in MROPE:
        options["text_config"].setdefault("rope_parameters", {}).update(mrope_section=MROPE[family])
    config = kind(**options)
    for part in parts(config):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(part, name, None)
            if isinstance(token, list | tuple) or (token or 0) >= VOCAB:
                setattr(part, name, 2)
    cls = getattr(hf, FAMILIES[family])
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count // 10**6} million parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():  # at 0.02 the usual initialization leaves logits that are all alike
        for parameter in model.parameters():
            if not parameter.isfinite().all() or (parameter.dim() > 1 and not parameter.any()):
                parameter.normal_(0, 0.02)
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model
