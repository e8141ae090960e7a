"""The command hkdfast as a user types it, on files."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hkdfast
from hkdfast import cli
from hkdfast.budget import Budget, TooSlow, measure
from hkdfast.cli import bench, demo, main
from hkdfast.cli.help import EXAMPLES

ROOT = Path(__file__).parents[2]
EXTRAS = ("transformers", "peft", "accelerate", "trl", "triton", "PIL", "tqdm", "pytest")
SUM = """
import pytest

@pytest.mark.parametrize("shape", ["small"])
def test_sum(benchmark, shape):
    assert benchmark(sum, [1, 2]) == 3
"""
# stands in for a package that is not installed: sys.modules[name] = None makes its import fail
WITHOUT = """
import sys
for name in {names!r}: sys.modules[name] = None
from hkdfast.cli import main
sys.exit(main({arguments!r}))
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def process(*arguments, without=()):
    """The command in a process of its own, where some packages are as if not installed."""
    arguments = [str(argument) for argument in arguments]
    what = ["-c", WITHOUT.format(names=without, arguments=arguments)] if without else ["-m", "hkdfast", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *what], capture_output=True, text=True, env=env, check=False)


@pytest.fixture
def command(capfd, monkeypatch):
    """The command in this process: the same result in a fiftieth of the time."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capfd.readouterr())

    return run


def refused(done):
    """The one line of a refusal."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("hkdfast: error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def files(tmp_path):
    """Two sets of questions over the same three images, answers of two systems to each."""
    for split in ("random", "adversarial"):
        with (tmp_path / f"coco_pope_{split}.json").open("w") as file:
            for i in range(6):
                text, label = "Is there a cat in the image?", ["yes", "no"][i % 2]
                file.write(
                    json.dumps({"question_id": i, "image": f"{i // 2}.png", "text": text, "label": label}) + "\n"
                )
    answers = {
        "ours.random": ["Yes", "No", "yes", "no", "Yes", "no"],
        "ours.adversarial": ["Yes", "No", "yes", "no", "Yes", "yes"],
        "theirs.random": ["Yes", "No", "yes", "yes", "no", "no"],
        "theirs.adversarial": ["Yes", "yes", "yes", "yes", "Yes", "yes"],
    }
    for name, texts in answers.items():
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i, text in enumerate(texts):
                file.write(json.dumps({"question_id": i, "text": text}) + "\n")
    return tmp_path


@pytest.fixture
def pope(files, command):
    def run(*options, splits=("random", "adversarial")):
        return command(*pope_words(files, splits), *options)

    return run


def pope_words(files, splits=("random", "adversarial")):
    questions = [files / f"coco_pope_{split}.json" for split in splits]
    answers = [files / f"ours.{split}.jsonl" for split in splits]
    return ["evaluate", "pope", "--questions", *questions, "--answers", *answers]


@pytest.mark.slow
def test_pope_scores_answers_with_torch_alone(files):
    done = process(*pope_words(files), "--output", files / "out" / "scores.json", without=EXTRAS)
    assert (done.returncode, done.stderr) == (0, "")
    head, random, adversarial = (line.split() for line in done.stdout.splitlines())
    assert head == ["questions", "number", "accuracy", "precision", "recall", "f1", "yes_rate", "unreadable"]
    assert random == ["random", "6", *["100.00"] * 4, "50.00", "0"]
    # three yes found, one of three noes called yes: precision 3/4, recall 1, F1 6/7
    assert adversarial == ["adversarial", "6", "83.33", "75.00", "100.00", "85.71", "66.67", "0"]
    report = json.loads((files / "out" / "scores.json").read_text())
    assert report["rule"] == "vcd"
    assert report["sets"]["adversarial"]["mean"]["f1"] == 2 * 0.75 / 1.75
    assert report["hkdfast"] == hkdfast.__version__


