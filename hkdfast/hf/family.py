"""Load models of one family by name, and check that one batch has the same meaning for all."""

import copy
from contextlib import nullcontext
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from transformers import AutoProcessor, set_seed

from ..shell import absolute
from . import loading
from .adapter import adapted, check_adapter, seed_lora_config
from .head import LanguageHead, unwrap_peft
from .loading import base_of, is_adapter, reading, reason

# fields of an image processor that only name its class and do not change its pixels
KINDS = ("image_processor_type", "processor_class", "auto_map")


def model_names(models):
    """For each model its folder or Hub name, or None if it is an object."""
    return [str(model) if isinstance(model, (str, Path)) else None for model in models]


def absolute_names(names):
    """The names with folders as absolute paths, so that a run can be resumed from any working directory."""
    return [absolute(name) for name in names]


def adapters_of(peft_config, count):
    """One adapter's configuration or None for each of so many models, from one for all or a list.

    Raises:
        ValueError: a list of another length.
    """
    adapters = list(peft_config) if isinstance(peft_config, (list, tuple)) else [peft_config] * count
    if len(adapters) != count:
        raise ValueError(f"peft_config must be one or {count}, one per model, got {len(adapters)}")
    return adapters


def load_model(name, dtype="auto"):
    """A model with a language-model head from a folder or a Hub name, or a PEFT adapter on its model, trainable.

    Raises:
        OSError: no model under that name.
        ValueError: a model without a language-model head; damaged files, weights that are missing or fit nothing.
    """
    return loaded(name, lambda base: loading.load_weights(base, dtype))


def set_attention(model, name):
    """Change the attention of a model; None leaves it as it is.

    Args:
        model: a Hugging Face model, or a PEFT model.
        name: as `attn_implementation` of from_pretrained.

    Raises:
        ImportError: an attention that is not installed.
        ValueError: one that the model does not have, or that transformers does not know.
    """
    if name is None:
        return
    inner = unwrap_peft(model)
    before = inner.config._attn_implementation
    try:
        inner.set_attn_implementation(name)
    except ImportError as error:
        raise ImportError(f"attn_implementation {name!r}: {reason(error)}", name="flash_attn") from error
    except ValueError as error:
        raise ValueError(f"attn_implementation {name!r} of {type(inner).__name__}: {reason(error)}") from error
    if name != before == inner.config._attn_implementation:  # of which transformers warns only
        raise ValueError(f"attn_implementation {name!r}: {type(inner).__name__} has {before!r} alone")


def meta_model(name):
    """The model under a name, or the adapter on its model, without its weights: in no memory.

    Raises:
        OSError, ValueError: as `load_model`.
    """
    return loaded(name, loading.outline)


def loaded(name, load):
    (base,) = absolute_names([base_of(name)])  # it goes into the adapters that are saved
    config = loading.adapter_config(name) if is_adapter(name) else None
    model = load(base)
    if config is None:
        return model
    with model.device if model.device.type == "meta" else nullcontext():
        model = loading.put_adapter(model, name, config, trainable=True)
    model.active_peft_config.base_model_name_or_path = base
    return model


def prepare_for_training(model, args, peft_config=None, shared=False):
    """Prepare a model for training: freeze weights, and add a LoRA adapter if the options say so.

    Args:
        model: a Hugging Face model, or a PEFT model, whose own adapter is trained.
        args: StudentArguments.
        peft_config: an adapter of the caller's own making instead of LoRA of rank args.lora_r.
        shared: whether the model without its adapter is a teacher.

    Raises:
        ValueError: if there is no head, nothing to train, an adapter on an adapter, weights outside an adapter that
            would be trained and not saved with it, or a text of args.freeze that is in the name of no weight.
    """
    LanguageHead(model)
    names = [name for name, _ in unwrap_peft(model).named_parameters()]
    for text in args.freeze or ():
        if not any(text in name for name in names):
            raise ValueError(f"freeze: {text!r} is in the name of no weight of {type(unwrap_peft(model)).__name__}")
    if not isinstance(model, PeftModel) and (peft_config is not None or args.lora_r is not None):
        set_seed(args.seed)  # the adapter starts with the same weights in every process and every run
        lora = {"alpha": args.lora_alpha, "dropout": args.lora_dropout, "targets": args.lora_targets}
        # PEFT writes the model's name into the configuration, which may be that of other models too
        config = copy.deepcopy(peft_config) or seed_lora_config(model, r=args.lora_r, **lora)
        model = adapted(model, config, shared=shared)
    elif isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError("the model has an adapter already: pass either the bare model or no peft_config")
    for name, parameter in model.named_parameters():  # those of an adapter too
        if any(text in name for text in args.freeze or ()):
            parameter.requires_grad_(False)
    if isinstance(model, PeftModel):
        check_adapter(model, shared=shared)
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"no weight of {type(model).__name__} is trainable")
    return model


