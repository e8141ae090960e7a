"""hkdfast evaluate choices: the multiple-choice tracks of the Responsible-AI challenge, with mapping shifts."""

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
    "shifts": "letter-to-option maps for each question: cyclic, all, none, or a number of random maps",
    "aggregate": "mean of the shifts' log-probabilities, or a vote of the shifts",
    "method": "letters: score each letter; per_option: each option alone, yes or no; calibrated: letters minus "
    "letters after a content-free question",
    "scoring": "score a letter by one token or by all its tokens; auto: by one token if every letter is one",
    "template": "wording of the prompt: a number, or a text with {statement} and {options}",
    "seed": "random seed of a number of shifts",
    "batch_size": "questions per forward pass, with all their shifts",
    "multi_answer": "answer with all letters whose option has a probability above 1/2; with --method per_option",
}


def number_or_text(text):
    return int(text) if text.lstrip("-").isdigit() else text


def add_arguments(parser):
    parser.description = (
        "Score a vision-language model on the multiple-choice questions of the Responsible-AI challenge, asked under "
        "shifts of the letter-to-option map (reconstruction of HKD4VLM's mapping shift), or score existing answers. "
        "The score is micro-F1. Differences between two systems have 95 % paired bootstrap intervals over images."
    )
    add = parser.add_argument
    add("--task", required=True, choices=tuple(TASKS), help="track of the challenge")
    add("--data", nargs="+", required=True, metavar="FILE", help="questions of the challenge, JSON list or JSON lines")
    ask_model.add_options(parser)
    group = parser.add_argument_group("inference")
    add_inference(group)
    group.add_argument(
        "--fixed",
        nargs="*",
        metavar="TEXT",
        help='options that keep their letter; by default "No hallucination"; without a value none does',
    )


def add_inference(parser, names=tuple(HELP)):
    """An option for each of these fields of ChoiceInference."""
    for option in fields(ChoiceInference):
        if option.name in names:
            kind = type(option.default) if option.name not in ("shifts", "template") else number_or_text
            how = {"type": kind, "default": option.default, "choices": WORDS.get(option.name)}
            if kind is bool:
                how = {"action": "store_true"}
            parser.add_argument("--" + option.name.replace("_", "-"), help=HELP[option.name], **how)


def run(args):
    """Read and check everything; run the model; write --output and print the table."""
    args.draws = 1
    ask_model.check_options(args, args.data)
    fixed = TASKS[args.task].fixed if args.fixed is None else tuple(args.fixed)
    inference = ChoiceInference(fixed=fixed, **{name: getattr(args, name) for name in HELP})
    names = ask_model.set_names(args.data)
    sets = {
        name: challenge.read(path, args.task, args.images, labels=None if args.model else True)
        for name, path in zip(names, args.data, strict=True)
    }
    files = dict(zip(names, args.data, strict=True))
    scored = {name: records for name, records in sets.items() if labeled(files[name], records)}
    ask_model.check_images(args, sets)
    ours, theirs = ask_model.answer_files(args, sets, challenge.read_answers)
    report = {"hkdfast": __version__, "task": args.task, "model": args.model, "adapter": args.adapter}
    report |= {"inference": asdict(inference) if args.model else None}
    lines = None
    if args.model:
        for records in sets.values():
            inference.check(records)
        lines, base = ask_model.run_model(args, sets, answer_set(args, inference), texts(inference))
        ours = letters(lines)
        theirs = letters(base) if base else theirs
    paths = [files[name] for name in scored]
    report |= tables.compare(scored, paths, ours, theirs, rate, COMPARED, args.resamples)
    if lines and inference.method != "per_option" and inference.shifts != "none":
        for name, found in report["sets"].items():
            found |= effect_of_shifts(scored[name], ours[name], lines[name], args.resamples)
    ask_model.write(args.output, report)
    for name in sets:
        if name not in scored:
            print(f"{name}: answered, but not scored, because its questions have no answers")
    if scored:
        print(tables.table(report, COLUMNS))


def texts(inference):
    """For `ask_model.run_model`: the prompts, with the options in their own order."""

    def texts(records):
        yield "--template", inference.template if isinstance(inference.template, str) else ""
        for record in records:
            yield record.place, question(record, template=inference.template)

    return texts


def labeled(path, records):
    """Whether the questions of a file have answers; ValueError if only some have."""
    count = sum(record.answer is not None for record in records)
    if 0 < count < len(records):
        missing = f"{len(records) - count} of {len(records)} questions have no answer"
        raise ValueError(f"{path}: {missing}, expected an answer for each question or for none")
    return count > 0


def rate(records, answers):
    return choices.grade(records, answers), choices.score(records, answers)


def letters(lines):
    """{set name: [answers]} from the lines of answer files."""
    return {name: [[line["choice"] for line in one]] for name, one in lines.items()}


def effect_of_shifts(records, ours, lines, resamples):
    """The scores without shifts, and the difference that the shifts make."""
    graded, score = rate(records, [line["unshifted"] for line in lines])
    shifted, _ = rate(records, ours[0])
    difference = tables.differences([shifted], [graded], COMPARED, resamples)
    return {"unshifted": tables.mean_of([score]), "shift": difference}


def answer_set(args, inference):
    """For `ask_model.run_model`: answer a set; the letters are also written in the challenge's own format."""

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
