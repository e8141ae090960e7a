"""What is not trained stays as it is: weights and buffers of a teacher, frozen modules; and no option is ignored."""

import copy
import inspect
import math
import shutil

import peft
import pytest
import torch
import transformers as hf
import zoo
from coupled_models import QUIET, STACK, batch, chain, pyramid, saved, sized, stage, ternary
from safetensors.torch import load_file
from test_seed_trainer import assert_same, one_loss
from transformers.trainer_callback import PrinterCallback
from zoo import Rows, config, one_thread  # noqa: F401

from hkdfast.hf import PyramidConfig, PyramidTrainer, SeedConfig, SeedTrainer, TernaryConfig, TernaryTrainer, as_teacher
from hkdfast.hf.adapter import check_config, merge_and_reset
from hkdfast.hf.configs import UNREAD
from hkdfast.hf.frozen import settle
from hkdfast.hf.head import evaluating
from hkdfast.hf.trainer import UNREAD as UNREAD_PARTS

PROJECTOR = "multi_modal_projector"
SAVED = dict(modules_to_save=[PROJECTOR])


def lora(**options):
    return peft.LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=["q_proj"]) | options))


def seed(folder, model, adapter=None, **options):
    many = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2)
    rows = Rows(zoo.batch(size=8))
    made = SeedTrainer(
        model, config(folder, **(many | options)), train_dataset=rows, eval_dataset=rows, peft_config=adapter
    )
    made.remove_callback(PrinterCallback)
    return made


def unfrozen(model, adapter):
    model = peft.get_peft_model(model, adapter)
    for name, parameter in model.named_parameters():
        if PROJECTOR in name:
            parameter.requires_grad_(True)
    return model


def logits(model, seed=9):
    with evaluating(model):
        return model(**zoo.batch(seed=seed)).logits


def off(one, two):
    return (one - two).abs().max().item()


# weights that a teacher computes with, or that no adapter saves


@pytest.mark.parametrize(
    "adapter, told",
    [
        (dict(bias="all"), r"vision_tower.*bias \(\d+ weights in all\) would be trained"),
        (dict(bias="lora_only", target_modules=["q_proj", "fc1"]), r"q_proj\.base_layer\.bias"),
        (None, r"^model\.multi_modal_projector\.linear_1\.weight \(4 weights in all\)"),
    ],
    ids=["all", "lora_only", "projector"],
)
def test_what_would_move_the_teacher_is_refused_by_name(tmp_path, adapter, told):
    model = zoo.build("llava")
    model, adapter = (model, lora(**adapter)) if adapter else (unfrozen(model, lora()), None)
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"{told}.*frozen teacher.*modules_to_save"):
        seed(tmp_path / "out", model, adapter)
    assert not (tmp_path / "out").exists()
    if adapter:  # the model is as it was, and can be given again
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_are_unfrozen_later_are_refused_too(tmp_path):
    trainer = seed(tmp_path, zoo.build("llava"), lora())
    trainer.model.get_base_model().model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match="multi_modal_projector.*frozen teacher"):
        trainer.train()
    models = [peft.get_peft_model(model, lora()) for model in chain(2)]
    trainer = stage(tmp_path, models, batch())
    models[1].get_base_model().model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match="multi_modal_projector.*saved without it"):
        trainer.train()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_projector_among_modules_to_save_is_trained_and_saved_and_the_teacher_stays(tmp_path, rounds):
    base = zoo.build("llava")
    options = dict(rounds=rounds, save_strategy="steps", save_steps=1, lora_dropout=0.1)
    trainer = seed(tmp_path, zoo.build("llava"), lora(**SAVED), **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    copies = trainer.model.get_base_model().model.multi_modal_projector.modules_to_save["default"].state_dict()
    before = base.model.multi_modal_projector.state_dict()
    assert len(copies) == 4 and all(off(x, before[name]) > 1e-3 for name, x in copies.items())
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    assert off(logits(loaded), logits(trainer.model)) <= 1e-5 * logits(base).abs().max()
    taught = base
    if rounds == 2:  # the first round's student
        taught = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "round-1/checkpoint-3")
        assert off(logits(taught), logits(base)) > 0.1
    with as_teacher(trainer.model):
        assert off(trainer.model(**zoo.batch(seed=9)).logits, logits(taught)) <= (0 if rounds == 1 else 1e-4)
    for number in range(1, rounds + 1):
        again = seed(tmp_path / f"again-{number}", zoo.build("llava"), lora(**SAVED), **options)
        part = f"round-{number}/checkpoint-2" if rounds > 1 else "checkpoint-2"
        again.train(resume_from_checkpoint=str(tmp_path / part))
        for ours, theirs in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_best_checkpoint_has_its_modules_to_save(tmp_path):
    best = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)
    worst = dict(metric_for_best_model="loss", greater_is_better=True)  # which the first step is, not the last
    trainer = seed(tmp_path, zoo.build("llava"), lora(**SAVED), **best, **worst)
    trainer.train()
    loaded = peft.PeftModel.from_pretrained(zoo.build("llava"), trainer.state.best_model_checkpoint)
    assert off(logits(loaded), logits(trainer.model)) == 0
    last = peft.PeftModel.from_pretrained(zoo.build("llava"), tmp_path / "checkpoint-3")
    assert off(logits(last), logits(loaded)) > 0


