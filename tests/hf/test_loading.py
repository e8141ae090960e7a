"""What other people saved: damaged models, adapters that do not fit, templates of every form, classes of one's own."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import zoo  # noqa: E402
from zoo import Rows, config, one_thread  # noqa: E402, F401

from hkdfast import cli, notes  # noqa: E402
from hkdfast.batch import noised  # noqa: E402
from hkdfast.hf import QuestionCollator, SeedTrainer, family, generate  # noqa: E402
from hkdfast.hf.coupled import restore, save_model  # noqa: E402
from hkdfast.hf.templates import answered, prompts  # noqa: E402

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
BOTH = [lambda folder: generate.load(folder, device="cpu"), family.load_model, family.meta_model]
QUESTION = "Is there a cat in the image?"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model as users have it, an adapter on it, images and questions."""
    home = tmp_path_factory.mktemp("home")
    model = zoo.build("llava")
    model.save_pretrained(home / "model")
    zoo.processor().save_pretrained(home / "model")
    adapter_on(home / "model").save_pretrained(home / "adapter")
    (home / "images").mkdir()
    zoo.picture(0).save(home / "images/0.png")
    line = {"question_id": 0, "image": "0.png", "text": QUESTION, "label": "yes"}
    (home / "questions.jsonl").write_text(json.dumps(line))
    return home


@pytest.fixture(autouse=True)
def untold():
    notes.noted.clear()


def adapter_on(folder, **options):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    how = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**how))


@pytest.fixture
def copy(home, tmp_path):
    """A copy of the model's folder, to be damaged."""
    return shutil.copytree(home / "model", tmp_path / "model")


@pytest.fixture
def adapter(home, tmp_path):
    return shutil.copytree(home / "adapter", tmp_path / "adapter")


def edit(file, change):
    found = json.loads(file.read_text())
    file.write_text(json.dumps(change(found) or found))


