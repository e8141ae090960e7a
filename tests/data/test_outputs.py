"""Files that are written: never over an input, through links, into devices, and refused before the work."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hkdfast.data import outputs

ROOT = Path(__file__).parents[2]


def write(path, text="whole"):
    with outputs.replacing(path) as file:
        file.write(text)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "scores.json", tmp_path / "link.json"
    link.symlink_to("far/scores.json")
    write(link, "first")  # the link leads nowhere yet
    assert link.is_symlink() and real.read_text() == "first"
    real.chmod(0o640)
    write(link, "second")
    assert link.is_symlink() and real.read_text() == "second"
    assert real.stat().st_mode & 0o777 == 0o640
    with pytest.raises(RuntimeError), outputs.replacing(link) as file:
        file.write("half")
        raise RuntimeError
    assert real.read_text() == "second"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["far", "link.json", "scores.json"]


def test_devices_and_pipes_are_written_as_they_are(tmp_path):
    write(os.devnull)
    assert not Path(os.devnull).is_file()
    os.mkfifo(tmp_path / "pipe")
    outputs.check("--output", tmp_path / "pipe")  # which waits for no reader
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe")
    reader.join(10)
    assert read == ["whole"]
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


SCRIPT = """
from hkdfast.data import outputs
print("before")
outputs.check("--output", "/dev/stdout")
with outputs.replacing("/dev/stdout") as file: file.write("scores\\n")
print("after")
"""


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_the_own_output_goes_on_where_it_is(tmp_path, kind):
    how = {"cwd": ROOT, "check": True}
    if kind == "pipe":
        found = subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, **how).stdout
    else:
        with (tmp_path / "all.txt").open("w") as file:
            subprocess.run([sys.executable, "-c", SCRIPT], stdout=file, **how)
        found = (tmp_path / "all.txt").read_text()
    assert found == "before\nscores\nafter\n"


def test_inputs_are_refused_by_every_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    Path("answers.jsonl").write_text("hours")
    Path("link").symlink_to("answers.jsonl")
    os.link("answers.jsonl", "hard")
    for name in ("answers.jsonl", "./deep/../answers.jsonl", tmp_path / "answers.jsonl", "link", "hard"):
        with pytest.raises(ValueError, match=r"--output .* is also read, as answers\.jsonl: name another file"):
            outputs.check("--output", name, ["none", "answers.jsonl"])
    with pytest.raises(ValueError, match="is also read, as link"):
        outputs.check("--output", "answers.jsonl", ["link"])
    outputs.check("--output", "new.json", ["answers.jsonl", "none"])
    outputs.check("--output", os.devnull, [os.devnull])  # nothing is lost there
    assert Path("answers.jsonl").read_text() == "hours"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("folder", ValueError, "--output .*folder is a folder, expected a file"),
        ("folder/", ValueError, "is a folder, expected a file"),
        ("new/", ValueError, "is a folder, expected a file"),
        ("file/a.json", OSError, "--output .*a.json cannot be written: .*Not a directory"),
        ("old.json", OSError, "--output .*old.json cannot be written: it is read-only"),
        ("loop", OSError, "cannot be written: Too many levels of symbolic links"),
        ("x" * 300, OSError, "cannot be written: File name too long"),
        ("/proc/none/a.json", OSError, "--output /proc/none/a.json cannot be written"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(tmp_path, name, error, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "old.json").write_text("")
    (tmp_path / "old.json").chmod(0o444)
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        outputs.check("--output", os.path.join(tmp_path, name))
    outputs.check("--output", tmp_path / "deep" / "new.json")
    outputs.check("--output", None)
    assert sorted(tmp_path.iterdir()) == before


# The commands


def run(*words, **how):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | how.pop("env", {})
    words = [sys.executable, "-m", "hkdfast", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, env=env, check=False, **how)


@pytest.fixture
def files(tmp_path):
    """Questions and answers of POPE, of MME and of the challenge; the questions' image is there."""
    question = {"question_id": 0, "image": "a.png", "text": "Is there a cat?", "label": "yes"}
    (tmp_path / "q\u00fc.json").write_text(json.dumps(question))
    (tmp_path / "a.jsonl").write_text(json.dumps({"question_id": 0, "text": "Yes"}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"question_id": 0, "text": "No"}))
    (tmp_path / "c.json").write_text(json.dumps([{"image": "a.png", "claim": "A cat.", "answer": "D"}]))
    (tmp_path / "c.answers.json").write_text('["D"]')
    (tmp_path / "a.png").write_text("")
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme" / "count.txt").write_text("1.png\tq\tYes\tyes\n1.png\tq\tNo\tno\n")
    return tmp_path


