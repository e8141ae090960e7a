"""What the benchmarks that ask a model share: options, asking with and without an adapter, scores and their table."""

import json
from pathlib import Path

from .. import modules
from . import bootstrap, jsonl, pope

WIDTHS = ("auto", "float32", "bfloat16", "float16")


def add_options(parser):
    """Options of a command that asks a model, or takes answers that exist, and scores them."""
    add = parser.add_argument
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
    modules.add_option(parser)
    add("--base", action="store_true", help="also ask the model without its adapter, and compare")
    add("--against", nargs="+", metavar="FILE", help="answers of another system to compare with, listed like --answers")
    add("--device", help="torch device; without it a GPU if there is one")
    add("--dtype", default="auto", choices=WIDTHS, help="auto: as the model is saved")
    add("--resume", action="store_true", help="go on where a stopped run with the same options ended")
    add("--resamples", type=int, default=10_000, help="draws of the bootstrap")
    add("--output", metavar="FILE", help="JSON file for the scores; needed with --model, whose answers go beside it")


def check_options(args):
    """Options that contradict each other, named; and answers that would be lost."""
    if args.model:
        for option in ("images", "output"):
            if getattr(args, option) is None:
                raise ValueError(f"--model needs --{option}")
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
    folder = answer_folder(args) if args.model else None
    if folder == Path(args.output or "").expanduser():
        raise ValueError(f"--output {args.output} is the name of the folder of the answers, expected a file beside it")
    if folder and not args.resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds the answers of an earlier run: --resume it, or name another --output")


def answer_folder(args):
    return Path(args.output).expanduser().with_suffix(".answers")


def set_names(paths):
    """What a table calls the question files: the shortest naming under which no two are the same."""
    for naming in (pope.split_name, lambda path: Path(path).stem, str):
        names = [naming(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a file of questions is listed twice")


def read_answer_files(option, paths, asked, read):
    """{set name: [answers of each draw]} from as many files for each question set, in blocks; read(path, questions)."""
    draws, rest = divmod(len(paths), len(asked))
    if rest or not draws:
        count = f"{len(asked)} files of questions"
        raise ValueError(f"{option} lists {len(paths)} files for {count}, expected as many for each")
    blocks = [paths[start : start + draws] for start in range(0, len(paths), draws)]
    return {
        name: [read(path, questions) for path in block]
        for (name, questions), block in zip(asked.items(), blocks, strict=True)
    }


def answer_files(args, asked, read):
    """What --answers and --against list, each as `read_answer_files` gives it, or None."""
    listed = (("--answers", args.answers), ("--against", args.against))
    ours, theirs = (read_answer_files(option, paths, asked, read) if paths else None for option, paths in listed)
    draws = args.draws if args.model else len(next(iter(ours.values())))
    count = len(next(iter(theirs.values()))) if theirs else draws
    if count != draws:
        raise ValueError(f"{draws} draws of each question against {count}: a comparison needs as many")
    return ours, theirs


def ask(args, asked, answer_set):
    """({set name: answers} of the model, the same of its base or None).

    Args:
        asked: {set name: questions}.
        answer_set: function of (model, processor, questions, path, model_id) to the answers of a set, which it keeps in
            files beside --output whose names begin with the path's.
    """
    from ..hf import answer  # the only part that needs transformers

    for questions in asked.values():
        answer.check_images(questions, args.images)
    model, processor = answer.load(args.model, args.adapter, device=args.device, dtype=args.dtype)

    def every(kind, model_id):
        return {
            name: answer_set(
                model, processor, questions, answer_folder(args) / f"{name.replace('/', '_')}{kind}", model_id
            )
            for name, questions in asked.items()
        }

    ours = every("", " + ".join(filter(None, (args.model, args.adapter))))
    if not args.base:
        return ours, None
    with model.disable_adapter():
        return ours, every(".base", args.model)


def compare(asked, paths, ours, theirs, rate, compared, resamples):
    """{"sets": {name: scores}, "difference": {metric: interval}} over all question sets and draws.

    Args:
        asked, paths: {set name: questions}, and their files.
        ours, theirs: {set name: [answers of each draw]}; theirs may be None.
        rate: function of (questions, answers) to (Marks, {metric: score}).
        compared: {name of a metric: what `bootstrap.paired` calls it} of those that get an interval.
    """
    sets, pairs = {}, ([], [])
    for (name, questions), path in zip(asked.items(), paths, strict=True):
        marks, rated = zip(*(rate(questions, answers) for answers in ours[name]), strict=True)
        sets[name] = {"questions": str(path), **mean_of(rated)}
        if theirs:
            others, against = zip(*(rate(questions, answers) for answers in theirs[name]), strict=True)
            sets[name] |= {"against": mean_of(against), "difference": differences(marks, others, compared, resamples)}
            pairs[0].extend(marks)
            pairs[1].extend(others)
    return {"sets": sets} | ({"difference": differences(*pairs, compared, resamples)} if theirs and sets else {})


def mean_of(draws):
    """{"draws": [score of each draw], "mean": their mean}."""
    numbers = [name for name, value in draws[0].items() if not isinstance(value, dict)]
    return {"draws": list(draws), "mean": {name: sum(draw[name] for draw in draws) / len(draws) for name in numbers}}


def differences(ours, theirs, compared, resamples):
    return {
        name: bootstrap.paired(ours, theirs, metric, resamples=resamples).as_dict() for name, metric in compared.items()
    }


def table(report, columns):
    """The report as text: one row per question set and system, in percent; differences in points, 95 % intervals."""

    def score_row(label, one):
        return [label, f"{one['questions']:.0f}", *(f"{100 * one[key]:.2f}" for key in columns)]

    def difference_row(label, found):
        return [label, "", *(str(bootstrap.Interval(**found[key])) if key in found else "" for key in columns)]

    rows = []
    for name, found in report["sets"].items():
        rows.append(score_row(name, found["mean"]))
        if len(found["draws"]) == 1:
            rows += [score_row(f"    {label}", one) for label, one in found["draws"][0].get("classes", {}).items()]
        for other, difference in (("unshifted", "shift"), ("against", "difference")):
            if other in found:
                rows.append(score_row(f"  {other}", found[other]["mean"]))
            if difference in found:
                rows.append(difference_row(f"  {difference}", found[difference]))
    if "difference" in report and len(report["sets"]) > 1:
        rows.append(difference_row("all, difference", report["difference"]))
    return layout(["questions", "number", *columns], rows)


def layout(head, rows):
    """Columns of text, the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (head, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def write(path, report):
    with jsonl.replacing(path) as file:
        json.dump(report, file, indent=2)
        file.write("\n")
