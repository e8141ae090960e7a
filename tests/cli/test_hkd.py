"""hkdfast hkd from files to scores: both tracks, adapters, a killed run, bad input."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import weakref

import peft
import pytest
import torch
import transformers as hf
import zoo
from coupled_models import sized
from safetensors.torch import load_file, save_file
from zoo import one_thread  # noqa: F401

from hkdfast import cli
from hkdfast.cli import hkd as hkd_command
from hkdfast.cli.hkd import EpochConcatDataset, examples, product, questions
from hkdfast.data.challenge import write
from hkdfast.data.tasks import NONE, TASKS
from hkdfast.evaluate.choices import Record
from hkdfast.hf.coupled import CoupledTrainer

WORDS = (*"bcd.,", "claim", "context", "caption", "true", "false", "partially", "not", "verifiable", "letter", "red")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders of three models, images, and questions of both tasks with and without answers."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "WORDS", zoo.WORDS + WORDS)
        for place, name in enumerate(("large", "medium", "small")):
            sized(place).save_pretrained(home / name)
            zoo.processor().save_pretrained(home / name)
    (home / "images").mkdir()
    for i in range(4):
        zoo.picture(i).save(home / f"images/{i}.png")
    phrases = ("a cat", "one dog", "the cow"), ("a word", "the dog", "no cat")
    captions = [
        Record(
            "hallucination", f"{i % 4}.png", ", ".join(phrases[i % 2]), "", "?", (*phrases[i % 2], NONE),
            "ABCD"[i % 4], f"c{i}",
        )
        for i in range(6)
    ]  # fmt: skip
    claims = [
        Record("factcheck", f"{i % 4}.png", "a red cat", "one cow", "?", TASKS["factcheck"].options, "ABCD"[i % 4], i)
        for i in range(6)
    ]
    for name, records in (("captions", captions), ("claims", claims)):
        write(home / f"{name}.json", records)
        write(home / f"{name}-bare.json", [Record(**vars(one) | {"answer": None}) for one in records[:4]])
    return home


FEW = ("--use-cpu", "--per-device-train-batch-size", "3", "--logging-steps", "1", "--learning-rate", "1e-3")


def hkd(home, output, *options, data="captions.json", task="hallucination", models=("large", "medium", "small")):
    paths = ["--models", *(str(home / name) for name in models), "--images", str(home / "images")]
    paths += ["--data", str(home / data), "--output", str(output), "--task", task]
    return cli.main(["hkd", *paths, *FEW, *map(str, options)])


def scores(output):
    found = json.loads((output / "scores.json").read_text())
    (answers,) = (output / "scores.answers").glob("*.json")
    return found, json.loads(answers.read_text())


def weights(folder):
    return hf.LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_a_track_from_files_to_scores(home, tmp_path, capfd, monkeypatch):
    made, asking = [], hkd_command.choices.run

    class Seen(hkd_command.TernaryTrainer):
        def __init__(self, *args, **others):
            super().__init__(*args, **others)
            made.extend(weakref.ref(each) for each in (self, *self.model.models.values()))

    def ask(args):
        assert len(made) == 4 and not any(ref() for ref in made)  # the student that answers is loaded into room
        asking(args)

    monkeypatch.setattr(hkd_command, "TernaryTrainer", Seen)
    monkeypatch.setattr(hkd_command.choices, "run", ask)
    more = ("--unlabeled", home / "captions-bare.json", "--rewrites", 1, "--dev", home / "captions.json")
    augment = ("--augment", "shuffle", "flip", "crop", "color", "paraphrase", "--stage-epochs", 1, 2)
    assert hkd(home, tmp_path / "out", *more, *augment) == 0
    shown = capfd.readouterr()
    for title in ("stage 1 of 3", "stage 2 of 3", "stage 3 of 3, refinement"):
        assert title in shown.out
    assert "ternary/student" in shown.out and "micro_f1" in shown.out
    found, answers = scores(tmp_path / "out")
    (found,) = found["sets"].values()
    assert found["mean"]["questions"] == 6 and "shift" in found
    assert [one["question_id"] for one in answers] == [f"c{i}" for i in range(6)]
    assert all(one["choice"] in "ABCD" for one in answers)
    out = tmp_path / "out"
    before, stage, after = (
        weights(folder) for folder in (home / "small", out / "pyramid/stage-2/student", out / "ternary/student")
    )
    name = "lm_head.weight"
    assert not torch.equal(before[name], stage[name]) and not torch.equal(stage[name], after[name])
    history = json.loads((out / "ternary/done.json").read_text())["history"]
    assert "student_divergence_teacher2" in history[0]
    steps = [json.loads((out / f"pyramid/stage-{k}/done.json").read_text())["history"][-1]["step"] for k in (1, 2)]
    assert steps == [6, 12]  # sixteen examples by three, once and twice


@pytest.mark.slow
def test_adapters_on_the_other_track(home, tmp_path, capfd):
    options = ("--lora-r", 4, "--form", "one_pair", "--dev", home / "claims.json", "--learning-rates", 1e-3, 1e-2)
    options += ("--hard-weight", 0.5, 2.0)
    assert hkd(home, tmp_path / "out", *options, data="claims.json", task="factcheck", models=("large", "small")) == 0
    adapter = tmp_path / "out/ternary/student"
    assert peft.PeftConfig.from_pretrained(adapter).base_model_name_or_path == str(home / "small")
    found, _ = scores(tmp_path / "out")
    assert (found["model"], found["adapter"]) == (str(home / "small"), str(adapter))
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert [run[part]["hard_weight"] for part in ("stage 1", "ternary")] == [[0.5, 2.0]] * 2
    entry = json.loads((tmp_path / "out/ternary/done.json").read_text())["history"][0]
    assert entry["learning_rate"] == 1e-2
    terms = (
        2.0 * entry["student_cross_entropy"],
        *(entry[f"student_divergence_{way}_kl"] for way in ("forward", "reverse")),
    )
    assert entry["loss"] == pytest.approx(sum(terms), rel=1e-4)


@pytest.mark.slow
def test_every_model_gets_the_attention(home, tmp_path, monkeypatch):
    found = []
    for module in ("pyramid", "ternary"):
        plain = importlib.import_module(f"hkdfast.hf.{module}").set_attention

        def recorded(model, name, plain=plain):
            plain(model, name)
            found.append(model.config._attn_implementation)

        monkeypatch.setattr(f"hkdfast.hf.{module}.set_attention", recorded)
    assert hkd(home, tmp_path / "out", "--attn-implementation", "eager", "--max-steps", 1) == 0
    assert set(found) == {"eager"} and len(found) >= 7  # in two stages of two, and of three in the refinement


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A run that nobody stops, and its options."""
    folder = tmp_path_factory.mktemp("whole")
    options = ("--dev", home / "captions.json", "--save-steps", 1)
    assert hkd(home, folder / "out", *options) == 0
    return folder / "out", options