def edit_weights(file, change):
    found = load_file(file)
    save_file(change(found) or found, file, metadata={"format": "pt"})


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def shards(folder):
    """The index of a model of two files, of which one is not there."""
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    places = {name: f"model-{1 + place % 2}.safetensors" for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def pickled(content):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return change


def without(part):
    def change(folder):
        edit_weights(folder / WEIGHTS, lambda found: {name: x for name, x in found.items() if part not in name})

    return change


def widened(found):
    found["text_config"]["intermediate_size"] = 24


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGED = {
    "header cut": (cut(WEIGHTS, 100), f"{WEIGHTS} is damaged or cut"),
    "end cut": (cut(WEIGHTS, -10), f"{WEIGHTS} is damaged or cut"),
    "empty": (cut(WEIGHTS, 0), f"{WEIGHTS} is damaged or cut"),
    "pointer": (lambda folder: (folder / WEIGHTS).write_bytes(POINTER), f"{WEIGHTS} is the pointer of Git LFS"),
    "shard": (shards, "model.safetensors.index.json names model-2.safetensors, which is not there"),
    "pickle": (pickled(b"garbage"), "pytorch_model.bin is damaged or cut"),
    "empty pickle": (pickled(b""), "pytorch_model.bin is damaged or cut"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no file named {WEIGHTS}"),
    "missing weight": (without("layers.1.self_attn.k_proj"), "e.g. model.language_model.layers.1.self_attn.k_proj"),
    "no head": (without("lm_head"), "lacks 1 weights of LlavaForConditionalGeneration, e.g. lm_head.weight"),
    "shape": (lambda folder: edit(folder / "config.json", widened), r"is \(.*48.*\), config.json makes it \(.*24.*\)"),
    "config": (cut("config.json", 100), "config.json is damaged or cut, it is no JSON"),
    "config list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "generation": (cut("generation_config.json", 20), "generation_config.json is damaged or cut"),
    "type": (
        lambda folder: edit(folder / "config.json", lambda found: found | {"model_type": "mine"}),
        "the type 'mine' is none that transformers knows: .* --import",
    ),
    "tower": (
        lambda folder: edit(folder / "config.json", lambda found: found | {"vision_config": {"model_type": "mine"}}),
        "the type 'mine' of its vision_config is none that transformers knows: .* --import",
    ),
    "number": (
        lambda folder: edit(folder / "config.json", lambda found: found | {"text_config": {"hidden_size": "x"}}),
        "hidden_size",
    ),
}


@pytest.mark.parametrize("load", BOTH, ids=["asked", "trained", "outlined"])
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_model_is_refused_by_name(copy, what, load):
    change, told = DAMAGED[what]
    change(copy)
    with pytest.raises((ValueError, OSError), match=told) as caught:
        load(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (cut("tokenizer.json", 100), "tokenizer.json is damaged or cut"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
        (cut("tokenizer_config.json", 30), "tokenizer_config.json is damaged or cut"),
        (cut("processor_config.json", 30), "processor_config.json is damaged or cut"),
        (lambda folder: (folder / "processor_config.json").unlink(), "no processor_config.json or preprocessor_config"),
        (
            lambda folder: edit(
                folder / "processor_config.json",
                lambda found: (
                    found | {"processor_class": "OwnProcessor", "auto_map": {"AutoProcessor": "own.OwnProcessor"}}
                ),
            ),
            "code .* is not run: .* --import",
        ),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "chat template .* is damaged"),
        (lambda folder: (folder / "chat_template.jinja").write_text("Hello"), "shows no question about an image"),
    ],
)
def test_a_damaged_processor_is_refused_by_name(copy, change, told):
    change(copy)
    with pytest.raises((ValueError, OSError), match=told) as caught:
        generate.load(copy, device="cpu")
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_model_of_the_hub_is_refused_by_the_name_of_its_file(home, tmp_path, monkeypatch):
    snapshot = shutil.copytree(home / "model", tmp_path / "models--zoo--model/snapshots/abc")
    (tmp_path / "models--zoo--model/refs").mkdir()
    (tmp_path / "models--zoo--model/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    generate.load("zoo/model", device="cpu")
    cut(WEIGHTS, 100)(snapshot)
    with pytest.raises(ValueError, match=f"model 'zoo/model': {WEIGHTS} is damaged or cut"):
        generate.load("zoo/model", device="cpu")
    with pytest.raises(OSError, match="model 'zoo/nothing': "):
        generate.load("zoo/nothing", device="cpu")


def test_a_quantized_model_has_an_outline(copy):
    how = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit(copy / "config.json", lambda found: found | {"quantization_config": how})
    assert {x.device.type for x in family.meta_model(copy).parameters()} == {"meta"}


def test_weights_that_fit_nothing_are_told(copy, capfd):
    edit_weights(copy / WEIGHTS, lambda found: found | {"adapter.weight": torch.ones(2)})
    family.load_model(copy)
    family.load_model(copy)
    shown = capfd.readouterr().err
    assert shown.count("1 weights fit nothing in LlavaForConditionalGeneration") == 1  # once
    assert "e.g. adapter.weight" in shown and "LOAD REPORT" not in shown


def test_a_whole_model_is_loaded_with_all_its_numbers(home):
    expected = zoo.build("llava").state_dict()
    for model in (generate.load(home / "model", device="cpu")[0], family.load_model(home / "model")):
        assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    outline = family.meta_model(home / "model")
    assert {x.device.type for x in outline.parameters()} == {"meta"}


def test_a_tokenizer_of_more_words_than_the_model_embeds_is_refused(copy):
    model = zoo.build("llava")
    model.resize_token_embeddings(zoo.SPECIAL.index("<image>"))
    model.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"numbers '\?' 20, but the model embeds 4 words"):
        generate.load(copy, device="cpu")


# adapters


def renamed(old, new):
    def change(folder):
        edit_weights(folder / ADAPTER, lambda found: {name.replace(old, new): x for name, x in found.items()})

    return change


def fewer(folder):
    edit_weights(folder / ADAPTER, lambda found: dict(list(found.items())[1:]))


def thinner(folder):
    edit_weights(folder / ADAPTER, lambda found: {name: x[:, :3].contiguous() for name, x in found.items()})


def configured(**changes):
    return lambda folder: edit(folder / "adapter_config.json", lambda found: found | changes)


MISFITS = {
    "names": (renamed(".language_model.", "."), "fit nothing in LlavaForConditionalGeneration, e.g. base_model.model"),
    "half": (fewer, "lacks 1 weights of LlavaForConditionalGeneration, e.g. base_model.model"),
    "shapes": (thinner, "size mismatch for base_model.model"),
    "targets": (configured(target_modules=["nothing"]), "target"),
    "type": (configured(peft_type="MINE"), "MINE"),
    "task": (configured(task_type="SEQ_CLS"), "is of task SEQ_CLS"),
    "module": (configured(modules_to_save=["multi_modal_projector"]), "no weight .*multi_modal_projector"),
    "config": (cut("adapter_config.json", 50), "adapter_config.json is damaged or cut"),
    "cut": (cut(ADAPTER, 50), f"{ADAPTER} is damaged or cut"),
    "none": (lambda folder: (folder / ADAPTER).unlink(), f"no {ADAPTER}"),
}
PUT = {
    "asked": lambda home, adapter: generate.load(home / "model", adapter, device="cpu"),
    "trained": lambda home, adapter: family.load_model(adapter),
    "outlined": lambda home, adapter: family.meta_model(adapter),
}


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("what", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(home, adapter, what, put):
    change, told = MISFITS[what]
    change(adapter)
    with pytest.raises((ValueError, OSError), match=told) as caught:
        PUT[put](home, adapter)
    assert str(adapter) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["multi_modal_projector"]}, {"use_dora": True}])
