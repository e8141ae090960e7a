"""The two tasks of the Responsible-AI challenge, and how a question of theirs becomes a prompt.

Training, augmentation and evaluation all write their prompts by `question`.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from .. import choices
from ..choices import CONTENT_FREE, LETTERS, OPTIONS_PLACEHOLDER, Choice

NONE = "No hallucination"  # the option to choose if no other one is right
CLOSING = "Answer with the letter of one option."


@dataclass(frozen=True)
class Task:
    """How the two tasks differ."""

    statement: str  # name of the field with the text to judge
    context: str  # name of the field with the text that accompanies it
    question: str  # name of the field with the question
    asked: str  # the challenge's question, for entries without one
    options: tuple[str, ...] | None  # for entries without options; None if each question has its own
    fixed: tuple[str, ...]  # options that keep their place under a shift, unless the user says otherwise
    templates: tuple[str, ...]  # the prompt, and paraphrases of it


TASKS = {
    "hallucination": Task(
        statement="system1_answer",
        context="system1_question",
        question="system2_question",
        asked="Which of the following systems' outputs belong to hallucination?",
        options=None,
        fixed=(NONE,),
        templates=(
            f"Question: {{context}}\nCaption: {{statement}}\n{{question}}\n{OPTIONS_PLACEHOLDER}\n{CLOSING}",
            "Caption: {statement}\nWhich of these parts of it does the image not support?\n"
            f"{OPTIONS_PLACEHOLDER}\n{CLOSING}",
            f"A system described the image: {{statement}}\nIt had been asked: {{context}}\nCompare its words with the "
            f"image. Which of them are hallucinated?\n{OPTIONS_PLACEHOLDER}\n{CLOSING}",
            f"Look at the image and read this text about it.\n{{statement}}\nOne of the phrases below may be made up. "
            f"Which one?\n{OPTIONS_PLACEHOLDER}\n{CLOSING}",
        ),
    ),
    "factcheck": Task(
        statement="claim",
        context="context",
        question="question",
        asked="Based on the provided information, please determine whether the claim is factual.",
        options=("True", "False", "Partially True", "Not Verifiable"),
        fixed=(),
        templates=(
            f"Context: {{context}}\nClaim: {{statement}}\n{{question}}\n{OPTIONS_PLACEHOLDER}\n{CLOSING}",
            "Claim: {statement}\nBackground: {context}\nJudge the claim by the image and the background.\n"
            f"{OPTIONS_PLACEHOLDER}\n{CLOSING}",
            "Read the following text.\n{context}\nIs this claim about the image right? {statement}\n"
            f"{OPTIONS_PLACEHOLDER}\n{CLOSING}",
            f"Somebody says: {{statement}}\nWhat is known: {{context}}\nHow true is it, going by image and text?\n"
            f"{OPTIONS_PLACEHOLDER}\n{CLOSING}",
        ),
    ),
}
PLACEHOLDERS = re.compile(r"\{(statement|context|question)\}")


def is_none(option):
    """Whether an option is "No hallucination", in upper or lower case."""
    return option.strip().casefold() == NONE.casefold()


@dataclass(frozen=True)
class Record:
    """One question of either task, with the same field names for both."""

    task: str  # a key of TASKS
    image: str  # file name within the image folder
    statement: str  # the text to judge: the caption or the claim
    context: str  # the question that the caption answers, or the claim's context; may be empty
    question: str
    options: tuple[str, ...]  # in the order of the letters
    answer: str | None = None  # the right letter, or letters in order ("AC"); None if unknown
    question_id: int | str = 0
    place: str = field(default="", compare=False, repr=False)  # "file:line"


@dataclass(frozen=True)
class ChoiceInference:
    """How questions are asked and answered; the options of `hkdfast.choices.answer`, checked."""

    shifts: str | int = "cyclic"
    aggregate: str = "mean"
    method: str = "letters"
    # texts of options that keep their place, by default those of both tasks; a text that is not an option has no effect
    fixed: tuple[str, ...] = tuple(text for task in TASKS.values() for text in task.fixed)
    scoring: str = "auto"
    template: int | str = 0  # as in `choice`
    seed: int = 0  # of random shifts
    batch_size: int = 8  # questions per forward pass, with all their shifts
    multi_answer: bool = False  # as in `letters_of`

    def __post_init__(self):
        choices.check_options(self.aggregate, self.method, self.scoring, self.batch_size)
        if self.multi_answer and self.method != "per_option":
            raise ValueError(f'multi_answer asks about each option alone: method is {self.method!r}, not "per_option"')

    def check(self, records):
        """Refuse options that do not fit the records, before any model is loaded."""
        for record in records:
            choices.plan(choice(record, self.template), self.shifts, self.fixed, self.seed)


def template_of(task, template=0):
    """A template of a task by its number; a text is checked and returned.

    Raises:
        ValueError: an unknown task, a number that none of its templates has, a text without {statement} or {options}.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    known = TASKS[task].templates
    if isinstance(template, int):
        if not 0 <= template < len(known):
            raise ValueError(f"template {template} of {task} does not exist, expected 0 to {len(known) - 1} or a text")
        return known[template]
    missing = [placeholder for placeholder in ("{statement}", OPTIONS_PLACEHOLDER) if placeholder not in template]
    if missing:
        raise ValueError(f"the template {template!r} has no {' and no '.join(missing)}")
    return template


