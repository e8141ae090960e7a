"""hkdfast hkd: pyramid, ternary refinement and mapping-shift evaluation of a chain of models on one's own questions."""

import argparse
import gc
from pathlib import Path

from torch.utils.data import ConcatDataset

from ..evaluate import choices, choices_command
from ..evaluate.tasks import NONE, TASKS, Inference, example
from . import answer
from .augment import Augment, Augmented, Color, Crop, Flip, Paraphrase, ShuffleOptions, Sometimes
from .config import CoupledConfig, PyramidConfig, TernaryConfig, nth
from .coupled import finished, last_checkpoint
from .family import base_of, is_adapter
from .options import TRAINING, add_options, check_output, own
from .pyramid import PyramidTrainer
from .synthetic import Reword
from .ternary import TernaryTrainer

AUGMENT = {
    "shuffle": ShuffleOptions(),
    "paraphrase": Sometimes(Paraphrase()),
    "flip": Sometimes(Flip()),
    "crop": Sometimes(Crop()),
    "color": Sometimes(Color()),
}
SHARED = tuple(name for name in own(CoupledConfig) if name != "vocab")
PYRAMID, TERNARY = own(PyramidConfig, CoupledConfig), own(TernaryConfig, CoupledConfig)
TRAINED = (*TRAINING, "save_total_limit", "weight_decay", "max_grad_norm")
DEFAULTS = {"save_total_limit": 1}  # a checkpoint holds the models of a stage and their optimizer
INFERENCE = ("shifts", "combine", "scoring", "template")  # "form" is the refinement's here


def add_arguments(parser):
    """Options of the command. Their help shows the defaults if the parser's formatter does."""
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="PATH",
        help="from large to small: folders or Hub names; unchanged",
    )
    add("--task", required=True, choices=tuple(TASKS), help="track of the challenge")
    add("--data", required=True, metavar="FILE", help="questions with answers, in the challenge's JSON")
    add("--images", required=True, metavar="DIR", help="folder of the questions' images")
    add("--output", required=True, metavar="DIR", help="new folder for models and answers")
    add("--unlabelled", metavar="FILE", help="more questions, of which no answer is read: teachers give them")
    add("--dev", metavar="FILE", help="questions that the student answers at the end, scored if they have answers")
    add(
        "--augment",
        nargs="*",
        default=["shuffle"],
        choices=tuple(AUGMENT),
        help="what changes the examples, anew in each epoch",
    )
    add("--rewrites", type=int, default=0, help="rewritten captions per example, for teachers to answer; hallucination")
    add("--refine-epochs", type=float, help="--num-train-epochs of the ternary refinement, where they differ")
    add("--resume", action="store_true", help="go on where --output stands; finished stages are kept")
    add_options(parser, "distillation", CoupledConfig, SHARED)
    add_options(parser, "pyramid", PyramidConfig, PYRAMID)
    add_options(parser, "ternary refinement", TernaryConfig, TERNARY)
    add_options(parser, "training, of each stage", CoupledConfig, TRAINED, DEFAULTS)
    choices_command.add_inference(parser.add_argument_group("prompts, and inference on --dev"), INFERENCE)