@pytest.mark.parametrize("old", [False, True])
def test_an_adapter_that_fits_does_what_it_did_when_it_was_saved(home, tmp_path, options, old):
    """Also under the names of the transformers of its time."""
    saved = adapter_on(home / "model", **options).eval()
    with torch.no_grad():
        for name, x in saved.named_parameters():
            if x.requires_grad and "lora" not in name:
                x.mul_(1.5)
    saved.save_pretrained(tmp_path)
    if old:
        names = {
            "model.model.language_model.": "model.language_model.model.",
            "model.model.vision_tower.": "model.vision_tower.vision_model.",
        }

        def rename(name):
            new = next((new for new in names if name.startswith("base_model." + new)), None)
            return name.replace(new, names[new], 1) if new else name

        edit_weights(tmp_path / ADAPTER, lambda found: {rename(name): x for name, x in found.items()})
    batch = zoo.batch()
    with torch.no_grad():
        for model in (generate.load(home / "model", tmp_path, device="cpu")[0], family.load_model(tmp_path).eval()):
            assert torch.equal(model(**batch).logits, saved(**batch).logits)


LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=LANGUAGE, bias="all"),
        peft.LoraConfig(r=4, target_modules=LANGUAGE, trainable_token_indices=[4, 8]),
        peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
        peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=".*vision_tower.*", task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=LANGUAGE, modules_to_save=["lm_head", "embed_tokens"]),
        peft.IA3Config(target_modules=LANGUAGE, feedforward_modules=[]),
        peft.VBLoRAConfig(target_modules=LANGUAGE, vector_length=8, num_vectors=16, r=2),  # layers share a tensor
        peft.AdaLoraConfig(target_modules=LANGUAGE, total_step=3, tinit=1, tfinal=1),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_of_every_kind_load_whole(home, tmp_path, config):
    saved = peft.get_peft_model(family.load_model(home / "model"), config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in saved.parameters():
            if x.requires_grad:
                x.add_(0.1 * torch.randn(x.shape, generator=draw))
    saved.save_pretrained(tmp_path)
    batch = zoo.batch()
    with torch.no_grad():
        expected = saved(**batch).logits
        for model in (generate.load(home / "model", tmp_path, device="cpu")[0], family.load_model(tmp_path).eval()):
            assert torch.equal(model(**batch).logits, expected)
        assert not torch.allclose(expected, zoo.build("llava")(**batch).logits, atol=1e-2)
    family.meta_model(tmp_path)


def test_virtual_tokens_are_refused(home, tmp_path):
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", base_model_name_or_path="a")
    prompt.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING, whose virtual tokens"):
        generate.load(home / "model", tmp_path, device="cpu")


def test_an_adapter_of_another_base_is_told(home, adapter, copy, capfd):
    generate.load(home / "model", adapter, device="cpu")
    assert "was trained on" not in capfd.readouterr().err
    generate.load(copy, adapter, device="cpu")
    told = f"adapter {str(adapter)!r} was trained on {str(home / 'model')!r} and is put on {str(copy)!r}"
    assert told in capfd.readouterr().err


def test_an_adapter_in_the_place_of_a_model_says_how_to_give_both(home):
    with pytest.raises(ValueError, match="is a PEFT adapter: the model is .*model', and .* by --adapter"):
        generate.load(home / "adapter", device="cpu")


def test_an_adapter_without_its_base_is_refused(adapter):
    configured(base_model_name_or_path=None)(adapter)
    with pytest.raises(ValueError, match="does not name the base model"):
        family.load_model(adapter)


STEPS = dict(max_steps=2, save_strategy="steps", save_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_checkpoint_that_does_not_fit_is_not_resumed(tmp_path, rounds):
    def trainer():
        options = STEPS | {"rounds": rounds}
        return SeedTrainer(zoo.build("llava"), config(tmp_path, **options), train_dataset=Rows(zoo.batch(size=8)))

    trainer().train()
    checkpoint = tmp_path / ("round-2" if rounds > 1 else "") / "checkpoint-1"
    for file in checkpoint.rglob("[12a]*.safetensors"):  # the adapter, and what each round learned
        edit_weights(file, lambda found: {name.replace("q_proj", "z_proj"): x for name, x in found.items()})
    with pytest.raises(ValueError, match="fit nothing in LlavaForConditionalGeneration, e.g. .*z_proj"):
        trainer().train(resume_from_checkpoint=str(checkpoint))
    for file in checkpoint.rglob("[12a]*.safetensors"):
        cut(file.name, 60)(file.parent)
    with pytest.raises(ValueError, match="safetensors is damaged or cut"):
        trainer().train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "run.json"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(tmp_path, name):
    def trainer():
        return SeedTrainer(zoo.build("llava"), config(tmp_path, **STEPS), train_dataset=Rows(zoo.batch(size=8)))

    trainer().train()
    file = tmp_path / "run.json" if name == "run.json" else tmp_path / "checkpoint-1" / name
    cut(name, 40)(file.parent)
    with pytest.raises(ValueError, match=re.escape(name)):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_a_coupled_training_saved_is_restored_whole_or_not_at_all(home, tmp_path):
    for name, model in (("whole", zoo.build("llava")), ("adapter", adapter_on(home / "model"))):
        save_model(model, tmp_path / name)
        restore(model, tmp_path / name)
    edit_weights(tmp_path / "whole" / WEIGHTS, lambda found: dict(list(found.items())[1:]))
    fewer(tmp_path / "adapter")
    for name, model in (("whole", zoo.build("llava")), ("adapter", adapter_on(home / "model"))):
        with pytest.raises(ValueError, match="lacks 1 weights of LlavaForConditionalGeneration"):
            restore(model, tmp_path / name)


# templates

PARTS = zoo.CHAT.replace("MARK", "<image>")
TEXT = "{% for message in messages %}{{ message.role.upper() + ': ' + message.content.strip() + ' ' }}{% endfor %}"
PRINTED = "{% for message in messages %}{{ message.role | upper }}: {{ message.content }} {% endfor %}"
STRICT = "{% if messages[0].content is not string %}{{ raise_exception('text, please') }}{% endif %}" + TEXT
TEXTS = PARTS.replace("<image>", "")  # a list of parts, and images are left out
ASKED = {"parts": PARTS, "text": TEXT, "printed": PRINTED, "strict": STRICT, "texts": TEXTS}


@pytest.mark.parametrize("keeper", ["processor", "tokenizer"])
@pytest.mark.parametrize("form", ASKED)
def test_a_template_of_any_form_shows_question_image_and_answer(form, keeper):
    processor = zoo.processor()
    processor.chat_template = None
    (processor if keeper == "processor" else processor.tokenizer).chat_template = ASKED[form]
    (written,) = prompts(processor, ["cat ?"])
    # the template of the parts sets a space between them, the others get the line break that a mark gets
    assert written.split("ASSISTANT")[0] == {"parts": "USER: <image> cat ? "}.get(form, "USER: <image>\ncat ? ")
    said = answered(processor, "cat ?", written, "No")
    assert said.startswith(written.split("ASSISTANT")[0]) and said.count("No") == 1 and "'" not in said
    collator = QuestionCollator(processor, answers=True)
    batch = collator([{"image": zoo.picture(0), "text": "cat ?", "answer": "No"}])
    assert (batch["input_ids"] == zoo.IMAGE).sum() == zoo.PATCHES
    assert "no" in processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])


