"""hkdfast evaluate: score a model's answers to a benchmark's questions, or existing answers."""

from dataclasses import asdict, fields, replace
from pathlib import Path

from .. import __version__
from ..data import outputs
from ..data.generation import GenerationOptions, with_instruction
from ..evaluate import mme, pope, tables
from . import ask_model, choices
from .help import HelpFormatter, add_example, shorten_usage

COMPARED = {"f1": "f1", "accuracy": "accuracy"}  # metrics that get an interval
DECODING_HELP = {
    "sample": "sample from the whole vocabulary instead of greedy decoding",
    "temperature": "temperature of --sample",
    "seed": "random seed of --sample",
    "instruction": "text that is appended to every question after a space, '' for none; the default is VCD's",
    "max_new_tokens": "largest number of tokens of an answer",
    "batch_size": "questions per batch",
}


def add_arguments(parser):
    """The subcommands of `hkdfast evaluate`."""
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    made = {
        name: commands.add_parser(name, help=text, formatter_class=HelpFormatter)
        for name, text in (
            ("pope", "POPE: yes-no questions about objects in images"),
            ("mme", "MME: score the answers in a results folder"),
            ("choices", "Responsible-AI challenge: multiple choice, micro-F1"),
        )
    }
    for name, command in made.items():
        add_example(command, f"evaluate {name}")
    add_pope(made["pope"])
    command = made["mme"]
    command.description = "Score the answers to MME's questions exactly as the official script does."
    command.add_argument(
        "--results", required=True, metavar="DIR", help="folder with one tab-separated .txt file per subtask"
    )
    command.add_argument("--output", metavar="FILE", help="JSON file for the scores")
    command.set_defaults(run=run_mme)
    choices.add_arguments(made["choices"])
    made["choices"].set_defaults(run=choices.run, kept=ask_model.kept)
    for command in made.values():
        shorten_usage(command)


def add_pope(parser):
    parser.description = (
        "Score a vision-language model on POPE's questions, or score existing answers, exactly as the official scripts "
        "do. Differences between two systems have 95 % paired bootstrap intervals over images. The column unreadable "
        "counts answers with neither yes nor no, or both; it does not change the official scores."
    )
    add = parser.add_argument
    add("--questions", nargs="+", required=True, metavar="FILE", help="JSON lines: question_id, image, text, label")
    scores = ask_model.add_options(parser)
    scores.add_argument(
        "--rule", choices=pope.RULES, default="vcd", help="official script to score by: VCD's or POPE's"
    )
    add = parser.add_argument_group("generation").add_argument
    for option in fields(GenerationOptions):
        if option.name not in DECODING_HELP:
            continue
        kind = {"action": "store_true"} if option.type is bool else {"type": option.type, "default": option.default}
        add("--" + option.name.replace("_", "-"), help=DECODING_HELP[option.name], **kind)
    add("--draws", type=int, default=1, help="answers per question; more than 1 needs --sample")
    parser.set_defaults(run=run_pope, kept=ask_model.kept)


def run_pope(args):
    """Read and check everything; run the model; write --output and print the table."""
    if args.draws < 1:
        raise ValueError(f"--draws is {args.draws}, expected at least 1")
    if args.model and not args.sample and args.draws != 1:
        raise ValueError(f"--draws {args.draws} needs --sample: greedy answers are all the same")
    ask_model.check_options(args, args.questions)
    decoding = GenerationOptions(**{name: getattr(args, name) for name in DECODING_HELP})
    names = ask_model.set_names(args.questions)
    sets = {
        name: pope.read_questions(path, images=args.images) for name, path in zip(names, args.questions, strict=True)
    }
    ask_model.check_images(args, sets)
    ours, theirs = ask_model.answer_files(args, sets, pope.read_answers)
    if args.model:
        ours, base = ask_model.run_model(args, sets, answer_set(args, decoding), texts(decoding))
        theirs = base or theirs
    report = {"hkdfast": __version__, "rule": args.rule, "model": args.model, "adapter": args.adapter}
    report |= {"decoding": asdict(decoding) | {"draws": args.draws} if args.model else None}

    def rate(questions, answers):
        graded = pope.grade(questions, answers, args.rule)
        return graded, pope.score(graded) | {"unreadable": pope.count_unreadable(answers)}

    report |= tables.compare(sets, args.questions, ours, theirs, rate, COMPARED, args.resamples)
    ask_model.write(args.output, report)
    print(tables.table(report, pope.METRICS, ["unreadable"]))


def texts(decoding):
    """For `ask_model.run_model`: the prompts."""

    def texts(questions):
        yield "--instruction", decoding.instruction
        for question in questions:
            yield question.place, with_instruction(question.text, decoding.instruction)

    return texts


def answer_set(args, decoding):
    """For `ask_model.run_model`: the answers of each draw."""

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
        raise ValueError(f"--output {args.output} would be read as a subtask of {args.results}: choose another file")
    found = mme.score_folder(args.results)
    head = ["subtask", "questions", "accuracy", "accuracy_plus", "score", "unreadable"]
    ask_model.write(args.output, {"hkdfast": __version__, "subtasks": found})
    print(tables.layout(head, [[name, *(cell(one.get(key)) for key in head[1:])] for name, one in found.items()]))


def cell(value):
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
