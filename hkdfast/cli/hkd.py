"""hkdfast hkd: HKD4VLM's pyramid, ternary refinement and mapping-shift evaluation on a user's own questions."""

import argparse
from pathlib import Path

from torch.utils.data import ConcatDataset

from ..choices import LETTERS
from ..data import challenge, jsonl
from ..data.augment import Augment, Augmented, Color, Crop, Flip, Noise, Paraphrase, RandomApply, ShuffleOptions
from ..data.synthetic import RewriteStatement
from ..data.tasks import TASKS, ChoiceInference, choice, example, is_none, question
from ..hf import generate, loading, run_state
from ..hf.choices import encoder
from ..hf.configs import CoupledConfig, PyramidConfig, SharedArguments, StudentArguments, TernaryConfig, at_or_last
from ..hf.family import absolute_names, free_memory
from ..hf.loading import base_of, is_adapter
from ..hf.options import DEFAULTS, TRAINING, add_options, check_output, own
from ..hf.progress import Progress
from ..hf.pyramid import PyramidTrainer
from ..hf.ternary import TernaryTrainer
from ..option_scores import single_tokens
from . import choices, user_modules

AUGMENT = {
    "shuffle": ShuffleOptions(),
    "paraphrase": RandomApply(Paraphrase()),
    "flip": RandomApply(Flip()),
    "crop": RandomApply(Crop()),
    "color": RandomApply(Color()),
    "noise": RandomApply(Noise()),
}
FILES = {
    "data": True,
    "unlabeled": False,
    "dev": None,
}  # options that name files of questions: whether answers are read
SHARED = tuple(name for name in own(CoupledConfig) if name != "vocab")
KERNELS = ("precision", "tile_memory", "backend", "attn_implementation")
ADAPTER = tuple(name for name in SHARED if name.startswith("lora_") or name in ("freeze", "dtype"))
LOSS = (*own(CoupledConfig, StudentArguments), *(name for name in own(SharedArguments) if name not in ADAPTER))
LOSS = tuple(name for name in (*LOSS, "t_squared") if name not in KERNELS)
PYRAMID, TERNARY = own(PyramidConfig, CoupledConfig), own(TernaryConfig, CoupledConfig)
TRAINED = (*TRAINING, "weight_decay", "max_grad_norm")
INFERENCE = ("shifts", "aggregate", "scoring", "template")
GROUPS = {
    "distillation": (CoupledConfig, LOSS),
    "pyramid": (PyramidConfig, PYRAMID),
    "ternary refinement": (TernaryConfig, TERNARY),
    "what is trained": (CoupledConfig, ADAPTER),
    "training, of each stage": (CoupledConfig, TRAINED),
    "kernels": (CoupledConfig, KERNELS),
}


def add_arguments(parser):
    """Options of the command. Their help shows the defaults if the parser's formatter does."""
    parser.description = (
        "Distill a chain of vision-language models into the smallest one: pyramid distillation from model to model, "
        "then a ternary refinement with two teachers, then answers under mapping shifts (reconstruction of HKD4VLM)."
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="PATH",
        help="models from large to small: folders or Hub names; not changed",
    )
    add("--task", required=True, choices=tuple(TASKS), help="track of the challenge")
    add("--data", required=True, metavar="FILE", help="questions with answers, in the challenge's JSON")
    add("--images", required=True, metavar="DIR", help="folder of the questions' images")
    add("--output", required=True, metavar="DIR", help="new folder for models and answers")
    add(
        "--unlabeled",
        metavar="FILE",
        help="more questions; their answers are not read, the teachers provide the targets",
    )
    add("--dev", metavar="FILE", help="questions that the student answers at the end; scored if they have answers")
    add(
        "--augment",
        nargs="*",
        default=["shuffle"],
        choices=tuple(AUGMENT),
        help="augmentations of the examples, drawn anew in each epoch",
    )
    add("--rewrites", type=int, default=0, help="rewritten captions or claims per example, answered by the teachers")
    add(
        "--swaps",
        metavar="FILE",
        help='JSON of phrases and their replacements in rewrites, {"cat": ["dog", "cow"]}; by default captions get '
        "options of other captions",
    )
    add("--refine-epochs", type=float, help="epochs of the ternary refinement; by default --num-train-epochs")
    add("--resume", action="store_true", help="resume from --output; finished stages are kept")
    user_modules.add_option(parser)
    for title, (config, names) in GROUPS.items():
        add_options(parser, title, config, names, DEFAULTS)
    choices.add_inference(parser.add_argument_group("prompts, and inference on --dev"), INFERENCE)


