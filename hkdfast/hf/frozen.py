"""What is not trained stays as it is: modes of frozen modules, weights and buffers that no adapter saves."""

from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers.modeling_layers import GradientCheckpointingLayer

COPIES = ".modules_to_save."  # in the names of what PEFT trains and saves beside the original module
SAVE = 'freeze it, or name its module in modules_to_save of the adapter\'s configuration (bias="none" for biases)'


def adapters_own(model):
    """The ids of the parameters that are the adapters' own, with which a PEFT model without them does not compute."""
    own = set()
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            parts = [getattr(module, name, None) for name in (*module.adapter_layer_names, *module.other_param_names)]
            own |= {id(p) for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()}
    return own


def check_trained(model, shared):
    """Refuse weights of a PEFT model that are trained outside its adapter.

    Args:
        shared: whether the model without its adapter is used too, as the teacher: then nothing outside the adapter may
            be trained. Else it may, if saving the adapter saves it (LoRA's bias="all").

    Raises:
        ValueError: naming the first such weight.
    """
    own = adapters_own(model)
    foreign = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    if foreign and not shared:
        state = get_peft_model_state_dict(
            model, model.state_dict(keep_vars=True), model.active_adapters[0], save_embedding_layers=False
        )
        saved = {id(x) for x in state.values()}
        foreign = {name: p for name, p in foreign.items() if id(p) not in saved}
    if foreign:
        why = (
            "the frozen teacher computes with it too: switching the adapter off does not undo it"
            if shared
            else "the adapter is saved without it"
        )
        more = f" ({len(foreign)} weights in all)" if len(foreign) > 1 else ""
        raise ValueError(f"{plain_name(next(iter(foreign)))}{more} would be trained, but {why}: {SAVE}")


def plain_name(name):
    return name.removeprefix("base_model.model.")


def settle(model):
    """Put what is trained into training mode, and every other module into evaluation mode.

    A module is trained if a parameter below it is. One without parameters (dropout, an activation) is in the mode of
    the module around it; unless it has buffers that no adapter saves, as the running statistics of a normalization.
    Frozen layers that transformers checkpoints stay checkpointed, see FrozenCheckpoint.

    Args:
        model: a PEFT model, or another, all of whose buffers are saved.
    """
    saved = not isinstance(model, PeftModel)
    trained, held = set(), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.update(above(name))
        if parameter.requires_grad:
            trained.update(above(name))
    for name, _ in model.named_buffers(remove_duplicate=False):
        if not saved and COPIES not in name:
            held.update(above(name))
    modes = {}
    model.eval()
    for name, module in model.named_modules(remove_duplicate=False):  # those around a module come before it
        modes[name] = name in trained or (name not in held and modes.get(name.rpartition(".")[0], True))
        module.training = module.training or modes[name] or stays_checkpointed(module)


def above(name):
    """Names of the modules around a parameter or buffer, "" for the model itself."""
    return ["", *accumulate(name.split(".")[:-1], "{}.{}".format)]


def stays_checkpointed(layer):
    """Whether transformers checkpoints a layer in training mode; then it computes as in evaluation mode if frozen."""
    if not (isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing):
        return False
    if not isinstance(layer._gradient_checkpointing_func, FrozenCheckpoint):
        layer._gradient_checkpointing_func = FrozenCheckpoint(layer, layer._gradient_checkpointing_func)
    return True


class FrozenCheckpoint:
    """A layer's checkpointing function, inside which the layer is in evaluation mode if nothing in it is trained.

    transformers checkpoints layers in training mode only, but gradients pass through frozen layers too, and what they
    keep for the backward pass is as large as that of others. So they are marked as training on the outside.
    """

    def __init__(self, layer, checkpoint):
        self.layer, self.checkpoint = layer, checkpoint

    def __call__(self, function, *args, **others):
        return self.checkpoint(partial(self.run, function), *args, **others)

    def run(self, function, *args, **others):  # once more in the backward pass
        mode = self.layer.training
        self.layer.training = any(parameter.requires_grad for parameter in self.layer.parameters())
        try:
            return function(*args, **others)
        finally:
            self.layer.training = mode


@contextmanager
def flags_kept(model):
    """PEFT sets requires_grad of all adapter weights where it switches an adapter on: it comes back as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def buffers_kept(model):
    """See that a run of a PEFT model in training mode changes no buffer that its adapter does not save.

    Raises:
        ValueError: naming the first that changed.
    """
    before = {name: x.clone() for name, x in unsaved_buffers(model).items()}
    yield
    for name, x in unsaved_buffers(model).items():
        if name in before and not torch.equal(x.nan_to_num(), before[name].nan_to_num()):
            raise ValueError(
                f"the buffer {plain_name(name)} changes in training, but the adapter is saved without it: {SAVE}"
            )


def unsaved_buffers(model):
    """{name: buffer} of the modules of a PEFT model in training mode that its adapter does not save."""
    if not isinstance(model, PeftModel):
        return {}
    modules = {f"{name}." if name else "": module for name, module in model.named_modules() if module.training}
    names = {start + name: x for start, m in modules.items() for name, x in m.named_buffers(recurse=False)}
    return {name: x for name, x in names.items() if COPIES not in name}