def test_pope_compares(files, pope):
    others = [files / f"theirs.{split}.jsonl" for split in ("random", "adversarial")]
    done = pope("--against", *others, "--resamples", 500, "--output", files / "scores.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((files / "scores.json").read_text())
    # accuracy: 6/6 - 4/6 and 5/6 - 3/6
    assert report["sets"]["random"]["difference"]["accuracy"]["difference"] == pytest.approx(1 / 3)
    assert report["sets"]["adversarial"]["difference"]["accuracy"]["difference"] == pytest.approx(1 / 3)
    pooled = report["difference"]["f1"]
    # F1: 1 - 2/3 and 6/7 - 2/3
    assert pooled["difference"] == pytest.approx((1 / 3 + 6 / 7 - 2 / 3) / 2)
    assert pooled["low"] < pooled["difference"] < pooled["high"]
    assert (pooled["images"], pooled["pairs"], pooled["resamples"]) == (3, 2, 500)
    interval = f"{100 * pooled['difference']:+.2f} [{100 * pooled['low']:+.2f}, {100 * pooled['high']:+.2f}]"
    assert interval in done.stdout.splitlines()[-1]


def test_pope_rules_differ(files, pope):
    (files / "ours.random.jsonl").write_text(
        "".join(json.dumps({"question_id": i, "text": "I know"}) + "\n" for i in range(6))
    )
    found = {}
    for rule in ("vcd", "pope"):
        done = pope("--rule", rule, "--output", files / f"{rule}.json", splits=("random",))
        assert done.returncode == 0
        found[rule] = json.loads((files / f"{rule}.json").read_text())["sets"]["random"]["mean"]
        assert done.stdout.splitlines()[1].split()[-1] == "6"
    assert found["vcd"]["yes_rate"] == 0
    assert found["pope"]["yes_rate"] == 1
    assert found["vcd"]["unreadable"] == found["pope"]["unreadable"] == 6


def test_pope_counts_what_says_neither_yes_nor_no_or_both(files, pope):
    texts = ["Yes", "No", "Yes, or no", "I know", "Yes", "maybe"]
    lines = [json.dumps({"question_id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    (files / "ours.random.jsonl").write_text("".join(lines))
    others = [files / f"theirs.{split}.jsonl" for split in ("random", "adversarial")]
    done = pope("--against", *others, "--resamples", 10, "--output", files / "scores.json")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][-1] == "unreadable" and rows[1][0] == "random" and rows[1][-1] == "3"
    assert rows[2][0] == "against" and rows[2][-1] == "0"
    found = json.loads((files / "scores.json").read_text())["sets"]["random"]
    assert (found["draws"][0]["unreadable"], found["mean"]["unreadable"]) == (3, 3)
    # the script of VCD: right but for "maybe", which it takes for a yes under no
    assert (found["mean"]["accuracy"], found["mean"]["yes_rate"]) == (5 / 6, 4 / 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "ours.random.jsonl"], "--against lists 1 files for 2 files of questions"),
        (["--against", *["ours.random.jsonl"] * 4], "1 draws of each question against 2"),
        (["--against", "ours.random.jsonl", "none.jsonl"], "none.jsonl"),
        (["--images", "none"], "image folder 'none' is not a folder"),
        (["--images", "."], "3 of 3 images of"),
        (["--adapter", "a"], "--adapter needs --model"),
        (["--base"], "--base needs --adapter"),
        (["--draws", "0"], "--draws is 0, expected at least 1"),
        (["--resamples", "0"], "--resamples is 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--output", "."], "--output . is a folder"),
    ],
)
def test_pope_refuses(files, pope, monkeypatch, options, message):
    monkeypatch.chdir(files)
    assert message in refused(pope(*options))


def test_pope_refuses_a_broken_line_by_its_number(files, pope):
    with (files / "coco_pope_random.json").open("a") as file:
        file.write('{"question_id": 7,\n')
    assert "coco_pope_random.json:7: not JSON" in refused(pope("--output", files / "scores.json"))
    assert not (files / "scores.json").exists()


def test_a_comparison_that_cannot_be_is_refused_before_the_model_is_asked(files, command):
    for i in range(3):
        (files / f"{i}.png").touch()
    done = command(
        "evaluate", "pope", "--model", "none", "--questions", files / "coco_pope_random.json", "--images", files,
        "--output", files / "scores.json", "--sample", "--draws", 2, "--against", files / "theirs.random.jsonl",
    )  # fmt: skip
    assert "2 draws of each question against 1" in refused(done)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model needs --images"),
        (["--images", "."], "--model needs --output"),
        (["--images", ".", "--output", "o.json", "--draws", "2"], "--draws 2 needs --sample"),
        (["--images", ".", "--output", "o.json", "--adapter", "a", "--base", "--against", "x"], "expected one"),
    ],
)
def test_asking_a_model_refuses(files, command, monkeypatch, options, message):
    monkeypatch.chdir(files)
    done = command("evaluate", "pope", "--model", "m", "--questions", "coco_pope_random.json", *options)
    assert message in refused(done)