@pytest.mark.slow
@pytest.mark.parametrize("where", ["stage 2", "ternary", "answers"])
def test_a_killed_run_resumes_without_losing_a_stage(home, whole, tmp_path, monkeypatch, where):
    (whole, options), part = whole, tmp_path / "part"

    def kill(*args, **others):
        raise Killed

    with monkeypatch.context() as patch:
        if where == "answers":
            patch.setattr(hkd_command.choices, "run", kill)
        else:
            saving = CoupledTrainer._save_checkpoint

            def save(trainer, *args):
                saving(trainer, *args)
                if trainer.log_extra.get("stage") == (2 if where == "stage 2" else None):
                    raise Killed

            patch.setattr(CoupledTrainer, "_save_checkpoint", save)
        with pytest.raises(Killed):
            hkd(home, part, *options)
    stamps = {each: each.stat().st_mtime_ns for each in part.glob("*/**/done.json")}
    assert len(stamps) == {"stage 2": 1, "ternary": 2, "answers": 3}[where]
    assert hkd(home, part, *options) == 2  # not without being told
    assert hkd(home, part, *options, "--resume") == 0
    assert all(each.stat().st_mtime_ns == stamp for each, stamp in stamps.items())
    assert not list(part.glob("*/**/checkpoint-*"))
    ours, theirs = (weights(folder / "ternary/student") for folder in (part, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert scores(part)[1] == scores(whole)[1]


def test_another_run_is_not_resumed(home, whole, tmp_path, capsys):
    (whole, options), part = whole, tmp_path / "part"
    shutil.copytree(whole, part)
    before = {each: each.stat().st_mtime_ns for each in part.rglob("*")}
    lines = json.loads((home / "captions.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(lines[:5]))
    cases = [
        (dict(models=("large", "small", "medium")), (), "models was"),
        (dict(data=tmp_path / "fewer.json"), (), "data was 'sha256 "),
        ({}, ("--temperature", 2), "stage 1, temperature was 1.0 and is 2.0 now"),
        (
            {},
            ("--learning-rates", 1e-3, 1e-3, 1e-4),
            "stage 2, learning_rates was [0.001, 0.001] and is [0.001, 0.0001]",
        ),
        ({}, ("--refine-epochs", 3), "ternary, num_train_epochs was 1.0 and is 3.0 now"),
        ({}, ("--augment", "flip"), "augment was ['shuffle'] and is ['flip'] now"),
    ]
    for paths, more, told in cases:
        assert hkd(home, part, *options, *more, "--resume", **paths) == 2, told
        assert told in capsys.readouterr().err
    assert {each: each.stat().st_mtime_ns for each in part.rglob("*")} == before


def test_other_swaps_are_another_run(home, whole, tmp_path, capsys):
    (whole, options), part = whole, tmp_path / "part"
    shutil.copytree(whole, part)
    manifest = json.loads((part / "run.json").read_text())
    assert manifest["swaps"] is None
    (part / "run.json").write_text(json.dumps(manifest | {"swaps": "sha256 0"}))
    assert hkd(home, part, *options, "--resume") == 2
    assert "swaps was 'sha256 0' and is None now" in capsys.readouterr().err


def test_letters_that_a_tokenizer_does_not_know_are_told_before_training(home, tmp_path, capsys, monkeypatch):
    models = ("large", "medium", "small")
    monkeypatch.setattr(zoo, "WORDS", zoo.WORDS + tuple(word for word in WORDS if word not in "cd"))
    for name in models:
        shutil.copytree(home / name, tmp_path / name)
        zoo.processor().save_pretrained(tmp_path / name)
    assert hkd(home, tmp_path / "out", data="claims.json", task="factcheck", models=[tmp_path / n for n in models]) == 2
    assert "same tokens" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_phrase_of_a_rewrite_says_that_there_is_none(home, tmp_path, monkeypatch):
    lines = json.loads((home / "captions.json").read_text())
    loud = json.loads(json.dumps(lines).replace(NONE, NONE.upper()))
    (tmp_path / "loud.json").write_text(json.dumps(loud))
    offered = []
    monkeypatch.setattr(
        hkd_command, "RewriteStatement", lambda phrases: offered.append(phrases) or hkd_command.AUGMENT["flip"]
    )
    paths = ["--data", tmp_path / "loud.json", "--images", home / "images", "--models", "a", "b", "--output", "c"]
    args = cli.make_parser(["hkd"]).parse_args(["hkd", *map(str, paths), "--task", "hallucination", "--rewrites", "1"])
    examples(args, questions(args))
    assert offered == [["a cat", "a word", "no cat", "one dog", "the cow", "the dog"]]


def test_claims_are_rewritten_by_the_swaps_of_a_file(home, tmp_path):
    (tmp_path / "swaps.json").write_text('{"cat": ["dog", "horse"], "cow": ["bull"]}')
    paths = ["--data", home / "claims.json", "--images", home / "images", "--models", "a", "b", "--output", "c"]
    words = ["hkd", *map(str, paths), "--task", "factcheck", "--rewrites", "2", "--swaps", str(tmp_path / "swaps.json")]
    args = cli.make_parser(["hkd"]).parse_args(words)
    data = examples(args, questions(args))
    made = [data[i] for i in range(18)]
    assert {one["statement"] for one in made[:6]} == {"a red cat"} and {one["answer"] for one in made[6:]} == {None}
    assert {one["statement"] for one in made[6:]} == {"a red dog", "a red horse"}
    assert {one["context"] for one in made} == {"one cow"}  # claims change, what is known of the image does not


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["hkd", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    parser = cli.make_parser(["hkd"])._subparsers._group_actions[0].choices["hkd"]
    for action in parser._actions[1:]:
        assert action.help and action.option_strings[0] in text
        if not action.required and action.default and action.nargs != 0:
            shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
            assert f"(default: {shown})" in text


def test_each_refined_model_is_the_pyramids_product(tmp_path):
    for folder in ("stage-1/student", "stage-2/teacher", "stage-2/student"):
        (tmp_path / folder).mkdir(parents=True)
    found = [product(["a", "b", "c"], tmp_path, place) for place in range(3)]
    assert found == ["a", *(str(tmp_path / folder) for folder in ("stage-2/teacher", "stage-2/student"))]


def test_examples_change_with_the_epoch(home):
    parser = cli.make_parser(["hkd"])
    paths = ["--data", home / "captions.json", "--images", home / "images", "--models", "a", "b", "--output", "c"]
    args = parser.parse_args(["hkd", *map(str, paths), "--task", "hallucination", "--rewrites", "2"])
    data = examples(args, questions(args))
    assert isinstance(data, EpochConcatDataset) and len(data) == 18
    first = [data[i]["text"] for i in range(18)]
    assert [data[i]["text"] for i in range(18)] == first
    data.set_epoch(1)
    assert [data[i]["text"] for i in range(18)] != first
    assert [data[i]["answer"] is None for i in range(18)] == [False] * 6 + [True] * 12  # the rewrites


def test_bad_input_is_told_before_anything_is_written(home, tmp_path, capsys):
    lines = json.loads((home / "captions.json").read_text())
    del lines[3]["correct_choice"]
    (tmp_path / "bare.json").write_text(json.dumps(lines))
    (tmp_path / "odd.json").write_text('{"dog": ["cow"], "cat": "dog"}')
    shutil.copytree(home / "images", tmp_path / "corrupt")
    (tmp_path / "corrupt/3.png").write_bytes((home / "images/3.png").read_bytes()[:200])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    zoo.processor().save_pretrained(shutil.copytree(home / "small", tmp_path / "other"))
    hf.LlamaForCausalLM(zoo.llama()).save_pretrained(tmp_path / "text")
    shutil.copytree(home / "small", tmp_path / "half")
    half = load_file(tmp_path / "half/model.safetensors")
    save_file(dict(list(half.items())[1:]), tmp_path / "half/model.safetensors", metadata={"format": "pt"})
    cases = [
        (dict(models=("large",)), (), "at least two"),
        (dict(models=("large", "small")), (), "--form one_pair"),
        (dict(models=("large", "medium", tmp_path / "other")), (), "tokenizers"),
        (dict(models=("large", "medium", "nowhere")), (), "nowhere"),
        (dict(models=("large", "medium", tmp_path / "text")), (), "is a llama, a model of text alone"),
        (dict(models=("large", "medium", tmp_path / "half")), (), "lacks 1 weights"),
        ({}, ("--import", "no_such_module"), "--import no_such_module: ModuleNotFoundError"),
        (dict(data=tmp_path / "bare.json"), (), "entry 4"),
        (dict(data="none.json"), (), "none.json"),
        ({}, ("--images", tmp_path / "corrupt"), "3.png"),
        ({}, ("--unlabeled", tmp_path / "none.json"), "none.json"),
        ({}, ("--dev", tmp_path / "bare.json"), "1 of 6 questions have no answer"),
        ({}, ("--stage-weights", "-1"), "stage_weights"),
        ({}, ("--teacher-weights", "1", "1", "1"), "teacher1, teacher2"),
        ({}, ("--temperature", "0"), "temperature"),
        ({}, ("--rewrites", "-1"), "--rewrites"),
        (dict(data="claims.json", task="factcheck"), ("--rewrites", "1"), "--swaps"),
        ({}, ("--rewrites", "1", "--swaps", tmp_path / "none.json"), "none.json"),
        ({}, ("--rewrites", "1", "--swaps", tmp_path / "bare.json"), "expected an object"),
        ({}, ("--rewrites", "1", "--swaps", tmp_path / "odd.json"), "alternatives of 'cat' are 'dog'"),
        ({}, ("--swaps", tmp_path / "odd.json"), "no effect with --rewrites 0"),
        ({}, ("--template", "9"), "template 9"),
        ({}, ("--dev", home / "captions.json", "--shifts", "99"), "shifts is 99"),
    ]
    for paths, options, told in cases:
        assert hkd(home, tmp_path / "out", *options, **paths) == 2, (paths, options)
        assert told in capsys.readouterr().err, (paths, options, told)
        assert not (tmp_path / "out").exists(), (paths, options)
    assert hkd(home, tmp_path / "full") == 2
    assert "full" in capsys.readouterr().err and (tmp_path / "full/file").read_text() == "mine"


@pytest.mark.slow
def test_a_stopped_chain_says_what_it_kept(home, tmp_path, monkeypatch, capfd):
    saving, out = CoupledTrainer._save_checkpoint, tmp_path / "out"

    def save(trainer, *args):
        saving(trainer, *args)
        if trainer.log_extra.get("stage") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(CoupledTrainer, "_save_checkpoint", save)
        assert hkd(home, out, "--save-steps", "1") == 130
    *_, told, pasted = capfd.readouterr().err.splitlines()
    kept = "pyramid/stage-1, finished, pyramid/stage-2/checkpoint-1"
    assert told == f"hkdfast: stopped, kept in {out}: {kept}. To continue:"
    assert cli.main(shlex.split(pasted)[3:]) == 0
    assert (out / "ternary/student/model.safetensors").is_file()


def test_an_output_that_cannot_be_written_is_told_before_the_work(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hkd_command, "questions", lambda _: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    for output, where in ((tmp_path / "file/out", tmp_path / "file"), ("/proc/hkdfast/out", "/proc")):
        assert hkd(home, output) == 2
        assert f"--output {output} cannot be written: {where}: " in capsys.readouterr().err


def test_a_disk_without_room_is_told_before_the_first_step(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    monkeypatch.setattr(CoupledTrainer, "training_step", lambda *_: pytest.fail("a step was made"))
    assert hkd(home, tmp_path / "out") == 2
    assert re.search(r"a checkpoint takes \d+ MiB, 0 MiB are free", capsys.readouterr().err)
