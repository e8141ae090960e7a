"""Multiple choice under a shifted letter-to-option map: reconstruction of HKD4VLM's mapping shift (arXiv:2506.13038).

    questions = [Choice("What does the image show?", ("a cat", "a dog", "a cow"), image="1.png"), ...]
    found = answer(model, encode, questions, shifts="cyclic")       # found.scores (N, n), found.choice (N,)

A model prefers some letters, whichever option they label. So each question is asked several times, with the options
under different letters. The score of a letter is assigned to the option that it labeled, and the scores are averaged.

A model is any function of a batch that returns the prediction at the batch's answer rows, in the order of
`hkdfast.batch.answer_rows`: logits (N, V) or a `Head`. `encode(prompts, images, answers)` makes the batch, a dict with
at least "input_ids" (B, T). If answers is None, it holds the prompts; otherwise the prompts with their answers, and
"labels" at the answers' tokens. `hkdfast.hf.choices.encoder` makes such a function from a Hugging Face processor.
"""

import math
import random
import string
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from .batch import Model
from .engine.renamed import CHOICES, refuses
from .option_scores import SCORINGS, Encode, OptionScorer, single_tokens

LETTERS = string.ascii_uppercase
SHIFTS = ("cyclic", "all", "none")
AGGREGATES = ("mean", "vote")
METHODS = ("letters", "per_option", "calibrated")
OPTIONS_PLACEHOLDER = "{options}"  # replaced by the options in the text of a question
CONTENT_FREE = "N/A"  # a text without content, as in Zhao et al., 2021
EACH = "\nProposed answer: {option}\nIs it right? Answer Yes or No."
YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question.

    Args:
        text: the question. Its last "{options}" is replaced by the lettered options, one per line; without it they
            follow the text on new lines. The text after "{options}" may ask for a letter: the method "per_option",
            which shows one option at a time, leaves it out.
        options: 2 to 26 texts without letters.
        image: the image, its path, or anything else that `encode` accepts; it is not read here.
        content_free: the text without its content; the method "calibrated" asks it with "N/A" as every option.

    Raises:
        ValueError: on another number of options, or one that is not a text or is empty.
    """

    text: str
    options: tuple[str, ...]
    image: Any = None
    content_free: str = CONTENT_FREE

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if not 2 <= len(self.options) <= len(LETTERS):
            raise ValueError(f"a question needs 2 to {len(LETTERS)} options, got {len(self.options)}: {self.options}")
        for option in self.options:
            if not isinstance(option, str) or not option.strip():
                raise ValueError(f"every option must be a text that is not empty, got {option!r} in {self.options}")

    def prompt(self, order: Sequence[int] | None = None) -> str:
        """The text of the prompt. The letter at index `place` labels option order[place]; None: no shift."""
        places = range(len(self.options)) if order is None else order
        lines = "\n".join(f"{LETTERS[place]}. {self.options[option]}" for place, option in enumerate(places))
        before, mark, after = self.text.rpartition(OPTIONS_PLACEHOLDER)
        return f"{before}{lines}{after}" if mark else f"{self.text}\n{lines}"

    @property
    def stem(self) -> str:
        """The text before the options."""
        before, mark, _ = self.text.rpartition(OPTIONS_PLACEHOLDER)
        return before.rstrip() if mark else self.text


@dataclass(frozen=True)
class Answers:
    """A model's answers to N questions with at most n options. Scores are float64, all tensors on the CPU."""

    scores: Tensor  # (N, n) log-probabilities of the options in their own order; -inf where there is no option
    choice: Tensor  # (N,) int64, the option chosen
    by_shift: tuple[Tensor, ...]  # N of (shifts, options): log-probabilities of each shift; the first is unshifted


def shifts(n: int, how: str | int = "cyclic", fixed: Iterable[int] = (), seed: int = 0) -> list[tuple[int, ...]]:
    """The letter-to-option maps under which a question is asked: reconstruction of HKD4VLM (arXiv:2506.13038).

    Args:
        n: number of options.
        how: "cyclic": each free option gets each free place once, so there are as many maps as free places; "all":
            every permutation; "none": no shift; a number: that many different random permutations.
        fixed: indices of options that keep their place, such as a last "none of these".
        seed: of the random permutations.

    Returns:
        list of tuples, order[place] = option. The first one is the identity.

    Raises:
        ValueError: an unknown `how`, a number above the number of permutations, a fixed index out of range.
    """
    fixed = set(fixed)
    if not fixed <= set(range(n)):
        raise ValueError(f"fixed options {sorted(fixed - set(range(n)))} are not among {n} options (0 to {n - 1})")
    free = [option for option in range(n) if option not in fixed]
    return [permutation(n, fixed, order) for order in free_orders(free, how, seed)]


