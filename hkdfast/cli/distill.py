"""hkdfast distill: DistillTrainer on a user's own text, conversations, or questions about images."""

from pathlib import Path

from .. import shell
from ..batch import answer_rows
from ..data.generation import DTYPES
from ..hf import examples, run_state, teachers
from ..hf.collator import QuestionCollator
from ..hf.configs import StudentArguments
from ..hf.distill import DistillTrainer
from ..hf.distill_config import DistillArguments, DistillConfig
from ..hf.family import check_family
from ..hf.options import DEFAULTS, TRAINING, add_options, check_output, own
from ..hf.progress import Progress
from ..hf.text_collator import TextCollator
from . import user_modules

KERNELS = ("precision", "tile_memory", "backend", "attn_implementation")
LOSS = (*own(DistillArguments, StudentArguments), "beta", "temperature", "t_squared", "teacher_floor", "vocab")
ADAPTER = tuple(name for name in own(StudentArguments) if name not in (*LOSS, *KERNELS, "dtype"))
TRAINED = (*TRAINING, "weight_decay", "max_grad_norm")
GROUPS = {"distillation": LOSS, "what is trained": ADAPTER, "training": TRAINED, "kernels": KERNELS}
BEFORE = "before.json"  # in --output: the evaluation on --dev before the first step
SHOWN = ("loss", "divergence", "cross_entropy", "agreement")  # metrics of an evaluation


