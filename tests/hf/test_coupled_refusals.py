"""Pictures with and without answers in coupled training, and what it refuses before any work."""

import json
import math
import shutil

import peft
import pytest
import transformers as hf
import zoo
from coupled_models import QUIET, batch, chain, pyramid, saved, sized, ternary
from transformers import HfArgumentParser
from zoo import Rows, one_thread  # noqa: F401

from hkdfast import UNLABELED
from hkdfast.batch import answer_rows
from hkdfast.hf import (
    PyramidConfig,
    PyramidTrainer,
    QuestionCollator,
    TernaryConfig,
    TernaryTrainer,
    family,
)
from hkdfast.hf.adapter import seed_lora_config


@pytest.mark.slow
def test_pictures_with_and_without_answers(tmp_path):
    """Processor, collator, both systems; the rows without an answer are those where it would begin."""
    processor = zoo.processor()
    examples = [
        {"image": zoo.picture(i), "text": "Is there a cat in the image ?" if i % 2 else "cat ?", "answer": answer}
        for i, answer in enumerate(("Yes", None, "No", None))
    ]
    found = QuestionCollator(processor, answers=True)(examples)
    words = [processor.tokenizer.decode(row[row != -100]) for row in found["labels"]]
    assert words == ["yes </s>", "", "no </s>", ""]
    rows, labels = answer_rows(found)
    assert rows.sum(1).tolist() == [2, 1, 2, 1] and (labels == UNLABELED).sum() == 2
    # the row without an answer sees what the first answer token follows
    said = [found["input_ids"][i][rows[i]][0] for i in range(4)]
    assert len(set(map(int, said))) == 1
    for kind, config, models in (
        (PyramidTrainer, PyramidConfig, chain(3)),
        (TernaryTrainer, TernaryConfig, chain(3)),
    ):
        args = config(str(tmp_path / kind.__name__), **QUIET, max_steps=2, per_device_train_batch_size=2)
        trainer = kind(models, args, train_dataset=examples, processing_class=processor)
        trainer.train()
        history = trainer.history if kind is PyramidTrainer else trainer.state.log_history
        assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)


def test_an_example_without_an_answer_is_told(tmp_path):
    examples = [{"image": zoo.picture(0), "text": "cat ?"}]
    with pytest.raises(ValueError, match="example 0 of the batch has no 'answer', only image, text"):
        QuestionCollator(zoo.processor(), answers=True)(examples)