POPE = ("evaluate", "pope", "--questions", "q\u00fc.json", "--answers", "a.jsonl")
CHOICES = ("evaluate", "choices", "--task", "factcheck", "--data", "c.json", "--answers", "c.answers.json")
MME = ("evaluate", "mme", "--results", "mme")


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (POPE, "q\u00fc.json"),
        (POPE, "mme/../a.jsonl"),
        ((*POPE, "--against", "b.jsonl"), "b.jsonl"),
        ((*POPE, "--images", "."), "a.png"),
        (CHOICES, "c.json"),
        (CHOICES, "c.answers.json"),
        ((*CHOICES, "--images", "."), "a.png"),
        (MME, "mme/count.txt"),
    ],
)
def test_no_command_writes_over_its_inputs(files, words, output, monkeypatch, capsys):
    from hkdfast.cli import main

    monkeypatch.chdir(files)
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert main([*words, "--output", output]) == 2
    assert f"--output {output} is also read" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*MME, "--output", "mme/new.txt"), "would be read as a subtask of mme"),
        (("bench", "--json", "q\u00fc.json/x"), "--json q\u00fc.json/x cannot be written"),
        (("bench", "--json", "mme"), "--json mme is a folder"),
        (
            ("evaluate", "pope", "--questions", "a.jsonl", "--model", "m", "--images", ".", "--output", "/dev/null"),
            "--output /dev/null is not a file: with --model the answers go into a folder beside it",
        ),
        (
            ("evaluate", "pope", "--questions", "s.answers/q", "--model", "m", "--images", ".", "--output", "s.json"),
            "s.answers/q is read, and the answers are written in s.answers: name another --output",
        ),
        (
            (
                "evaluate",
                "pope",
                "--questions",
                "a.jsonl",
                "--model",
                "m",
                "--images",
                ".",
                "--output",
                "m/config.json",
            ),
            "--output m/config.json is also read, as m/config.json",
        ),
    ],
)
def test_other_outputs_that_would_harm(files, words, message, monkeypatch, capsys):
    from hkdfast.cli import main

    monkeypatch.chdir(files)
    (files / "m").mkdir()
    (files / "m" / "config.json").write_text("{}")
    assert main(list(words)) == 2
    assert message in capsys.readouterr().err
    assert not (files / "mme" / "new.txt").exists()


@pytest.mark.parametrize("words", [POPE, CHOICES, MME])
def test_scores_are_written_before_they_are_printed(files, words, monkeypatch):
    from hkdfast.cli import main

    def fail(*words, **how):
        raise RuntimeError("printing")

    monkeypatch.chdir(files)
    monkeypatch.setattr("builtins.print", fail)
    with pytest.raises(RuntimeError, match="printing"):
        main([*words, "--output", "scores.json"])
    assert json.loads((files / "scores.json").read_text())["hkdfast"]


def test_mme_writes_text_files_elsewhere(files, monkeypatch):
    from hkdfast.cli import main

    monkeypatch.chdir(files)
    assert main([*MME, "--output", "new/deep/scores.txt"]) == 0
    assert json.loads((files / "new/deep/scores.txt").read_text())["subtasks"]["count"]["questions"] == 2


def test_no_encoding_stops_a_table(files):
    done = run(*POPE, "--output", "scores.json", cwd=files, env={"PYTHONIOENCODING": "ascii", "LANG": "C"})
    assert done.returncode == 0, done.stderr
    assert r"q\xfc" in done.stdout and "100.00" in done.stdout
    done = run(
        "evaluate", "pope", "--questions", "n\u00fc", "--answers", "x", cwd=files, env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 2 and r"n\xfc" in done.stderr and "Traceback" not in done.stderr
