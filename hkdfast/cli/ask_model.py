"""What the benchmarks that ask a model share: options, asking with and without an adapter, scores and their table."""

import json
from pathlib import Path

from ..data import outputs
from ..data.generation import DTYPES
from ..evaluate import pope
from . import user_modules

# what the folder of a model or an adapter is read for; scores may lie beside it
MODEL_FILES = ("*config.json", "*.safetensors", "*.bin", "*.index.json", "*token*.json", "vocab*", "merges.txt")
MODEL_FILES += ("*.model", "chat_template*")


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
    user_modules.add_option(parser)
    add("--base", action="store_true", help="also ask the model without its adapter, and compare")
    add("--against", nargs="+", metavar="FILE", help="answers of another system to compare with, listed like --answers")
    add("--device", help="torch device; without it a GPU if there is one")
    add("--dtype", default="auto", choices=DTYPES, help="auto: as the model is saved")
    add(
        "--attn-implementation",
        help="e.g. sdpa, eager, flash_attention_2 (of the extra flash); default: transformers' choice",
    )
    add("--resume", action="store_true", help="continue a stopped run with the same options")
    add("--resamples", type=int, default=10_000, help="draws of the bootstrap")
    add("--output", metavar="FILE", help="JSON file for the scores; needed with --model, whose answers go beside it")


def check_options(args, questions):
    """Options that contradict each other, named; and answers that would be lost.

    Args:
        questions: the files of them.
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
        raise ValueError("--base and --against are two things to compare with, expected one")
    given = [*questions, *(args.answers or ()), *(args.against or ())]
    outputs.check("--output", args.output, [*given, *model_files(args.model), *model_files(args.adapter)])
    if args.model and outputs.special(args.output):
        raise ValueError(f"--output {args.output} is no file: with --model the answers go into a folder beside it")
    folder = answer_folder(args) if args.model else None
    if folder == Path(args.output or "").expanduser():
        raise ValueError(f"--output {args.output} is the name of the folder of the answers, expected a file beside it")
    inside = folder and next((name for name in given if folder.resolve() in Path(name).resolve().parents), None)
    if inside:
        raise ValueError(f"{inside} is read, and the answers are written in {folder}: name another --output")
    if folder and not args.resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds the answers of an earlier run: --resume it, or name another --output")


def model_files(folder):
    """The files of a model or an adapter in a folder; none for a Hub name or None."""
    place = Path(folder or "").expanduser()
    return [file for pattern in MODEL_FILES for file in place.glob(pattern)] if folder and place.is_dir() else []


def check_images(args, asked):
    """See that --output is none of the images of the questions, which are {set name: questions}."""
    if args.images:
        names = {question.image for questions in asked.values() for question in questions}
        outputs.check("--output", args.output, [Path(args.images).expanduser() / name for name in names])


def answer_folder(args):
    return Path(args.output).expanduser().with_suffix(".answers")


def kept(args):
    """What a stopped command has left of its answers, as text; None where there is nothing."""
    folder = answer_folder(args) if args.model and args.output else None
    if folder is None or not folder.is_dir() or not any(folder.iterdir()):
        return None
    files = [file for file in folder.iterdir() if file.name.endswith((".jsonl", ".jsonl.partial"))]
    count = sum(file.read_bytes().count(b"\n") for file in files)
    return f"{count} answers are kept in {folder}"


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


def ask(args, asked, answer_set, texts):
    """({set name: answers} of the model, the same of its base or None).

    Args:
        asked: {set name: questions}.
        answer_set: function of (model, processor, questions, path, model_id) to the answers of a set, which it keeps in
            files beside --output whose names begin with the path's.
        texts: function of questions to (what an error begins with, text) of each text that they put to the model.
    """
    from ..hf import generate  # the only part that needs transformers

    for questions in asked.values():
        generate.check_images(questions, args.images)
    model, processor = generate.load(
        args.model,
        args.adapter,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
    )
    for questions in asked.values():
        generate.check_texts(processor, list(texts(questions)))

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


def write(path, report):
    """Write the scores to --output, if there is one."""
    if path is None:
        return
    with outputs.replacing(path) as file:
        json.dump(report, file, indent=2)
        file.write("\n")
