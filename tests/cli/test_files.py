"""No input is written over, scores outlive the terminal, and bad files are named before the work."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hkdfast.cli import main

ROOT = Path(__file__).parents[2]
TEXT = "Is there a cat in the image?"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Questions of POPE, answers of two systems, a folder of MME, and a track of the challenge."""
    questions = [{"question_id": i, "image": f"{i}.png", "text": TEXT, "label": ["yes", "no"][i % 2]} for i in range(4)]
    lines(tmp_path / "q.json", questions)
    for name, texts in (("ours", ["Yes", "no", "yes", "yes"]), ("theirs", ["no", "no", "yes", "no"])):
        lines(tmp_path / f"{name}.jsonl", [{"question_id": i, "text": text} for i, text in enumerate(texts)])
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme" / "count.txt").write_text("1.png\tOne cat?\tYes\tYes\n1.png\tTwo cats?\tNo\tyes\n")
    claims = [{"question_id": i, "image_id": f"{i}.png", "claim": "A cat.", "correct_choice": "A"} for i in range(3)]
    (tmp_path / "claims.json").write_text(json.dumps(claims))
    (tmp_path / "letters.json").write_text(json.dumps(["A", "B", None]))
    (tmp_path / "others.json").write_text(json.dumps(["A", "A", "A"]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


POPE = "evaluate pope --questions q.json --answers ours.jsonl --resamples 10".split()
AGAINST = [*POPE, "--against", "theirs.jsonl"]
MME = "evaluate mme --results mme".split()
CHOICES = "evaluate choices --task factcheck --data claims.json --answers letters.json --resamples 10".split()
CHOICES += ["--against", "others.json"]


def run(capfd, *words):
    """(exit code, stdout, stderr) of a command in this process."""
    capfd.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


def refused(capfd, *words):
    code, out, err = run(capfd, *words)
    assert code == 2 and out == "", (out, err)
    assert err.startswith("hkdfast: error: ") and err.count("\n") == 1, err
    return err


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


INPUTS = [
    (AGAINST, "q.json"),
    (AGAINST, "ours.jsonl"),
    (AGAINST, "theirs.jsonl"),
    (MME, "mme/count.txt"),
    (CHOICES, "claims.json"),
    (CHOICES, "letters.json"),
    (CHOICES, "others.json"),
]


@pytest.mark.parametrize(("words", "name"), INPUTS, ids=lambda value: value if isinstance(value, str) else value[1])
def test_no_input_is_written_over_by_any_name(home, capfd, words, name):
    os.symlink(home / name, "link.json")
    os.symlink("link.json", "again.json")
    os.link(home / name, "hard.json")
    os.symlink(".", "here")
    before = contents(home)
    spellings = [name, f"./{name}", f"mme/../{name}", home / name, "link.json", "again.json", "hard.json"]
    for spelling in (*spellings, f"here/{name}"):
        message = refused(capfd, *words, "--output", spelling)
        assert f"--output {spelling}" in message
        assert contents(home) == before


@pytest.mark.parametrize("words", [AGAINST, MME, CHOICES], ids=lambda words: words[1])
def test_a_link_is_written_through(home, capfd, words):
    Path("real").mkdir()
    Path("real/scores.json").write_text("old")
    os.symlink("real/scores.json", "scores.json")
    os.symlink("real/new.json", "dangling.json")
    for name, target in (("scores.json", "real/scores.json"), ("dangling.json", "real/new.json")):
        code, _, err = run(capfd, *words, "--output", name)
        assert code == 0, err
        assert Path(name).is_symlink() and json.loads(Path(target).read_text())["hkdfast"]
    assert sorted(each.name for each in Path("real").iterdir()) == ["new.json", "scores.json"]


@pytest.mark.parametrize("words", [AGAINST, MME, CHOICES], ids=lambda words: words[1])
def test_devices_and_pipes_are_opened_as_they_are(home, capfd, words):
    table = run(capfd, *words)[1]
    assert run(capfd, *words, "--output", "/dev/null") == (0, table, "")
    assert Path("/dev/null").is_char_device()
    os.mkfifo("pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_text()))
    reader.start()
    code, out, err = run(capfd, *words, "--output", "pipe")
    reader.join(10)
    assert (code, out, err) == (0, table, "") and json.loads(found[0])["hkdfast"]
    assert Path("pipe").is_fifo()


def process(words, **how):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | how.pop("env", {})
    done = subprocess.run([sys.executable, "-m", "hkdfast", *words], env=env, check=False, **how)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("into", ["pipe", "file", "appended"])
def test_scores_may_go_to_stdout(home, into):
    """JSON and table, whole and one after the other, whatever stdout is."""
    words = [*AGAINST, "--output", "/dev/stdout"]
    if into == "pipe":
        text = process(words, stdout=subprocess.PIPE).stdout.decode()
    else:
        with open("out.txt", "wb" if into == "file" else "ab") as file:
            assert process(words, stdout=file).returncode == 0
        text = Path("out.txt").read_text()
    report, end = json.JSONDecoder().raw_decode(text)
    assert report["rule"] == "vcd"
    assert text[end:].split()[:2] == ["questions", "number"]


@pytest.mark.slow
def test_scores_are_written_before_they_are_printed(home):
    """Stdout may be closed, full or unable to say a word: the scores are in their file."""
    os.rename("q.json", "frage-\u00fc\u4e2d.json")
    words = [*POPE, "--output", "scores.json"]
    words[3] = "frage-\u00fc\u4e2d.json"
    done = process(words, env={"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "frage-" in done.stdout and done.stdout.isascii()
    assert json.loads(Path("scores.json").read_text())["sets"]["frage-\u00fc\u4e2d"]
    Path("scores.json").unlink()
    with open("/dev/full", "w") as full:
        process(words, stdout=full, stderr=subprocess.DEVNULL)
    assert json.loads(Path("scores.json").read_text())["sets"]


def test_an_error_can_be_told_in_any_encoding(home):
    words = [*POPE, "--output", "scores.json"]
    words[3] = "nicht-da-\u00fc\u4e2d.json"
    done = process(words, env={"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 2 and "nicht-da-" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [AGAINST, MME, CHOICES], ids=lambda words: words[1])
@pytest.mark.parametrize("name", ["mme", "mme/", "new/", "q.json/scores.json", "/proc/none/scores.json", "locked.json"])
def test_what_cannot_be_written_is_told_before_the_work(home, capfd, words, name, monkeypatch):
    def work(*_, **__):
        raise AssertionError("begun")

    monkeypatch.setattr("hkdfast.evaluate.tables.compare", work)
    monkeypatch.setattr("hkdfast.evaluate.mme.score_folder", work)
    Path("locked.json").write_text("")
    Path("locked.json").chmod(0o444)
    before = contents(home)
    assert f"--output {name}" in refused(capfd, *words, "--output", name)
    assert contents(home) == before


def test_folders_are_made_for_the_scores(home, capfd):
    assert run(capfd, *POPE, "--output", "a/b/scores.json")[0] == 0
    assert [file.name for file in Path("a/b").iterdir()] == ["scores.json"]


# what files hold


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"question_id": 0}]', "q.json"),
        (json.dumps([{"question_id": 0}, {"question_id": 1}], indent=1).encode(), "q.json"),
        (json.dumps({"question_id": 0, "text": "x"}, indent=1).encode(), "q.json"),
        ('{"question_id": 0}'.encode("utf-16"), "UTF-16"),
        ('{"question_id": 0}'.encode("utf-16-le"), "UTF-16"),
        ('{"question_id": 0}'.encode("utf-16-be"), "UTF-16"),
    ],
    ids=["list", "indented list", "indented object", "utf-16", "utf-16-le", "utf-16-be"],
)
def test_a_file_of_another_form_is_named_by_what_it_is(home, capfd, data, message):
    (home / "q.json").write_bytes(data)
    found = refused(capfd, *POPE)
    assert "q.json" in found and message in found and len(found) < 300
    if b"[" in data:
        assert "list" in found and "one JSON object per line" in found
    os.rename("q.json", "ours.jsonl")
    lines(home / "q.json", [{"question_id": 0, "image": "0.png", "text": TEXT, "label": "yes"}])
    found = refused(capfd, *POPE)
    assert "ours.jsonl" in found and len(found) < 300


def test_lines_where_a_list_may_be_are_read_and_utf_16_is_named(home, capfd):
    claims = json.loads(Path("claims.json").read_text())
    table = run(capfd, *CHOICES)[1]
    lines(home / "claims.json", claims)
    assert run(capfd, *CHOICES)[:2] == (0, table)
    Path("claims.json").write_bytes(json.dumps(claims).encode("utf-16"))
    assert "UTF-16" in refused(capfd, *CHOICES)
    Path("mme/count.txt").write_bytes(Path("mme/count.txt").read_text().encode("utf-16"))
    found = refused(capfd, *MME)
    assert "count.txt" in found and "UTF-16" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": "1"}, "ours.jsonl:2: question_id is 1"),
        ({"text": 3}, "q.json:2: text is 3, expected str"),
        ({"text": [TEXT] * 999}, "q.json:2: text is "),
        ({"image": ["a.png", "b.png"]}, "q.json:2: image is ['a.png', 'b.png'], expected str"),
        ({"image": {"bytes": "x" * 9999}}, "q.json:2: image is "),
        ({"image": None}, "q.json:2: image is None, expected str"),
        ({"label": "yes" * 999}, "q.json:2: label is "),
        ({"label": True}, "q.json:2: label is True, expected str"),
    ],
)
def test_values_of_another_kind_are_named_in_one_short_line(home, capfd, change, message):
    found = [json.loads(line) for line in Path("q.json").read_text().splitlines()]
    found[1] |= change
    lines(home / "q.json", found)
    told = refused(capfd, *POPE)
    assert message in told and len(told) < 300, told
    if "question_id" in change:  # a number given as text
        assert "1" in told and "'1'" in told and "ours.jsonl:2" in told


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["A", "Bad", "A"], "entry 2"),
        (["bad", "A", "A"], "entry 1"),
        (["A", "A", "a cab"], "entry 3"),
        (["Ad", "A", "A"], "entry 1"),
        (["A"], "1 answers for 3"),
        (["A", "A"], "2 answers for 3"),
        ([["A"], ["Bad"], ["C"]], "entry 2"),
        ([{"question_id": "0", "choice": "A"}], "'0'"),
        ([{"choice": "A"}, {"choice": "B"}], "2 answers for 3"),
    ],
)
def test_words_are_no_letters_and_no_answer_is_lost(home, capfd, answers, message):
    Path("letters.json").write_text(json.dumps(answers))
    told = refused(capfd, *CHOICES)
    assert "letters.json" in told and message in told


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "A. True", "Bad", "False"])
def test_the_text_of_an_option_is_no_letter(home, capfd, text):
    claims = json.loads(Path("claims.json").read_text())
    claims[1]["correct_choice"] = text
    Path("claims.json").write_text(json.dumps(claims))
    told = refused(capfd, *CHOICES)
    assert "claims.json:entry 2: correct_choice is " in told and repr(text) in told and "A to D" in told
