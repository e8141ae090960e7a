"""hkdfast seed: SEED on a user's own model, images and questions. Most options are fields of SeedConfig."""

from pathlib import Path

from .. import shell
from ..data.generation import DTYPES, GenerationOptions, with_instruction
from ..evaluate import pope
from ..hf import generate, rounds, run_state
from ..hf.collator import QuestionCollator, Questions
from ..hf.configs import SeedConfig, SharedArguments
from ..hf.options import DEFAULTS as SHARED_DEFAULTS
from ..hf.options import TRAINING, add_options, check_output, own
from ..hf.progress import Progress
from ..hf.seed import SeedTrainer
from . import user_modules

OWN = own(SeedConfig, SharedArguments)
SHARED = own(SharedArguments)
KERNELS = ("precision", "tile_memory", "backend", "attn_implementation")
ADAPTER = tuple(name for name in SHARED if name.startswith("lora_"))
LOSS = (*OWN, *(name for name in SHARED if name not in (*KERNELS, *ADAPTER)))
GROUPS = {"SEED": LOSS, "adapter": ADAPTER, "training": TRAINING, "kernels": KERNELS}
DEFAULTS = SHARED_DEFAULTS | {"yes_rate": True}  # the answers to POPE's questions are yes or no


def add_arguments(parser):
    """Options of the command. Their help shows the defaults if the parser's formatter does."""
    parser.description = (
        "Train an adapter that reduces the hallucinations of a vision-language model, without labels: the model on the "
        "image, contrasted with itself on a noised image, teaches the model with the adapter (reconstruction of SEED)."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="vision-language model: a folder or a Hub name; not changed")
    add("--images", required=True, metavar="DIR", help="folder of the questions' images")
    add("--questions", required=True, metavar="FILE", help="JSON lines: question_id, image, text; label with --labels")
    add("--output", required=True, metavar="DIR", help="new folder for the adapter and the processor")
    add("--labels", action="store_true", help="train at the tokens of the labels; by default labels are not read")
    add(
        "--instruction",
        default=GenerationOptions.instruction,
        help="text that is appended to every question, '' for none",
    )
    add("--dtype", default="auto", choices=DTYPES, help="data type of the model; auto: as saved")
    add("--resume", action="store_true", help="resume from the last checkpoint in --output")
    user_modules.add_option(parser)
    for title, names in GROUPS.items():
        add_options(parser, title, SeedConfig, names, DEFAULTS)


def run(args):
    """Read and check everything; train the adapter and save it in --output."""
    if args.hard_weight and not args.labels:
        raise ValueError(f"--hard-weight {args.hard_weight} needs --labels")
    if args.confidence == "target" and not args.labels:
        raise ValueError("--confidence target needs --labels")
    output = Path(args.output).absolute()
    check_output(args.output, output, args.resume)
    checkpoint = run_state.last_checkpoint(output) if args.resume else None
    # a run that was stopped before its first checkpoint has RUN alone, and begins again
    if args.resume and checkpoint is None and not (output / run_state.RUN).is_file():
        raise ValueError(f"--resume: no checkpoint in {args.output}")
    config = SeedConfig(str(output), **{name: getattr(args, name) for name in sum(GROUPS.values(), ())})
    questions = pope.read_questions(args.questions, images=args.images, labels=args.labels)
    generate.check_images(questions, args.images)
    with Progress(parts(config)) as progress:
        place = shell.absolute(args.model)  # it is written into the adapter's configuration
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
    """The parts of Progress: the rounds."""
    folders = rounds.folders(config.output_dir, config.rounds)
    return {folder: (f"round {number} of {config.rounds}", 1) for number, folder in enumerate(folders, 1)}


def scoring(args, output):
    """A hint for the user: the command that scores the adapter on these questions, if they have labels."""
    try:
        pope.read_questions(args.questions)
    except ValueError:
        return "hkdfast evaluate pope scores it on questions with labels; these have none."
    words = ["evaluate", "pope", "--model", shell.absolute(args.model), "--adapter", output, "--base"]
    words += ["--images", shell.absolute(args.images), "--questions", shell.absolute(args.questions)]
    words += ["--output", output.with_name(f"{output.name}-scores.json"), "--instruction", args.instruction]
    words += ["--dtype", args.dtype, *(["--device", "cpu"] if args.use_cpu else [])]
    words += ["--import", *args.modules] if args.modules else []
    return f"To compare it with the model without it, on these or on other questions:\n{shell.paste(*words)}"


def kept(args):
    """What a stopped run has kept."""
    return run_state.kept(args.output)
