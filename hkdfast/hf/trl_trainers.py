"""TRL's trainers with hkdfast applied from the start, for models that their constructors refuse."""

from contextlib import ExitStack, contextmanager

import trl
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from .apply import apply
from .head import LanguageHead
from .patches.loss import check_options


@contextmanager
def adapter_hidden(model):
    """While this is open, a PEFT model shows its language-model head without the adapter on it."""
    head = model.get_output_embeddings()
    if not (isinstance(model, PeftModel) and isinstance(head, BaseTunerLayer)):
        yield
        return
    LanguageHead(model)  # an adapter that hkdfast cannot fuse is an error here
    model.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings


@contextmanager
def vocabulary_shown(teacher, size):
    """While this is open, the teacher's configuration names a vocabulary of this size."""
    config = teacher.config.get_text_config()
    own, config.vocab_size = config.vocab_size, size
    try:
        yield
    finally:
        config.vocab_size = own


class Applied:
    """What hkdfast's subclasses of TRL's trainers share; DistillationTrainer says what they take."""

    def __init__(self, model=None, teacher_model=None, args=None, *others, divergence=None, loss_options=None, **named):
        loss_options = dict(loss_options or {})
        check_options(divergence, loss_options)
        with ExitStack() as stack:
            if loss_options.get("vocab") is not None:
                for name, one in {"model": model, "teacher_model": teacher_model}.items():
                    if not hasattr(one, "config"):
                        raise ValueError(f"with the option vocab {name} must be a model, got {one!r}: load it first")
                size = model.config.get_text_config().vocab_size
                stack.enter_context(vocabulary_shown(teacher_model, size))
            if hasattr(model, "get_output_embeddings"):
                stack.enter_context(adapter_hidden(model))
            super().__init__(model, teacher_model, args, *others, **named)
        apply(self, divergence, **loss_options)


class DistillationTrainer(Applied, trl.DistillationTrainer):
    """`trl.DistillationTrainer` with hkdfast's loss, which also takes LoRA on the language-model head and vocabularies
    of different sizes.

    Args:
        model, teacher_model, args, ...: as in TRL's. A model with LoRA on its head is given as a PEFT model. With the
            option vocab, model and teacher_model are models, not names.
        divergence: as in `hkdfast.hf.apply`.
        loss_options: dict of options of `hkdfast.hf.apply`, e.g. {"vocab": "common"}: the first words of the two
            vocabularies are compared, which must be the same words.

    Raises:
        ValueError, TypeError: as TRL's trainer and `hkdfast.hf.apply`.
    """