def run(args):
    """Everything is read and checked first; then come the stages, the refinement and the answers."""
    output = Path(args.output).expanduser()
    check_output(args.output, output, args.resume)
    places = parties(args)
    pyramid = PyramidConfig(str(output / "pyramid"), **options(args, *SHARED, *PYRAMID, *TRAINED))
    refined = options(args, *SHARED, *TERNARY, *TRAINED)
    if args.refine_epochs is not None:
        refined["num_train_epochs"] = args.refine_epochs
    if args.learning_rates:
        refined["learning_rates"] = [nth(args.learning_rates, place) for place in places]
    ternary = TernaryConfig(str(output / "ternary"), **refined)
    data = examples(args)
    evaluation = None if args.dev is None else evaluation_of(args, output)
    trainer = PyramidTrainer(args.models, pyramid, train_dataset=data)
    if finished(ternary.output_dir) is None:
        trainer.train(resume_from_checkpoint=args.resume and Path(pyramid.output_dir).is_dir())
        processor = trainer.processing_class
        del trainer
        gc.collect()
        models = [product(args.models, pyramid.output_dir, place) for place in places]
        trainer = TernaryTrainer(models, ternary, train_dataset=data, processing_class=processor)
        trainer.train(resume_from_checkpoint=last_checkpoint(ternary.output_dir) if args.resume else None)
        trainer.finish(ternary.output_dir, models=args.models)
    if pyramid.process_index:
        return
    student = Path(ternary.output_dir) / list(ternary.roles())[-1]
    print(f"The student is in {student}.")
    if evaluation is not None:
        evaluation.model = base_of(str(student))
        evaluation.adapter = str(student) if is_adapter(student) else None
        choices_command.run(evaluation)


def options(args, *names):
    return {name: getattr(args, name) for name in names}


def parties(args):
    """Places in the chain, from 0, of the models that are refined: the largest, the student and its last teacher."""
    last = len(args.models) - 1
    if last < 1:
        raise ValueError(f"--models lists {len(args.models)}, a pyramid needs at least two, from large to small")
    if args.form == "one_pair":
        return [last - 1, last]
    if last < 2:
        raise ValueError(f"--form {args.form} couples three models, --models lists two: add one, or --form one_pair")
    return [0, last - 1, last]


def product(names, folder, place):
    """What the pyramid has made of the model in this place: as a teacher, else as a student, else the model itself."""
    made = [Path(folder) / f"stage-{place + 1}" / "teacher", Path(folder) / f"stage-{place}" / "student"]
    return str(next((each for each in made if each.is_dir()), names[place]))


def examples(args):
    """The training data: --data and --unlabelled, augmented, and rewrites of --data."""
    records = choices.read(args.data, args.task, args.images)
    unlabelled = [] if args.unlabelled is None else choices.read(args.unlabelled, args.task, args.images, labels=False)
    answer.check_images([*records, *unlabelled], args.images)
    told, asked = ([example(one, args.images, args.template) for one in each] for each in (records, unlabelled))
    changes = [AUGMENT[name] for name in args.augment]
    parts = [Augmented(told + asked, Augment(changes, seed=args.seed))]
    if args.rewrites < 0:
        raise ValueError(f"--rewrites is {args.rewrites}, expected 0 or more")
    if args.rewrites:
        if args.task != "hallucination":
            raise ValueError("--rewrites puts phrases of options into captions: there are none in --task factcheck")
        phrases = sorted({option for one in records for option in one.options} - {NONE})
        parts.append(Augmented(told, Augment([Reword(phrases), *changes], seed=args.seed + 1), args.rewrites))
    return Together(parts)


class Together(ConcatDataset):
    """Datasets one after the other, each told of a new epoch."""

    def set_epoch(self, epoch):
        for dataset in self.datasets:
            dataset.set_epoch(epoch)


def evaluation_of(args, output):
    """The arguments of `hkdfast evaluate choices` for --dev, whose questions are read and checked."""
    parser = argparse.ArgumentParser()
    choices_command.add_arguments(parser)
    given = {"task": args.task, "data": args.dev, "images": args.images, "output": output / "scores.json"}
    given |= {"model": "the student", "dtype": args.dtype} | options(args, *INFERENCE)
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    made = parser.parse_args([*words, "--resume", *(["--device", "cpu"] if args.use_cpu else [])])
    records = choices.read(args.dev, args.task, args.images, labels=None)
    choices_command.labelled(args.dev, records)
    Inference(fixed=TASKS[args.task].fixed, **options(made, *INFERENCE)).check(records)
    answer.check_images(records, args.images)
    return made