def test_every_option_explains_itself_and_parses():
    for config in (PyramidConfig, TernaryConfig):
        (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(["--output_dir", "x", "--hard_weight", "0.5"])
        assert parsed.hard_weight == [0.5]
        own = [
            f
            for name, f in config.__dataclass_fields__.items()
            if name not in hf.TrainingArguments.__dataclass_fields__
        ]
        assert all(field.metadata["help"].endswith(".") for field in own)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (PyramidConfig, dict(mode="online"), "concurrent, mutual, frozen"),
        (PyramidConfig, dict(stage_weights=[1.0, -1.0]), r"stage_weights must be numbers that are not negative.*-1.0"),
        (PyramidConfig, dict(stage_weights=[]), "at least one"),
        (PyramidConfig, dict(stage_epochs=[-1.0]), "stage_epochs must be"),
        (PyramidConfig, dict(learning_rates=[float("nan")]), "learning_rates must be"),
        (PyramidConfig, dict(hard_weight=-1.0), "hard_weight"),
        (TernaryConfig, dict(hard_weight=[1.0] * 4), "hard_weight must be one number per model at most.*for 3 models"),
        (PyramidConfig, dict(mode="frozen", detach=False), "detach=False"),
        (PyramidConfig, dict(divergence="kl"), "unknown divergence 'kl'"),
        (PyramidConfig, dict(temperature=0.0), "temperature"),
        (PyramidConfig, dict(divergence="jensen_shannon", beta=1.0), "0 < beta < 1"),
        (PyramidConfig, dict(unlabeled_weight=-1.0), "unlabeled_weight"),
        (PyramidConfig, dict(lora_r=0), "lora_r must be at least 1"),
        (PyramidConfig, dict(backend="cudnn"), "unknown backend"),
        (PyramidConfig, dict(vocab="all"), "vocab must be None"),
        (PyramidConfig, dict(label_smoothing_factor=0.1), "label_smoothing_factor"),
        (PyramidConfig, dict(learning_rates=-1.0), r"learning_rates must be numbers .* got \[-1.0\]"),
        (PyramidConfig, dict(stage_epochs=-2), r"stage_epochs must be numbers .* got \[-2.0\]"),
        (
            PyramidConfig,
            dict(mode="mutual", detach=False, teacher_floor=-5.0),
            "teacher_floor=-5.0 takes constant teachers",
        ),
        (PyramidConfig, dict(mode="frozen", stage_weights=[0.0], hard_weight=0.0), "every weight of the coupling is 0"),
        (TernaryConfig, dict(form="triple"), "two_teachers, mutual, one_pair"),
        (TernaryConfig, dict(teachers="dead"), "frozen, trained"),
        (TernaryConfig, dict(teacher_weights=[1.0, 1.0, 1.0]), r"one number or 2 \(teacher1, teacher2\)"),
        (TernaryConfig, dict(teacher_coupling=1.0), "two trained teachers"),
    ],
)
def test_wrong_options_are_told_before_any_work(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_wrong_models_are_told_before_any_work(tmp_path):
    names, out = saved(tmp_path, 2), tmp_path / "out"
    other = zoo.processor()
    other.tokenizer.add_tokens(["giraffe"])
    other.save_pretrained(shutil.copytree(names[1], tmp_path / "words"))
    other = zoo.processor()
    other.image_processor.image_mean = [0.4] * 3
    other.save_pretrained(shutil.copytree(names[1], tmp_path / "pixels"))
    model = sized(0)
    small = zoo.llava(zoo.llama(vocab=20))
    cases = [
        (names[:1], "at least two models"),
        (names[0], "at least two models"),
        ([model, sized(1), model], "occurs twice"),
        (
            [names[0], str(tmp_path / "words")],
            "tokenizers of '.*model-0' and '.*words' differ in 1 of 25 and 26.*giraffe",
        ),
        ([names[0], str(tmp_path / "pixels")], "image processors of '.*model-0' and '.*pixels' differ in image_mean"),
    ]
    for models, message in cases:
        with pytest.raises(ValueError, match=message):
            pyramid(out, models, batch())
        assert not out.exists()
    with pytest.raises(OSError, match="nowhere"):
        pyramid(out, [*names, str(tmp_path / "nowhere")], batch())
    with pytest.raises(ValueError, match=r"couples 3 models \(teacher1, teacher2, student\)"):
        ternary(out, names, batch())
    with pytest.raises(ValueError, match="must be different objects"):
        ternary(out, [model, model, sized(1)], batch())
    with pytest.raises(ValueError, match="head of model 2 has 20 tokens, fewer than the tokenizer's 25"):
        PyramidTrainer([model, small], PyramidConfig(str(out), **QUIET), processing_class=zoo.processor())
    with pytest.raises(ValueError, match="'nothing' is in the name of no weight"):
        pyramid(out, names, batch(), freeze=["nothing"]).train()
    with pytest.raises(ValueError, match="no language-model head"):
        pyramid(out, [model.model, sized(1)], batch()).train()
    with pytest.raises(TypeError, match="PyramidConfig"):
        PyramidTrainer(names, TernaryConfig(str(out)))
    with pytest.raises(ValueError, match="one or 2, one per model"):
        pyramid(out, names, batch(), peft_config=[None] * 3)
    with pytest.raises(ValueError, match="learning_rates must be one number per model at most.*for 2 models"):
        pyramid(out, names, batch(), learning_rates=[1e-3] * 3)
    with pytest.raises(ValueError, match="stage_epochs must be one number per stage at most.*for 1 stages"):
        pyramid(out, names, batch(), stage_epochs=[1, 2])


def test_later_models_of_a_chain_are_looked_at_before_the_first_is_trained(tmp_path):
    names, out = saved(tmp_path, 3), tmp_path / "out"
    sized(2, num_hidden_layers=1).save_pretrained(names[2])
    with pytest.raises(ValueError, match="'language_model.layers.1.' is in the name of no weight"):
        pyramid(out, names, batch(), freeze=["language_model.layers.1."])
    adapted = seed_lora_config(sized(1))
    peft.get_peft_model(family.load_model(names[1]), adapted).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter already"):
        pyramid(out, [names[0], names[1], tmp_path / "adapter"], batch(), peft_config=[None, None, adapted])
    pyramid(out, [names[0], tmp_path / "adapter"], batch(), freeze=["lora_A"], mode="frozen")
    with pytest.raises(ValueError, match="init_lora_weights 'pissa' changes the frozen weights"):
        pyramid(out, names, batch(), peft_config=peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    zoo.llava(zoo.llama(vocab=20)).save_pretrained(names[2])
    with pytest.raises(ValueError, match="head of model 3 has 20 tokens, fewer than the tokenizer's 25"):
        pyramid(out, names, batch())
    assert not out.exists()


def test_a_batch_without_labels_is_told(tmp_path):
    found = batch()
    del found["labels"]
    with pytest.raises(ValueError, match="needs labels in the batch, which has input_ids"):
        pyramid(tmp_path, chain(2), found).train()
    trainer = pyramid(tmp_path / "soft", chain(2), found, mode="frozen", hard_weight=0.0)  # needs none
    trainer.train()
    assert json.loads((tmp_path / "soft/stage-1/done.json").read_text())["stage"] == 1
