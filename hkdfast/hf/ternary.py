"""The ternary refinement as a Trainer."""

from collections.abc import Callable, Sequence
from typing import Any

from .configs import TernaryConfig
from .coupled import CoupledTrainer, save_model
from .family import (
    absolute_names,
    adapters_of,
    check_apart,
    check_family,
    load_model,
    model_names,
    prepare_for_training,
    set_attention,
)
from .trainer import check_parts


class TernaryTrainer(CoupledTrainer):
    """Trainer of coupled models: reconstruction of HKD4VLM's ternary-coupled refinement distillation
    (arXiv:2506.13038). The student is meant to come from the pyramid.

    Args:
        models: in the order of TernaryConfig.form: [teacher1, teacher2, student] (two_teachers), three models (mutual)
            or [teacher, student] (one_pair); each a folder or Hub name of a model or a PEFT adapter, or a Hugging Face
            model. The weights of models that are not trained are left with requires_grad=False.
        args: TernaryConfig.
        data_collator: default: QuestionCollator(processing_class, answers=True).
        train_dataset, eval_dataset, callbacks, optimizers, ...: as in Trainer.
        processing_class: the processor of the batches, saved with the models; default: that of the first name.
        peft_config: PEFT config of an adapter for all trained models, or a list with one config or None per model.

    Raises:
        ValueError: before any work: another number of models than the form couples, a model twice, tokenizers or image
            processors that differ (both named), an option or argument that would be ignored, models that share a
            weight, one that is trained outside an adapter and not saved with it; at the first batch, a head that is not
            what it seems, or a buffer that training changes and an adapter does not save.
        OSError: before any work: no model or processor under a name.

    A checkpoint has a folder for each trained model, named by its role. run.json in output_dir describes the run; a
    checkpoint of another run is refused (ValueError, naming the first difference). Whether the data is the same is not
    checked. save_model(folder) writes the student as an ordinary Hugging Face folder, or a PEFT adapter with lora_r; in
    the mutual form all three models, each in a folder of its role.

    Logged beside the loss as by PyramidTrainer, e.g. student_divergence_teacher1.
    """

    def __init__(
        self,
        models: Sequence[Any],
        args: TernaryConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        args = TernaryConfig("ternary") if args is None else args
        if not isinstance(args, TernaryConfig):
            raise TypeError(f"args must be a TernaryConfig, got {type(args).__name__}")
        check_parts(args, others)
        roles = args.roles()
        if isinstance(models, str) or len(models) != len(roles):
            raise ValueError(f"form {args.form!r} couples {len(roles)} models ({', '.join(roles)}), got {models!r}")
        check_apart(dict(zip(roles, models, strict=True)), roles)
        adapters, names = adapters_of(peft_config, len(roles)), model_names(models)
        processing_class = check_family([name for name in names if name], processing_class)
        manifest = {
            "models": absolute_names(names),
            "peft_config": [adapter and adapter.to_dict() for adapter in adapters],
        }
        made = {}
        for (role, is_trained), model, name, adapter in zip(roles.items(), models, names, adapters, strict=True):
            model = load_model(name, args.dtype) if name else model
            set_attention(model, args.attn_implementation)
            made[role] = prepare_for_training(model, args, adapter) if is_trained else model
        super().__init__(
            made,
            args,
            args.loss,
            {role: args.rate_of(place) for place, role in enumerate(roles)},
            title="ternary refinement",
            manifest=manifest | args.fingerprint(),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        student = self.model.models["student"] if "student" in self.model.models else None
        if _internal_call or student is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            save_model(student, output_dir or self.args.output_dir, self.processing_class)