def check_family(names, processor=None):
    """The processor for the batches of these models, after a check that it fits all of them.

    Args:
        names: folders or Hub names.
        processor: of the batches; None: that of the first name.

    Raises:
        OSError: no model or processor under a name.
        ValueError: tokenizers that number words differently, or image processors that differ; the message names both.
    """
    if not names:
        return processor
    for name in names:
        loading.load_config(base_of(name))
    found = []
    for name in names:
        with reading("processor", base_of(name)):
            found.append((name, AutoProcessor.from_pretrained(base_of(name), trust_remote_code=False)))
    first = ("processing_class", processor) if processor is not None else found[0]
    for other in found:
        check_words(first, other)
        check_pixels(first, other)
    return first[1]


def check_words(first, second):
    """Refuse two (name, processor or tokenizer) whose vocabularies differ."""
    one, two = (getattr(processor, "tokenizer", processor).get_vocab() for _, processor in (first, second))
    differ = sorted(word for word in one.keys() | two.keys() if one.get(word) != two.get(word))
    if differ:
        word = differ[0]
        numbers = [vocab.get(word, "missing") for vocab in (one, two)]
        raise ValueError(
            f"the tokenizers of {first[0]!r} and {second[0]!r} differ in {len(differ)} of {len(one)} and {len(two)} "
            f"words, e.g. {word!r} ({numbers[0]} and {numbers[1]}): models can be coupled over one vocabulary only"
        )


def check_pixels(first, second):
    """Refuse two (name, processor) that process images differently, as far as their configurations show."""
    made = [getattr(processor, "image_processor", None) for _, processor in (first, second)]
    if None in made:
        return
    one, two = (processor.to_dict() for processor in made)
    differ = [name for name in one if name in two and one[name] != two[name] and name not in KINDS]
    if differ:
        name = differ[0]
        raise ValueError(
            f"the image processors of {first[0]!r} and {second[0]!r} differ in {', '.join(differ)} ({name}: "
            f"{one[name]!r} and {two[name]!r}): one batch cannot serve both models"
        )


def check_apart(models, roles=None):
    """Refuse models that share a weight: training one would move the other.

    Args:
        models: {name: model}; those that are names themselves are loaded apart. One object at two places is left to the
            caller.
        roles: {name: whether the model is trained}; two that are not may share. None: all are.
    """
    seen = {}
    for name, model in models.items():
        for part, parameter in () if isinstance(model, (str, Path)) else model.named_parameters():
            other = seen.setdefault(id(parameter), name)
            is_trained = roles is None or roles[name] or roles[other]
            if is_trained and other != name and models[other] is not model:
                raise ValueError(
                    f"{other} and {name} share the weight {part}: training one moves the other, load each by itself"
                )


def check_heads(models, processor):
    """Refuse a head of {name: model} with fewer tokens than the tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_vocab"):
        return
    for name, model in models.items():
        words = len(LanguageHead(model).base().weight)
        if words < len(tokenizer):
            raise ValueError(
                f"the head of {name} has {words} tokens, fewer than the tokenizer's {len(tokenizer)}: another family"
            )


def free_memory():
    """Collect garbage and release the device's cached memory, to make room for the next model."""
    clear_device_cache(garbage_collection=True)
