"""A model's language-model head: where it is, what it computes, and how to work inside its forward.

The forward of the head, inside the forward of whatever wraps the model (DDP, FSDP, autocast), is the one place where
the head's weight is whole, cast and synchronized. Its forward is therefore replaced for one call at a time: to take the
hidden states out, or to turn them into the loss there and then. No logits are made either way.
"""

from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch.distributed.tensor import DTensor

from ..batch import answer_rows
from ..engine.arguments import without_autocast
from ..heads import Head
from .frozen import flags_kept
from .probe import measure, numbers, points

# never shown to the model: it would make logits for them, or does not know them
LABELS = ("labels", "shift_labels", "num_items_in_batch", "distill_only")
WORDS = 1024  # of the vocabulary that verify compares: all of them in float64 would be a second head


def unwrap_peft(model):
    """The Hugging Face model inside a PEFT model."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def forward_replaced(module, function):
    """A context in which module.forward(...) calls function(forward, ...)."""
    forward, own = module.forward, "forward" in vars(module)
    module.forward = lambda *args, **kwargs: function(forward, *args, **kwargs)
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


@contextmanager
def evaluating(model):
    """A context without gradients and dropout; afterwards every module has its own training mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def as_teacher(model):
    """The frozen model behind a PEFT model: adapter off, no gradients, no dropout. There is one copy of the weights."""
    # not model.disable_adapter(): it inspects every module each time, for longer than a small model runs
    with evaluating(model), flags_kept(model):
        model.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            model.base_model.enable_adapter_layers()


def model_inputs(batch):
    return {name: x for name, x in batch.items() if name not in LABELS} | {"use_cache": False}