@pytest.mark.parametrize("where", ["jinja", "json", "tokenizer"])
def test_the_template_is_found_wherever_a_folder_keeps_it(copy, where):
    own = PARTS.replace("USER", "user").replace("ASSISTANT", "REPLY")
    (copy / "chat_template.jinja").unlink()
    if where == "jinja":
        (copy / "chat_template.jinja").write_text(own)
    elif where == "json":
        (copy / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    else:
        edit(copy / "tokenizer_config.json", lambda found: found | {"chat_template": own})
    _, processor = generate.load(copy, device="cpu")
    assert prompts(processor, ["cat ?"])[0].endswith("REPLY:")


def test_of_several_templates_the_default_is_taken_and_none_is_refused_by_name():
    for keeper in ("processor", "tokenizer"):
        processor = zoo.processor()
        processor.chat_template = None
        part = processor if keeper == "processor" else processor.tokenizer
        part.chat_template = {"rag": "no", "default": PARTS}
        assert prompts(processor, ["cat ?"]) == prompts(zoo.processor(), ["cat ?"])
        part.chat_template = {"rag": "no", "tools": PARTS}
        with pytest.raises(ValueError, match="has the chat templates rag, tools, and none of them is the default"):
            prompts(processor, ["cat ?"])


@pytest.mark.parametrize(
    ("mark", "words", "written"),
    [
        ("<|image_pad|>", ["<|vision_start|>", "<|vision_end|>"], "<|vision_start|><|image_pad|><|vision_end|>cat ?"),
        ("<|image|>", ["<|begin_of_image|>", "<|end_of_image|>"], "<|begin_of_image|><|image|><|end_of_image|>cat ?"),
        ("<|image|>", [], "<|image|>\ncat ?"),
        ("<image>", ["<|vision_start|>", "<|vision_end|>"], "<image>\ncat ?"),
    ],
)
def test_without_a_template_a_mark_stands_between_what_its_family_frames_it_with(mark, words, written):
    processor = zoo.processor()
    processor.chat_template = None
    processor.image_token = mark
    processor.tokenizer.add_tokens([mark, *words], special_tokens=True)
    assert prompts(processor, ["cat ?"]) == [written]
    processor.tokenizer.chat_template = TEXT
    assert prompts(processor, ["cat ?"]) == [f"USER: {written} "]


def test_that_there_is_no_template_is_told_once(capfd):
    processor = zoo.processor()
    processor.chat_template = None
    assert prompts(processor, ["cat ?"]) == prompts(processor, ["cat ?"]) == ["<image>\ncat ?"]
    told = "hkdfast: note: LlavaProcessor and its tokenizer have no chat template: the model is asked without one\n"
    assert capfd.readouterr().err == told


# the command


def ask(home, output, *options, model=None):
    paths = ["--model", model or home / "model", "--images", home / "images", "--questions", home / "questions.jsonl"]
    words = ["evaluate", "pope", *paths, "--output", output, "--device", "cpu", "--max-new-tokens", 1, *options]
    return cli.main(list(map(str, words)))


def refusal(capfd):
    shown = capfd.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("hkdfast: error: ")]
    assert len(lines) == 1 and "Traceback" not in shown, shown
    return lines[0]