@pytest.mark.slow
def test_asking_a_model_without_transformers_names_the_extra(files):
    for i in range(3):
        (files / f"{i}.png").touch()
    done = process(
        "evaluate", "pope", "--model", "m", "--questions", files / "coco_pope_random.json", "--images", files,
        "--output", files / "scores.json", without=("transformers",),
    )  # fmt: skip
    assert "hkdfast[hf]" in refused(done)


@pytest.mark.slow
def test_seed_without_transformers_names_the_extra():
    assert "hkdfast[hf]" in refused(process("seed", "--help", without=("transformers",)))


def test_mme(files, command):
    folder = files / "mme"
    folder.mkdir()
    (folder / "existence.txt").write_text("1.png\tIs there a cat?\tYes\tYes\n1.png\tIs there a dog?\tNo\tyes\n")
    done = command("evaluate", "mme", "--results", folder, "--output", files / "mme.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == ["existence", "2", "0.5000", "0.0000", "50.0000", "0"]
    assert json.loads((files / "mme.json").read_text())["subtasks"]["existence"]["score"] == 50
    assert "no .txt file" in refused(command("evaluate", "mme", "--results", files))


@pytest.mark.slow
def test_doctor_tells_every_backend_and_why_one_is_missing():
    done = process("doctor", without=("triton",))
    assert done.returncode == 0, done.stderr
    facts = dict(re.findall(r"^  (\S+) +(.+)$", done.stdout, re.M))
    assert facts["reference"] == "ok"
    assert "triton" in facts and facts["triton"] != "ok"
    for name, state in hkdfast.backends().items():
        if name != "triton":
            assert facts[name] == state
    assert hkdfast.__version__ in facts["hkdfast"]


def test_demo_measures_both_on_the_same_problem(command):
    done = command("demo", "--rows", 64, "--vocab", 2000, "--hidden", 32, "--repeats", 1, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(logits|heads), (PyTorch|hkdfast) +([\d.]+) ms +(\S+)", done.stdout, re.M)
    assert [row[:2] for row in rows] == [(what, who) for what in ("logits", "heads") for who in ("PyTorch", "hkdfast")]
    for _, _, milliseconds, error in rows:
        assert float(milliseconds) > 0
        assert 0 < float(error) < 1e-4


def test_demo_ends_with_what_it_means(command):
    sizes = ("--rows", 64, "--vocab", 2000, "--hidden", 32, "--repeats", 1, "--dtype", "float32")
    last = command("demo", *sizes).stdout.splitlines()[-1]
    share = r"[\d.e-]+ of its time, [\d.e-]+ of its error(, [\d.e-]+ of its memory)?"
    assert re.fullmatch(f"hkdfast against PyTorch: logits {share}; heads {share}\\.", last), last


@pytest.mark.slow
def test_demo_leaves_out_what_would_not_fit(command, monkeypatch):
    """As on a processor without 16-bit products: PyTorch's own way takes time with every row."""
    plain = demo.plain

    def slow(*tensors, dtype=torch.float32):
        if dtype == torch.float32:
            time.sleep(0.5 * len(tensors[0]))  # 32 s for all rows
        return plain(*tensors, dtype=dtype)

    monkeypatch.setattr(demo, "plain", slow)
    start = time.monotonic()
    sizes = ("--rows", 64, "--vocab", 500, "--hidden", 16, "--repeats", 1)
    done = command("demo", *sizes, "--seconds", 12)
    assert time.monotonic() - start < 14 and done.returncode == 0
    why = re.findall(r"^(logits|heads), PyTorch +skipped: (\d+) of 64 rows took [\d.]+ s", done.stdout, re.M)
    assert [title for title, _ in why] == ["logits", "heads"] and all(int(rows) < 64 for _, rows in why)
    assert len(re.findall(r"^\w+, hkdfast.* ms ", done.stdout, re.M)) == 3
    *_, last = done.stdout.splitlines()
    assert "Skipped: logits, PyTorch; heads, PyTorch; they need more --seconds" in last


def test_demo_shows_how_far_it_is(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    sizes = ("--rows", "8", "--vocab", "50", "--hidden", "4", "--repeats", "1", "--dtype", "float32")
    assert main(["demo", *sizes]) == 0
    drawn = sys.stderr.getvalue()
    assert all(f"{i}/6, at most" in drawn for i in range(6)) and "heads, hkdfast" in drawn
    assert drawn.endswith("\x1b[K")


def test_a_part_may_take_what_the_others_left():
    budget = Budget(100, 4)
    assert budget.begin("first") == pytest.approx(25, abs=1)
    budget.end -= 70
    assert budget.begin("second") == pytest.approx(10, abs=1)
    budget.end -= 70
    assert budget.begin("third") == 0


def test_runs_that_do_not_fit_are_not_begun():
    ran = []

    def call(rows):
        ran.append(rows)
        time.sleep(0.002 * rows)

    with pytest.raises(TooSlow, match="^8 of 512 rows took 0.0 s, the limit for all is 0.0 s"):
        measure(call, 512, 0.04, 3)
    assert ran == [8, 8]
    ran.clear()
    with pytest.raises(TooSlow, match="^one run took 0.1 s, the limit for 5 runs is 0.4 s"):
        measure(call, 64, 0.4, 3)
    assert ran == [1, 1, 4, 16, 64]
    ran.clear()
    assert measure(call, 16, 5, 3) == pytest.approx(0.032, abs=0.02)
    assert ran == [1, 1, 4, 16, 16, 16, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows is 0, expected at least 1"),
        (["--device", "tpu"], "no device 'tpu' here"),
        (["--seconds", "nan"], "--seconds is nan, expected a finite number above 0"),
    ],
)
def test_demo_refuses(command, options, message):
    assert message in refused(command("demo", *options))


@pytest.mark.slow
def test_bench_runs_what_lies_beside_the_package_or_says_where_it_is(command, monkeypatch, tmp_path):
    assert (bench.FOLDER / "bench_logits.py").is_file()
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "benchmarks" / "speed")
    assert "they are in the repository only" in refused(command("bench"))  # as from a wheel
    assert "--seconds is 0.0, expected" in refused(command("bench", "--seconds", 0))
    bench.FOLDER.mkdir(parents=True)
    (bench.FOLDER / "bench_sum.py").write_text(SUM)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    done = command("bench", "--list")
    assert done.returncode == 0 and "test_sum" in done.stdout, done.stdout
    monkeypatch.chdir(tmp_path / "benchmarks")  # the file is named from here, wherever the benchmarks run
    done = command("bench", "-k", "sum", "--json", "../figures.json")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["benchmarks"][0]["name"] == "test_sum[small]"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["evaluate"],
        ["evaluate", "pope"],
        ["evaluate", "mme"],
        ["doctor"],
        ["demo"],
        ["bench"],
        ["seed"],
        ["distill"],
        ["evaluate", "choices"],
    ],
    ids=" ".join,
)
def test_help_explains_every_option(command, words):
    done = command(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    options = re.findall(r"^  (-[^\n]*(?:\n {3,}[^\n]*)*)", done.stdout, re.M)
    assert any(option.startswith("-h") for option in options)
    for option in options:
        flags, *explained = re.split(r"\s{2,}", option, maxsplit=1)
        assert explained and len(explained[0]) > 8, option
    assert not re.search(r"\(default: (None|False|\[.*|)\)", done.stdout)
    usage, _, _ = done.stdout.partition("\n\n")
    assert words not in (["seed"], ["distill"]) or len(usage) < 200 and usage.endswith("[options]")
    if words not in ([], ["evaluate"]):
        assert "\nexample: hkdfast " in done.stdout


def test_unknown_words_exit_with_two(command):
    for words in (["evaporate"], ["evaluate", "pope", "--questions", "q.json"], []):
        done = command(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: hkdfast")


@pytest.mark.slow
def test_the_module_is_the_command_and_needs_torch_alone():
    assert process("--version").stdout == f"hkdfast {hkdfast.__version__}\n"
    assert process("--help", without=EXTRAS).returncode == 0


def test_debug_shows_the_traceback(files, command):
    with pytest.raises(FileNotFoundError, match="no .txt file"):
        command("--debug", "evaluate", "mme", "--results", files)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_command_is_one_that_it_takes(name):
    words = shlex.split(EXAMPLES[name])
    assert words[0] == "hkdfast" and words[1 : 1 + len(name.split())] == name.split()
    assert cli.make_parser(words[1:]).parse_args(words[1:]).run