def free_orders(free: list[int], how: str | int, seed: int) -> Iterable[Sequence[int]]:
    """The orders of the free options for the option `how` of `shifts`; the given order is first."""
    if how == "cyclic":
        return [free[i:] + free[:i] for i in range(max(1, len(free)))]
    if how == "all":
        return permutations(free)
    if how == "none":
        return [free]
    if isinstance(how, bool) or not isinstance(how, int):
        raise ValueError(f"unknown shifts {how!r}, expected one of {', '.join(SHIFTS)} or a number")
    most = math.factorial(len(free))
    if not 1 <= how <= most:
        raise ValueError(f"shifts is {how}, expected 1 to {most}: {len(free)} options are free to move")
    draw, found = random.Random(seed), dict.fromkeys([tuple(free)])
    while len(found) < how:
        found[tuple(draw.sample(free, len(free)))] = None
    return found


def permutation(n: int, fixed: Collection[int], free: Iterable[int]) -> tuple[int, ...]:
    """The order with the free options, in turn, at the free places."""
    left = iter(free)
    return tuple(place if place in fixed else next(left) for place in range(n))


def check_list(name: str, texts: object) -> None:
    """Refuse a single text where a list is expected: its letters would be used as the list."""
    if isinstance(texts, str):
        raise ValueError(f"{name} is the text {texts!r}, expected a list of texts")


def fixed_indices(options: Sequence[str], fixed: Iterable[int | str]) -> list[int]:
    """Indices of the fixed options, given by index or by text. A text that is not an option has no effect."""
    check_list("fixed", fixed)
    texts = {each.strip().casefold() for each in fixed if isinstance(each, str)}
    return [i for i, option in enumerate(options) if option.strip().casefold() in texts] + [
        each for each in fixed if not isinstance(each, str)
    ]


def shuffle_options(
    question: Choice, answer: int | None, rng: random.Random, fixed: Iterable[int | str] = ()
) -> tuple[Choice, int | None]:
    """The counterpart of the mapping shift for training: shuffle the options and return the new place of the answer.

    Args:
        question: Choice.
        answer: index of the right option, or None if it is not known.
        rng: random.Random.
        fixed: options that keep their place, by index or by text.

    Returns:
        (Choice, index of the answer or None).

    Raises:
        ValueError: an answer or a fixed index out of range.
    """
    n = len(question.options)
    if answer is not None and not 0 <= answer < n:
        raise ValueError(f"answer is option {answer}, expected 0 to {n - 1} or None")
    order = random_order(question.options, rng, fixed)
    options = tuple(question.options[option] for option in order)
    return replace(question, options=options), None if answer is None else order.index(answer)


def random_order(options: Sequence[str], rng: random.Random, fixed: Iterable[int | str] = ()) -> tuple[int, ...]:
    """A random order of options, order[place] = option, as `shuffle_options` uses it."""
    stay = fixed_indices(options, fixed)
    free = [option for option in shifts(len(options), "none", stay)[0] if option not in stay]
    return permutation(len(options), stay, rng.sample(free, len(free)))


