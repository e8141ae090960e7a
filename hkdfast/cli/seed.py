"""hkdfast seed: SEED on a user's own model, images and questions. Options are SeedConfig's; none is described twice."""

from pathlib import Path

from .. import shell
from ..data.generation import DTYPES, GenerationOptions, with_instruction
from ..evaluate import pope
from ..hf import generate, rounds, run_state
from ..hf.collator import QuestionCollator, Questions
from ..hf.configs import SeedConfig
from ..hf.options import DEFAULTS as SHARED_DEFAULTS
from ..hf.options import TRAINING, add_options, check_output, own
from ..hf.progress import Progress
from ..hf.seed import SeedTrainer
from . import user_modules

OWN = own(SeedConfig)
DEFAULTS = SHARED_DEFAULTS | {"yes_rate": True}  # questions of POPE's form ask for yes or no


def add_arguments(parser):
    """Options of the command. Their help shows the defaults if the parser's formatter does."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="vision-language model: a folder or a Hub name; not changed")
    add("--images", required=True, metavar="DIR", help="folder of the questions' images")
    add("--questions", required=True, metavar="FILE", help="JSON lines: question_id, image, text; label with --labels")
    add("--output", required=True, metavar="DIR", help="new folder for the adapter and the processor")
    add("--labels", action="store_true", help="learn at the tokens of the labels; without it no label is read")
    add("--instruction", default=GenerationOptions.instruction, help="text that follows every question, '' for none")
    add("--dtype", default="auto", choices=DTYPES, help="auto: as the model is saved")
    add("--resume", action="store_true", help="resume from the last checkpoint in --output")
    user_modules.add_option(parser)
    for title, names in (("SEED", OWN), ("training", TRAINING)):
        add_options(parser, title, SeedConfig, names, DEFAULTS)


def run(args):
    """Everything is read and checked first; then the adapter is trained and saved in --output."""
    if args.hard_weight and not args.labels:
        raise ValueError(f"--hard-weight {args.hard_weight} needs --labels")
    if args.confidence == "target" and not args.labels:
        raise ValueError("--confidence target needs --labels")
    output = Path(args.output).absolute()
    check_output(args.output, output, args.resume)
    checkpoint = run_state.last_checkpoint(output) if args.resume else None
    if args.resume and checkpoint is None and not (output / run_state.RUN).is_file():  # else it did not come so far
        raise ValueError(f"--resume: no checkpoint in {args.output}")
    config = SeedConfig(str(output), **{name: getattr(args, name) for name in (*OWN, *TRAINING)})
    questions = pope.read_questions(args.questions, images=args.images, labels=args.labels)
    generate.check_images(questions, args.images)
    with Progress(parts(config)) as progress:
        place = shell.absolute(args.model)  # which the adapter names
        model, processor = generate.load(place, device="cpu" if args.use_cpu else None, dtype=args.dtype)
        texts = [(each.place, with_instruction(each.text, args.instruction)) for each in questions]
        generate.check_texts(processor, [("--instruction", args.instruction), *texts])
        trainer = SeedTrainer(
            model,
            config,
            train_dataset=Questions(questions, Path(args.images), args.labels),
            data_collator=QuestionCollator(processor, args.labels, args.instruction),
            processing_class=processor,
            callbacks=[progress],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        run_state.save_whole(trainer, output, "the adapter")
    if trainer.is_world_process_zero():
        print(f"The adapter is in {output}.", scoring(args, output), sep="\n")


def parts(config):
    """The rounds, for Progress."""
    folders = rounds.folders(config.output_dir, config.rounds)
    return {folder: (f"round {number} of {config.rounds}", 1) for number, folder in enumerate(folders, 1)}


def scoring(args, output):
    """What to do with the adapter: the command that scores it on these questions, if they have labels."""
    try:
        pope.read_questions(args.questions)
    except ValueError:
        return "hkdfast evaluate pope scores it on questions that have labels; these have none."
    words = ["evaluate", "pope", "--model", shell.absolute(args.model), "--adapter", output, "--base"]
    words += ["--images", shell.absolute(args.images), "--questions", shell.absolute(args.questions)]
    words += ["--output", output.with_name(f"{output.name}-scores.json"), "--instruction", args.instruction]
    words += ["--dtype", args.dtype, *(["--device", "cpu"] if args.use_cpu else [])]
    words += ["--import", *args.modules] if args.modules else []
    return f"To score it beside its base, on these or on other questions:\n{shell.paste(*words)}"


def kept(args):
    """What a stopped run has left."""
    return run_state.kept(args.output)