@pytest.mark.parametrize("what", ["end cut", "shard", "config", "tower", "missing weight"])
def test_a_command_says_in_one_line_what_is_damaged(home, copy, tmp_path, capfd, what):
    change, told = DAMAGED[what]
    change(copy)
    assert ask(home, tmp_path / "out.json", model=copy) == 2
    assert re.search(told, refusal(capfd))
    words = ["seed", "--model", copy, "--images", home / "images", "--questions", home / "questions.jsonl"]
    assert cli.main(list(map(str, [*words, "--output", tmp_path / "out", "--use-cpu"]))) == 2
    assert re.search(told, refusal(capfd)) and not (tmp_path / "out").exists()
    with pytest.raises((ValueError, OSError), match=told):
        cli.main(["--debug", *map(str, [*words, "--output", tmp_path / "out", "--use-cpu"])])


def test_a_text_model_is_no_model_of_images(home, tmp_path, capfd):
    transformers.LlamaForCausalLM(zoo.llama()).save_pretrained(tmp_path / "text")
    zoo.tokenizer().save_pretrained(tmp_path / "text")
    assert ask(home, tmp_path / "out.json", model=tmp_path / "text") == 2
    assert "is a llama, a model of text alone" in refusal(capfd)


def test_a_lack_of_memory_is_told_in_one_line(home, tmp_path, capfd, monkeypatch):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator"),
    ):

        def full(*args, error=error, **others):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(generate, "generate_texts", full)
            assert ask(home, tmp_path / f"{type(error).__name__}.json") == 2
        assert "out of memory" in refusal(capfd)

    def broken(*args, **others):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(generate, "generate_texts", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):  # is not hidden
        ask(home, tmp_path / "ours.json")


