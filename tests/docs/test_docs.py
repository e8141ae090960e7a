"""README, docs/ and the other pages: every example runs, every command parses, every link leads somewhere."""

import argparse
import importlib
import json
import re
import shlex
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

import pytest

import hkdfast
from hkdfast import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")), *ROOT.glob("benchmarks/*/*.md")]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    """[(line number, text)] of the page's fenced blocks of a language, without those whose "needs" is missing here."""
    text = page.read_text()
    found = re.finditer(rf"^(?:<!-- needs: (\S+) -->\n)?^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found if exists(match[1])]


def exists(name):
    """Whether hkdfast has an attribute of this dotted name, "hkdfast.Head.from_linear"; no name is there."""
    try:
        return name is None or attrgetter(name.removeprefix("hkdfast."))(hkdfast) is not None
    except AttributeError:
        return False


def test_a_block_is_left_out_only_while_what_it_needs_is_missing(tmp_path):
    page = tmp_path / "page.md"
    names = ("hkdfast.Head", "hkdfast.nothing", "hkdfast.Head.nothing", None)
    marks = [f"<!-- needs: {name} -->\n" if name else "" for name in names]
    page.write_text("\n".join(f"{mark}```python\n{i}\n```\n" for i, mark in enumerate(marks)))
    assert blocks(page, "python") == [(3, "0\n"), (17, "3\n")]


@pytest.mark.parametrize("page", [page for page in LINKED if page.exists()], ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.slow
def test_names_of_the_changelog_exist():
    text = (ROOT / "CHANGELOG.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `hkdfast.")]
    assert len(rows) > 15
    for _, new in (row for row in rows if len(row) == 2):
        for name in re.findall(r"`(hkdfast\.[\w.]+)`", new):
            assert find_spec(name), name  # found, not imported: a backend may not run here


def test_places_named_in_the_changelog_have_the_new_names():
    """The third column says where the second is found."""
    text = (ROOT / "CHANGELOG.md").read_text()
    found = 0
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) != 3 or not re.fullmatch(r"`[A-Za-z_]+`(, `[A-Z_]+`)*", cells[1]):
            continue
        for place in re.findall(r"`(hkdfast(?:\.[a-z_]+)+)`", cells[2]):
            module = importlib.import_module(place)
            for name in re.findall(r"`(\w+)`", cells[1]):
                if name[0].isupper() or "hf" in place:
                    assert hasattr(module, name), f"{place}.{name}"
                    found += 1
    assert found > 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of a reader: the models, images and files that the pages speak of."""
    zoo = pytest.importorskip("zoo", reason="the pages with models need transformers")
    from coupled_models import sized
    from trainers import CHAT, language_model, letters

    home = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "WORDS", (*zoo.WORDS, *"bcd", "letter", "street", "kitchen", "true", "false", "caption"))
        zoo.build("llava").save_pretrained(home / "my-model")
        zoo.processor().save_pretrained(home / "my-model")
        for place, name in enumerate(("large", "medium", "small")):
            sized(place).save_pretrained(home / name)
            zoo.processor().save_pretrained(home / name)
        words = zoo.tokenizer()
        words.chat_template = CHAT
        spelled = letters()
        spelled.save_pretrained(home / "my-byte-level-tokenizer")
        vocab = max(len(words), len(spelled))
        for seed, name in enumerate(("my-student", "my-teacher", "my-other-teacher")):
            language_model(seed, vocab=vocab).save_pretrained(home / name)
            words.save_pretrained(home / name)
    (home / "images").mkdir()
    for number, name in enumerate(("street", "kitchen")):
        zoo.picture(number).save(home / f"images/{name}.png")
    for page in PAGES:
        for name, text in files(page):
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_text(text)
    return home


def files(page):
    """[(name, text)] of the files that a page shows."""
    return re.findall(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", page.read_text(), re.M | re.S)


def readers(name):
    """What reads a file of this name in the commands."""
    from hkdfast.cli import hkd
    from hkdfast.data import challenge
    from hkdfast.evaluate import mme, pope
    from hkdfast.hf import examples

    captions = partial(challenge.read, "captions.json", "hallucination")
    return {
        "questions.jsonl": lambda path: pope.read_questions(path, "images", labels=False),
        "labeled.jsonl": lambda path: pope.read_questions(path, "images"),
        "answers.jsonl": lambda path: pope.read_answers(path, pope.read_questions("labeled.jsonl")),
        "mme/existence.txt": mme.read,
        "captions.json": lambda path: challenge.read(path, "hallucination", "images"),
        "unlabeled.json": lambda path: challenge.read(path, "hallucination", "images", labels=False),
        "claims.json": lambda path: challenge.read(path, "factcheck", "images"),
        "letters.json": lambda path: challenge.read_answers(path, captions()),
        "swaps.json": hkd.read_swaps,
        "text.jsonl": examples.read,
        "named.jsonl": examples.read,
        "visual.jsonl": examples.read,
    }[name]


SHOWN = [(page, name) for page in PAGES for name, _ in files(page)]


@pytest.mark.parametrize(("page", "name"), SHOWN, ids=[f"{name_of(page)}-{name}" for page, name in SHOWN])
def test_files_are_read_by_what_reads_them(page, name, home, monkeypatch):
    monkeypatch.chdir(home)
    assert len(readers(name)(name)) >= 1


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_json_block_is_a_file(page):
    assert len(blocks(page, "json")) == sum(not name.endswith(".txt") for name, _ in files(page))


def commands(page):
    """[words] of the hkdfast commands in a page's bash blocks."""
    lines = "\n".join(text.replace("\\\n", " ") for _, text in blocks(page, "bash")).splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["hkdfast"]]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_works_from_top_to_bottom(page, home, monkeypatch, capsys):
    """Every command exits with 0, and the Python blocks run in one namespace."""
    monkeypatch.chdir(home)
    asked = commands(page)
    assert asked or page.name in ("losses.md", "trl.md")
    for words in asked:
        args = cli.make_parser(words).parse_args(words)
        assert isinstance(args, argparse.Namespace)
        small = ["--use-cpu"] if words[0] in cli.TRAINING else ["--repeats", "1"] if words[0] == "demo" else []
        small += ["--device", "cpu"] if "--model" in words and words[0] == "evaluate" else []
        assert cli.main([*words, *small]) == 0, capsys.readouterr().err
        if words[0] == "evaluate" and "--output" in words:
            scores = json.loads(Path(words[words.index("--output") + 1]).read_text())
            assert scores["subtasks" if words[1] == "mme" else "sets"]
    namespace = {}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, page, "exec"), namespace)
