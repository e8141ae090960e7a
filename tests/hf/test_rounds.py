"""SeedTrainer from end to end: rounds, resuming, two processes, a user's own files, the command."""

import json
import shutil

import peft
import pytest
import torch
import zoo
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from zoo import Rows, config, one_thread  # noqa: F401

from hkdfast import cli
from hkdfast.data.generation import GenerationOptions
from hkdfast.hf import QuestionCollator, SeedTrainer, as_teacher, seed_lora_config
from hkdfast.hf.generate import generate_texts


def trainer_of(folder, batch, adapter=None, **options):
    model = zoo.build("llava")
    return SeedTrainer(model, config(folder, **options), train_dataset=Rows(batch), peft_config=adapter)


def losses(trainer):
    return [
        (entry.get("round"), entry["step"], entry["loss"], entry["divergence"], entry["grad_norm"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


# rounds

EVOLVING = dict(
    rounds=2, max_steps=3, per_device_train_batch_size=2, save_strategy="steps", save_steps=1, alpha=[1.5, 1.0]
)


@pytest.fixture(scope="module")
def evolved(tmp_path_factory):
    """A training of two rounds, with dropout, whose every step is kept."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evolved")
    trainer = trainer_of(folder, zoo.batch(size=8), lora_dropout=0.1, **EVOLVING)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return folder, trainer


@pytest.mark.slow
def test_rounds_are_logged_with_their_own_schedule_and_contrast(evolved):
    history = [entry for entry in evolved[1].state.log_history if "loss" in entry]
    assert [(entry["round"], entry["step"]) for entry in history] == [(r, s) for r in (1, 2) for s in (1, 2, 3)]
    assert [entry["contrast_weight"] for entry in history] == [1.5] * 3 + [1.0] * 3
    assert history[0]["learning_rate"] == history[3]["learning_rate"]
    assert history[3]["agreement"] == 1.0 or history[3]["divergence"] < history[0]["divergence"]


@pytest.mark.parametrize("checkpoint", ["final", "round-2/checkpoint-3"])
def test_all_rounds_are_one_ordinary_adapter_on_the_original_model(evolved, checkpoint):
    folder, trainer = evolved
    loaded = peft.PeftModel.from_pretrained(zoo.build("llava"), folder / checkpoint)
    batch = zoo.batch(seed=9)
    trained, base = trainer.model.eval(), zoo.build("llava")
    with torch.no_grad():
        expected, before, found = (model(**batch).logits for model in (trained, base, loaded))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - before).abs().max() > 1e-2 * expected.abs().max()
    assert json.loads((folder / checkpoint / "adapter_config.json").read_text())["r"] == 32


def test_the_first_round_merged_is_the_teacher_of_the_second(evolved):
    folder, trainer = evolved
    first = peft.PeftModel.from_pretrained(zoo.build("llava"), folder / "round-1/checkpoint-3").eval()
    batch = zoo.batch(seed=9)
    with as_teacher(trainer.model):
        taught = trainer.model(**batch).logits
    with torch.no_grad():
        assert torch.allclose(taught, first(**batch).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["round-1/checkpoint-2", "round-1/checkpoint-3", "round-2/checkpoint-2", True])
def test_resuming_goes_on_to_the_same_losses_bit_for_bit(evolved, tmp_path, checkpoint):
    folder, whole = evolved
    where = checkpoint
    if checkpoint is True:  # the last one under output_dir
        shutil.copytree(folder / "round-1", tmp_path / "round-1")
        shutil.copytree(folder / "round-2/checkpoint-1", tmp_path / "round-2/checkpoint-1")
        shutil.copy(folder / "run.json", tmp_path)
    else:
        where = str(folder / checkpoint)
    trainer = trainer_of(tmp_path, zoo.batch(size=8), lora_dropout=0.1, **EVOLVING)
    torch.manual_seed(123)  # whatever ran before
    trainer.train(resume_from_checkpoint=where)
    assert losses(trainer) == losses(whole)
    for ours, theirs in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_resuming_one_round_amid_an_accumulated_epoch(tmp_path):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, save_strategy="steps")
    batch = zoo.batch(size=10, answers=2)
    whole = trainer_of(tmp_path, batch, save_steps=2, lora_dropout=0.2, **options)
    whole.train()
    again = trainer_of(tmp_path / "again", batch, save_steps=9, lora_dropout=0.2, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_resuming_looks_at_what_it_finds(tmp_path, rounds):
    options = dict(rounds=rounds, max_steps=2, save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
    batch = zoo.batch(size=8)
    whole = trainer_of(tmp_path, batch, **options)
    whole.train()
    last = tmp_path / ("round-2" if rounds > 1 else "") / "checkpoint-2"
    again = trainer_of(tmp_path, batch, **options)
    assert again.train(resume_from_checkpoint=True) is None  # at the end there is nothing to train
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert losses(again) == losses(whole)
    (last / "trainer_state.json").unlink()  # as a stop while it was written leaves it
    again = trainer_of(tmp_path, batch, **options)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole) and last.is_dir()
    with pytest.raises(ValueError, match="another run: max_steps was 2 and is 4 now"):
        trainer_of(tmp_path, batch, **options | {"max_steps": 4}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="another run: alpha was .1.5, 1.0. and is .2.0. now"):
        trainer_of(tmp_path, batch, **options, alpha=2.0).train(resume_from_checkpoint=str(last))
    with pytest.raises(ValueError, match="another run: dataloader_drop_last was False and is True now"):
        trainer_of(tmp_path, batch, **options, dataloader_drop_last=True).train(resume_from_checkpoint=str(last))
    with pytest.raises(
        ValueError, match="already holds a training run: pass resume_from_checkpoint=True or choose another"
    ):
        trainer_of(tmp_path, batch, **options).train()
    with pytest.raises(ValueError, match="no complete checkpoint in .*nowhere"):
        trainer_of(tmp_path / "nowhere", batch, **options).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no complete checkpoint .*checkpoint-7"):
        trainer_of(tmp_path, batch, **options).train(resume_from_checkpoint=str(last.with_name("checkpoint-7")))
    other = trainer_of(tmp_path / "other", batch, **options, temperature=2.0)
    other.train()
    shutil.copytree(last, last.with_name("checkpoint-2-mine"))  # no checkpoint of ours: nothing trips over it
    with pytest.raises(ValueError, match="other is another run: temperature was 2.0 and is 1.0 now"):
        trainer_of(tmp_path / "other", batch, **options).train(resume_from_checkpoint=str(last))


@pytest.mark.slow
def test_rounds_with_an_adapted_head(tmp_path):
    """LoRA on an untied head: the sum must not count the merged head twice."""
    model = zoo.build("llava")
    names = seed_lora_config(model).target_modules
    adapter = peft.LoraConfig(r=4, lora_alpha=4, target_modules=f"{names}|lm_head", use_rslora=True)
    options = dict(rounds=2, max_steps=2, learning_rate=1e-2)
    trainer = trainer_of(tmp_path, zoo.batch(size=8), adapter, **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not any("base_layer" in name for name in load_file(tmp_path / "final/adapter_model.safetensors"))
    loaded, batch = peft.PeftModel.from_pretrained(zoo.build("llava"), tmp_path / "final"), zoo.batch(seed=9)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        assert torch.allclose(loaded(**batch).logits, expected, atol=1e-4)


@pytest.mark.slow
def test_rounds_in_bfloat16_keep_to_the_adapter_that_is_saved(tmp_path):
    """The merged weights are rounded once: loaded as an adapter, the rounds give what training saw up to that."""
    model = zoo.build("llava").bfloat16()
    trainer = SeedTrainer(
        model, config(tmp_path, rounds=2, max_steps=3, learning_rate=1e-2), train_dataset=Rows(zoo.batch(size=8))
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    batch, loaded = zoo.batch(seed=9), peft.PeftModel.from_pretrained(zoo.build("llava").bfloat16(), tmp_path / "final")
    with torch.no_grad():
        base, trained, found = (
            m(**batch).logits[:, -1].float() for m in (zoo.build("llava").bfloat16(), trainer.model.eval(), loaded)
        )
    assert (found - trained).norm() < 0.1 * (trained - base).norm()


@pytest.mark.slow
def test_training_twice_is_the_same_training(tmp_path):
    found = []
    for _ in range(2):
        trainer = trainer_of(tmp_path, zoo.batch(size=4))
        for _ in range(2):
            trainer.model.base_model.model.eval()
            trainer.train()
            found.append(losses(trainer))
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.data.zero_()
    assert found[0] == found[2] and found[1] == found[3]
    assert found[0][0][2] == found[1][0][2]  # the same noise, prompts and (zero) adapter


def test_rounds_over_a_head_that_is_tied_are_refused(tmp_path):
    model = zoo.llava(zoo.llama(tie_word_embeddings=True))
    adapter = peft.LoraConfig(target_modules=["lm_head"])
    with pytest.raises(ValueError, match="uses twice"):
        SeedTrainer(model, config(tmp_path, rounds=2), peft_config=adapter)


def test_a_trainer_runs_its_rounds_once(evolved):
    with pytest.raises(ValueError, match="new trainer"):
        evolved[1].train()


# two processes


@pytest.mark.slow
def test_two_processes_are_one_large_batch(tmp_path):
    import test_seed_trainer

    batch = zoo.batch(size=8, answers=2)
    trainer, expected = test_seed_trainer.train(
        tmp_path / "one", batch, adapter=test_seed_trainer.noisy_adapter, per_device_train_batch_size=8, max_steps=2
    )
    zoo.two_processes(
        tmp_path,
        """
import test_seed_trainer
trainer, steps = test_seed_trainer.train(FOLDER, zoo.batch(size=8, answers=2), adapter=test_seed_trainer.noisy_adapter,
    ddp_backend="gloo", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
if trainer.is_world_process_zero():
    torch.save((steps, trainer.state.log_history), FOLDER + "/found.pt")
""",
    )
    steps, history = torch.load(tmp_path / "found.pt")
    for ours, theirs in zip(steps, expected, strict=True):
        scale = max(grad.abs().max() for grad in theirs.values())
        assert ours.keys() == theirs.keys()
        for name, grad in theirs.items():
            assert (ours[name] - grad).abs().max() <= 1e-4 * scale, name
    for ours, theirs in zip(history[:2], trainer.state.log_history[:2], strict=True):
        for key in ("loss", "divergence", "confidence", "agreement", "cross_entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


# a user's own files


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model saved as users have it, images and POPE-style questions."""
    folder = tmp_path_factory.mktemp("home")
    zoo.build("llava").save_pretrained(folder / "model")
    zoo.processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    lines = []
    for i in range(6):
        zoo.picture(i).save(folder / f"images/{i}.png")
        text = f"Is there a {('cat', 'dog', 'cow')[i % 3]} in the image?"
        lines.append({"question_id": i, "image": f"{i}.png", "text": text, "label": ("yes", "no")[i % 2]})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True], ids=["prompts", "labels"])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_from_pictures_to_answers(tmp_path, name, answers):
    """Processor, collator, training, saving, PeftModel.from_pretrained, answers."""
    processor = zoo.processor(name)
    examples = [
        {"image": zoo.picture(i), "text": "Is there a cat in the image?", "answer": ("Yes", "No")[i % 2]}
        for i in range(4)
    ]
    collator = QuestionCollator(processor, answers)
    batch = collator(examples)
    if answers:
        words = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
        assert words == ["yes </s>", "no </s>"] * 2
    trainer = SeedTrainer(
        zoo.build(name),
        config(tmp_path, yes_rate=True, learning_rate=1e-2, max_steps=4, per_device_train_batch_size=2),
        train_dataset=examples,
        data_collator=collator,
        processing_class=processor.tokenizer,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(zoo.build(name), tmp_path / "adapter").eval()
    texts, images = [e["text"] for e in examples], [e["image"] for e in examples]
    few = GenerationOptions(max_new_tokens=3)
    said = [generate_texts(model, processor, texts, images, few) for model in (loaded, trainer.model.eval())]
    assert said[0] == said[1]
    inputs = QuestionCollator(processor)(examples)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, trainer.model(**inputs).logits, atol=1e-5)
        assert not torch.allclose(loaded(**inputs).logits, zoo.build(name)(**inputs).logits, atol=1e-3)


def test_answers_are_the_labels_without_a_chat_template():
    processor = zoo.processor()
    processor.chat_template = None
    examples = [{"image": zoo.picture(i), "text": "cat ?" if i else "Is there a cat in the image?"} for i in range(2)]
    for example, answer in zip(examples, ("Yes", "No cat"), strict=True):
        example["answer"] = answer
    batch = QuestionCollator(processor, True, "")(examples)
    words = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert words == ["yes </s>", "no cat </s>"]


def test_a_processor_without_pad_and_eos_is_refused():
    processor = zoo.processor()
    processor.tokenizer.pad_token = processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither pad nor eos"):
        QuestionCollator(processor)
    with pytest.raises(ValueError, match="PreTrainedTokenizerFast has no tokenizer|TokenizersBackend has no tokenizer"):
        QuestionCollator(zoo.tokenizer())


# the command


def seed(home, output, *options, questions="questions.jsonl", images="images", model="model"):
    paths = ["--model", home / model, "--images", home / images, "--questions", home / questions, "--output", output]
    return cli.main(["seed", *map(str, paths), "--use-cpu", *options])


FEW = ("--max-steps", "2", "--per-device-train-batch-size", "3", "--logging-steps", "1")


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
def test_the_command_trains_an_adapter(home, tmp_path, capfd, labels):
    options = ("--labels", "--hard-weight", "0.5") if labels else ()
    assert seed(home, tmp_path / "out", *FEW, "--learning-rate", "0.01", *options) == 0
    shown = capfd.readouterr()
    assert "step 2 of 2" in shown.out and "yes rate" in shown.out and "hkdfast evaluate pope" in shown.out
    base = LlavaForConditionalGeneration.from_pretrained(home / "model")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    AutoProcessor.from_pretrained(tmp_path / "out")
    moved = sum(p.abs().sum() for name, p in loaded.named_parameters() if "lora_B" in name)
    assert moved > 0


@pytest.mark.slow
def test_the_command_resumes(home, tmp_path):
    all_of_them = ("--save-total-limit", "9")
    assert seed(home, tmp_path / "whole", *FEW, "--rounds", "2", "--save-steps", "1", *all_of_them) == 0
    shutil.copytree(tmp_path / "whole/round-1/checkpoint-1", tmp_path / "part/round-1/checkpoint-1")
    shutil.copy(tmp_path / "whole/run.json", tmp_path / "part")
    assert seed(home, tmp_path / "part", *FEW, "--rounds", "2", "--save-steps", "1", "--resume") == 0
    whole, part = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.slow
def test_a_command_that_died_before_its_first_checkpoint_begins_again(home, tmp_path, monkeypatch):
    plain = SeedTrainer.training_step
    monkeypatch.setattr(SeedTrainer, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        seed(home, tmp_path / "out", *FEW)
    monkeypatch.setattr(SeedTrainer, "training_step", plain)
    assert seed(home, tmp_path / "out", *FEW) == 2  # not without being told
    assert seed(home, tmp_path / "out", *FEW, "--resume") == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["seed", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    parser = cli.make_parser(["seed"])
    seed_parser = parser._subparsers._group_actions[0].choices["seed"]
    for action in seed_parser._actions[1:]:
        assert action.help and action.option_strings[0] in text
        if not action.required and action.default and action.nargs != 0:
            shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
            assert f"(default: {shown})" in text


def test_bad_input_is_told_before_anything_is_written(home, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"question_id": 1, "image": "0.png", "text": "cat ?"}\n{oops\n')
    (tmp_path / "elsewhere.jsonl").write_text('{"question_id": 1, "image": "nowhere.png", "text": "cat ?"}\n')
    (tmp_path / "bare.jsonl").write_text('{"question_id": 1, "image": "0.png", "text": "cat ?"}\n')
    shutil.copytree(home / "images", tmp_path / "corrupt")
    (tmp_path / "corrupt/3.png").write_bytes((home / "images/3.png").read_bytes()[:200])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "headless").mkdir()
    shutil.copytree(home / "model", tmp_path / "headless", dirs_exist_ok=True)
    known = json.loads((home / "model/config.json").read_text())["vision_config"]
    (tmp_path / "headless/config.json").write_text(json.dumps(known))
    cases = [
        (dict(questions=tmp_path / "none.jsonl"), (), "none.jsonl"),
        (dict(questions=tmp_path / "broken.jsonl"), (), "broken.jsonl:2"),
        (dict(questions=tmp_path / "elsewhere.jsonl"), (), "nowhere.png"),
        (dict(questions=tmp_path / "bare.jsonl"), ("--labels",), "bare.jsonl:1"),
        (dict(images=tmp_path / "nothing"), (), "nothing"),
        (dict(images=tmp_path / "corrupt"), (), "3.png"),
        (dict(model=tmp_path / "no-model"), (), "no-model"),
        (dict(model=tmp_path / "headless"), (), "clip_vision_model"),
        ({}, ("--hard-weight", "1"), "--labels"),
        ({}, ("--confidence", "target", "--alpha-schedule", "linear"), "--labels"),
        ({}, ("--noise-step", "1000"), "0 to 999"),
        ({}, ("--alpha", "-1"), "alpha"),
        ({}, ("--lora-targets", "nothing"), "q_proj"),
        ({}, ("--resume",), "no checkpoint"),
    ]
    for paths, options, told in cases:
        assert seed(home, tmp_path / "out", *FEW, *options, **paths) == 2, (paths, options)
        assert told in capsys.readouterr().err, (paths, options)
        assert not (tmp_path / "out").exists(), (paths, options)
    assert seed(home, tmp_path / "full", *FEW) == 2
    assert "full" in capsys.readouterr().err and (tmp_path / "full/file").read_text() == "mine"