def test_switching_the_adapter_off_and_on_trains_no_more_than_before(tmp_path):
    """PEFT makes all of an adapter trainable where it switches it on, even what its user froze."""
    model = peft.get_peft_model(zoo.build("llava"), lora(**SAVED, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "linear_2" in name:
            parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = seed(tmp_path, model)
    one_loss(trainer, zoo.batch())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all((parameter.grad is not None) == flags[name] for name, parameter in model.named_parameters())


def test_adapters_that_move_weights_or_add_to_the_loss_are_refused(tmp_path):
    moving = lora()
    moving.init_lora_weights = "lora_ga"
    for adapter, told in (
        (moving, "'lora_ga' changes the frozen weights"),
        (lora(kasa_config=peft.KasaConfig()), "LORA with kasa_config adds a term to the loss"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=3), "ADALORA with orth_reg_weight adds a term"),
    ):
        with pytest.raises(ValueError, match=told):
            check_config(adapter)
        with pytest.raises(ValueError, match=told):
            seed(tmp_path, zoo.build("llava"), adapter)
    model = peft.get_peft_model(zoo.build("llava"), lora())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights below it: unmerge it"):
        seed(tmp_path, model)


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(trainable_token_indices=[5, 6]), "trains single tokens"),
        (dict(init_lora_weights="mica"), "is a variant of LoRA"),
    ],
    ids=["tokens", "mica"],
)
def test_adapters_that_rounds_cannot_add_up_are_refused(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        seed(tmp_path, zoo.build("llava"), lora(**options), rounds=2)
    seed(tmp_path, zoo.build("llava"), lora(**options), max_steps=1).train()  # one round can


def test_rounds_over_layers_with_one_weight_are_refused(tmp_path):
    model = zoo.build("llava")
    first, second = (layer.self_attn for layer in model.model.language_model.layers)
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(ValueError, match="the model uses twice"):
        seed(tmp_path, model, lora(), rounds=2)


def test_a_new_round_begins_as_its_teacher_however_the_adapter_was_drawn():
    model = peft.get_peft_model(zoo.build("llava"), lora(init_lora_weights=False))
    assert off(logits(model), logits(zoo.build("llava"))) > 0.1
    before = logits(model)
    merge_and_reset(model)
    with as_teacher(model):
        assert off(model(**zoo.batch(seed=9)).logits, before) < 1e-4
    assert off(logits(model), before) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("options", [SAVED, dict(bias="all")], ids=["modules_to_save", "bias"])
def test_stage_folders_hold_what_was_trained(tmp_path, options):
    names = saved(tmp_path)
    more = dict(max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=1, keep_checkpoints=True)
    whole = pyramid(tmp_path / "out", names, batch(), peft_config=lora(**options), **more)
    student = whole.train()
    found = hf.LlavaForConditionalGeneration.from_pretrained(names[2])
    kind = PROJECTOR if options is SAVED else "bias"
    before = {name: p for name, p in found.named_parameters() if kind in name}
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad and kind in name}
    assert len(trained) == len(before) and len(trained) > 3
    for name, parameter in trained.items():
        name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "").replace("base_layer.", "")
        assert off(parameter, before[name]) > 0 or "k_proj.bias" in name or "post_layernorm" in name, name
    loaded = peft.PeftModel.from_pretrained(found, tmp_path / "out/stage-2/student")
    assert off(logits(loaded), logits(student)) == 0
    shutil.copytree(tmp_path / "out/stage-1", tmp_path / "on/stage-1")
    shutil.copytree(tmp_path / "out/stage-2/checkpoint-1", tmp_path / "on/stage-2/checkpoint-1")
    shutil.copy(tmp_path / "out/stage-2/run.json", tmp_path / "on/stage-2")
    again = pyramid(tmp_path / "on", names, batch(), peft_config=lora(**options), **more).train(True)
    for ours, theirs in zip(again.parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_coupled_models_refuse_what_no_adapter_saves(tmp_path):
    models = [unfrozen(model, lora()) for model in chain(3)]
    for make in (pyramid, ternary):
        with pytest.raises(
            ValueError, match="multi_modal_projector.linear_1.weight.*saved without it.*modules_to_save"
        ):
            make(tmp_path / "out", models, batch())
    assert not (tmp_path / "out").exists()


def test_models_that_share_a_weight_are_refused(tmp_path):
    models = chain(3)
    models[2].model.vision_tower = models[0].model.vision_tower
    with pytest.raises(ValueError, match="model 1 and model 3 share the weight model.vision_tower"):
        pyramid(tmp_path / "out", models, batch())
    with pytest.raises(ValueError, match="teacher1 and student share the weight model.vision_tower"):
        ternary(tmp_path / "out", models, batch())
    with pytest.raises(ValueError, match="teacher and student share the weight"):
        stage(tmp_path / "out", models[::2], batch())
    model = sized(0)
    with pytest.raises(ValueError, match="share the weight"):
        ternary(tmp_path / "out", [model, models[1], peft.get_peft_model(model, lora())], batch())
    assert not (tmp_path / "out").exists()
    models = chain(3)
    models[1].model.vision_tower = models[0].model.vision_tower  # two that do not learn may
    ternary(tmp_path / "out", models, batch(), max_steps=1).train()


def test_frozen_names_hold_for_adapters_too(tmp_path):
    models = chain(2)
    pyramid(tmp_path, models, batch(), lora_r=4, freeze=["layers.0."], max_steps=1, learning_rate=1e-2).train()
    for model in models:
        trained = {name for name, p in model.named_parameters() if "lora_B" in name and p.any()}
        assert trained and all("layers.1." in name for name in trained)


# frozen modules


class DropPath(torch.nn.Module):
    """A drop-path: whole examples fall out in training."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5) if self.training else x


def fronted(model, *parts):
    """The model with modules in front of its vision tower, as a part of it."""
    tower = model.model.vision_tower
    tower.front = torch.nn.Sequential(*parts)

    def run(module, args, kwargs):
        if args:
            return (module.front(args[0]), *args[1:]), kwargs
        return args, kwargs | {"pixel_values": module.front(kwargs["pixel_values"])}

    tower.register_forward_pre_hook(run, with_kwargs=True)
    return model


FRONTS = {
    "norm": lambda: torch.nn.BatchNorm2d(3),
    "plain norm": lambda: torch.nn.BatchNorm2d(3, affine=False),
    "dropout": lambda: torch.nn.Dropout(0.5),
    "drop-path": DropPath,
}


def features(model, seen):
    model.model.vision_tower.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.detach().clone())
    )


@pytest.mark.parametrize("front", FRONTS)
def test_student_and_teacher_see_the_same_features_of_a_frozen_tower(tmp_path, front):
    model = fronted(zoo.build("llava"), FRONTS[front]())
    before = copy.deepcopy(model.model.vision_tower.state_dict())
    trainer = seed(tmp_path, model, lora(target_modules=r".*language_model.*q_proj", lora_dropout=0.5), max_steps=2)
    seen, modes = [], []
    features(model, seen)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    layer.lora_dropout["default"].register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.train()
    assert len(seen) == 1 + 2 * 3  # a probe, then clean, noisy and student each step
    for step in (1, 4):
        assert torch.equal(seen[step], seen[step + 2]) and not torch.equal(seen[step], seen[step + 1])
    assert modes == [False, True, True]  # what is trained has its dropout
    after = model.model.vision_tower.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("make", ["pyramid", "pyramid, adapters", "ternary"])
def test_frozen_towers_of_coupled_models_stay_in_evaluation_mode(tmp_path, make):
    models = [fronted(model, *(FRONTS[name]() for name in FRONTS)) for model in chain(3, dropout=0.1)]
    before = [copy.deepcopy(model.model.vision_tower.state_dict()) for model in models]
    modes = []
    for model in models:
        for module in model.model.vision_tower.modules():
            module.register_forward_pre_hook(lambda module, *_: modes.append(module.training))
    options = dict(lora_r=2) if "adapters" in make else dict(freeze=["vision_tower"])
    (ternary if make == "ternary" else pyramid)(tmp_path, models, batch(), **options).train()
    assert modes and not any(modes)
    for model, old in zip(models, before, strict=True):
        after = model.model.vision_tower.state_dict()
        assert all(torch.equal(x, after[name]) for name, x in old.items())
    assert models[-1].model.language_model.layers[0].self_attn.training


def test_a_tower_that_is_trained_as_a_whole_keeps_its_statistics_in_its_folder(tmp_path):
    models = [fronted(model, FRONTS["norm"](), FRONTS["plain norm"]()) for model in chain(2)]
    trainer = stage(tmp_path, models, batch())
    trainer.train()
    trainer.save_models(tmp_path / "saved")
    state = load_file(tmp_path / "saved/student/model.safetensors")
    for part in models[1].model.vision_tower.front:
        assert part.training and part.num_batches_tracked == 2
    for name, x in models[1].model.vision_tower.front.state_dict().items():
        (key,) = [key for key in state if key.endswith(f"vision_tower.front.{name}")]
        assert torch.equal(state[key], x)


class Normed(torch.nn.Module):
    """A projector with statistics of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm = inner, torch.nn.BatchNorm1d(zoo.WIDTH)

    def forward(self, x):
        return self.norm(self.inner(x).flatten(0, 1)).view(*x.shape[:2], -1)


@pytest.mark.parametrize("rounds", [1, 2])
def test_statistics_of_modules_to_save_are_saved(tmp_path, rounds):
    def build():
        model = zoo.build("llava")
        model.model.multi_modal_projector = Normed(model.model.multi_modal_projector)
        return model.eval()

    trainer = seed(tmp_path, build(), lora(**SAVED), rounds=rounds)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    wrapper = trainer.model.get_base_model().model.multi_modal_projector
    norm = wrapper.modules_to_save["default"].norm
    assert norm.num_batches_tracked == 3 * rounds and off(norm.running_mean, torch.zeros(1)) > 1e-3
    assert wrapper.original_module.norm.num_batches_tracked == 3 * (rounds - 1)  # those of its teacher
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "final")
    assert off(logits(loaded), logits(trainer.model)) <= 1e-5 * logits(loaded).abs().max()
    if rounds == 1:
        with as_teacher(trainer.model):
            assert off(trainer.model(**zoo.batch(seed=9)).logits, logits(build())) == 0