def run(args):
    """Read and check everything; train the stages and the refinement; answer --dev."""
    with Progress() as progress:
        student, evaluation = train(args, progress)
        if student is None:
            return
        print(f"The student is in {student}.", flush=True)
        if evaluation is not None:
            evaluation.model = base_of(str(student))
            evaluation.adapter = str(student) if is_adapter(student) else None
            choices.run(evaluation)


def train(args, progress):
    """(folder of the student, arguments of its evaluation or None). The folder is None except in the first process."""
    output = Path(args.output).absolute()
    check_output(args.output, output, args.resume)
    places = refined_places(args)
    pyramid = PyramidConfig(str(output / "pyramid"), **options(args, *SHARED, *PYRAMID, *TRAINED))
    refined = options(args, *SHARED, *TERNARY, *TRAINED)
    if args.refine_epochs is not None:
        refined["num_train_epochs"] = args.refine_epochs
    for name in ("hard_weight", "learning_rates"):
        if refined[name]:
            refined[name] = [at_or_last(refined[name], place) for place in places]
    ternary = TernaryConfig(str(output / "ternary"), **refined)
    records = questions(args)
    data = examples(args, records)
    evaluation = None if args.dev is None else evaluation_of(args, output, records["dev"])
    for name in args.models:
        loading.check_visual(base_of(name))
    loading.load_processor(base_of(args.models[0]))  # it makes the batches of all models
    trainer = PyramidTrainer(args.models, pyramid, train_dataset=data, callbacks=[progress])
    check_prompts(args, records, trainer.processing_class)
    progress.parts = parts(pyramid, ternary, trainer.sizes, places)
    begun = args.resume and Path(pyramid.output_dir).is_dir()  # False: the first stage has not begun
    manifest = fingerprint(args, pyramid, ternary)
    if begun:
        run_state.check_manifest(output, manifest)
    elif pyramid.process_index == 0:
        run_state.write_manifest(output, manifest)
    if run_state.read_done(ternary.output_dir) is None:
        trainer.train(resume_from_checkpoint=begun)
        processor = trainer.processing_class
        del trainer
        free_memory()
        models = [product(args.models, pyramid.output_dir, place) for place in places]
        how = {"train_dataset": data, "processing_class": processor, "callbacks": [progress]}
        trainer = TernaryTrainer(models, ternary, **how)
        trainer.train(resume_from_checkpoint=run_state.last_checkpoint(ternary.output_dir) if args.resume else None)
        trainer.finish()
    del trainer
    free_memory()  # room for the student that answers --dev
    progress.close()
    student = Path(ternary.output_dir) / list(ternary.roles())[-1]
    return None if pyramid.process_index else student, evaluation


def parts(pyramid, ternary, sizes, places):
    """The parts of Progress: the stages and the refinement.

    Args:
        pyramid, ternary: configs.
        sizes: number of weights of each model in the chain.
        places: indices of the models in the refinement.
    """
    count = len(sizes)
    made = [pyramid.of_stage(stage) for stage in range(1, count)]
    found = {
        f"{pyramid.output_dir}/stage-{stage}": (f"stage {stage} of {count}", work(config, sizes[stage - 1 : stage + 1]))
        for stage, config in enumerate(made, 1)
    }
    refinement = work(ternary, [sizes[place] for place in places])
    return found | {ternary.output_dir: (f"stage {count} of {count}, refinement", refinement)}


def work(config, sizes):
    """Relative duration of a training. A trained model has a backward pass, which costs twice its forward pass."""
    passes = sum(size * (3 if learns else 1) for size, learns in zip(sizes, config.roles().values(), strict=True))
    return passes * (1 if config.max_steps > 0 else config.num_train_epochs)


def kept(args):
    """What a stopped run has kept."""
    return run_state.kept(args.output)


def options(args, *names):
    return {name: getattr(args, name) for name in names}


def refined_places(args):
    """Indices in the chain of the models in the refinement: the largest, the student's last teacher, the student."""
    last = len(args.models) - 1
    if last < 1:
        raise ValueError(f"--models lists {len(args.models)}, a pyramid needs at least two, from large to small")
    if args.form == "one_pair":
        return [last - 1, last]
    if last < 2:
        raise ValueError(
            f"--form {args.form} couples three models, --models lists two: add one, or use --form one_pair"
        )
    return [0, last - 1, last]