OWN = """
import transformers
class OwnConfig(transformers.LlavaConfig):
    model_type = "{name}"
class Own(transformers.LlavaForConditionalGeneration):
    config_class = OwnConfig
transformers.AutoConfig.register("{name}", OwnConfig)
transformers.AutoModelForImageTextToText.register(OwnConfig, Own)
"""


def test_a_class_of_ones_own_is_registered_by_an_import(home, copy, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_llava.py").write_text(OWN.format(name="own_llava"))
    (tmp_path / "own_broken.py").write_text("1 / 0")
    edit(copy / "config.json", lambda found: found | {"model_type": "own_llava"})
    save_file(zoo.build("llava").state_dict(), copy / WEIGHTS, metadata={"format": "pt"})  # under the names of today
    assert ask(home, tmp_path / "out.json", model=copy) == 2
    assert "--import" in refusal(capfd)
    assert ask(home, tmp_path / "out.json", "--import", "own_broken", model=copy) == 2
    assert "--import own_broken: ZeroDivisionError: division by zero" in refusal(capfd)
    assert ask(home, tmp_path / "out.json", "--import", "own_nowhere", model=copy) == 2
    assert "--import own_nowhere: ModuleNotFoundError" in refusal(capfd)
    assert ask(home, tmp_path / "out.json", "--import", "own_llava", model=copy) == 0
    assert json.loads((tmp_path / "out.json").read_text())["sets"]


def test_devices_that_do_not_compute_are_refused_in_one_sentence(home, tmp_path, capfd):
    for device, told in (("meta", "'meta' has no data"), ("cuda:99", "no device 'cuda:99' here")):
        assert ask(home, tmp_path / "out.json", "--device", device) == 2
        assert told in (line := refusal(capfd)) and len(line) < 200


# batches


def test_a_batch_without_images_is_named():
    batch = zoo.batch()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="got input_ids, attention_mask alone"):
        noised(batch)


def test_images_in_a_list_go_where_the_model_is():
    from hkdfast.hf.choices import placed

    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    found = placed([torch.ones(2), [torch.ones(2)]], model)
    assert found[0].dtype == found[1][0].dtype == torch.bfloat16