class Counting(torch.nn.Module):
    """A layer that keeps a mean of what it has seen in training."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.zeros(zoo.WIDTH))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().flatten(0, -2).mean(0), 0.1)
        return self.inner(x - self.mean)


def test_a_buffer_that_training_changes_and_no_adapter_saves_is_refused_before_a_step(tmp_path):
    model = zoo.build("llava")
    model.model.language_model.layers[0].mlp = Counting(model.model.language_model.layers[0].mlp)
    trainer = seed(tmp_path, model, lora(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"buffer model.language_model.layers.0.mlp.mean changes.*modules_to_save"):
        trainer.train()
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    models = [fronted(model, FRONTS["norm"]()) for model in chain(2)]  # its bias is trained and saved, and moves them
    with pytest.raises(ValueError, match=r"buffer model.vision_tower.front.0.running_mean changes"):
        pyramid(tmp_path / "out", models, batch(), peft_config=lora(bias="all")).train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_layers_stay_checkpointed_and_compute_as_in_evaluation(tmp_path, reentrant):
    """Gradients pass through the second layer, which is frozen: it is run once more in the backward pass."""
    found, runs = [], []
    for how in ({}, dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant})):
        model, rows = zoo.build("llava"), zoo.batch(answers=2)
        adapter = lora(target_modules=r".*language_model.layers.0.*q_proj", init_lora_weights=False)
        trainer = seed(tmp_path, model, adapter, **how)
        if how:
            trainer.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        modes = [[], []]
        for layer, mode in zip(model.model.language_model.layers, modes, strict=True):
            layer.mlp.register_forward_pre_hook(lambda _, args, layer=layer, mode=mode: mode.append(layer.training))
        trainer.model.train()
        trainer.head.verify(trainer.model, rows)
        for mode in modes:
            mode.clear()
        found.append(one_loss(trainer, rows))
        runs.append(modes)
    assert_same(found[1], found[0], rtol=1e-5)
    assert runs[0] == [[False, False, True], [False] * 3]  # clean, noisy, student
    assert runs[1] == [[False, False, True, True], [False] * 4]  # and once more
    for layer in model.model.language_model.layers:  # whoever trains it elsewhere finds it as it should be
        layer.requires_grad_(True)
    model.train()
    modes[1].clear()
    model(**rows)
    assert modes[1] == [True]


def test_a_module_is_trained_if_a_parameter_below_it_is():
    model = fronted(zoo.build("llava"), *(FRONTS[name]() for name in FRONTS))
    model = peft.get_peft_model(model, lora(lora_dropout=0.1, target_modules=r".*language_model.layers.1.*q_proj"))
    settle(model)
    training = {name.removeprefix("base_model.model.") for name, module in model.named_modules() if module.training}
    language = "model.language_model.layers.1"
    assert {language, f"{language}.self_attn", f"{language}.self_attn.q_proj.lora_dropout.default"} <= training
    assert not any("vision_tower" in name or "layers.0" in name or ".mlp" in name for name in training)
    assert f"{language}.self_attn.q_proj.base_layer" not in training


# options


CONFIGS = (SeedConfig, PyramidConfig, TernaryConfig)
VALUES = dict(
    label_smoothing_factor=0.1,
    neftune_noise_alpha=5.0,
    use_liger_kernel=True,
    use_cache=True,
    include_for_metrics=["inputs"],
    batch_eval_metrics=True,
    eval_do_concat_batches=False,
    bf16_full_eval=True,
    fp16_full_eval=True,
    auto_find_batch_size=True,
    remove_unused_columns=True,
    label_names=["answers"],
)


@pytest.mark.parametrize("kind", CONFIGS)
def test_options_that_would_be_ignored_are_refused(tmp_path, kind):
    assert VALUES.keys() == UNREAD.keys() | {"label_names"}
    for name, value in VALUES.items():
        with pytest.raises(ValueError, match=name):
            kind(str(tmp_path / "out"), use_cpu=True, **{name: value})
    kind(str(tmp_path), use_cpu=True, label_names=["labels"], eval_do_concat_batches=True)
    assert not (tmp_path / "out").exists()


def test_options_that_are_set_late_are_refused_too(tmp_path):
    args = config(tmp_path / "out")
    args.label_smoothing_factor = 0.1
    with pytest.raises(
        ValueError, match="label_smoothing_factor cannot be used here: the distributions of the teachers"
    ):
        SeedTrainer(zoo.build("llava"), args)


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(push_to_hub=True), "push_to_hub"),
        (dict(optim="lomo"), "'lomo' steps in the backward pass"),
        (dict(optim="galore_adamw_layerwise"), "'galore_adamw_layerwise' steps"),
    ],
    ids=["hub", "lomo", "layerwise"],
)
def test_what_coupled_models_cannot_keep_to_is_refused(tmp_path, options, told):
    for kind in CONFIGS[1:]:
        with pytest.raises(ValueError, match=told):
            kind(str(tmp_path), use_cpu=True, **options)


def test_parts_of_a_trainer_that_would_be_ignored_are_refused(tmp_path):
    read = {"args", "callbacks", "data_collator", "eval_dataset", "model", "optimizer_cls_and_kwargs", "optimizers",
            "processing_class", "self", "train_dataset"}  # fmt: skip
    assert set(inspect.signature(hf.Trainer.__init__).parameters) == read | UNREAD_PARTS.keys()
    names = [str(tmp_path / "nowhere")] * 3  # nothing is loaded before
    for name in UNREAD_PARTS:
        for make in (
            lambda **part: SeedTrainer(zoo.build("llava"), config(tmp_path / "out"), **part),
            lambda **part: PyramidTrainer(names, PyramidConfig(str(tmp_path / "out"), **QUIET), **part),
            lambda **part: TernaryTrainer(names, TernaryConfig(str(tmp_path / "out"), **QUIET), **part),
        ):
            with pytest.raises(ValueError, match=f"{name} is not used by this trainer"):
                make(**{name: lambda *_: {}})
            with pytest.raises(TypeError, match="Trainer has no argument 'eval_datset'"):
                make(eval_datset=[])
    assert not (tmp_path / "out").exists()


def test_rates_beside_an_optimizer_are_refused(tmp_path):
    models = chain(3)
    optimizer = torch.optim.SGD(models[2].parameters(), lr=1e-3)
    args = TernaryConfig(str(tmp_path), **QUIET, learning_rates=[1e-3])
    with pytest.raises(ValueError, match="learning_rates are ignored with your own optimizer"):
        TernaryTrainer(models, args, train_dataset=Rows(batch()), data_collator=STACK, optimizers=(optimizer, None))


@pytest.mark.parametrize("kind", ["seed", "ternary"])
def test_training_does_not_go_on_without_its_optimizer(tmp_path, kind):
    light = dict(save_strategy="steps", save_steps=1, save_only_model=True, max_steps=2)

    def make(**options):
        if kind == "seed":
            return seed(tmp_path, zoo.build("llava"), **(light | options))
        return ternary(tmp_path, chain(3), batch(), **(light | options))

    make().train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-1 has no optimizer.pt.*save_only_model"):
        make().train(resume_from_checkpoint=True)


def test_a_loss_that_is_not_finite_is_logged_as_it_is(tmp_path):
    trainer = seed(tmp_path, zoo.build("llava"), max_steps=2, logging_steps=2)
    plain, count = trainer.compute_loss, []

    def second_is_nan(*args, **others):
        count.append(1)
        return plain(*args, **others) * (float("nan") if len(count) == 2 else 1.0)

    trainer.compute_loss = second_is_nan
    trainer.train()
    assert math.isnan(trainer.state.log_history[0]["loss"])