@refuses(CHOICES)
def answer(
    model: Model,
    encode: Encode,
    questions: Iterable[Choice],
    *,
    shifts: str | int = "cyclic",
    aggregate: str = "mean",
    method: str = "letters",
    fixed: Sequence[int | str] = (),
    batch_size: int = 8,
    scoring: str = "auto",
    tokens: Sequence[int] | None = None,
    seed: int = 0,
    each: str = EACH,
    words: Sequence[str] = YES_NO,
    on_batch: Callable[[Answers], object] | None = None,
) -> Answers:
    """Answer multiple-choice questions: reconstruction of HKD4VLM's mapping-shift inference (arXiv:2506.13038).

    All prompts of a question are in one batch. Only the head's rows of the option words are multiplied, in float64, at
    the position where the answer begins; the full vocabulary is not.

    Args:
        model: function of a batch (see the module docstring). Gets no gradient.
        encode: function of (prompts, images, answers) to a batch on the model's device (see the module docstring).
        questions: list of Choice; their numbers of options may differ.
        shifts: as in `shifts`. The method "per_option" has no letters: it ignores `shifts` and `aggregate`.
        aggregate: "mean": the log-probabilities of the shifts are averaged, then normalized. "vote": each shift has one
            vote; the score is the logarithm of the share of votes (-inf for none). Ties go to the higher mean
            log-probability, then to the first option.
        method: "letters": log-probabilities of the letters after the prompt. "calibrated": the same minus those after a
            content-free prompt (Zhao et al., 2021, arXiv:2102.09690), one per question. "per_option": each option is
            asked alone; its score is log p(yes), not normalized over the options.
        fixed: options that keep their place, by index or by text (upper and lower case are equal).
        batch_size: questions per forward pass.
        scoring: "token": log softmax over the one token of each letter. "sequence": sum of the log-probabilities of all
            tokens of each letter (to the end of its turn) over the whole vocabulary, then normalized over the letters;
            a prompt per shift and letter. "auto": "token" if every letter is a single token, else "sequence".
        tokens: ids of the letters' tokens (of the words' tokens in the method "per_option"); None: found by `encode`.
        seed: random seed of a number of shifts.
        each: text after the stem of a question in the method "per_option"; contains "{option}".
        words: the words for right and wrong in the method "per_option".
        on_batch: called with the Answers of each finished batch, e.g. to save them; or None.

    Returns:
        Answers.

    Raises:
        ValueError: on an unknown option, an empty list of questions, a letter that is not one token with scoring
            "token", too few tokens, a model that does not return one row per answer token, or scores that are NaN.
    """
    check_options(aggregate, method, scoring, batch_size)
    questions = list(questions)
    if not questions:
        raise ValueError("there are no questions")
    most = max(len(question.options) for question in questions)
    prompts = [PromptSet(question, method, plan(question, shifts, fixed, seed), each) for question in questions]
    words = words if method == "per_option" else LETTERS[:most]
    with torch.no_grad():
        scorer = OptionScorer(model, encode, words, single_tokens(encode, prompts[0].lines[0], words, tokens, scoring))
        found = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            rows = scorer([line for one in batch for line in one.lines])
            parts = rows.split([len(one.lines) for one in batch])
            found += [one.to_options(part) for one, part in zip(batch, parts, strict=True)]
            if on_batch is not None:
                on_batch(merge_answers(found[start:], aggregate, method))
    return merge_answers(found, aggregate, method)


def check_options(aggregate: str, method: str, scoring: str, batch_size: int) -> None:
    """Check the options of `answer` that do not depend on the questions."""
    for name, value, known in (
        ("aggregate", aggregate, AGGREGATES),
        ("method", method, METHODS),
        ("scoring", scoring, SCORINGS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def merge_answers(by_shift: Sequence[Tensor], aggregate: str, method: str) -> Answers:
    """The Answers of several questions."""
    combined = [combined_scores(one, aggregate, method) for one in by_shift]
    width = max(len(score) for score, _ in combined)
    scores = torch.stack([torch.nn.functional.pad(one, (0, width - len(one)), value=-math.inf) for one, _ in combined])
    if scores.isnan().any():
        number = scores.isnan().any(1).nonzero()[0].item()
        raise ValueError(f"question {number} of its batch: under one of the shifts every option has probability 0")
    return Answers(scores, torch.tensor([choice for _, choice in combined]), tuple(by_shift))


def plan(question: Choice, how: str | int, fixed: Iterable[int | str], seed: int) -> list[tuple[int, ...]]:
    return shifts(len(question.options), how, fixed_indices(question.options, fixed), seed)


@dataclass
class PromptSet:
    """The prompts of one question, and the mapping from their scores back to its options."""

    question: Choice
    method: str
    orders: list[tuple[int, ...]]  # of the shifts
    each: str

    def __post_init__(self) -> None:
        question, count = self.question, len(self.question.options)
        if self.method == "per_option":
            texts = [question.stem + self.each.replace("{option}", option) for option in question.options]
            count = 2
        else:
            texts = [question.prompt(order) for order in self.orders]
            if self.method == "calibrated":
                texts.append(Choice(question.content_free, (CONTENT_FREE,) * count).prompt())
        self.lines = [(text, question.image, count) for text in texts]

    def to_options(self, rows: Tensor) -> Tensor:
        """(shifts, options) log-probabilities from those of the prompts, (lines, words)."""
        n = len(self.question.options)
        if self.method == "per_option":
            return rows[:, 0].view(1, n)
        if self.method == "calibrated":
            rows = (rows[:-1, :n] - rows[-1, :n]).log_softmax(-1)
        order = torch.tensor(self.orders)
        return torch.empty_like(rows[:, :n]).scatter_(1, order, rows[:, :n])


def combined_scores(by_shift: Tensor, aggregate: str, method: str) -> tuple[Tensor, int]:
    """((options,) scores, index of the chosen option) from the shifts' log-probabilities."""
    mean = by_shift.mean(0)
    if method == "per_option":
        return mean, int(mean.argmax())
    if aggregate == "mean":
        return mean.log_softmax(0), int(mean.argmax())
    votes = by_shift.argmax(1).bincount(minlength=len(mean))
    tied = mean.masked_fill(votes < votes.max(), -math.inf)
    first = votes.argmax() if tied.isneginf().all() else tied.argmax()
    return (votes.double() / len(by_shift)).log(), int(first)
