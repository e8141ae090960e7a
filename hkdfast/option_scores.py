"""Log-probabilities of a few words after a prompt, by one token each or by their whole sequence.

Used by choices.py; its module docstring defines a model and `encode`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .batch import Batch, Model, answer_rows
from .heads import Head
from .losses import distill_loss

Encode: TypeAlias = Callable[[list[str], list[Any], list[str] | None], dict[str, Any]]  # prompts, images, answers
Line: TypeAlias = tuple[str, Any, int]  # text, image, number of words

SCORINGS = ("auto", "token", "sequence")


class OptionScorer:
    """Log-probabilities of the words after a line, normalized over these words.

    Args:
        model, encode: see the module docstring of choices.py.
        words: list of texts.
        tokens: the single token of each word; None: the words are scored by their whole sequences.
    """

    def __init__(self, model: Model, encode: Encode, words: Sequence[str], tokens: Sequence[int] | None) -> None:
        self.model, self.encode, self.words, self.tokens = model, encode, words, tokens

    def __call__(self, lines: Sequence[Line]) -> Tensor:
        """(lines, words) float64 for lines (text, image, number of words); -inf beyond a line's number of words."""
        counts = torch.tensor([count for *_, count in lines]).unsqueeze(1)
        scores = self.by_sequence(lines, counts) if self.tokens is None else self.by_token(lines)
        scores = scores.masked_fill(torch.arange(scores.shape[1]) >= counts, -math.inf).log_softmax(-1)
        if scores.isnan().any():
            line = int(scores.isnan().any(1).nonzero()[0])
            raise ValueError(f"the model's scores are NaN after {lines[line][0]!r}")
        return scores

    def by_token(self, lines: Sequence[Line]) -> Tensor:
        texts, images, _ = zip(*lines, strict=True)
        source = self.model(self.encode(list(texts), list(images), None))
        logits = word_logits(source, torch.as_tensor(self.tokens))
        if len(logits) != len(lines):
            raise ValueError(f"the model returned {len(logits)} rows for {len(lines)} prompts, expected one each")
        return logits

    def by_sequence(self, lines: Sequence[Line], counts: Tensor) -> Tensor:
        pairs = [(text, image, place) for text, image, count in lines for place in range(count)]
        texts, images = [text for text, *_ in pairs], [image for _, image, _ in pairs]
        batch = self.encode(texts, images, [self.words[place] for *_, place in pairs])
        rows, labels = answers_of(batch, len(pairs))
        source = self.model(batch)
        if tuple(source.shape[:-1]) != tuple(labels.shape):
            raise ValueError(f"the model returned {tuple(source.shape)[:-1]} rows for {len(labels)} answer tokens")
        _, metrics = distill_loss(source, source, labels=labels, return_metrics=True)
        sums = torch.zeros(len(pairs), dtype=torch.float64)
        sums.index_add_(0, rows.nonzero()[:, 0].cpu(), -metrics["cross_entropy"].double().cpu())
        scores = torch.full((len(lines), len(self.words)), -math.inf, dtype=torch.float64)
        return scores.masked_scatter(torch.arange(len(self.words)) < counts, sums)


def word_logits(source: Tensor | Head, tokens: Tensor) -> Tensor:
    """(N, words) float64 on the CPU: the logits of some words of a source."""
    if isinstance(source, Head):
        tokens = tokens.to(source.weight.device)
        bias = None if source.bias is None else source.bias[tokens].cpu().double()
        weight = source.weight[tokens].cpu().double()
        logits = source.scale * torch.nn.functional.linear(source.hidden.cpu().double(), weight, bias)
        return logits if source.softcap is None else source.softcap * torch.tanh(logits / source.softcap)
    return source[..., tokens.to(source.device)].cpu().double()


def single_tokens(
    encode: Encode, line: Line, words: Sequence[str], tokens: Sequence[int] | None, scoring: str
) -> list[int] | None:
    """The ids of the words' tokens, or None if the words' sequences are to be scored."""
    if tokens is not None and scoring != "sequence":
        if len(tokens) < len(words):
            raise ValueError(f"tokens has {len(tokens)} ids, expected one for each of {', '.join(words)}")
        return list(tokens)[: len(words)]
    found, why = word_tokens(encode, line[0], line[1], words)
    if found is None and scoring == "token":
        raise ValueError(f'{why}: use scoring="sequence"')
    return None if scoring == "sequence" else found


def word_tokens(
    encode: Encode, prompt: str, image: Any, words: Sequence[str]
) -> tuple[list[int], None] | tuple[None, str]:
    """The single token of each word as the answer to a prompt.

    Returns:
        (list of token ids, None), or (None, reason) if a word has several tokens or changes the tokens at the end of
        the prompt.

    Raises:
        ValueError: if two words have the same tokens, as unknown words have.
    """
    prompted = encode([prompt], [image], None)
    context = prompted["input_ids"][0][answer_context(prompted, 0, answer_rows(prompted)[0])].tolist()
    batch = encode([prompt] * len(words), [image] * len(words), list(words))
    rows, labels = answers_of(batch, len(words))
    parts = [part.tolist() for part in labels.split(rows.sum(1).tolist())]
    for i, word in enumerate(words):
        if parts[i] in parts[:i]:
            twin = words[parts.index(parts[i])]
            raise ValueError(f"the answers {twin!r} and {word!r} have the same tokens {parts[i]}: use other words")
    for i, word in enumerate(words):
        if batch["input_ids"][i][answer_context(batch, i, rows)].tolist() != context:
            return None, f"the answer {word!r} changes the tokens at the end of its prompt"
        if parts[i][1:] != parts[0][1:]:
            return None, f"the answers {words[0]!r} and {word!r} are not one token each: {parts[0]} and {parts[i]}"
    return [part[0] for part in parts], None


def answers_of(batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """answer_rows of a batch of prompts with answers; ValueError if an example has none."""
    rows, labels = answer_rows(batch)
    if labels is None:
        raise ValueError(f"encode made no 'labels' for the answers, only {', '.join(batch)}")
    counts = rows.sum(1).tolist()
    if len(counts) != size or not all(counts):
        raise ValueError(f"encode made {len(counts)} rows with {counts} answer tokens for {size} answers")
    return rows, labels


def answer_context(batch: Batch, i: int, rows: Tensor) -> Tensor:
    """(T,) bool: the tokens of example i before its answer, without padding."""
    last = rows[i].nonzero()[0, 0]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(rows) if mask is None else mask.bool()
    return mask[i] & (torch.arange(rows.shape[1], device=rows.device) <= last)
