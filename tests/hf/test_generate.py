"""Models are asked and answer files are written: on a real, tiny LLaVA with random weights, built here."""

import json
import subprocess
import sys

import pytest
import torch

from hkdfast.data.generation import GenerationOptions
from hkdfast.evaluate.pope import Question, read_answers, read_questions

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
image = pytest.importorskip("PIL.Image")

import zoo  # noqa: E402

from hkdfast.hf import generate  # noqa: E402


def make_model(family):
    model = zoo.build(family, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and parameter.dim() > 1:
                parameter.mul_(2)  # so that answers depend on image and question and are not one word for all
        # a special token in an answer would vanish from its text, an image token would ask for an image
        model.get_output_embeddings().weight[[0, 1, *range(3, len(zoo.SPECIAL))]] = 0
    # what a checkpoint may bring along and a comparison must not inherit
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=2.0, top_k=2, num_beams=3)
    model.generation_config.eos_token_id = 2
    return model


def make_processor(family="llava"):
    processor = zoo.processor(family)
    processor.tokenizer.padding_side = "right"  # what a processor saved after training often says
    return processor


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with model/, adapter/, images/ and questions.json."""
    home = tmp_path_factory.mktemp("pope")
    make_processor().save_pretrained(home / "model")
    model = make_model("llava")
    model.save_pretrained(home / "model")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(home / "adapter")
    (home / "images").mkdir()
    for i in range(5):
        zoo.picture(i).save(home / f"images/{i}.png")
    texts = [
        "Is there a cat in the image?",
        "Is there a dog in the image?",
        "Is there a cow, a cat, a dog in the image ?",
    ]
    with (home / "questions.json").open("w") as file:
        for i in range(13):
            line = {"question_id": i, "image": f"{i % 5}.png", "text": texts[i % 3], "label": ["yes", "no"][i % 2]}
            file.write(json.dumps(line) + "\n")
    return home


@pytest.fixture(scope="module")
def loaded(home):
    return generate.load(home / "model", device="cpu")


@pytest.fixture(scope="module")
def questions(home):
    return read_questions(home / "questions.json", images=home / "images")


def ask(loaded, questions, home, path, **options):
    resume = options.pop("resume", False)
    decoding = GenerationOptions(**{"max_new_tokens": 5, "batch_size": 4} | options)
    return generate.answer_file(
        *loaded, questions, home / "images", path, decoding, name="tiny", resume=resume, progress=False
    )


def by_hand(model, processor, question, home, decoding):
    """Greedy answer to one question without padding, cache or generate()."""
    content = [{"type": "image"}, {"type": "text", "text": f"{question.text} {decoding.instruction}"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=generate.read_image(home / "images" / question.image), return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    for _ in range(decoding.max_new_tokens):
        with torch.no_grad():
            word = model(**inputs, use_cache=False).logits[0, -1].argmax()
        if word == 2:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], word.view(1, 1)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return processor.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_greedy_batches_equal_one_question_at_a_time_by_hand(family, questions, home, tmp_path):
    made = make_model(family), make_processor(family)
    found = ask(made, questions, home, tmp_path / "a.jsonl")
    decoding = GenerationOptions(max_new_tokens=5)
    assert found == [by_hand(*made, question, home, decoding) for question in questions]
    assert len(set(found)) > 3  # else equality would say little


def test_the_answer_depends_on_the_image(loaded, questions, home, tmp_path):
    one = [Question(i, f"{i}.png", "Is there a cat in the image?", "yes") for i in range(5)]
    assert len(set(ask(loaded, one, home, tmp_path / "a.jsonl"))) > 1


def test_the_file_is_in_the_official_format(loaded, questions, home, tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    found = ask(loaded, questions, home, path)
    assert read_answers(path, questions) == found
    line = json.loads(path.read_text().split("\n")[3])
    assert {**line, "metadata": None} == {
        "question_id": 3, "prompt": questions[3].text, "text": found[3], "model_id": "tiny", "image": "3.png",
        "metadata": None,
    }  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == ["a.jsonl"]


def test_draws_differ_and_repeat(loaded, questions, home, tmp_path):
    state = torch.get_rng_state()
    first = ask(loaded, questions, home, tmp_path / "a.jsonl", sample=True)
    assert torch.equal(state, torch.get_rng_state())
    assert first == ask(loaded, questions, home, tmp_path / "b.jsonl", sample=True)
    assert first != ask(loaded, questions, home, tmp_path / "c.jsonl", sample=True, draw=1)
    assert first != ask(loaded, questions, home, tmp_path / "d.jsonl", sample=True, seed=1)
    # nearly no temperature is greedy: temperature reaches the model, and the checkpoint's own settings do not
    cold = ask(loaded, questions, home, tmp_path / "e.jsonl", sample=True, temperature=1e-4)
    assert cold == ask(loaded, questions, home, tmp_path / "f.jsonl")


def test_sampling_draws_from_the_whole_vocabulary_at_the_temperature(loaded, home):
    model, processor = loaded
    picture, text = generate.read_image(home / "images/0.png"), "Is there a cat in the image?"
    with torch.no_grad():
        inputs = generate.encode(processor, [text], [picture])
        p = (model(**inputs).logits[0, -1] / 3).softmax(-1)
    n = 4000
    decoding = GenerationOptions(sample=True, temperature=3.0, max_new_tokens=1, batch_size=n)
    drawn = generate.generate_texts(model, processor, [text] * n, [picture] * n, decoding)
    words = processor.tokenizer.batch_decode(torch.arange(len(p)).view(-1, 1), skip_special_tokens=True)
    expected = {word: sum(p[i].item() for i, other in enumerate(words) if other == word) for word in set(words)}
    for word, share in expected.items():
        assert abs(drawn.count(word) / n - share) < 5 * (share * (1 - share) / n) ** 0.5 + 1e-3, word


def test_resume_gives_the_answers_of_an_uninterrupted_run(loaded, questions, home, tmp_path, monkeypatch):
    whole = ask(loaded, questions, home, tmp_path / "whole.jsonl", sample=True)
    plain, asked = generate.generate_texts, []

    def failing(model, processor, texts, images, decoding, number):
        if number == 2:
            raise RuntimeError("power cut")
        return plain(model, processor, texts, images, decoding, number)

    def counting(model, processor, texts, images, decoding, number):
        asked.append(number)
        return plain(model, processor, texts, images, decoding, number)

    path = tmp_path / "cut.jsonl"
    monkeypatch.setattr(generate, "generate_texts", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        ask(loaded, questions, home, path, sample=True)
    assert not path.exists()
    with (tmp_path / "cut.jsonl.partial").open("a") as file:
        file.write('{"question_id": 8, "prompt": "Is th')  # a line that the stop cut in two
    monkeypatch.setattr(generate, "generate_texts", counting)
    kept = (tmp_path / "cut.jsonl.partial").read_text().splitlines()[:-1]
    with monkeypatch.context() as at_once, pytest.raises(RuntimeError, match="power cut"):
        # a second stop, before the resumed run has asked anything, takes nothing away
        at_once.setattr(generate, "tqdm", lambda **_: (_ for _ in ()).throw(RuntimeError("power cut")))
        ask(loaded, questions, home, path, sample=True, resume=True)
    assert (tmp_path / "cut.jsonl.partial").read_text().splitlines() == kept
    assert ask(loaded, questions, home, path, sample=True, resume=True) == whole
    assert asked == [2, 3]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert ask(loaded, questions, home, path, sample=True, resume=True) == whole
    assert asked == [2, 3]
    # other settings are another run, and resumed as well: what is whole there does not hide what is partial
    monkeypatch.setattr(generate, "generate_texts", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        ask(loaded, questions, home, path, sample=True, temperature=0.5, resume=True)
    monkeypatch.setattr(generate, "generate_texts", counting)
    ask(loaded, questions, home, path, sample=True, temperature=0.5, resume=True)
    assert asked == [2, 3, 2, 3]


def test_without_a_chat_template_the_image_token_comes_first(loaded, home):
    processor = make_processor()
    processor.chat_template = None
    assert generate.prompts(processor, ["Is there a cat?"]) == ["<image>\nIs there a cat?"]
    inputs = generate.encode(processor, ["Is there a cat?", "cat ?"], [generate.read_image(home / "images/0.png")] * 2)
    assert (inputs["input_ids"] == zoo.IMAGE).sum(1).tolist() == [zoo.PATCHES] * 2
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert inputs["attention_mask"][1, 0] == 0  # padded on the left
    assert processor.tokenizer.padding_side == "right"


def test_a_template_that_writes_the_first_token_gets_no_second_one(home):
    processor = make_processor()
    processor.chat_template = "<s>" + processor.chat_template
    inputs = generate.encode(processor, ["cat ?"], [generate.read_image(home / "images/0.png")])
    assert (inputs["input_ids"] == 1).sum() == 1


def test_the_models_own_generation_config_is_left_as_it_was(loaded, questions, home, tmp_path):
    before = loaded[0].generation_config.to_dict()
    ask(loaded, questions[:2], home, tmp_path / "a.jsonl")
    assert loaded[0].generation_config.to_dict() == before
    assert before["repetition_penalty"] == 5.0


def test_a_broken_image_is_named(tmp_path):
    whole = tmp_path / "whole.png"
    image.frombytes("RGB", (64, 64), torch.randint(256, (64 * 64 * 3,), dtype=torch.uint8).numpy().tobytes()).save(
        whole
    )
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=name):
            generate.check_images([Question(0, "whole.png", "?", None), Question(1, name, "?", None)], tmp_path, False)
    generate.check_images([Question(0, "whole.png", "?", None)], tmp_path, False)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"temperature": float("nan")}, {"max_new_tokens": 0}, {"batch_size": 0}]
)
def test_decoding_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GenerationOptions(**wrong)


def test_load_refuses(home, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        generate.load(home / "model", tmp_path)
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    transformers.LlamaConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="is a llama, a model of text alone"):
        generate.load(tmp_path / "text")


def hkdfast(*args):
    return subprocess.run(
        [sys.executable, "-m", "hkdfast", *map(str, args)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_asks_a_model_with_and_without_its_adapter(home, tmp_path):
    options = [
        "--model",
        home / "model",
        "--adapter",
        home / "adapter",
        "--base",
        "--questions",
        home / "questions.json",
    ]
    options += ["--images", home / "images", "--sample", "--draws", 2, "--max-new-tokens", 3, "--resamples", 200]
    done = hkdfast("evaluate", "pope", *options, "--output", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "scores.json").read_text())
    found = report["sets"]["questions"]
    assert len(found["draws"]) == len(found["against"]["draws"]) == 2
    assert report["difference"]["f1"]["pairs"] == 2
    names = sorted(file.name for file in (tmp_path / "scores.answers").iterdir())
    assert names == [f"questions{kind}.{draw}.jsonl" for kind in ("", ".base") for draw in (0, 1)]
    texts = [
        read_answers(tmp_path / "scores.answers" / name, read_questions(home / "questions.json")) for name in names
    ]
    assert len(set(map(tuple, texts))) == 4  # adapter and draws matter
    # the answers score again to the same numbers
    files = [tmp_path / "scores.answers" / name for name in names]
    again = hkdfast(
        "evaluate", "pope", "--questions", home / "questions.json", "--answers", *files[:2], "--against", *files[2:],
        "--resamples", 200, "--output", tmp_path / "again.json",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert json.loads((tmp_path / "again.json").read_text())["sets"] == report["sets"]


@pytest.mark.slow
def test_the_command_refuses_a_broken_image_before_the_model_is_loaded(home, tmp_path):
    (tmp_path / "0.png").write_text("not an image")
    (tmp_path / "q.json").write_text('{"question_id": 0, "image": "0.png", "text": "Is there a cat?", "label": "yes"}')
    done = hkdfast(
        "evaluate", "pope", "--model", tmp_path / "none", "--questions", tmp_path / "q.json", "--images", tmp_path,
        "--output", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("hkdfast: error: image ")
    assert "0.png" in done.stderr
    assert not (tmp_path / "out.json").exists()
