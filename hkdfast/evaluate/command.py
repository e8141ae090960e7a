"""hkdfast evaluate: ask a model a benchmark's questions, or take answers that exist, and score them."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from .. import __version__
from . import bootstrap, jsonl, mme, pope
from .decoding import Decoding

COMPARED = ("f1", "accuracy")  # metrics that get an interval
DECODING_HELP = {
    "sample": "draw every word from the whole vocabulary instead of taking the most probable one",
    "temperature": "of the sampling",
    "seed": "of the sampling",
    "instruction": "text that follows every question after a space, '' for none; the default is VCD's",
    "max_new_tokens": "most words (tokens) of an answer",
    "batch_size": "questions asked at once",
}


def add_arguments(parser, formatter):
    """The subcommands of `hkdfast evaluate`, each with `run` set to what does it."""
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    add_pope(commands.add_parser("pope", help="POPE: is there an object in the image?", formatter_class=formatter))
    command = commands.add_parser("mme", help="MME: score the answers of a results folder", formatter_class=formatter)
    command.add_argument("--results", required=True, metavar="DIR", help="folder with a tab-separated .txt per subtask")
    command.add_argument("--output", metavar="FILE", help="JSON file for the scores")
    command.set_defaults(run=run_mme)


def add_pope(parser):
    parser.description = (
        "Ask a vision-language model POPE's questions, or take answers that exist, and score them exactly as the "
        "official scripts do, with 95 % paired bootstrap intervals over images for a difference between two systems."
    )
    add = parser.add_argument
    add("--questions", nargs="+", required=True, metavar="FILE", help="JSON lines: question_id, image, text, label")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PATH", help="model to ask: a folder or a Hub name")
    what.add_argument(
        "--answers",
        nargs="+",
        metavar="FILE",
        help="answers to score: as many files for each file of questions, all of the first before those of the next",
    )
    add("--images", metavar="DIR", help="folder of the questions' images; needed with --model")
    add("--adapter", metavar="DIR", help="PEFT adapter to put on the model")
    add("--base", action="store_true", help="also ask the model without its adapter, and compare")
    add("--against", nargs="+", metavar="FILE", help="answers of another system to compare with, listed like --answers")
    add("--rule", choices=pope.RULES, default="vcd", help="the official script to score as: VCD's or POPE's own")
    add("--draws", type=int, default=1, help="how often each question is asked; more than 1 needs --sample")
    for option in fields(Decoding):
        if option.name not in DECODING_HELP:
            continue
        kind = {"action": "store_true"} if option.type is bool else {"type": option.type, "default": option.default}
        add("--" + option.name.replace("_", "-"), help=DECODING_HELP[option.name], **kind)
    add("--device", help="torch device; without it a GPU if there is one")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: as the model is saved",
    )
    add("--resume", action="store_true", help="go on where a stopped run with the same options ended")
    add("--resamples", type=int, default=10_000, help="draws of the bootstrap")
    add("--output", metavar="FILE", help="JSON file for the scores; needed with --model, whose answers go beside it")
    parser.set_defaults(run=run_pope)


def run_pope(args):
    """Everything is read and checked first; then the model is asked; then the table is printed and --output written."""
    check_options(args)
    decoding = Decoding(**{name: getattr(args, name) for name in DECODING_HELP})
    names = set_names(args.questions)
    asked = {
        name: pope.read_questions(path, images=args.images) for name, path in zip(names, args.questions, strict=True)
    }
    theirs = read_answer_files("--against", args.against, asked) if args.against else None
    ours = read_answer_files("--answers", args.answers, asked) if args.answers else None
    draws = args.draws if args.model else len(ours[names[0]])
    if theirs and len(theirs[names[0]]) != draws:
        count = len(theirs[names[0]])
        raise ValueError(f"{draws} draws of each question against {count}: a comparison needs as many")
    if args.model:
        ours, base = ask(args, decoding, asked)
        theirs = base or theirs
    report = {"hkdfast": __version__, "rule": args.rule, "model": args.model, "adapter": args.adapter}
    report |= {"decoding": asdict(decoding) | {"draws": args.draws} if args.model else None}
    report |= compare(asked, ours, theirs, args)
    print(table(report))
    if args.output:
        write(args.output, report)


def check_options(args):
    """Options that contradict each other, named."""
    if args.model:
        for option in ("images", "output"):
            if getattr(args, option) is None:
                raise ValueError(f"--model needs --{option}")
        if not args.sample and args.draws != 1:
            raise ValueError(f"--draws {args.draws} needs --sample: greedy answers are all the same")
    if args.draws < 1:
        raise ValueError(f"--draws is {args.draws}, expected at least 1")
    if args.resamples < 1:
        raise ValueError(f"--resamples is {args.resamples}, expected at least 1")
    if args.adapter and not args.model:
        raise ValueError("--adapter needs --model")
    if args.base and not args.adapter:
        raise ValueError("--base needs --adapter: without one there is nothing to compare with")
    if args.base and args.against:
        raise ValueError("--base and --against are two things to compare with, expected one")
    if args.output and Path(args.output).is_dir():
        raise ValueError(f"--output {args.output} is a folder, expected a file")


def set_names(paths):
    """What a table calls the question files: the shortest naming under which no two are the same."""
    for naming in (pope.split_name, lambda path: Path(path).stem, str):
        names = [naming(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a file of questions is listed twice")


def read_answer_files(option, paths, asked):
    """{set name: [answers of each draw]} from as many files for each question set, in blocks."""
    draws, rest = divmod(len(paths), len(asked))
    if rest or not draws:
        count = f"{len(asked)} files of questions"
        raise ValueError(f"{option} lists {len(paths)} files for {count}, expected as many for each")
    blocks = [paths[start : start + draws] for start in range(0, len(paths), draws)]
    return {
        name: [pope.read_answers(path, questions) for path in block]
        for (name, questions), block in zip(asked.items(), blocks, strict=True)
    }


def ask(args, decoding, asked):
    """({set name: [answers of each draw]} of the model, the same of its base or None); the files go beside --output."""
    from ..hf import answer  # the only part that needs transformers

    for questions in asked.values():
        answer.check_images(questions, args.images)
    model, processor = answer.load(args.model, args.adapter, device=args.device, dtype=args.dtype)
    folder = Path(args.output).expanduser().with_suffix(".answers")

    def all_draws(kind, model_id):
        return {
            name: [
                answer.answer_file(
                    model,
                    processor,
                    questions,
                    args.images,
                    folder / f"{name.replace('/', '_')}{kind}.{draw}.jsonl",
                    replace(decoding, draw=draw),
                    name=model_id,
                    resume=args.resume,
                )
                for draw in range(args.draws)
            ]
            for name, questions in asked.items()
        }

    ours = all_draws("", " + ".join(filter(None, (args.model, args.adapter))))
    if not args.base:
        return ours, None
    with model.disable_adapter():
        return ours, all_draws(".base", args.model)


def compare(asked, ours, theirs, args):
    """{"sets": {name: scores}, "difference": {metric: interval}} over all question sets and draws."""
    sets, pairs = {}, ([], [])
    for (name, questions), path in zip(asked.items(), args.questions, strict=True):
        marks = [pope.mark(questions, answers, args.rule) for answers in ours[name]]
        sets[name] = {"questions": str(path), **scores(marks)}
        if theirs:
            others = [pope.mark(questions, answers, args.rule) for answers in theirs[name]]
            sets[name] |= {"against": scores(others), "difference": differences(marks, others, args.resamples)}
            pairs[0].extend(marks)
            pairs[1].extend(others)
    return {"sets": sets} | ({"difference": differences(*pairs, args.resamples)} if theirs else {})


def scores(marks):
    """{"draws": [score of each draw], "mean": their mean}."""
    draws = [pope.score(one) for one in marks]
    return {"draws": draws, "mean": {name: sum(draw[name] for draw in draws) / len(draws) for name in draws[0]}}


def differences(ours, theirs, resamples):
    return {name: bootstrap.paired(ours, theirs, name, resamples=resamples).as_dict() for name in COMPARED}


def table(report):
    """The report as text: one row per question set and system, in percent; differences in points, 95 % intervals."""
    head = ["questions", "number", *pope.METRICS]
    rows = []
    for name, found in report["sets"].items():
        for label, one in ((name, found), ("  against", found.get("against"))):
            if one:
                mean = one["mean"]
                rows.append([label, f"{mean['questions']:.0f}", *(f"{100 * mean[key]:.2f}" for key in pope.METRICS)])
        if "difference" in found:
            rows.append(["  difference", *difference_cells(found["difference"])])
    if "difference" in report and len(report["sets"]) > 1:
        rows.append(["all, difference", *difference_cells(report["difference"])])
    return layout(head, rows)


def difference_cells(difference):
    return ["", *(str(bootstrap.Interval(**difference[key])) if key in difference else "" for key in pope.METRICS)]


def layout(head, rows):
    """Columns of text, the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (head, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def run_mme(args):
    found = mme.score_folder(args.results)
    head = ["subtask", "questions", "accuracy", "accuracy_plus", "score"]
    print(layout(head, [[name, *(cell(one.get(key)) for key in head[1:])] for name, one in found.items()]))
    if args.output:
        write(args.output, {"hkdfast": __version__, "subtasks": found})


def cell(value):
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def write(path, report):
    with jsonl.replacing(path) as file:
        json.dump(report, file, indent=2)
        file.write("\n")