def choice(record, template=0):
    """The record as a `hkdfast.choices.Choice` about its image.

    Args:
        record: Record.
        template: number of one of the task's templates, or a text with {statement} and {options}; {context} and
            {question} are optional. A line is left out if all the fields that it names are empty.
    """

    template = template_of(record.task, template)
    free = replace(record, statement=CONTENT_FREE, context=CONTENT_FREE if record.context else "")
    return Choice(filled(template, record), record.options, record.image, filled(template, free))


def filled(template, record):
    """The template with the record's texts in place of their placeholders. {options} stays."""

    def fill(line):
        named = PLACEHOLDERS.findall(line)
        if named and not any(getattr(record, name) for name in named):
            return None
        return PLACEHOLDERS.sub(lambda match: getattr(record, match[1]), line)

    lines = (fill(line) for line in template.split("\n"))
    return "\n".join(line for line in lines if line is not None)


def letters_of(record, place, scores, multi_answer=False):
    """The letters of an answer.

    Args:
        record: Record.
        place: index of the chosen option.
        scores: log-probabilities of the options in their order.
        multi_answer: return all options with a probability above 1/2, if there are any; the scores must be those of
            the method "per_option" of `hkdfast.choices.answer`. "No hallucination" is dropped if there are others.
    """
    if multi_answer:
        likely = [i for i, score in enumerate(scores) if score > math.log(0.5)]
        wrong = [i for i in likely if not is_none(record.options[i])]
        return "".join(LETTERS[i] for i in wrong or likely or [place])
    return LETTERS[place]


def question(record, order=None, template=0):
    """The prompt of a record. The letter at index `place` labels option order[place]; order None: no shift."""
    return choice(record, template).prompt(order)


def example(record, folder=None, template=0):
    """The record as a training example: a dict with "image" (a path), "text" (the prompt) and "answer" (the right
    letters or None). The record's other fields and "template" are in it too, so that augmentation can rewrite the
    prompt.

    Args:
        record: Record.
        folder: of the images; None leaves the file name.
        template: as in `choice`.
    """
    image = record.image if folder is None else str(Path(folder).expanduser() / record.image)
    found = {name: getattr(record, name) for name in own_fields()} | {"image": image, "options": list(record.options)}
    return found | {"template": template, "text": question(record, template=template)}


def own_fields():
    """Names of the fields of a Record that describe the question, not its place in a file."""
    return [each.name for each in fields(Record) if each.compare]


def record_of(example):
    """The Record of an example that `example` made.

    Raises:
        ValueError: naming the fields that are missing.
    """
    names = own_fields()
    missing = [name for name in names if name not in example]
    if missing:
        found = f"the example has no {', '.join(missing)}, only {', '.join(example)}"
        raise ValueError(f"{found}: make it by hkdfast.evaluate.choices.example")
    return Record(**{name: example[name] for name in names} | {"options": tuple(example["options"])})
