"""hkdfast distill from files to a student: text, messages, questions about images, several teachers, bad input."""

import json
import re
import shutil
import sys

import peft
import pytest
import torch
import transformers as hf
import zoo
from trainers import CHAT, language_model
from zoo import one_thread  # noqa: F401

from hkdfast import cli
from hkdfast.hf import run_state
from hkdfast.hf.progress import WIDTH

PROMPTS = ("is there a cat", "a dog in the image ?", "is the cow", "yes no one word is there a")
FEW = ("--use-cpu", "--per-device-train-batch-size", "3", "--logging-steps", "1", "--learning-rate", "1e-3")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(form, count=12):
    """Examples of text in one of their forms."""
    made = []
    for number in range(count):
        prompt, answer = PROMPTS[number % 4], "yes the cat " * (1 + number % 3)
        made.append(
            {
                "text": {"text": f"{prompt} {answer}"},
                "prompt": {"prompt": prompt, "completion": None if number % 4 == 3 else f" {answer}"},
                "messages": {
                    "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                },
            }[form]
        )
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders of models, and files of examples."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    words = zoo.tokenizer()
    words.chat_template = CHAT
    for name, model in (
        ("student", language_model(0)),
        ("teacher", language_model(1, 48)),
        ("other", language_model(2)),
    ):
        model.save_pretrained(home / name)
        words.save_pretrained(home / name)
    for form in ("text", "prompt", "messages"):
        lines(home / f"{form}.jsonl", rows_of(form))
    lines(home / "named.jsonl", [row | {"teacher_id": "ab"[n % 2]} for n, row in enumerate(rows_of("prompt"))])
    (home / "images").mkdir()
    for number in range(4):
        zoo.picture(number).save(home / f"images/{number}.png")
    for seed, name in enumerate(("vlm", "vlm-teacher")):
        zoo.build("llava", seed).save_pretrained(home / name)
        zoo.processor().save_pretrained(home / name)
    asked = [{"image": f"{n % 4}.png", "text": "is there a cat ?", "answer": ("yes", "no")[n % 2]} for n in range(6)]
    del asked[5]["answer"]  # the teacher gives it
    lines(home / "questions.jsonl", asked)
    return home


def distill(home, output, *options, model="student", teacher=("teacher",), data="text.jsonl", few=FEW):
    paths = ["--model", home / model, "--teacher", *(home / one if "=" not in str(one) else one for one in teacher)]
    words = [*paths, "--data", home / data, "--output", output, *few, *options]
    return cli.main(["distill", *map(str, words)])


def history(output):
    return [entry for entry in json.loads((output / run_state.DONE).read_text())["history"] if "loss" in entry]


def test_a_text_file_becomes_a_student(home, tmp_path, capfd):
    out = tmp_path / "out"
    options = ("--dev", home / "messages.jsonl", "--num-train-epochs", "8", "--divergence", "reverse_kl")
    assert distill(home, out, *options) == 0
    shown = capfd.readouterr()
    assert shown.err == ""  # no bar in a file, no warning of a library
    assert all(len(line) <= WIDTH or line.startswith("The student is in") for line in shown.out.splitlines())
    said = re.search(r"3 examples, (\d+) positions, (\d+) with a loss. The loss takes ([\d.]+) KiB", shown.out)
    assert said and int(said[1]) > int(said[2]) > 0 and float(said[3]) > 0
    table = dict(re.findall(r"^(loss|divergence|agreement) +([\d.]+ +[\d.]+)$", shown.out, re.M))
    before, after = map(float, table["divergence"].split())
    assert after < before
    assert f"from {before:.3g}"[:8] in shown.out and "most likely token" in shown.out
    assert len(history(out)) == 32  # twelve examples by three, eight times
    student = hf.AutoModelForCausalLM.from_pretrained(out)
    assert len(hf.AutoTokenizer.from_pretrained(out)) > 20
    start = hf.AutoModelForCausalLM.from_pretrained(home / "student")
    assert not torch.equal(student.lm_head.weight, start.lm_head.weight)


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_every_form_of_text_gives_an_adapter_of_self_distillation(home, tmp_path, form, capfd):
    out = tmp_path / "out"
    options = ("--teacher", "self", "--lora-r", "4", "--hard-weight", "0.5", "--max-steps", "2")
    assert distill(home, out, *options, data=f"{form}.jsonl") == 0, capfd.readouterr().err
    config = peft.PeftConfig.from_pretrained(out)
    assert config.base_model_name_or_path == str(home / "student")
    assert history(out)[0]["divergence"] == pytest.approx(0, abs=1e-6)  # an adapter begins as nothing
    assert "--dev measures it on other examples" in capfd.readouterr().out


def test_each_example_has_its_teacher(home, tmp_path, capfd):
    out = tmp_path / "out"
    teachers = (f"a={home / 'teacher'}", f"b={home / 'other'}")
    assert distill(home, out, teacher=teachers, data="named.jsonl") == 0, capfd.readouterr().err
    assert {"divergence_a", "divergence_b"} <= set(history(out)[0])
    run = json.loads((out / run_state.RUN).read_text())
    assert run["teachers"] == {"a": str(home / "teacher"), "b": str(home / "other")}


def test_questions_about_images(home, tmp_path, capfd):
    out = tmp_path / "out"
    options = ("--images", home / "images", "--instruction", "one word", "--dev", home / "questions.jsonl")
    assert distill(home, out, *options, model="vlm", teacher=("vlm-teacher",), data="questions.jsonl") == 0
    assert "agreement" in capfd.readouterr().out
    hf.AutoModelForImageTextToText.from_pretrained(out), hf.AutoProcessor.from_pretrained(out)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_a_dataset_folder(home, tmp_path, saved, capfd):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "data"
    if saved:
        datasets.Dataset.from_list(rows_of("prompt")).save_to_disk(str(folder))
    else:
        folder.mkdir()
        shutil.copy(home / "prompt.jsonl", folder / "train.jsonl")
    assert distill(home, tmp_path / "out", "--max-steps", "2", data=folder) == 0, capfd.readouterr().err
    assert distill(home, tmp_path / "file", "--max-steps", "2", data="prompt.jsonl") == 0
    assert [e["loss"] for e in history(tmp_path / "out")] == [e["loss"] for e in history(tmp_path / "file")]


def test_images_of_a_dataset_need_no_folder(home, tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": zoo.picture(n % 4), "text": "is there a cat ?", "answer": ("yes", None)[n % 2]} for n in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    done = distill(home, tmp_path / "out", model="vlm", teacher=("vlm-teacher",), data=tmp_path / "data")
    assert done == 0, capfd.readouterr().err


def test_resumed_to_the_same_student(home, tmp_path, capfd):
    options = ("--save-steps", "2", "--max-steps", "4", "--dev", home / "text.jsonl")
    assert distill(home, tmp_path / "whole", *options) == 0
    whole = capfd.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part/model.safetensors").unlink()
    state = tmp_path / "part/checkpoint-4"
    assert distill(home, tmp_path / "part", *options) == 2
    assert "--resume" in capfd.readouterr().err
    assert state.is_dir() and distill(home, tmp_path / "part", *options, "--resume") == 0
    again = capfd.readouterr().out
    table = "\n".join(line for line in whole.splitlines() if line.startswith(("divergence", "loss")))
    assert table and table in again.replace("\n\n", "\n")
    one, two = (hf.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert distill(home, tmp_path / "part", *options, "--resume", "--temperature", "2") == 2
    assert "temperature was 1.0 and is 2.0 now" in capfd.readouterr().err


def broken(home, row, number=2):
    """A copy of the text file with another row in this line."""
    rows = rows_of("text", 3)
    rows[number - 1] = row
    lines(home / "broken.jsonl", rows)
    return {"data": "broken.jsonl"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": "a"}, r"broken.jsonl:2 has only texts, expected one of text, prompt and completion, messages"),
        ({"text": 3}, r"broken.jsonl:2: text is 3, expected a text"),
        ({"prompt": "is there"}, "broken.jsonl:2 has a prompt without completion"),
        ({"messages": [{"role": "user", "content": "a"}]}, "broken.jsonl:2 has no turn of the assistant"),
        ({"text": "a", "teacher_id": "x"}, "broken.jsonl:2: teacher_id is 'x', but --teacher is one"),
    ],
)
def test_a_wrong_example_is_named_by_its_line(home, tmp_path, capfd, monkeypatch, row, message):
    monkeypatch.setattr("hkdfast.cli.distill.DistillTrainer", None)
    assert distill(home, tmp_path / "out", **broken(home, row)) == 2
    assert re.search(message, " ".join(capfd.readouterr().err.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        (("--teacher", "self"), {}, "--teacher self is the model without its adapter: set --lora-r"),
        (("--teacher", "a", "b"), {}, "--teacher a: several teachers are given as NAME=PATH"),
        (("--teacher", "a=x", "a=y"), {}, "--teacher names 'a' twice"),
        (("--teacher", "a=x", "c=y"), {"data": "named.jsonl"}, "teacher_id is 'b', expected one of a, c"),
        (("--images", "images"), {}, "--images is for questions about images"),
        ((), {"model": "vlm", "teacher": ("vlm-teacher",), "data": "questions.jsonl"}, "name the folder of the images"),
        (("--images", "images"), {"data": "questions.jsonl"}, "takes text only"),
        (("--max-length", "1"), {}, "max_length must be at least 2 tokens, got 1"),
        (("--max-length", "2"), {"data": "prompt.jsonl"}, "the first 2 tokens of its prompt leave nothing"),
        ((), {"data": "nothing.jsonl"}, "nothing.jsonl"),
        (("--max-length", "9", "--images", "images"), {"data": "questions.jsonl"}, "--max-length truncates text"),
    ],
)
def test_wrong_options_are_named(home, tmp_path, capfd, monkeypatch, options, how, message):
    monkeypatch.chdir(home)
    assert distill(home, tmp_path / "out", *options, **how) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_differ_are_named(home, tmp_path, capfd):
    words = zoo.tokenizer()
    words.add_tokens(["extra"])
    shutil.copytree(home / "other", tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    assert distill(home, tmp_path / "out", teacher=(tmp_path / "other",)) == 2
    assert "differ in 1 of" in capfd.readouterr().err


def test_a_folder_without_datasets_names_the_package(home, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert distill(home, tmp_path / "out", data="images") == 2
    assert "datasets" in capfd.readouterr().err
