"""What the patches compute: the loss between the heads of two models, inside the student's forward."""

from ...engine.checks import check_vocab
from ...engine.renamed import LOSS
from ...losses import MODULE_OPTIONS, DistillLoss, distill_loss
from ..head import LanguageHead, hidden_states, loss_in_head

# what the trainers decide for each batch
OWNED = ("reduction", "ignore_index", "return_metrics", "labels", "row_weight", "num_items")
OPTIONS = tuple(name for name in MODULE_OPTIONS if name not in OWNED)


def check_options(divergence, options):
    """Refuse what no patch takes. TypeError on an unknown option, ValueError on a wrong value."""
    for name in options:
        if name in OPTIONS:
            continue
        hint = f"expected some of {', '.join(OPTIONS)}"
        if name in OWNED:
            hint = "the trainer decides it for each batch"
        elif name in LOSS:
            hint = f"it is called {LOSS[name]} now"
        raise TypeError(f"apply() has no option {name!r}: {hint}")
    if divergence is None and "beta" in options:
        raise ValueError("beta is of a divergence that is named: without one both are those of the trainer's config")
    DistillLoss(divergence or "forward_kl", **options)


def generalized_jsd(beta):
    """The divergence and its beta that the `beta` of GKD, TRL and Liger means."""
    if beta in (0, 1):
        return {"divergence": ("forward_kl", "reverse_kl")[int(beta)]}
    return {"divergence": "jensen_shannon", "beta": beta}


def refuse_labels(options):
    """Refuse a cross entropy where the completions are samples of the student."""
    if options.get("hard_weight"):
        raise ValueError(
            f"hard_weight {options['hard_weight']}: the completions are the student's own samples, from whose cross "
            "entropy it learns nothing; expected 0"
        )


class HeadLoss:
    """The loss between the language-model heads of a student and its teacher. No logits are made.

    Args:
        student, teacher: Hugging Face models or PEFT models, not wrapped. They may be one object.
        request: Request.
        configured: function without arguments, called for each batch: the options that the trainer's own settings mean.
            Those of the request come before them.

    Raises:
        ValueError: if a model has no head, or one that is not hidden @ weight.T + bias; if the heads are on two
            devices, or their vocabularies differ and the option vocab does not say what to compare.
    """

    def __init__(self, student, teacher, request, configured):
        self.student = LanguageHead(student)
        self.teacher = self.student if teacher is student else LanguageHead(teacher)
        self.inner = student
        self.request, self.configured = request, configured
        weights = [head.base().weight for head in (self.student, self.teacher)]
        if weights[0].device != weights[1].device:
            raise ValueError(
                f"the head of the student is on {weights[0].device}, that of the teacher on {weights[1].device}: move "
                f"the teacher, e.g. teacher.to({str(weights[0].device)!r})"
            )
        check_vocab([len(weight) for weight in weights], request.options.get("vocab"))

    def arguments(self):
        own = self.configured()
        if self.request.divergence is not None:
            own = {name: value for name, value in own.items() if name != "beta"}
            own["divergence"] = self.request.divergence
        return own | self.request.options

    def factor(self):
        """Of the divergence in the loss."""
        options = self.arguments()
        gain = options.get("temperature", 1.0) ** 2 if options.get("t_squared") else 1.0
        return gain * options.get("divergence_weight", 1.0)

    def verify(self, student, teacher, batch):
        """Find scale and softcap of both heads at their first batch, where it must not happen as late as in a forward.

        Args:
            student, teacher: the models as they are wrapped (DDP, ...), or not.
        """
        for head, model in (self.student, student), (self.teacher, teacher):
            if not head.verified:
                head.verify(model, batch)

    def teach(self, teacher, batch, rows):
        """The teacher's Head at these rows: no gradient is kept. In the mode that the teacher is in."""
        return self.teacher.source(hidden_states(teacher, self.teacher, batch, rows))

    def __call__(self, student, batch, rows, teacher, *, inner=None, labels=None, weigh=None, **others):
        """The mean over these rows, or what `others` (of `distill_loss`) ask for, and {metric: (N,)} of them.

        Args:
            student: the model as it is wrapped, or a function that calls its forward.
            inner: the same without its wrapper.
            teacher: from `teach`.
            labels: (N,) next tokens, read with a hard_weight only.
            weigh: function from the student's Head to the row_weight (N,), or None.
        """
        options = self.arguments() | others
        if options.get("hard_weight"):
            options["labels"] = labels

        def loss(hidden):
            head = self.student.source(hidden)
            if weigh is not None:
                options["row_weight"] = weigh(head)
            return distill_loss(head, teacher, return_metrics=True, **options)

        return loss_in_head(student, self.inner if inner is None else inner, self.student, batch, rows, loss)


def completion_rows(length, mask):
    """(B, length) bool: the positions before the tokens of the completions (B, C) that end the sequences, where the
    mask is not 0."""
    rows = mask.new_zeros(len(mask), length, dtype=mask.bool().dtype)
    size = mask.shape[1]
    rows[:, length - size - 1 : length - 1] = mask != 0
    return rows