class LanguageHead:
    """The head of a model, found and checked, from which `hkdfast.Head` is made.

    What a model does to its logits behind the head (a scale, a softcap) is found by `verify`, which `hidden_states`
    and `loss_in_head` call on their first batch.

    Args:
        model: a Hugging Face model with a language-model head, or a PEFT model around one, not wrapped (DDP, ...).
            LoRA on the head and a head among `modules_to_save` are understood.

    Attributes:
        module: the head itself.
        scale, softcap: of the logits, as in `hkdfast.Head`; 1.0 and None until verified.
        verified: whether scale and softcap are known.

    Raises:
        ValueError: if there is no head, or one that cannot be written as hidden @ weight.T + bias.
    """

    def __init__(self, model):
        inner = unwrap_peft(model)
        self.module = find_head(inner)
        if self.module is None:
            raise ValueError(
                f"{type(inner).__name__} has no language-model head (get_output_embeddings): load the model with one, "
                "e.g. through AutoModelForImageTextToText or AutoModelForCausalLM"
            )
        self.name = type(inner).__name__
        self.config = inner.config
        self.scale, self.softcap = 1.0, None
        self.verified = False
        self.inside = False  # whether a loss_in_head runs
        self.matrices(adapted=True)

    def base(self):
        """The head without its adapter."""
        if isinstance(self.module, ModulesToSaveWrapper):
            return self.module.original_module
        return self.module.get_base_layer() if isinstance(self.module, BaseTunerLayer) else self.module

    def matrices(self, adapted):
        """(weight, bias, [(A, B, scaling, dropout), ...]) of the head, with or without its adapter."""
        module, base = self.module, self.base()
        low_rank = []
        adapted = adapted and not getattr(module, "disable_adapters", False)
        if adapted and isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
            base = module.modules_to_save[module.active_adapters[0]]
        elif isinstance(module, BaseTunerLayer):
            if not isinstance(module, LoraLayer):
                raise ValueError(
                    f"the head is adapted by {type(module).__name__}: only LoRA or modules_to_save are known"
                )
            if module.merged:
                raise ValueError("the head's adapter is merged into its weight: unmerge it, so that it can be trained")
            if adapted:
                low_rank = [low_rank_of(module, name) for name in module.active_adapters if name in module.lora_A]
        weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"the head of {self.name} is a {type(base).__name__}, which has no plain (V, H) weight")
        return weight, bias, low_rank

    def source(self, hidden, adapted=True):
        """The `hkdfast.Head` of hidden states, for `distill_loss` and the other losses.

        Args:
            hidden: (..., H) states before the head, as `hidden_states` returns them or `loss_in_head` hands them over.
                Gets a gradient as the student's.
            adapted: False: without the head's adapter, as the frozen teacher behind a PEFT model has it.

        Returns:
            `hkdfast.Head`. As the student's, its weight and bias get a gradient if they require one; under LoRA A and B
            get it.

        Raises:
            ValueError: before `verify`, for scale and softcap are not known; on an adapter that is merged, or no plain
                LoRA; on a sharded weight that wants a gradient, outside `loss_in_head`; on an offloaded head; else as
                `hkdfast.Head`.
        """
        if not self.verified:
            raise ValueError(
                f"the head of {self.name} is not verified: call head.verify(model, batch) once, as hidden_states and "
                "loss_in_head do by themselves"
            )
        return self.multiplied(hidden, adapted)

    def multiplied(self, hidden, adapted=True):
        # LoRA's path is r more columns, so that its dropout acts as in the layer itself and A and B get their
        # gradients through autograd.
        weight, bias, low_rank = self.matrices(adapted)
        weight, bias = self.whole(weight), self.whole(bias)
        hidden = hidden.to(weight.device)  # where a device_map places the head elsewhere than the last layer
        for a, b, scaling, dropout in low_rank:
            down = scaling * torch.nn.functional.linear(dropout(hidden.to(a.weight.dtype)), self.whole(a.weight))
            with without_autocast(hidden.device):  # autocast's own cat does not take float16 under bfloat16
                hidden = torch.cat([hidden, down.to(hidden.dtype)], -1)
                weight = torch.cat([weight, self.whole(b.weight).to(weight.dtype)], -1)
        return Head(hidden, weight, bias, self.scale, self.softcap)

    def whole(self, x):
        """A weight of the head in one piece, on its device."""
        if x is None:
            return None
        if x.device.type == "meta":
            raise ValueError(f"the head of {self.name} is offloaded or not loaded (device meta): place it on a device")
        if not isinstance(x, DTensor):
            return x
        # FSDP shards a weight outside the forward only, and there a gradient would not be reduced over its ranks
        if x.requires_grad and torch.is_grad_enabled() and not self.inside:
            raise ValueError(
                f"the head of {self.name} is sharded here, outside the model's forward: compute the loss by "
                "loss_in_head, or under torch.no_grad() make a teacher of it"
            )
        return x.full_tensor()

    @torch.no_grad()
    def verify(self, model, batch):
        """Measure scale and softcap by what the model makes of one token, and see that the head is what it seems.

        The model runs once on the batch. Its head returns known logits instead, which shows what becomes of logits
        behind the head, whatever the configuration says.

        Args:
            model: the model, or what wraps it (PEFT, DDP, ...).
            batch: dict of the model's inputs.

        Raises:
            ValueError: if the head computes something else than hidden @ weight.T + bias, or the model changes its
                logits behind it by something else than a scale and a softcap; if the head is not run exactly once.
        """
        seen = []

        def probe(forward, hidden):
            if hidden.dim() != 3:
                raise ValueError(
                    f"the head of {self.name} sees hidden states {tuple(hidden.shape)}, expected (batch, positions, H)"
                )
            row = hidden[:1, [longest(hidden[0])]]
            logits = forward(row)
            exact = self.multiplied(row)
            vocab = len(exact.weight)
            words = torch.arange(0, vocab, -(-vocab // WORDS), device=exact.weight.device)
            ours = torch.nn.functional.linear(exact.hidden.double(), exact.weight[words].double())
            ours = ours if exact.bias is None else ours + exact.bias[words].double()
            ramp = points(logits.shape[-1], logits.device)
            seen.append((logits[..., words.to(logits.device)], ours.to(logits.device), ramp))
            return ramp.expand_as(logits)

        with evaluating(model), forward_replaced(self.module, probe):
            output = model(**model_inputs(batch))
        # in older versions of torch autocast keeps what it has cast here, without gradient, for the forward that learns
        torch.clear_autocast_cache()
        logits, ours, ramp = only(seen, self)
        off, slack = (logits - ours).abs().max().item(), tolerance(logits.dtype) * ours.abs().max().item()
        if not off <= slack:
            raise ValueError(
                f"the head of {self.name} does not compute hidden @ weight.T + bias: its logits differ by {off:.2g}, "
                f"more than {slack:.2g}"
            )
        made = getattr(output, "logits", None)
        if made is None or made.numel() != ramp.numel():
            shape = "no logits" if made is None else f"logits {tuple(made.shape)}"
            raise ValueError(f"{self.name} makes {shape} of the {ramp.numel()} logits that its head makes of a token")
        try:
            self.scale, self.softcap = measure(ramp, made.flatten(), logits.dtype, numbers(self.config))
        except ValueError as error:
            raise ValueError(
                f"{self.name} ({self.config.model_type}) changes the logits behind its head, and not by one scale > 0 "
                f"and one softcap, softcap * tanh(scale * logits / softcap): {error}. Give the loss this model's "
                "logits instead of a Head"
            ) from None
        self.verified = True


def find_head(model):
    """The head that a model names, else the only one that a model inside it names; None without one."""
    own = output_embeddings(model)
    if own is not None:
        return own
    inside = {id(head): head for part in model.modules() if (head := output_embeddings(part)) is not None}
    return next(iter(inside.values())) if len(inside) == 1 else None


def output_embeddings(module):
    find = getattr(module, "get_output_embeddings", None)
    return None if find is None else find()


def tolerance(dtype):
    """Largest error of a logit, relative to the largest logit: a few roundings of its dtype."""
    return max(8 * torch.finfo(dtype).eps, 1e-4)


def longest(hidden):
    """Index of the hidden state (T, H) with the largest norm: one of padding may be 0, of which every head makes 0."""
    return hidden.float().norm(dim=-1).argmax().item()


def low_rank_of(module, name):
    if name in module.lora_variant or module.lora_bias[name]:
        raise ValueError(f"the head's adapter {name!r} is not plain LoRA (DoRA, a bias, ...): hkdfast cannot fuse it")
    return module.lora_A[name], module.lora_B[name], module.scaling[name], module.lora_dropout[name]


def select_rows(hidden, rows):
    if hidden.shape[:2] != rows.shape:
        raise ValueError(
            f"the head sees hidden states {tuple(hidden.shape)}, but input_ids are {tuple(rows.shape)}: the processor "
            "must expand each image into its tokens"
        )
    return hidden[rows]


def hidden_states(model, head, batch, rows):
    """Run a model and return what enters its head at some positions. No logits are made.

    Dropout, gradients and autocast are as the caller has set them: for a teacher, `model.eval()` and
    `torch.no_grad()`. The first call verifies the head, by a run of its own without gradient.

    Args:
        model: the model, or what wraps it (PEFT, DDP, ...).
        head: its LanguageHead.
        batch: dict of the model's inputs, "input_ids" (B, T) int64 among them. Labels in it are not given to the model.
        rows: (B, T) bool, the positions whose next token is predicted; `hkdfast.batch.answer_rows` finds them.

    Returns:
        (N, H) hidden states at the N rows, in the order of `batch["input_ids"][rows]`, in the dtype in which they enter
        the head. They carry the graph of the model, from which all of it but the head gets its gradient.

    Raises:
        ValueError: if the head sees other positions than those of input_ids, or is not run exactly once; else as
            `LanguageHead.verify`.
    """
    verified(head, model, batch)
    taken = []

    def take(_, hidden):
        taken.append(select_rows(hidden, rows))
        return hidden[:1, :1, :1]

    with forward_replaced(head.module, take):
        model(**model_inputs(batch))
    return only(taken, head)


def loss_in_head(model, inner, head, batch, rows, loss):
    """Run a model with a loss in the place of its head. No logits are made.

    The loss is computed inside the head's forward, inside that of whatever wraps the model: there the head's weight is
    whole, and the wrapper sees what is used. This is the way of a model that learns under DDP or FSDP. The first call
    verifies the head, by a run of its own without gradient.

    Args:
        model: the model as it is wrapped (DDP, FSDP, ...), or not.
        inner: the same without its wrapper; it may be a PEFT model.
        head: LanguageHead of inner.
        batch: dict of the model's inputs, as in `hidden_states`.
        rows: (B, T) bool, the positions that the loss sees.
        loss: function from the hidden states (N, H) at the rows to (value, metrics): a scalar tensor, and a dict of
            anything. It makes the student by `head.source(hidden)`.

    Returns:
        value, whose backward gives all trained parameters of the model their gradient, and metrics.

    Raises:
        ValueError: as `hidden_states`.
    """
    verified(head, model, batch)

    def at_head(_, hidden):
        head.inside = True
        try:
            value, metrics = loss(select_rows(hidden, rows))
        finally:
            head.inside = False
        results.append((value.reshape(1, 1, 1), metrics))
        return results[-1][0]  # the very tensor: a sharding wrapper of the head hangs its hooks on it

    def at_top(forward, **inputs):
        with forward_replaced(head.module, at_head):
            forward(**inputs)
        value, metrics = only(results, head)
        return value.reshape(()), metrics

    results = []
    with forward_replaced(inner, at_top):
        return model(**model_inputs(batch))


def verified(head, model, batch):
    if not head.verified:
        head.verify(model, batch)


def only(results, head):
    """The result of the one run of a head; ValueError if it ran more often, or not at all."""
    if len(results) != 1:
        raise ValueError(
            f"{head.name} runs its head {len(results)} times for a batch, expected once: its logits are not those of "
            "one language-model head"
        )
    return results[0]


def head_fn(model, *, head=None):
    """The model as hkdfast.seed wants one: a function from a batch to the Head at its answer rows.

    For models that are not wrapped. Scale and softcap are verified on the first batch.

    Args:
        model: a Hugging Face model, or a PEFT model; then the Head is the student's, or under `as_teacher` the
            teacher's.
        head: its LanguageHead, if there is one already.
    """
    head = head or LanguageHead(model)

    def run(batch):
        return head.source(hidden_states(model, head, batch, answer_rows(batch)[0]))

    return run
