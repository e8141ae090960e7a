"""Keep frozen modules unchanged: their training mode, and weights and buffers that no adapter saves."""

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
    """The ids of the adapters' own parameters, which a PEFT model with disabled adapters does not use."""
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
    """Put trained modules into training mode, and all others into evaluation mode.

    A module is trained if a parameter in it is. A module without parameters (dropout, an activation) gets the mode of
    its parent, unless it has buffers that no adapter saves, such as the running statistics of a normalization. Frozen
    layers with gradient checkpointing keep it, see FrozenCheckpoint.

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

    transformers checkpoints layers in training mode only. Gradients also pass through frozen layers, which save as many
    activations for backward as others do. So frozen layers are marked as training, but run in evaluation mode.
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
    """Restore requires_grad of all weights. PEFT changes it when it enables an adapter."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def buffers_kept(model):
    """Check that a run of a PEFT model in training mode changes no buffer that its adapter does not save.

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
