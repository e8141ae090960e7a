"""hkdfast evaluate: ask a model a benchmark's questions, or take answers that exist, and score them."""

from dataclasses import asdict, fields, replace
from pathlib import Path

from .. import __version__
from ..data import outputs
from ..data.generation import GenerationOptions, with_instruction
from ..evaluate import mme, pope, tables
from . import ask_model, choices
from .help import HelpFormatter, add_example

COMPARED = {"f1": "f1", "accuracy": "accuracy"}  # metrics that get an interval
DECODING_HELP = {
    "sample": "draw every word from the whole vocabulary instead of taking the most probable one",
    "temperature": "of the sampling",
    "seed": "of the sampling",
    "instruction": "text that follows every question after a space, '' for none; the default is VCD's",
    "max_new_tokens": "most words (tokens) of an answer",
    "batch_size": "questions asked at once",
}


def add_arguments(parser):
    """The subcommands of `hkdfast evaluate`, each with `run` set to what does it."""
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    made = {
        name: commands.add_parser(name, help=text, formatter_class=HelpFormatter)
        for name, text in (
            ("pope", "POPE: is there an object in the image?"),
            ("mme", "MME: score the answers of a results folder"),
            ("choices", "the Responsible-AI challenge: multiple choice, micro-F1"),
        )
    }
    for name, command in made.items():
        add_example(command, f"evaluate {name}")
    add_pope(made["pope"])
    command = made["mme"]
    command.add_argument("--results", required=True, metavar="DIR", help="folder with a tab-separated .txt per subtask")
    command.add_argument("--output", metavar="FILE", help="JSON file for the scores")
    command.set_defaults(run=run_mme)
    choices.add_arguments(made["choices"])
    made["choices"].set_defaults(run=choices.run, kept=ask_model.kept)


def add_pope(parser):
    parser.description = (
        "Ask a vision-language model POPE's questions, or take answers that exist, and score them exactly as the "
        "official scripts do, with 95 % paired bootstrap intervals over images for a difference between two systems. "
        "Answers that say neither yes nor no, or both, are counted beside the official numbers and change none."
    )
    add = parser.add_argument
    add("--questions", nargs="+", required=True, metavar="FILE", help="JSON lines: question_id, image, text, label")
    ask_model.add_options(parser)
    add("--rule", choices=pope.RULES, default="vcd", help="the official script to score as: VCD's or POPE's own")
    add("--draws", type=int, default=1, help="how often each question is asked; more than 1 needs --sample")
    for option in fields(GenerationOptions):
        if option.name not in DECODING_HELP:
            continue
        kind = {"action": "store_true"} if option.type is bool else {"type": option.type, "default": option.default}
        add("--" + option.name.replace("_", "-"), help=DECODING_HELP[option.name], **kind)
    parser.set_defaults(run=run_pope, kept=ask_model.kept)


def run_pope(args):
    """Everything is read and checked first; then the model is asked; then --output is written and the table printed."""
    if args.draws < 1:
        raise ValueError(f"--draws is {args.draws}, expected at least 1")
    if args.model and not args.sample and args.draws != 1:
        raise ValueError(f"--draws {args.draws} needs --sample: greedy answers are all the same")
    ask_model.check_options(args, args.questions)
    decoding = GenerationOptions(**{name: getattr(args, name) for name in DECODING_HELP})
    names = ask_model.set_names(args.questions)
    asked = {
        name: pope.read_questions(path, images=args.images) for name, path in zip(names, args.questions, strict=True)
    }
    ask_model.check_images(args, asked)
    ours, theirs = ask_model.answer_files(args, asked, pope.read_answers)
    if args.model:
        ours, base = ask_model.ask(args, asked, answer_set(args, decoding), texts(decoding))
        theirs = base or theirs
    report = {"hkdfast": __version__, "rule": args.rule, "model": args.model, "adapter": args.adapter}
    report |= {"decoding": asdict(decoding) | {"draws": args.draws} if args.model else None}

    def rate(questions, answers):
        graded = pope.grade(questions, answers, args.rule)
        return graded, pope.score(graded) | {"unreadable": pope.count_unreadable(answers)}

    report |= tables.compare(asked, args.questions, ours, theirs, rate, COMPARED, args.resamples)
    ask_model.write(args.output, report)
    print(tables.table(report, pope.METRICS, ["unreadable"]))


def texts(decoding):
    """For `ask_model.ask`: what is asked."""

    def texts(questions):
        yield "--instruction", decoding.instruction
        for question in questions:
            yield question.place, with_instruction(question.text, decoding.instruction)

    return texts


def answer_set(args, decoding):
    """For `asking.ask`: the answers of each draw."""

    def answer_set(model, processor, questions, path, model_id):
        from ..hf import generate

        return [
            generate.answer_file(
                model,
                processor,
                questions,
                args.images,
                Path(f"{path}.{draw}.jsonl"),
                replace(decoding, draw=draw),
                name=model_id,
                resume=args.resume,
            )
            for draw in range(args.draws)
        ]

    return answer_set


def run_mme(args):
    files = mme.files(args.results)
    outputs.check("--output", args.output, files)
    beside = args.output and Path(args.output).resolve().parent == files[0].resolve().parent
    if beside and Path(args.output).suffix == ".txt":
        raise ValueError(f"--output {args.output} would be one of the subtasks of {args.results}: name another file")
    found = mme.score_folder(args.results)
    head = ["subtask", "questions", "accuracy", "accuracy_plus", "score", "unreadable"]
    ask_model.write(args.output, {"hkdfast": __version__, "subtasks": found})
    print(tables.layout(head, [[name, *(cell(one.get(key)) for key in head[1:])] for name, one in found.items()]))


def cell(value):
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
