"""hkdfast evaluate choices: the tracks of the Responsible-AI challenge, answered under shifts of the letters."""

from dataclasses import asdict, fields
from pathlib import Path

from .. import __version__
from ..choices import AGGREGATES, METHODS
from ..data import challenge
from ..data.tasks import TASKS, ChoiceInference, question
from ..evaluate import choices, tables
from ..option_scores import SCORINGS
from . import ask_model

COLUMNS = ("micro_f1", "precision", "recall")
COMPARED = {"micro_f1": "f1"}
WORDS = {"aggregate": AGGREGATES, "method": METHODS, "scoring": SCORINGS}
HELP = {
    "shifts": "letter-to-option maps each question is asked under: cyclic, all, none, or a number drawn at random",
    "aggregate": "average the shifts' log-probabilities, or let them vote",
    "method": "letters; each: every option alone, yes or no; calibrated: letters minus those after a blank question",
    "scoring": "a letter by its one token, or by all its tokens; auto: as the tokenizer has it",
    "template": "wording of the prompt: a number, or a text with {statement} and {options}",
    "seed": "of a number of shifts",
    "batch_size": "questions asked at once, with all their shifts",
    "multi_answer": "answer with all letters whose options are more likely right than not; with --form each",
}


def number_or_text(text):
    return int(text) if text.lstrip("-").isdigit() else text


def add_arguments(parser):
    parser.description = (
        "Ask a vision-language model the multiple-choice questions of the Responsible-AI challenge under shifts of the "
        "letter-to-option map (reconstruction of HKD4VLM's mapping shift), or take answers that exist; micro-F1 with "
        "95 % paired bootstrap intervals over images for a difference between two systems."
    )
    add = parser.add_argument
    add("--task", required=True, choices=tuple(TASKS), help="track of the challenge")
    add("--data", nargs="+", required=True, metavar="FILE", help="JSON list or JSON lines of the challenge's questions")
    ask_model.add_options(parser)
    add(
        "--fixed",
        nargs="*",
        metavar="TEXT",
        help='options that keep their letter; without it "No hallucination", with no text none',
    )
    add_inference(parser)


def add_inference(parser, names=tuple(HELP)):
    """Options of how questions are asked and answered: these fields of ChoiceInference."""
    for option in fields(ChoiceInference):
        if option.name in names:
            kind = type(option.default) if option.name not in ("shifts", "template") else number_or_text
            how = {"type": kind, "default": option.default, "choices": WORDS.get(option.name)}
            if kind is bool:
                how = {"action": "store_true"}
            parser.add_argument("--" + option.name.replace("_", "-"), help=HELP[option.name], **how)


def run(args):
    """Everything is read and checked first; then the model is asked; then --output is written and the table printed."""
    args.draws = 1
    ask_model.check_options(args, args.data)
    fixed = TASKS[args.task].fixed if args.fixed is None else tuple(args.fixed)
    inference = ChoiceInference(fixed=fixed, **{name: getattr(args, name) for name in HELP})
    names = ask_model.set_names(args.data)
    asked = {
        name: challenge.read(path, args.task, args.images, labels=None if args.model else True)
        for name, path in zip(names, args.data, strict=True)
    }
    files = dict(zip(names, args.data, strict=True))
    scored = {name: records for name, records in asked.items() if labeled(files[name], records)}
    ask_model.check_images(args, asked)
    ours, theirs = ask_model.answer_files(args, asked, challenge.read_answers)
    report = {"hkdfast": __version__, "task": args.task, "model": args.model, "adapter": args.adapter}
    report |= {"inference": asdict(inference) if args.model else None}
    lines = None
    if args.model:
        for records in asked.values():
            inference.check(records)
        lines, base = ask_model.ask(args, asked, answer_set(args, inference), texts(inference))
        ours = letters(lines)
        theirs = letters(base) if base else theirs
    paths = [files[name] for name in scored]
    report |= tables.compare(scored, paths, ours, theirs, rate, COMPARED, args.resamples)
    if lines and inference.method != "per_option" and inference.shifts != "none":
        for name, found in report["sets"].items():
            found |= effect_of_shifts(scored[name], ours[name], lines[name], args.resamples)
    ask_model.write(args.output, report)
    for name in asked:
        if name not in scored:
            print(f"{name}: answered, not scored: its questions have no answers")
    if scored:
        print(tables.table(report, COLUMNS))


def texts(inference):
    """For `ask_model.ask`: what is asked, in the options' own order."""

    def texts(records):
        yield "--template", inference.template if isinstance(inference.template, str) else ""
        for record in records:
            yield record.place, question(record, template=inference.template)

    return texts


def labeled(path, records):
    """Whether a file has answers to score by: to all of its questions, or to none."""
    count = sum(record.answer is not None for record in records)
    if 0 < count < len(records):
        missing = f"{len(records) - count} of {len(records)} questions have no answer"
        raise ValueError(f"{path}: {missing}, expected all to have one, or none")
    return count > 0


def rate(records, answers):
    return choices.grade(records, answers), choices.score(records, answers)


def letters(lines):
    """{set name: [answers]} of the lines of answer files."""
    return {name: [[line["choice"] for line in one]] for name, one in lines.items()}


def effect_of_shifts(records, ours, lines, resamples):
    """The same answers without shifts, and what the shifts changed."""
    graded, score = rate(records, [line["unshifted"] for line in lines])
    shifted, _ = rate(records, ours[0])
    difference = tables.differences([shifted], [graded], COMPARED, resamples)
    return {"unshifted": tables.mean_of([score]), "shift": difference}


def answer_set(args, inference):
    """For `asking.ask`: the lines of a set's answers; the letters also in the challenge's own form."""

    def answer_set(model, processor, records, path, model_id):
        from ..hf import choices as hf

        lines = hf.answer_file(
            model,
            processor,
            records,
            args.images,
            Path(f"{path}.jsonl"),
            inference,
            name=model_id,
            resume=args.resume,
        )
        challenge.write_answers(f"{path}.json", records, [line["choice"] for line in lines])
        return lines

    return answer_set
