"""Models, adapters and processors as other people saved them: loaded whole, or refused by name.

Whatever a library raises while it reads them becomes an error of one line that names the file, or else the folder or
Hub name. Weights that a file lacks would be random numbers, and an adapter that fits nothing would be the bare model:
neither is loaded.
"""

import json
import pickle
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, TaskType
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from .. import notes
from .templates import prompts

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
OTHER_TASKS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)  # their adapters come with a head
LONGEST = 300  # characters of a library's own message
REGISTER = "import the module that registers it first, in a command by --import MODULE"


@contextmanager
def reading(what, path):
    """A context for calls of libraries alone: any error of theirs becomes one that names what was read, and from where.

    Raises:
        OSError, ImportError: where the library raises one.
        ValueError: for everything else but a lack of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        kind = next((kind for kind in (OSError, ImportError) if isinstance(error, kind)), ValueError)
        made = kind(f"{what} {str(path)!r}: {fault(path) or reason(error)}")
        if kind is ImportError:
            made.name = error.name
        raise made from error


def reason(error):
    """The message of a library's error on one line, with the type of the error where the message alone is unclear."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"it needs code that lies beside its files, which is not run: {REGISTER}"
    text = text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " ..."
    return text if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}"


# what is wrong with the files under a name


def folder_of(path):
    """The folder that a folder or Hub name was read from, or None where there is none (yet)."""
    if Path(path).is_dir():
        return Path(path)
    try:
        found = [try_to_load_from_cache(str(path), name) for name in (CONFIG, ADAPTER_CONFIG, *PROCESSOR_FILES)]
    except ValueError:  # no Hub name either
        return None
    return next((Path(each).parent for each in found if isinstance(each, str)), None)


def fault(path):
    """Why the files of a model cannot be read, with the name of one, or None."""
    folder = folder_of(path)
    if folder is None:
        return None
    for file in sorted(folder.iterdir()):
        look = next((look for pattern, look in LOOKS.items() if file.match(pattern)), None)
        wrong = look and (pointer_fault(file) or look(file))
        if wrong:
            return f"{file.name} {wrong}"
    return unknown_type(folder)


def pointer_fault(file):
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
    return "is the pointer of Git LFS, not the file itself: git lfs pull fetches it" if start == POINTER else None


def json_fault(file):
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return f"is damaged or cut, it is no JSON: {error}"
    return None if isinstance(found, dict) else f"holds a {type(found).__name__}, expected an object"


def tokenizer_fault(file):
    wrong = json_fault(file)
    if wrong is None:
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises no other kind
            wrong = f"is no tokenizer: {error}"
    return wrong


def index_fault(file):
    wrong = json_fault(file)
    if wrong is None:
        shards = json.loads(file.read_bytes()).get("weight_map", {}).values()
        missing = sorted(name for name in set(shards) if not (file.parent / str(name)).is_file())
        wrong = f"names {missing[0]}, which is not there" if missing else None
    return wrong


