"""The Hallucination Elimination Adapter: LoRA on the language model only. Merging and adding adapters of rounds."""

import copy
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from ..shell import absolute
from .frozen import check_trained

MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the frozen weights
OWN_LOSS = ("orth_reg_weight", "kasa_config", "monteclora_config")  # options of adapters that add a term to the loss


def language_linear_names(model: Any) -> list[str]:
    """Names of the linear layers of the language model, without vision tower, projector and head.

    The language model is the module that directly holds the input embeddings.
    """
    embedding = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if embedding not in names:
        raise ValueError(f"{type(model).__name__} has no input embeddings among its modules")
    prefix = names[embedding].rpartition(".")[0]
    linears = [
        name
        for name, module in model.get_submodule(prefix).named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    ]
    return [f"{prefix}.{name}" if prefix else name for name in linears]


def target_regex(names: Sequence[str]) -> str:
    """A regular expression that matches these module names only; layer numbers become a pattern."""
    forms = {re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(name)) for name in names}
    shared, dot, _ = os.path.commonprefix(sorted(forms)).rpartition(r"\.")
    start = shared + dot
    return start + "(" + "|".join(sorted(form.removeprefix(start) for form in forms)) + ")"


def seed_lora_config(
    model: Any, *, r: int = 16, alpha: int = 32, dropout: float = 0.0, targets: Sequence[str] | None = None
) -> LoraConfig:
    """LoraConfig of the Hallucination Elimination Adapter for a model.

    Args:
        model: a Hugging Face model.
        r, alpha, dropout: LoRA's rank, scale (alpha / r times the product) and dropout.
        targets: last names of the layers to adapt, e.g. ["q_proj", "v_proj"]; None: every linear layer of the language
            model.

    Raises:
        ValueError: if a target is not among the language model's linear layers.
    """
    linears = language_linear_names(model)
    last = sorted({name.rpartition(".")[2] for name in linears})
    unknown = [name for name in targets or () if name not in last]
    if unknown or not last:
        raise ValueError(
            f"no layer {', '.join(unknown)} in the language model, its linear layers are {', '.join(last)}"
        )
    chosen = [name for name in linears if targets is None or name.rpartition(".")[2] in targets]
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_regex(chosen))


def adapted(model: Any, config: Any, rounds: int = 1, shared: bool = True) -> Any:
    """A model with a new adapter. If `check_adapter` refuses the adapter, it is removed again."""
    check_config(config)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    made = get_peft_model(model, config)
    config.base_model_name_or_path = absolute(config.base_model_name_or_path)  # which PEFT has set
    try:
        check_adapter(made, rounds, shared)
    except ValueError:
        made.unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return made


def check_adapter(model: Any, rounds: int = 1, shared: bool = True) -> None:
    """Refuse an adapter that cannot be trained, not in several rounds, or not with the base model as its teacher.

    Args:
        shared: whether the model without the adapter is the teacher.

    Raises:
        ValueError: naming what is wrong.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"one active adapter can be trained, the model has {', '.join(model.active_adapters) or 'none'}"
        )
    config = model.peft_config[model.active_adapters[0]]
    check_config(config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter of the adapter is trainable: load it with is_trainable=True")
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError("the adapter is merged into the weights below it: unmerge it, so that it can be trained")
    check_trained(model, shared)
    if rounds == 1:
        return
    layers = lora_layers(model)
    reasons = (  # in this order: the last ones take plain LoRA layers
        (lambda: not isinstance(config, LoraConfig), f"is {config.peft_type.value}"),
        (lambda: config.use_dora, "is DoRA"),
        (lambda: config.bias != "none" or config.lora_bias, "trains biases"),
        (lambda: config.target_parameters, "has target_parameters"),
        (lambda: config.trainable_token_indices, "trains single tokens (trainable_token_indices)"),
        (lambda: any(layer.lora_variant for layer in layers), "is a variant of LoRA"),
        (lambda: any(map(quantized, layers)), "is on quantized weights"),
        (lambda: twice(model), "adapts a weight that the model uses twice"),
    )
    for wrong, what in reasons:
        if wrong():
            raise ValueError(
                f"rounds={rounds} adds the LoRA products of all rounds, but the adapter {what}: use rounds=1"
            )


def check_config(config: Any) -> None:
    """The checks of `check_adapter` that need the adapter's configuration only."""
    if config.is_prompt_learning:
        raise ValueError(
            f"{config.peft_type.value} adds tokens to the prompt: use an adapter of the weights, e.g. LoRA"
        )
    for name in OWN_LOSS:
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"{config.peft_type.value} with {name} adds a term to the loss, which would be left out here"
            )
    how = str(getattr(config, "init_lora_weights", True)).lower()
    if how.startswith(MOVES_BASE):
        raise ValueError(f"init_lora_weights {how!r} changes the frozen weights, which are the teacher's: use True")


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def twice(model: Any) -> bool:
    """Whether an adapted weight is used by two modules: merging an adapter of one would change both."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    bases = [layer.get_base_layer() for layer in lora_layers(model)]
    bases += [module.original_module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return any(places[id(parameter)] > 1 for base in bases for parameter in base.parameters())


def quantized(layer: Any) -> bool:
    return not layer.get_base_layer().weight.is_floating_point()


@torch.no_grad()
def merge_and_reset(model: Any) -> None:
    """Merge the active adapter into its base weights and reset it: the student becomes the next teacher.

    Weights of 16 bits are rounded once, so the next round starts from the student up to that rounding.
    """
    name = model.active_adapters[0]
    how = model.peft_config[name].init_lora_weights
    how = how if how in (True, "gaussian") else True  # others draw B too, or look at data
    for layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(exact) + layer.get_delta_weight(name).to(exact))
        layer.reset_lora_parameters(name, how)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.load_state_dict(module.modules_to_save[name].state_dict())


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """What the active adapter has learned: {PEFT's name: CPU tensor}."""
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    return {name: x.detach().cpu().clone() for name, x in state.items() if ".base_layer." not in name}


def concat_adapters(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One adapter with the combined effect of the adapters of all rounds.

    LoRA products add: [B1 B2] [A1; A2] = B1 A1 + B2 A2. Other trained weights are those of the last round.
    """
    total = dict(states[-1])
    for name in total:
        parts = [state[name] for state in states]
        if ".lora_A." in name or name.endswith("lora_embedding_A"):
            total[name] = torch.cat(parts, 0)
        elif ".lora_B." in name or name.endswith("lora_embedding_B"):
            total[name] = torch.cat(parts, 1)
    return total


def concat_config(config: Any, rounds: int) -> Any:
    """The LoraConfig of `concat_adapters`: the rank times the number of rounds, and alpha so that the scaling stays."""
    config = copy.deepcopy(config)
    gain = rounds**0.5 if config.use_rslora else rounds
    config.r, config.lora_alpha = config.r * rounds, config.lora_alpha * gain
    config.rank_pattern = {name: r * rounds for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha * gain for name, alpha in config.alpha_pattern.items()}
    config.inference_mode = True
    return config


def save_adapter(model: Any, states: Sequence[dict[str, torch.Tensor]], folder: str | os.PathLike[str]) -> None:
    """Write the rounds' sum as an ordinary PEFT adapter on the original model."""
    folder = Path(folder)
    concat_config(model.peft_config[model.active_adapters[0]], len(states)).save_pretrained(folder)
    save_file(concat_adapters(states), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
