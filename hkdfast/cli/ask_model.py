"""The common part of the benchmarks that run a model: options, answers with and without an adapter, score files."""

import json
from pathlib import Path

from ..data import outputs
from ..data.generation import DTYPES
from ..evaluate import pope
from . import user_modules

# files that are read from the folder of a model or an adapter; scores may be written into the same folder
MODEL_FILES = ("*config.json", "*.safetensors", "*.bin", "*.index.json", "*token*.json", "vocab*", "merges.txt")
MODEL_FILES += ("*.model", "chat_template*")


def add_options(parser):
    """Options of a command that scores the answers of a model, or existing answers.

    Returns:
        the group of options about the scores, for those of a single benchmark.
    """
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PATH", help="model that answers: a folder or a Hub name")
    what.add_argument(
        "--answers",
        nargs="+",
        metavar="FILE",
        help="existing answers to score: the same number of files for each file of questions, those for the "
        "first file first",
    )
    add("--images", metavar="DIR", help="folder of the questions' images; required with --model")
    add("--output", metavar="FILE", help="JSON file for the scores; required with --model, whose answers go beside it")
    add("--adapter", metavar="DIR", help="PEFT adapter to load on the model")
    add("--base", action="store_true", help="also run the model without its adapter, and compare")
    add("--against", nargs="+", metavar="FILE", help="answers of another system to compare with, listed like --answers")
    add("--resume", action="store_true", help="continue a stopped run with the same options")
    group = parser.add_argument_group("loading the model")
    group.add_argument("--device", help="torch device; by default a GPU if there is one")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="data type of the model; auto: as saved")
    group.add_argument(
        "--attn-implementation",
        help="e.g. sdpa, eager, flash_attention_2 (of the extra flash); by default the one that transformers chooses",
    )
    user_modules.add_option(group)
    scores = parser.add_argument_group("scores")
    scores.add_argument("--resamples", type=int, default=10_000, help="number of bootstrap resamples")
    return scores


def check_options(args, questions):
    """Refuse options that contradict each other, or would overwrite an input or earlier answers.

    Args:
        questions: the files of questions.
    """
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
        raise ValueError("--base and --against both name a system to compare with, expected one of them")
    given = [*questions, *(args.answers or ()), *(args.against or ())]
    outputs.check("--output", args.output, [*given, *model_files(args.model), *model_files(args.adapter)])
    if args.model and outputs.special(args.output):
        raise ValueError(f"--output {args.output} is not a file: with --model the answers go into a folder beside it")
    folder = answer_folder(args) if args.model else None
    if folder == Path(args.output or "").expanduser():
        raise ValueError(f"--output {args.output} is the folder of the answers, expected a file with another name")
    inside = folder and next((name for name in given if folder.resolve() in Path(name).resolve().parents), None)
    if inside:
        raise ValueError(f"{inside} is read, and the answers are written in {folder}: name another --output")
    if folder and not args.resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} has the answers of an earlier run: pass --resume, or choose another --output")


def model_files(folder):
    """The files of a model or an adapter in a folder; [] for a Hub name or None."""
    place = Path(folder or "").expanduser()
    return [file for pattern in MODEL_FILES for file in place.glob(pattern)] if folder and place.is_dir() else []


def check_images(args, sets):
    """Refuse an --output that is one of the images of {set name: questions}."""
    if args.images:
        names = {question.image for questions in sets.values() for question in questions}
        outputs.check("--output", args.output, [Path(args.images).expanduser() / name for name in names])


def answer_folder(args):
    return Path(args.output).expanduser().with_suffix(".answers")


def kept(args):
    """How many answers a stopped command has kept, as text; None if there are none."""
    folder = answer_folder(args) if args.model and args.output else None
    if folder is None or not folder.is_dir() or not any(folder.iterdir()):
        return None
    files = [file for file in folder.iterdir() if file.name.endswith((".jsonl", ".jsonl.partial"))]
    count = sum(file.read_bytes().count(b"\n") for file in files)
    return f"{count} answers are kept in {folder}"


def set_names(paths):
    """The names of the question files in a table: the shortest form in which they differ."""
    for naming in (pope.split_name, lambda path: Path(path).stem, str):
        names = [naming(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a file of questions is listed twice")


def read_answer_files(option, paths, sets, read):
    """{set name: [answers of each draw]} from the same number of files for each question set, in blocks.

    Args:
        sets: {set name: questions}.
        read: function from (path, questions) to answers.
    """
    draws, rest = divmod(len(paths), len(sets))
    if rest or not draws:
        count = f"{len(sets)} files of questions"
        raise ValueError(f"{option} lists {len(paths)} files for {count}, expected the same number for each")
    blocks = [paths[start : start + draws] for start in range(0, len(paths), draws)]
    return {
        name: [read(path, questions) for path in block]
        for (name, questions), block in zip(sets.items(), blocks, strict=True)
    }


def answer_files(args, sets, read):
    """(answers of --answers, of --against), each as `read_answer_files` returns it, or None."""
    listed = (("--answers", args.answers), ("--against", args.against))
    ours, theirs = (read_answer_files(option, paths, sets, read) if paths else None for option, paths in listed)
    draws = args.draws if args.model else len(next(iter(ours.values())))
    count = len(next(iter(theirs.values()))) if theirs else draws
    if count != draws:
        raise ValueError(f"{draws} draws of each question against {count}: a comparison needs the same number")
    return ours, theirs


def run_model(args, sets, answer_set, texts):
    """({set name: answers} of the model, the same of its base model or None).

    Args:
        sets: {set name: questions}.
        answer_set: function from (model, processor, questions, path, model_id) to the answers of a set. It writes them
            to files whose names begin with that path.
        texts: function from questions to (prefix of an error message, text) for each text that the model gets.
    """
    from ..hf import generate  # the only part that needs transformers

    for questions in sets.values():
        generate.check_images(questions, args.images)
    model, processor = generate.load(
        args.model,
        args.adapter,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
    )
    for questions in sets.values():
        generate.check_texts(processor, list(texts(questions)))

    def every(kind, model_id):
        return {
            name: answer_set(
                model, processor, questions, answer_folder(args) / f"{name.replace('/', '_')}{kind}", model_id
            )
            for name, questions in sets.items()
        }

    ours = every("", " + ".join(filter(None, (args.model, args.adapter))))
    if not args.base:
        return ours, None
    with model.disable_adapter():
        return ours, every(".base", args.model)


def write(path, report):
    """Write the scores to --output, if it is given."""
    if path is None:
        return
    with outputs.replacing(path) as file:
        json.dump(report, file, indent=2)
        file.write("\n")
