"""What a person sees and keeps of hkdfast seed and hkdfast hkd: progress, checkpoints, paths, stops, full disks."""

import argparse
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import peft
import pytest
import torch
import zoo
from safetensors.torch import load_file
from test_rounds import FEW, home, seed  # noqa: F401
from transformers import LlavaForConditionalGeneration
from zoo import Rows, config, one_thread  # noqa: F401

from hkdfast import cli, shell
from hkdfast.cli import hkd
from hkdfast.hf import SeedTrainer, generate, run_state
from hkdfast.hf.family import prepare_for_training
from hkdfast.hf.progress import WIDTH, Progress, line

ROUNDS = (*FEW, "--rounds", "2", "--save-steps", "1", "--learning-rate", "0.01")


def command_of(home, output, *options):  # noqa: F811
    paths = ["--model", home / "model", "--images", home / "images", "--questions", home / "questions.jsonl"]
    words = ["seed", *map(str, paths), "--output", str(output), "--use-cpu", *options]
    return [sys.executable, "-m", "hkdfast", *words]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):  # noqa: F811
    """A run of two rounds that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert seed(home, folder, *ROUNDS) == 0
    return folder


# progress


@pytest.mark.slow
def test_a_log_file_has_short_lines_and_nothing_else(home, tmp_path):  # noqa: F811
    done = subprocess.run(
        command_of(home, tmp_path / "out", *ROUNDS), capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stderr == ""  # no bar, no warning of a library
    *lines, where, hint, pasted = done.stdout.splitlines()
    assert where == f"The adapter is in {tmp_path / 'out'}." and len(hint) <= WIDTH and "evaluate pope" in pasted
    assert all(len(line) <= WIDTH for line in lines) and "{" not in done.stdout and "\r" not in done.stdout
    steps = [line for line in lines if ", step " in line]
    place = r"round {} of 2, step {} of 2, \d\d:\d\d left: loss [\d.e-]+, agreement [\d.]+, yes rate [\d.]+"
    for (number, step), text in zip([(r, s) for r in (1, 2) for s in (1, 2)], steps, strict=True):
        assert re.match(place.format(number, step), text), text
    assert [text for text in lines if " is done: " in text] == [
        text for text in lines if re.fullmatch(r"round \d of 2 is done: 2 steps in \d\d:\d\d", text)
    ]


def screen(written):
    """The lines that a terminal shows of what was written to it."""
    shown = []
    for text in written.replace("\r\n", "\n").split("\n"):
        cells = []
        for part in re.sub("\x1b\\[[A-Z]", "", text).split("\r"):
            cells[: len(part)] = part
        shown.append("".join(cells).rstrip())
    return [text for text in shown if text]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(40, 120), (0, 0), (0, 120)])  # some do not say how large they are
def test_a_terminal_shows_lines_above_one_bar(home, tmp_path, size):  # noqa: F811
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    ran = subprocess.Popen(command_of(home, tmp_path / "out", *ROUNDS), stdout=side, stderr=side)
    os.close(side)
    written = b""
    try:
        while part := os.read(main, 65536):
            written += part
    except OSError:  # Linux: the other side is closed
        pass
    assert ran.wait() == 0
    written = written.decode()
    assert "round 2 of 2, step 2 of 2 |" in written and "100%" in written and "Warning" not in written
    lines = screen(written)
    lines = lines[next(i for i, text in enumerate(lines) if text.startswith("round")) :]
    bars = [text for text in lines if " gone, " in text]
    assert len(bars) <= 1 and not any("%|" in text for text in lines)  # no bar is left half drawn among the lines
    steps = [text for text in lines if ", step " in text and text not in bars]
    assert [re.match(r"round (\d) of 2, step (\d) of 2: loss", text).groups() for text in steps] == [
        (r, s) for r in "12" for s in "12"
    ]


def test_a_line_tells_what_matters_most_first():
    logs = {f"teacher_metric_{i}": 0.123456 for i in range(9)} | {"student_agreement": 1, "loss": 2.0, "epoch": 1.0}
    told = line("stage 1 of 3, step 5", logs | {"student_grad_norm": 3.0, "note": "text"})
    assert told.startswith("stage 1 of 3, step 5: loss 2, student agreement 1, teacher metric 0 0.123")
    assert len(told) <= WIDTH and "grad" not in told and "epoch" not in told and "note" not in told


def test_the_time_to_go_is_that_of_the_whole_job(capfd, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hkdfast.hf.progress.time.monotonic", lambda: now[0])
    with Progress({"a": ("first", 2), "b": ("second", 1), "c": ("third", 3)}) as progress:
        progress.begin("b")  # the first was finished by an earlier run
        now[0] += 10
        progress.at(0.5)
        assert progress.left() == ", 01:10 left"  # 0.5 of 4 took 10 s
        progress.begin("c", 0.5)
        progress.at(1.0)
        assert progress.left() == ", 00:00 left"


def test_parts_weigh_as_much_as_they_take():
    pyramid, ternary = hkd.PyramidConfig("p", stage_epochs=[1, 2]), hkd.TernaryConfig("t", max_steps=5)
    found = hkd.parts(pyramid, ternary, [100, 10, 1], [0, 1, 2])
    assert found == {
        "p/stage-1": ("stage 1 of 3", 330),
        "p/stage-2": ("stage 2 of 3", 66),
        "t": ("stage 3 of 3, refinement", 113),
    }


def test_a_trainer_used_from_python_keeps_its_own_bar(tmp_path):
    trainer = SeedTrainer(zoo.build("llava"), config(tmp_path, disable_tqdm=False), train_dataset=Rows(zoo.batch()))
    names = [type(each).__name__ for each in trainer.callback_handler.callbacks]
    assert "ProgressCallback" in names
    trainer = SeedTrainer(zoo.build("llava"), config(tmp_path), train_dataset=Rows(zoo.batch()), callbacks=[Progress()])
    names = [type(each).__name__ for each in trainer.callback_handler.callbacks]
    assert "ProgressCallback" not in names and "PrinterCallback" not in names


# checkpoints


@pytest.mark.slow
def test_the_last_checkpoint_alone_is_kept(whole):
    found = [each.relative_to(whole).as_posix() for each in run_state.checkpoints(whole)]
    assert found == ["round-2/checkpoint-2"]
    assert (whole / found[0] / "optimizer.pt").is_file()


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("place", [(1, 2), (2, 1), (2, 2)])
def test_a_stop_in_the_middle_of_a_save_loses_nothing(home, whole, tmp_path, monkeypatch, place):  # noqa: F811
    saving = SeedTrainer._save_rng_state

    def save(trainer, folder):
        if (trainer.round, trainer.state.global_step) == place:
            raise Killed
        saving(trainer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(SeedTrainer, "_save_rng_state", save)
        with pytest.raises(Killed):
            seed(home, tmp_path / "out", *ROUNDS)
    assert seed(home, tmp_path / "out", *ROUNDS, "--resume") == 0
    assert same(adapter(tmp_path / "out"), adapter(whole))
    assert len(run_state.checkpoints(tmp_path / "out")) == 1


@pytest.mark.slow
def test_half_a_checkpoint_is_not_counted_among_the_last(home, whole, tmp_path):  # noqa: F811
    """A run that was killed while it saved checkpoint 2 and goes on with other save_steps saves none of that name."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeedTrainer, "_save_rng_state", lambda *_: None)
        assert seed(home, out, *FEW, "--save-steps", "1", "--save-total-limit", "5") == 0
    (out / "checkpoint-2/trainer_state.json").unlink()
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-7")
    assert seed(home, out, *FEW, "--save-steps", "1", "--resume") == 0
    assert [each.name for each in run_state.checkpoints(out)] == ["checkpoint-2"]


