"""Generate a vision-language model's answers to questions about images, in the file format of POPE's scripts."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ..data import devices, jsonl, outputs
from ..data.generation import GenerationOptions, with_instruction
from ..data.images import read_image
from ..evaluate.pope import Question
from . import loading
from .family import set_attention
from .templates import image_marks, prompts

GREEDY = GenerationOptions()


def load(
    path: str | PathLike[str],
    adapter: str | PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """(model in eval mode, processor) from a folder or a Hub name, with a PEFT adapter on it if one is given.

    Args:
        path: what `AutoModelForImageTextToText` and `AutoProcessor` load.
        adapter: folder with adapter_config.json, or None.
        device: torch device; None takes a GPU if there is one.
        dtype: "auto" (as the weights are saved), "float32", "bfloat16" or "float16".
        attn_implementation: as in from_pretrained; None: transformers chooses.

    Raises:
        OSError: no model or processor under that name.
        ImportError: an attention that is not installed.
        FileNotFoundError: no adapter in that folder.
        ValueError: an unknown device; a model or processor that does not support images; damaged files; missing or
            unexpected weights of the model or its adapter; an adapter of virtual tokens or for another task; a chat
            template without an image. The message names the file or folder.
    """
    device = devices.find(device)
    if adapter is not None:
        adapter = Path(adapter).expanduser()
        if not (adapter / loading.ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"adapter {str(adapter)!r}: no {loading.ADAPTER_CONFIG}, expected a folder of PEFT")
        config = loading.adapter_config(adapter, path)
    loading.check_visual(path)
    processor = loading.load_processor(path)
    model = loading.load_weights(path, dtype)
    set_attention(model, attn_implementation)
    loading.check_words(path, processor, model)
    if adapter is not None:
        model = loading.put_adapter(model, adapter, config)
    with loading.reading("model", path):
        model = model.to(device)
    return model.eval(), processor


def check_images(questions: Iterable[Any], folder: str | PathLike[str], progress: bool = True) -> None:
    """Decode every image once, so that a broken one is reported before a model is loaded."""
    names = dict.fromkeys(question.image for question in questions)
    for name in tqdm(names, desc="images", unit="image", disable=None if progress else True, leave=False):
        read_image(Path(folder).expanduser() / name)


def check_texts(processor: Any, texts: Sequence[tuple[str, str]]) -> None:
    """Check that the processor accepts every question, before the first answer.

    Args:
        texts: list of (prefix of an error message, text).

    Raises:
        ValueError: naming a text that contains the processor's own image placeholder, or that its template or tokenizer
            does not accept.
    """
    marks = image_marks(processor)
    for where, text in texts:
        found = next((mark for mark in marks if mark in text), None)
        if found:
            raise ValueError(f"{where} contains {found}, the model's own image placeholder: {jsonl.shown(text)}")
    usual = placeholders(processor, ["Is there a cat?"])[0]
    counts: Sequence[int | None]
    try:
        counts = placeholders(processor, [text for _, text in texts])
    except Exception:  # raised for one of the texts, which is found below
        counts = [None] * len(texts)
    for (where, text), count in zip(texts, counts, strict=True):
        if count is None:
            try:
                count = placeholders(processor, [text])[0]
            except Exception as error:  # templates and tokenizers raise errors of any type
                raise ValueError(f"{where}: the processor does not accept {jsonl.shown(text)}: {error}") from error
        if count != usual:
            raise ValueError(
                f"{where} gives a prompt with {count} image placeholders, expected {usual}: {jsonl.shown(text)}"
            )


def placeholders(processor: Any, texts: list[str]) -> list[int]:
    """The number of placeholder tokens for images, videos and audio in each prompt."""
    names = ("image_token_id", "video_token_id", "audio_token_id")
    media = [token for name in names if (token := getattr(processor, name, None)) is not None]
    rows = processor.tokenizer(prompts(processor, texts)).input_ids
    return [sum(token in media for token in row) for row in rows]


def encode(processor: Any, texts: list[str], images: list[Any]) -> Any:
    """Model inputs for one text and one image each, padded on the left for generation."""
    return tokenize(processor, prompts(processor, texts), images)


def tokenize(processor: Any, written: list[str], images: list[Any]) -> Any:
    """Model inputs for texts as `prompts` writes them and one image each, padded on the left."""
    tokenizer = processor.tokenizer
    # a template that writes the first token itself must not get a second one
    begun = bool(tokenizer.bos_token) and written[0].startswith(tokenizer.bos_token)
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    try:
        tokenizer.padding_side = "left"
        tokenizer.pad_token = pad or tokenizer.eos_token
        return processor(
            text=written,
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            **({"add_special_tokens": False} if begun else {}),
        )
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad


@contextmanager
def plain_generation(model: Any, tokenizer: Any) -> Iterator[None]:
    """Use only the special tokens of the model's generation config: its penalties and top-k would bias a comparison."""
    kept = model.generation_config
    ends = {name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id")}
    pad = next(
        token for token in (kept.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None
    )
    try:
        model.generation_config = GenerationConfig(**ends, pad_token_id=pad)
        yield
    finally:
        model.generation_config = kept


@torch.inference_mode()
def generate_texts(
    model: Any, processor: Any, texts: list[str], images: list[Any], decoding: GenerationOptions, number: int = 0
) -> list[str]:
    """The model's replies to a batch of texts, one image each; `number` of the batch picks its random numbers."""
    # the layers of an adapter sit in the base model, and its generate() is not wrapped
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = encode(processor, texts, images).to(model.device, dtype=model.dtype)
    how: dict[str, Any] = {"do_sample": False}
    if decoding.sample:
        how = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    name = f"{decoding.seed} {decoding.draw} {number}".encode()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), plain_generation(model, processor.tokenizer):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big"))
        output = model.generate(**inputs, max_new_tokens=decoding.max_new_tokens, **how)
    prompt = inputs["input_ids"]
    # some families return the prompt in front of the reply, some the reply alone
    if output.shape[1] >= prompt.shape[1] and torch.equal(output[:, : prompt.shape[1]], prompt):
        output = output[:, prompt.shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(output, skip_special_tokens=True)]


def answer_file(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    images: str | PathLike[str],
    path: str | PathLike[str],
    decoding: GenerationOptions = GREEDY,
    *,
    name: str = "",
    resume: bool = False,
    progress: bool = True,
) -> list[str]:
    """Answer every question, and write the answers in the format of VCD's scripts to a file that appears when complete.

    Args:
        model, processor: as `load` gives them.
        questions: list of `pope.Question`.
        images: folder of their images.
        path: the JSON-lines file to write. Until it is complete, finished lines are in `path` with ".partial" added.
        decoding: GenerationOptions.
        name: model_id of each line.
        resume: reuse the answers of a stopped or complete run if questions, name and decoding are the same. The result
            is that of an uninterrupted run. A change of the weights under the same name is not detected.
        progress: show a progress bar.

    Returns:
        list of str, the answers.
    """
    lines = [
        {"question_id": q.question_id, "prompt": q.text, "text": None, "model_id": name, "image": q.image}
        | {"metadata": asdict(decoding)}
        for q in questions
    ]
    size = decoding.batch_size
    with resumable_jsonl(path, lines, ("text",), size, resume=resume, progress=progress) as (done, write):
        for start in range(len(done), len(lines), size):
            batch = questions[start : start + size]
            texts = [with_instruction(q.text, decoding.instruction) for q in batch]
            pictures = [read_image(Path(images).expanduser() / q.image) for q in batch]
            write(
                [{"text": text} for text in generate_texts(model, processor, texts, pictures, decoding, start // size)]
            )
    return [line["text"] for line in done]


@contextmanager
def resumable_jsonl(
    path: str | PathLike[str],
    lines: list[dict[str, Any]],
    blanks: Sequence[str],
    size: int,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Iterator[tuple[list[dict[str, Any]], Callable[[list[dict[str, Any]]], None]]]:
    """Write a JSON-lines file batch by batch. The file appears when all lines are complete.

    Until then finished lines are in `path` with ".partial" added.

    Args:
        path: the file.
        lines: list of dicts as they will be written, with None in the fields to fill in.
        blanks: names of the fields to fill in.
        size: lines per batch. A resumed run repeats an unfinished batch.
        resume: reuse the lines of an earlier run, as long as they equal `lines` except for the blanks.
        progress: show a progress bar.

    Yields:
        (list of the finished lines, which grows; function that writes the next lines from a list of dicts of blanks).
    """
    path = Path(path).expanduser()
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = max((reusable_lines(file, lines, blanks) for file in (path, partial)), key=len) if resume else []
    if len(kept) < len(lines):
        kept = kept[: len(kept) // size * size]
    with outputs.replacing(partial) as file:  # what is kept is never missing, whenever this run is stopped
        file.writelines(json.dumps(line) + "\n" for line in kept)
    done = list(kept)
    with (
        partial.open("a", encoding="utf-8") as file,
        tqdm(
            total=len(lines), initial=len(kept), desc=path.stem, unit="question", disable=None if progress else True
        ) as bar,
    ):

        def write(filled: list[dict[str, Any]]) -> None:
            found = [line | values for line, values in zip(lines[len(done) :], filled, strict=False)]
            file.writelines(json.dumps(line) + "\n" for line in found)
            file.flush()
            done.extend(found)
            bar.update(len(found))

        yield done, write
    partial.replace(path)


def reusable_lines(path: Path, lines: list[dict[str, Any]], blanks: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of an earlier run in `path`, up to the first one that differs from the expected lines."""
    if not path.is_file():
        return []
    kept = []
    for expected, text in zip(lines, path.read_text(encoding="utf-8").split("\n"), strict=False):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:  # the line that the stop cut in two
            break
        if {**found, **dict.fromkeys(blanks)} != expected:
            break
        kept.append(found)
    return kept
