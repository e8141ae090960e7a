"""Teachers of a trainer: models of their own, or the trained model without its adapter."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel

from .family import check_apart, load_model, set_attention
from .head import LanguageHead, as_teacher, hidden_states

TEACHER_ID = "teacher_id"  # the column that names an example's teacher, and of a batch
SELF = "self"  # the trained model without its adapter
TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")  # one row for each example of a batch


class Teacher:
    """A model of its own that teaches: in evaluation mode, its weights without gradients."""

    def __init__(self, model):
        self.model, self.head = model.eval().requires_grad_(False), LanguageHead(model)

    def move_to(self, device):
        placed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "quantization_method", None)
        if not placed:  # transformers has put it where it is
            self.model.to(device)

    def states(self, student, batch, rows):
        """Hidden states (N, H) that enter the head at these rows."""
        if not self.head.verified:
            self.head.verify(self.model, batch)
        with torch.no_grad():
            return hidden_states(self.model, self.head, batch, rows)

    def source(self, hidden):
        """The Head of these hidden states."""
        return self.head.source(hidden)


class BaseTeacher:
    """The model that is trained, without its adapter.

    Args:
        model: a PEFT model.
        head: its LanguageHead, which the trainer verifies.
    """

    def __init__(self, model, head):
        self.model, self.head = model, head

    def move_to(self, device):
        """It is where the trained model is."""

    def states(self, student, batch, rows):
        """As `Teacher.states`; student: the trained model as it is called, wrapped or not."""
        with as_teacher(self.model):
            return hidden_states(student, self.head, batch, rows)

    def source(self, hidden):
        return self.head.source(hidden, adapted=False)


def given(teacher, dtype="auto", attn_implementation=None):
    """{name: model or SELF} of a trainer's argument `teacher`, those given by a folder or Hub name loaded; the name of
    a teacher that is not given in a dict is None.

    Raises:
        ValueError: no teacher, or something else that is none.
        OSError: no model under a name.
    """
    named = dict(teacher) if isinstance(teacher, Mapping) else {None: teacher}
    if not named:
        raise ValueError("teacher is an empty dict, expected a teacher for each teacher_id of the examples")
    for name, one in named.items():
        where = "teacher" if name is None else f"teacher {name!r}"
        if not isinstance(one, (str, Path, torch.nn.Module)):
            raise ValueError(
                f'{where} is {type(one).__name__}, expected a model, a folder or Hub name, "{SELF}" for the model '
                "without its adapter, or a dict of such"
            )
        if str(one) != SELF and isinstance(one, (str, Path)):
            named[name] = load_model(one, dtype)
        if isinstance(named[name], torch.nn.Module):
            set_attention(named[name], attn_implementation)
    return named


def is_self(teacher):
    """Whether a teacher is the trained model without its adapter."""
    return isinstance(teacher, (str, Path)) and str(teacher) == SELF


def check(model, named, vocab):
    """Refuse teachers that cannot teach a model.

    Args:
        named: as `given` returns them.
        vocab: as in `hkdfast.distill_loss`.

    Raises:
        ValueError: the model itself, one that shares weights with it, SELF without an adapter, or a vocabulary of
            another size where vocab is None.
    """
    own = len(LanguageHead(model).base().weight)
    for name, one in named.items():
        where = "teacher" if name is None else f"teacher {name!r}"
        if is_self(one):
            if not isinstance(model, PeftModel):
                raise ValueError(
                    f'{where} is "{SELF}", the model without its adapter, but it has none: set lora_r or peft_config'
                )
            continue
        if one is model:
            raise ValueError(
                f'{where} is the model itself: pass a model of its own, or "{SELF}" for it without adapter'
            )
        check_apart({"the model": model, where: one})
        size = len(LanguageHead(one).base().weight)
        if vocab is None and size != own:
            raise ValueError(f'the heads of the model ({own} tokens) and {where} ({size}) differ: set vocab="common"')


def choose_examples(batch, examples):
    """(batch, rows) for a teacher of some examples: only those examples if the batch is text, else all of it.

    Args:
        examples: (B,) bool, at least one.

    Returns:
        the batch, and the (B,) bool or index of its rows in the whole.
    """
    size = len(examples)
    tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
    text = all(name in TEXT and len(x) == size and x.dim() == 2 for name, x in tensors.items())
    if bool(examples.all()) or not text:
        return batch, slice(None)
    return {name: x[examples] for name, x in tensors.items()}, examples