def test_a_finished_adapter_stays_until_another_is_written(home, whole, tmp_path, monkeypatch):  # noqa: F811
    out = shutil.copytree(whole, tmp_path / "out")
    before = (out / "adapter_model.safetensors").read_bytes()

    def half(trainer, folder=None, state_dict=None):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "adapter_model.safetensors").write_bytes(before[:100])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SeedTrainer, "_save", half)
        with pytest.raises(Killed):
            seed(home, out, *ROUNDS, "--resume")
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert seed(home, out, *ROUNDS, "--resume") == 0
    assert (out / "adapter_model.safetensors").read_bytes() == before and not (out / "saving").exists()


# paths


def test_an_adapter_names_its_base_from_every_folder(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(home)
    words = ["--model", "model", "--images", "images", "--questions", "questions.jsonl", "--output", "adapter"]
    assert cli.main(["seed", *words, "--use-cpu", *FEW]) == 0
    adapter = shutil.move(home / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    base = peft.PeftConfig.from_pretrained(adapter).base_model_name_or_path
    assert base == str(home / "model")
    peft.PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), adapter)
    assert f"base_model: {base}" in (adapter / "README.md").read_text()


def test_trainers_name_the_base_from_every_folder(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(home)
    model = LlavaForConditionalGeneration.from_pretrained("model")
    trainer = SeedTrainer(model, config(tmp_path), train_dataset=Rows(zoo.batch()))
    coupled = prepare_for_training(
        LlavaForConditionalGeneration.from_pretrained("model"), hkd.PyramidConfig("out", lora_r=2)
    )
    for made in (trainer.model, coupled):
        assert made.peft_config["default"].base_model_name_or_path == str(home / "model")


def options(parser, path=()):
    """(words of the command, action) of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                yield from options(each, (*path, name))
        else:
            yield path, action


def test_home_is_found_in_every_option_that_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = {}
    for asked in cli.TRAINING:
        for path, action in options(cli.make_parser([asked])):
            if action.metavar in cli.PATHS:
                found[" ".join((*path, action.option_strings[-1]))] = action.type("~/x")
    assert set(found.values()) == {"/home/me/x"}
    wanted = "model images questions output", "models images data output unlabeled dev swaps"
    for command, names in zip(("seed", "hkd"), wanted, strict=True):
        assert {f"{command} --{name}" for name in names.split()} <= found.keys()
    asks = "model answers images adapter against output".split()
    evaluate = {"pope": ["questions", *asks], "choices": ["data", *asks], "mme": ["results", "output"]}
    for command, names in evaluate.items():
        assert {f"evaluate {command} --{name}" for name in names} <= found.keys()
    assert "bench --json" in found
    assert shell.path("me/model") == "me/model"  # of the Hub


def test_the_command_at_the_end_runs_when_it_is_pasted(home, tmp_path, monkeypatch, capfd):  # noqa: F811
    place = shutil.copytree(home, tmp_path / "my files; rm")
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    words = ["--model=~/model", "--images", "images", "--questions", "questions.jsonl", "--output", "an adapter"]
    assert cli.main(["seed", *words, "--use-cpu", *FEW]) == 0
    pasted = capfd.readouterr().out.splitlines()[-1]
    monkeypatch.chdir(tmp_path)
    program, words = shlex.split(pasted)[:3], shlex.split(pasted)[3:]
    assert program == [sys.executable, "-m", "hkdfast"]
    assert cli.main(words) == 0
    scores = json.loads((place / "an adapter-scores.json").read_text())
    assert scores["adapter"] == str(place / "an adapter")


def test_no_command_is_promised_for_questions_without_labels(home, tmp_path, capfd):  # noqa: F811
    bare = [json.loads(text) for text in (home / "questions.jsonl").read_text().splitlines()]
    for one in bare:
        del one["label"]
    (tmp_path / "bare.jsonl").write_text("\n".join(map(json.dumps, bare)))
    assert seed(home, tmp_path / "out", *FEW, questions=tmp_path / "bare.jsonl") == 0
    assert "questions with labels; these have none." in capfd.readouterr().out.splitlines()[-1]


# stops


def stop(how):
    if how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    raise KeyboardInterrupt


def pasted(shown):
    *_, text = shown.err.splitlines()
    assert shlex.split(text)[:3] == [sys.executable, "-m", "hkdfast"]
    return shlex.split(text)[3:]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_stopped_training_says_what_it_kept_and_how_to_go_on(home, whole, tmp_path, monkeypatch, capfd, how):  # noqa: F811
    step, out = SeedTrainer.training_step, tmp_path / "out"

    def training_step(trainer, *args):
        if trainer.round == 2 and trainer.state.global_step == 1:
            stop(how)
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SeedTrainer, "training_step", training_step)
        assert seed(home, out, *ROUNDS) == 130
    shown = capfd.readouterr()
    assert f"hkdfast: stopped, kept in {out}: round-2/checkpoint-1. To continue:" in shown.err
    assert "Traceback" not in shown.err
    assert cli.main(pasted(shown)) == 0
    assert same(adapter(out), adapter(whole))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_training_that_is_stopped_before_anything_is_kept(home, whole, tmp_path, monkeypatch, capfd):  # noqa: F811
    for where, told in (((generate, "load"), "nothing was kept"), ((SeedTrainer, "training_step"), "no checkpoint in")):
        with monkeypatch.context() as patch:
            patch.setattr(*where, lambda *_, **__: stop("Ctrl-C"))
            assert seed(home, tmp_path / "out", *ROUNDS) == 130
        shown = capfd.readouterr()
        assert told in shown.err
    assert cli.main(pasted(shown)) == 0
    assert same(adapter(tmp_path / "out"), adapter(whole))


def test_a_stopped_evaluation_says_what_it_kept(home, tmp_path, monkeypatch, capfd):  # noqa: F811
    plain, asked = generate.generate_texts, []

    def some(*args):
        if len(asked) == 2:
            stop("Ctrl-C")
        asked.append(args)
        return plain(*args)

    words = ["--model", home / "model", "--images", home / "images", "--questions", home / "questions.jsonl"]
    words += ["--output", tmp_path / "scores.json", "--device", "cpu", "--batch-size", "2", "--max-new-tokens", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(generate, "generate_texts", some)
        assert cli.main(["evaluate", "pope", *map(str, words)]) == 130
    shown = capfd.readouterr()
    assert f"hkdfast: stopped, 4 answers are kept in {tmp_path / 'scores.answers'}. To continue:" in shown.err
    assert cli.main(pasted(shown)) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["sets"]


@pytest.mark.parametrize("words", [["doctor"], ["demo"], ["evaluate", "mme", "--results", "a b"]], ids=" ".join)
def test_every_command_can_be_stopped(words, monkeypatch, capfd):
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, argv):
        args = parse(parser, argv)
        args.run = lambda _: stop("SIGTERM")
        return args

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    assert cli.main(words) == 130
    shown = capfd.readouterr()
    assert "hkdfast: stopped, nothing was kept. To begin again:" in shown.err
    assert pasted(shown) == words


# disks


def test_an_output_that_cannot_be_written_is_told_before_the_work(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("hkdfast.cli.seed.pope.read_questions", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    for output, where in ((tmp_path / "file/out", tmp_path / "file"), (Path("/proc/hkdfast/out"), "/proc")):
        assert seed(home, output) == 2
        assert f"--output {output} cannot be written: {where}: " in capsys.readouterr().err


def test_a_disk_without_room_is_told_before_the_first_step(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    monkeypatch.setattr("transformers.Trainer.training_step", lambda *_: pytest.fail("a step was made"))
    assert seed(home, tmp_path / "out") == 2
    assert re.search(r"a checkpoint takes \d+ MiB, 0 MiB are free", capsys.readouterr().err)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_what_was_saved(home, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    saving, out = torch.save, tmp_path / "out"

    def save(what, file, *args, **others):
        if "round-2/checkpoint-2/optimizer.pt" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing\nmore")
        saving(what, file, *args, **others)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert seed(home, out, *ROUNDS) == 2
    shown = capsys.readouterr().err
    assert f"checkpoint {out}/round-2/checkpoint-2 cannot be written: " in shown and "Traceback" not in shown
    assert seed(home, out, *ROUNDS, "--resume") == 0
    assert same(adapter(out), adapter(whole))