def product(names, folder, place):
    """The model at this index as the pyramid left it: trained as a teacher, else as a student, else unchanged."""
    made = [Path(folder) / f"stage-{place + 1}" / "teacher", Path(folder) / f"stage-{place}" / "student"]
    return str(next((each for each in made if each.is_dir()), names[place]))


def fingerprint(args, pyramid, ternary):
    """All that determines the result of a run, for `run_state.write_manifest`."""
    manifest = options(args, "task", "augment", "rewrites", "template") | {"models": absolute_names(args.models)}
    for name in ("data", "unlabeled", "swaps"):
        file = getattr(args, name)
        manifest[name] = file and run_state.digest(file)
    stages = range(1, len(args.models))
    manifest |= {f"stage {stage}": pyramid.of_stage(stage).fingerprint() for stage in stages}
    return manifest | {"ternary": ternary.fingerprint()}


def questions(args):
    """{option: list of Record} of the FILES that are given. All images are decoded once, as a check."""
    given = {name: labels for name, labels in FILES.items() if getattr(args, name) is not None}
    found = {
        name: challenge.read(getattr(args, name), args.task, args.images, labels) for name, labels in given.items()
    }
    generate.check_images([record for records in found.values() for record in records], args.images)
    return found


def check_prompts(args, records, processor):
    """Check that the processor accepts every question, and that its tokens tell the letters apart."""
    texts = [(one.place, question(one, template=args.template)) for each in records.values() for one in each]
    template = args.template if isinstance(args.template, str) else ""
    generate.check_texts(processor, [("--template", template), *texts])
    encode = encoder(processor, folder=args.images)
    for name, scoring in (("data", "auto"), ("dev", args.scoring)):
        if name in records:
            letters = LETTERS[: max(len(record.options) for record in records[name])]
            first = choice(records[name][0], args.template)
            single_tokens(encode, (first.prompt(), first.image), letters, None, scoring)


def examples(args, records):
    """The training data: --data and --unlabeled, augmented, and rewrites of --data."""
    labeled, unlabeled = (
        [example(one, args.images, args.template) for one in records.get(name, ())] for name in ("data", "unlabeled")
    )
    changes = [AUGMENT[name] for name in args.augment]
    parts = [Augmented(labeled + unlabeled, Augment(changes, seed=args.seed))]
    if args.rewrites < 0:
        raise ValueError(f"--rewrites is {args.rewrites}, expected 0 or more")
    if args.swaps is not None and not args.rewrites:
        raise ValueError("--swaps has no effect with --rewrites 0")
    if args.rewrites:
        rewrite = Augment([rewriter(args, records["data"]), *changes], seed=args.seed + 1)
        parts.append(Augmented(labeled, rewrite, args.rewrites))
    return EpochConcatDataset(parts)


def rewriter(args, records):
    """The transform that replaces phrases in captions and claims."""
    if args.swaps is not None:
        return RewriteStatement(swaps=read_swaps(args.swaps))
    if args.task != "hallucination":
        raise ValueError("--rewrites of claims need --swaps: claims have no options to take phrases from")
    return RewriteStatement(sorted({option for one in records for option in one.options if not is_none(option)}))


def read_swaps(path):
    """{phrase: alternatives} of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: not JSON, or another structure; names the phrase.
    """
    path = Path(path).expanduser()
    found = jsonl.parse(path, jsonl.content(path))
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: expected an object of phrases and their alternatives, found {jsonl.shown(found)}")
    for phrase, others in found.items():
        if not isinstance(others, list) or not others:
            raise ValueError(
                f"{path}: the alternatives of {phrase!r} are {jsonl.shown(others)}, expected a list of texts"
            )
    return found


class EpochConcatDataset(ConcatDataset):
    """ConcatDataset that passes set_epoch on to its datasets."""

    def set_epoch(self, epoch):
        for dataset in self.datasets:
            dataset.set_epoch(epoch)


def evaluation_of(args, output, records):
    """The arguments of `hkdfast evaluate choices` for --dev, checked against its questions."""
    parser = argparse.ArgumentParser()
    choices.add_arguments(parser)
    given = {"task": args.task, "data": args.dev, "images": args.images, "output": output / "scores.json"}
    given |= {"model": "the student", "dtype": args.dtype} | options(args, *INFERENCE)
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    made = parser.parse_args([*words, "--resume", *(["--device", "cpu"] if args.use_cpu else [])])
    choices.labeled(args.dev, records)
    ChoiceInference(**options(made, *INFERENCE)).check(records)
    return made