def safetensors_fault(file):
    try:
        with safe_open(file, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"is damaged or cut: {error}"


def pickle_fault(file):
    try:
        torch.load(file, map_location="meta", weights_only=True)
    # torch says that a file is cut, or holds more than tensors, by different exceptions
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        return f"is damaged or cut, or holds more than tensors: {' '.join(str(error).split())[:80]}"


LOOKS = {
    "*.index.json": index_fault,
    "tokenizer.json": tokenizer_fault,
    "*config.json": json_fault,  # of the model, its adapter, processor, tokenizer, generation
    "special_tokens_map.json": json_fault,
    "chat_template.json": json_fault,
    "*.safetensors": safetensors_fault,
    "pytorch_model*.bin": pickle_fault,
    "adapter_model.bin": pickle_fault,
    "optimizer.pt": pickle_fault,
    "scheduler.pt": pickle_fault,
}
POINTER = b"version https://git-lfs.github.com"


def unknown_type(folder):
    """A text if transformers does not know the type of a model or of a part of it, else None."""
    file = folder / CONFIG
    if not file.is_file():
        return None
    config = json.loads(file.read_bytes())
    parts = {"": config} | {f" of its {name}": part for name, part in config.items() if isinstance(part, dict)}
    for where, part in parts.items():
        kind = part.get("model_type")
        if isinstance(kind, str) and kind not in CONFIG_MAPPING:
            brings = " (the code that lies beside its files is not run)" if "auto_map" in config else ""
            return f"the type {kind!r}{where} is none that transformers knows{brings}: {REGISTER}"
    return None


# models


def load_config(path):
    """The configuration of a model from a folder or a Hub name."""
    if Path(path).is_dir() and not (Path(path) / CONFIG).is_file():
        raise FileNotFoundError(f"model {str(path)!r}: no {CONFIG} in that folder")
    with reading("model", path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def auto_class(path, config):
    """The class that loads a model with a language-model head.

    Raises:
        ValueError: for a model that gives no text.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise ValueError(
        f"model {str(path)!r} is a {config.model_type}, and none that answers in text is known of that type: if its "
        f"class is your own, {REGISTER}"
    )


def check_visual(path):
    """Refuse a name under which there is no model that answers in text about images.

    Raises:
        OSError: no model under that name.
        ValueError: an adapter, or a model of another kind.
    """
    if Path(path).is_dir() and is_adapter(path):
        base = str(base_of(path))
        raise ValueError(
            f"model {str(path)!r} is a PEFT adapter: the model is {base!r}, and hkdfast evaluate puts this on it by "
            "--adapter"
        )
    config = load_config(path)
    if auto_class(path, config) is not AutoModelForImageTextToText:
        raise ValueError(
            f"model {str(path)!r} is a {config.model_type}, a model of text alone: expected one that answers in text "
            "about images"
        )


def load_weights(path, dtype="auto", kind=None, **how):
    """A model with every weight from its files.

    Args:
        path: folder or Hub name.
        dtype: "auto" (as the weights are saved) or a dtype or its name.
        kind: the class that loads it; None: as `auto_class`.
        how: for its from_pretrained.

    Raises:
        OSError: no model under that name.
        ValueError: damaged files, weights that are missing or of another shape; names one.
    """
    kind = kind or auto_class(path, load_config(path))
    folder = folder_of(path)
    generation = folder and folder / "generation_config.json"
    if generation and generation.is_file() and (wrong := json_fault(generation)):
        # from_pretrained would take other ends of an answer instead, and not say so
        raise ValueError(f"model {str(path)!r}: {generation.name} {wrong}")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        logging.set_verbosity_error()  # its table of what is wrong would stand before the error that says it
        with reading("model", path):
            model, found = kind.from_pretrained(
                path,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **how,
            )
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    name = type(model).__name__
    for key, saved, expected in sorted(found["mismatched_keys"]):
        raise ValueError(f"model {str(path)!r}: {key} is {tuple(saved)}, {CONFIG} makes it {tuple(expected)}")
    missing, left = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        fits = f"; it has {len(left)} that fit nothing, e.g. {left[0]}" if left else ""
        raise ValueError(
            f"model {str(path)!r} lacks {len(missing)} weights of {name}, e.g. {missing[0]}{fits}: they would be random"
        )
    if left:
        notes.note_once(
            f"model {str(path)!r}: {len(left)} weights fit nothing in {name} and are left out, e.g. {left[0]}"
        )
    return model


def outline(path):
    """A model without weights, on the meta device, after the checks that `load_weights` makes of its files."""
    config = load_config(path)
    if getattr(config, "quantization_config", None) is None:
        return load_weights(path, device_map="meta")
    with torch.device("meta"), reading("model", path):  # quantized weights are made on their device
        return auto_class(path, config).from_config(config)


# adapters


def is_adapter(name):
    """Whether a folder or Hub name holds a PEFT adapter."""
    return (Path(name) / ADAPTER_CONFIG).is_file() if Path(name).is_dir() else on_hub(str(name))


@cache  # without a network each look takes half a minute
def on_hub(name):
    return find_adapter_config_file(name) is not None


def base_of(name):
    """The base model of an adapter, or the name itself.

    Raises:
        ValueError: an adapter that does not say it.
    """
    if not is_adapter(name):
        return name
    with reading("adapter", name):
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(f"adapter {str(name)!r}: {ADAPTER_CONFIG} does not name the base model")
    return base


def adapter_config(path, model=None):
    """The configuration of an adapter.

    Args:
        path: folder or Hub name.
        model: name of the model it is put on; a note on stderr says if it was trained on another.

    Raises:
        ValueError: an adapter that nothing can be answered with: of virtual tokens, or of another task.
    """
    with reading("adapter", path):
        config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        kind = config.peft_type.value
        raise ValueError(f"adapter {str(path)!r} is of type {kind}, whose virtual tokens do not mix with image tokens")
    if config.task_type in OTHER_TASKS:
        raise ValueError(f"adapter {str(path)!r} is of task {config.task_type}, expected one of a model that answers")
    trained = config.base_model_name_or_path
    if model is not None and trained and not same_place(trained, model):
        notes.note_once(f"adapter {str(path)!r} was trained on {trained!r} and is put on {str(model)!r}")
    return config


def same_place(one, two):
    one, two = (Path(path).expanduser() for path in (one, two))
    return one == two or one.exists() and two.exists() and one.samefile(two)


def put_adapter(model, path, config, trainable=False):
    """The PEFT model of a model, with an adapter from a folder or a Hub name on it.

    Args:
        config: as `adapter_config` gives it.

    Raises:
        OSError: no weights under that name.
        ValueError: an adapter that does not fit the model.
    """
    config.inference_mode = not trainable
    config.base_model_name_or_path = getattr(model, "name_or_path", None)  # PEFT would warn of the other
    with reading("adapter", path):
        adapted = get_peft_model(model, config)
    fill_adapter(adapted, path)
    return adapted


def fill_adapter(model, path, state=None):
    """Load the active adapter's weights, all of them, from under a name or as they are given.

    Args:
        model: PEFT model; one on the meta device is looked at alone.
        path: folder or Hub name.
        state: {PEFT's name: tensor}, read from `path` already.

    Raises:
        OSError: no weights under that name.
        ValueError: damaged weights, or names or shapes that do not fit the model; names one.
    """
    name = model.active_adapters[0]
    inner = model.get_base_model()
    local = Path(path)
    if state is None:
        if local.is_dir() and not any((local / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise FileNotFoundError(f"adapter {str(path)!r}: no {SAFETENSORS_WEIGHTS_NAME} in that folder")
        with reading("adapter", path):
            renamed = getattr(inner, "_checkpoint_conversion_mapping", None)
            state = load_peft_weights(str(path), device="cpu", key_mapping=renamed)
    if inner.device.type == "meta":
        state = {key: x.to("meta") for key, x in state.items()}
    with reading("adapter", path):
        try:
            found = set_peft_model_state_dict(model, state, adapter_name=name)
        except KeyError as error:  # of a module that is saved whole
            raise ValueError(f"it has no weight {error.args[0]}") from error
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[name].peft_type) or name
    tensors = model.state_dict(keep_vars=True)
    absent = [key for key in found.missing_keys if prefix in key and name in key.split(".")]
    filled = {id(x) for key, x in tensors.items() if key not in set(found.missing_keys)}
    absent = [key for key in absent if id(tensors[key]) not in filled]  # some types share one tensor among layers
    for keys, what in ((found.unexpected_keys, "has"), (absent, "lacks")):
        if keys:
            whose = f"that fit nothing in {type(inner).__name__}" if what == "has" else f"of {type(inner).__name__}"
            raise ValueError(f"adapter {str(path)!r} {what} {len(keys)} weights {whose}, e.g. {keys[0]}")


# processors


def load_processor(path):
    """The processor of images and text from a folder or a Hub name.

    Raises:
        OSError: none under that name.
        ValueError: damaged files, or one that cannot batch questions about images.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise FileNotFoundError(
            f"model {str(path)!r} has no processor of images: no {' or '.join(PROCESSOR_FILES)} in that folder"
        )
    with reading("processor", path):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            kind = type(processor).__name__
            raise ValueError(f"processor {str(path)!r} is a {kind} without {part}, expected one of images and text")
    if processor.tokenizer.pad_token is None and processor.tokenizer.eos_token is None:
        raise ValueError(f"processor {str(path)!r}: its tokenizer has neither pad nor eos token, expected one of them")
    return processor


def check_words(path, processor, model):
    """Check that the chat template takes a question, and that the model has every token of it.

    Raises:
        ValueError: a chat template that cannot be used, or a tokenizer with more words than the model has embeddings.
    """
    try:
        asked = prompts(processor, ["Is there a cat?"])
    except ValueError as error:
        raise ValueError(f"processor {str(path)!r}: {error}") from error
    # an image's place in the prompt may have a number beyond all words: it is never embedded
    images = {getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")}
    last = max(set(processor.tokenizer(asked)["input_ids"][0]) - images)
    embedding = model.get_input_embeddings()
    rows = len(embedding.weight) + getattr(embedding, "num_additional_embeddings", 0)
    if last >= rows:
        word = processor.tokenizer.convert_ids_to_tokens(last)
        raise ValueError(
            f"processor {str(path)!r}: its tokenizer numbers {word!r} {last}, but the model embeds {rows} words: the "
            "tokenizer is another model's, or words were added to it alone"
        )