def add_arguments(parser):
    """Options of the command. Their help shows the defaults if the parser's formatter does."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="PATH",
        help="student: a folder or Hub name of a model or adapter; not changed",
    )
    add(
        "--teacher",
        required=True,
        nargs="+",
        metavar="TEACHER",
        help='a folder or Hub name; "self" for the model without its adapter; or several as NAME=PATH, from which the '
        "teacher_id of each example chooses",
    )
    add("--data", required=True, metavar="FILE", help="text, messages or questions: JSON lines or a dataset folder")
    add("--output", required=True, metavar="DIR", help="new folder for the student, or its adapter")
    add("--dev", metavar="FILE", help="examples on which the student is evaluated before and after training")
    add("--images", metavar="DIR", help="folder of the images that the examples name")
    add("--instruction", default="", help="text that is appended to every question about an image")
    add("--dtype", default="auto", choices=DTYPES, help="data type of the loaded models; auto: as saved")
    add("--resume", action="store_true", help="resume from the last checkpoint in --output")
    user_modules.add_option(parser)
    for title, names in GROUPS.items():
        add_options(parser, title, DistillConfig, names, DEFAULTS)


def run(args):
    """Read and check everything; train the student and save it in --output."""
    output = Path(args.output).absolute()
    check_output(args.output, output, args.resume)
    named = parse_teachers(args.teacher)
    if any(map(teachers.is_self, named.values())) and args.lora_r is None:
        raise ValueError("--teacher self is the model without its adapter: set --lora-r, e.g. --lora-r 16")
    config = DistillConfig(str(output), **{name: getattr(args, name) for name in (*sum(GROUPS.values(), ()), "dtype")})
    read = {name: examples.read(file) for name in ("data", "dev") if (file := getattr(args, name)) is not None}
    for found in read.values():
        examples.check_teachers(found, list(named))
    manifest = fingerprint(args, named, config)
    config.max_length = None  # the trainer refuses it together with a data_collator: the examples are truncated here
    if args.resume and (output / run_state.RUN).is_file():
        run_state.check_manifest(output, manifest)
    with Progress() as progress:
        processor = check_family([args.model, *(one for one in named.values() if not teachers.is_self(one))])
        collator, data = prepared(args, read, processor)
        trainer = DistillTrainer(
            shell.absolute(args.model),
            named.get(None, named),
            config,
            data_collator=collator,
            train_dataset=data["data"],
            processing_class=processor,
            callbacks=[progress],
        )
        if trainer.is_world_process_zero():
            run_state.write_manifest(output, manifest)
        progress.parts = parts(config, data)
        scores = train(args, trainer, data, progress)
        run_state.save_whole(trainer, output, "the student")
    if trainer.is_world_process_zero():
        run_state.mark_done(output, {"history": trainer.state.log_history, "dev": scores})
        print(f"The student is in {output}.", *report(args, trainer, scores), sep="\n")


def parse_teachers(words):
    """{name: teacher} of --teacher; a single teacher has the name None.

    Raises:
        ValueError: several teachers without NAME=PATH, or a repeated name.
    """
    if len(words) == 1 and ("=" not in words[0] or Path(words[0]).expanduser().exists()):
        return {None: place_of(words[0])}
    named = {}
    for word in words:
        name, sign, place = word.partition("=")
        if not (sign and name and place):
            raise ValueError(f"--teacher {word}: several teachers are given as NAME=PATH, e.g. math=my-math-model")
        if name in named:
            raise ValueError(f"--teacher names {name!r} twice")
        named[name] = place_of(place)
    return named


def place_of(word):
    """A teacher for the trainer; a folder as an absolute path."""
    return word if word == teachers.SELF else shell.absolute(shell.path(word))


def prepared(args, read, processor):
    """(data collator, {"data", "dev": dataset}) of the examples, all checked."""
    _, first = read["data"][0]
    if "image" in first:
        if args.max_length is not None:
            raise ValueError("--max-length truncates text, but the examples of --data have images: shorten the texts")
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"the examples of --data have images, but --model {args.model} takes text only")
        collator = QuestionCollator(processor, answers=True, instruction=args.instruction)
        return collator, {name: examples.ImageQuestions(found, processor, args.images) for name, found in read.items()}
    for name in ("images", "instruction"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for questions about images, but the examples of --data have no 'image'")
    collator = TextCollator(getattr(processor, "tokenizer", processor), args.max_length)
    return collator, {name: examples.EncodedTexts(found, collator) for name, found in read.items()}


def fingerprint(args, named, config):
    """All that determines the result of a run, for `run_state.write_manifest`."""
    manifest = {"model": shell.absolute(args.model), "instruction": args.instruction}
    manifest["teachers"] = {str(name): one for name, one in named.items()}
    folder = Path(args.data).is_dir()
    manifest["data"] = shell.absolute(args.data) if folder else run_state.digest(args.data)
    return config.fingerprint() | manifest


def parts(config, data):
    """The parts of Progress: evaluations and training. A training step costs about three times an evaluation step."""
    examples_seen = config.max_steps * config.train_batch_size * config.gradient_accumulation_steps
    work = 3 * (examples_seen if config.max_steps > 0 else config.num_train_epochs * len(data["data"]))
    made = {config.output_dir: ("training", work)}
    if "dev" in data:
        evaluations = {
            f"{config.output_dir}, {when}": (f"--dev {when}", len(data["dev"])) for when in ("before", "after")
        }
        before, after = evaluations.items()
        made = dict([before, *made.items(), after])
    return made


def train(args, trainer, data, progress):
    """Train, and with --dev evaluate before and after. Returns {"before", "after": metrics} or {}."""
    output, scores = trainer.args.output_dir, {}
    checkpoint = run_state.last_checkpoint(output) if args.resume else None
    kept = run_state.read(Path(output) / BEFORE) if checkpoint else None
    if "dev" in data:
        scores["before"] = kept or measure(trainer, data["dev"], progress, "before")
        if trainer.is_world_process_zero():
            run_state.write(Path(output) / BEFORE, scores["before"])
    announce(trainer, data["data"], progress)
    trainer.train(resume_from_checkpoint=checkpoint)
    if "dev" in data:
        scores["after"] = measure(trainer, data["dev"], progress, "after")
    return scores


def measure(trainer, data, progress, when):
    """{metric: mean} over the answer positions of a dataset."""
    if trainer.is_world_process_zero():
        progress.begin(f"{trainer.args.output_dir}, {when}")
    found = trainer.evaluate(data, metric_key_prefix="dev")
    return {name: found[f"dev_{name}"] for name in SHOWN if f"dev_{name}" in found}


def announce(trainer, data, progress):
    """Print the memory of the loss on the batch of the longest examples, before the first step."""
    batch = trainer.data_collator(data.longest(trainer.args.per_device_train_batch_size))
    rows = answer_rows(batch)[0]
    memory = trainer.loss_memory(int(rows.sum()), rows.numel())
    if trainer.is_world_process_zero():
        progress.say(
            f"Largest batch: {len(rows)} examples, {rows.numel():,} positions, {int(rows.sum()):,} with a loss. The "
            f"loss takes {size(memory.fused)};\nPyTorch with full logits would take {size(memory.eager)} or more."
        )


def size(count):
    """Bytes as a text."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def report(args, trainer, scores):
    """The result of the run, as lines of text."""
    if scores:
        before, after = scores["before"], scores["after"]
        yield f"{'on ' + Path(args.dev).name:24}{'before':>10}{'after':>10}"
        for name in before:
            yield f"{name.replace('_', ' '):24}{before[name]:10.3f}{after[name]:10.3f}"
        yield (
            f"On examples that it was not trained on, student and teacher have the same most likely token at "
            f"{after['agreement']:.0%}\nof the positions (before: {before['agreement']:.0%}); the divergence went from "
            f"{before['divergence']:.3g} to {after['divergence']:.3g} nats per token."
        )
        return
    seen = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    if seen:
        yield (
            f"The divergence from the teacher went from {seen[0]:.3g} to {seen[-1]:.3g} nats per token on the training "
            "data; --dev measures it on other examples."
        )


def kept(args):
    """What a stopped run has kept."""
    return run_state.kept(args.output)
