"""The challenge's files, prompts and micro-F1, and `hkdfast evaluate choices` on a tiny model with random weights."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hkdfast.cli import main
from hkdfast.data.challenge import read, read_answers, write
from hkdfast.data.tasks import letters_of
from hkdfast.evaluate import bootstrap, choices
from hkdfast.evaluate.choices import NONE, TASKS, ChoiceInference, Record, choice, question, score

# as on the challenge's page, but for the texts
CAPTION = {
    "image_id": "00385794700c832e.jpg",
    "system1_question": "What type of shelf is it?",
    "system1_answer": "Leafy greens are arranged on a blue wire shelf {options}.",
    "system2_question": "Which of the following systems' outputs belong to hallucination?",
    "correct_answer": "blue wire shelf",
    "correct_choice": "C",
    "choices": [
        {"id": "A", "choice": NONE},
        {"id": "B", "choice": "leafy greens"},
        {"id": "C", "choice": "blue wire shelf"},
        {"id": "D", "choice": "fresh produce"},
    ],
}
CLAIM = {
    "image_id": "0234613.jpg",
    "claim": "A supporter waves a flag.",
    "context": "There was a rally.",
    "question": "Based on the provided information, please determine whether the claim is factual.",
    "correct_answer": "True",
    "correct_choice": "A",
    "choices": [{"id": a, "choice": b} for a, b in zip("ABCD", TASKS["factcheck"].options, strict=True)],
}
PAGE = {"hallucination": CAPTION, "factcheck": CLAIM}


def saved(path, entries, lines=False):
    text = "\n".join(json.dumps(entry, indent=None) for entry in entries) if lines else json.dumps(entries, indent=2)
    path.write_text(text)
    return path


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_challenges_own_objects_are_read(tmp_path, lines, wrapped):
    for task, entry in PAGE.items():
        path = saved(tmp_path / "q.json", [{"metadata": entry} if wrapped else entry] * 2, lines)
        first, second = read(path, task)
        assert (first.question_id, second.question_id) == (0, 1)
        assert replace(second, question_id=0) == first
        assert (first.image, first.options) == (entry["image_id"], tuple(one["choice"] for one in entry["choices"]))
        assert first.answer == entry["correct_choice"]
    record = first
    assert (record.statement, record.context) == ("A supporter waves a flag.", "There was a rally.")


def test_other_spellings_and_what_may_be_left_out(tmp_path):
    entry = {"image": "1.png", "system1_answer": "A cat.", "choices": ["a cat", NONE], "answer": "b", "id": "x7"}
    (record,) = read(saved(tmp_path / "q.json", [entry]), "hallucination")
    assert record == Record(
        "hallucination", "1.png", "A cat.", "", TASKS["hallucination"].asked, ("a cat", NONE), "B", "x7"
    )
    (record,) = read(saved(tmp_path / "q.json", [{"image": "1.png", "claim": "A cat.", "answer": "D"}]), "factcheck")
    assert record.options == ("True", "False", "Partially True", "Not Verifiable") and record.answer == "D"
    entry.pop("answer")
    path = saved(tmp_path / "q.json", [entry, entry | {"id": 3, "answer": "A"}, entry | {"id": 4, "answer": ""}])
    assert [one.answer for one in read(path, "hallucination", labels=None)] == [None, "A", None]
    assert [one.answer for one in read(path, "hallucination", labels=False)] == [None] * 3


@pytest.mark.parametrize("text", ["AC", "CA", "A, C", "a;c", "(A) (C)", ["C", "A"], "A. C."])
def test_several_letters_are_a_set(tmp_path, text):
    path = saved(tmp_path / "q.json", [CAPTION | {"correct_choice": text}])
    records = read(path, "hallucination")
    assert records[0].answer == "AC"
    assert read_answers(saved(tmp_path / "a.json", [text]), records) == ["AC"]
    assert score(records, ["AC"])["right"] == 1 and score(records, ["C"])["right"] == 0


@pytest.mark.parametrize("word", ["Bad", "bad", "BAD", "Cab", "true", "TRUE"])
def test_words_are_no_letters(tmp_path, word):
    options = ["True", "False", "Bad", "Cab"]
    path = saved(tmp_path / "q.json", [CLAIM | {"choices": options, "correct_choice": word}])
    with pytest.raises(ValueError, match=rf"entry 1: correct_choice is '{word}' \('{word}' is the text of [ACD]\)"):
        read(path, "factcheck")
    saved(path, [CLAIM | {"choices": ["A", "B"], "correct_choice": "B"}])  # a letter is a letter
    assert read(path, "factcheck")[0].answer == "B"


@pytest.mark.parametrize("task", TASKS)
def test_records_come_back_from_the_file_they_are_written_to(tmp_path, task):
    (record,) = read(saved(tmp_path / "q.json", [PAGE[task]]), task)
    records = [record, replace(record, question_id="b", answer="AB", context="", statement="Ünï\n{x}")]
    write(tmp_path / "new" / "w.json", records)
    assert read(tmp_path / "new" / "w.json", task) == records
    entry = json.loads((tmp_path / "new" / "w.json").read_text())[0]
    assert entry == PAGE[task] | {"question_id": 0}
    write(tmp_path / "t.json", [replace(one, answer=None) for one in records])
    assert read(tmp_path / "t.json", task, labels=None) == [replace(one, answer=None) for one in records]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("hallucination", {"image_id": 7}, r"q\.json:entry 2: image_id is 7, expected str"),
        ("hallucination", {"image_id": None}, "image_id is None, expected str"),
        ("hallucination", {"system1_answer": ...}, "entry 2: no field 'system1_answer'; found 'image_id'"),
        ("factcheck", {"claim": ...}, "entry 2: no field 'claim'"),
        ("hallucination", {"choices": ...}, "entry 2: no field 'choices'"),
        ("hallucination", {"choices": "ABCD"}, "choices is 'ABCD', expected list"),
        ("hallucination", {"choices": [{"id": "B", "choice": "x"}]}, "choices: id is 'B', expected 'A': A, B, C"),
        ("hallucination", {"choices": ["x", ""]}, "choices: option B is '', expected a text"),
        ("hallucination", {"choices": ["x"]}, "choices: 1 options, expected 2 to 26"),
        ("hallucination", {"choices": ["x", "x"]}, "an option occurs twice"),
        ("hallucination", {"correct_choice": ...}, "entry 2: no field 'correct_choice'"),
        ("hallucination", {"correct_choice": "E"}, "correct_choice is 'E', expected letters of A to D, each once"),
        ("hallucination", {"correct_choice": "CC"}, "correct_choice is 'CC', expected letters of A to D, each once"),
        ("hallucination", {"correct_choice": ""}, "correct_choice is '', expected one of A, B, C, D"),
        ("hallucination", {"correct_choice": 2}, "correct_choice is 2, expected str or list"),
        ("factcheck", {"correct_choice": ["A", 3]}, r"correct_choice is \['A', 3\], expected letters"),
        ("factcheck", {"question_id": 1.5}, "question_id is 1.5, expected int or str"),
        ("factcheck", {"question_id": 0}, "entry 2: question_id 0 is already at entry 1"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, task, change, message):
    entry = {name: value for name, value in (PAGE[task] | change).items() if value is not ...}
    path = saved(tmp_path / "q.json", [PAGE[task], entry])
    with pytest.raises(ValueError, match=message):
        read(path, task)
    # the same on a line
    saved(path, [PAGE[task], entry], lines=True)
    with pytest.raises(ValueError, match=message.replace("entry 2", "2").replace("entry 1", "1")):
        read(path, task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "q.json: the file has no lines"),
        ("[]", "q.json: the file has no questions"),
        ("[{},\n {]", "q.json:2: not JSON"),
        ("[3]", "q.json:entry 1: expected an object, found a int"),
        ('{"image": 1}\nnull', "q.json:2: expected one JSON object per line, found a NoneType"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "q.json", "factcheck")
    (tmp_path / "q.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="q.json: not UTF-8"):
        read(tmp_path / "q.json", "factcheck")
    with pytest.raises(ValueError, match="unknown task 'pope', expected one of hallucination, factcheck"):
        read(tmp_path / "q.json", "pope")


def test_images_must_exist(tmp_path):
    path = saved(tmp_path / "q.json", [CLAIM])
    with pytest.raises(FileNotFoundError, match="1 of 1 images of .*q.json are not in .*, the first is '0234613.jpg'"):
        read(path, "factcheck", images=tmp_path)
    (tmp_path / "0234613.jpg").touch()
    assert len(read(path, "factcheck", images=tmp_path)) == 1


# Prompts


def test_prompts(tmp_path):
    (record,) = read(saved(tmp_path / "q.json", [CAPTION]), "hallucination")
    assert question(record, (1, 2, 3, 0)) == (
        "Question: What type of shelf is it?\n"
        "Caption: Leafy greens are arranged on a blue wire shelf {options}.\n"
        "Which of the following systems' outputs belong to hallucination?\n"
        "A. leafy greens\nB. blue wire shelf\nC. fresh produce\nD. No hallucination\n"
        "Answer with the letter of one option."
    )
    made = choice(record)
    assert made.prompt() == question(record) and made.image == record.image
    assert made.stem.endswith("belong to hallucination?")
    assert made.content_free.startswith("Question: N/A\nCaption: N/A\nWhich of")
    assert "Question:" not in question(replace(record, context=""))
    assert question(record, template="{question} {statement}\n{options}").startswith("Which of")
    (claim,) = read(saved(tmp_path / "q.json", [CLAIM]), "factcheck")
    assert question(claim).startswith("Context: There was a rally.\nClaim: A supporter waves a flag.\nBased on")


@pytest.mark.parametrize("task", TASKS)
def test_every_template_says_what_is_judged_and_offers_the_options(tmp_path, task):
    (record,) = read(saved(tmp_path / "q.json", [PAGE[task]]), task)
    for number in range(len(TASKS[task].templates)):
        text = question(record, (3, 2, 1, 0), number)
        assert record.statement in text and "\nA. " + record.options[3] in text
        assert text.endswith("letter.") or "letter" in text.rsplit("\n", 1)[1]
        assert text.count("{") == record.statement.count("{")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (4, "template 4 of hallucination does not exist, expected 0 to 3"),
        (-1, "template -1 of hallucination"),
        ("{statement}", r"has no \{options\}"),
        ("x", r"has no \{statement\} and no \{options\}"),
    ],
)
def test_templates_refuse(template, message):
    record = Record("hallucination", "1.png", "A cat.", "", "?", ("a cat", NONE))
    with pytest.raises(ValueError, match=message):
        question(record, template=template)


# Answers and scores


def asked(answers, task="factcheck", images=None):
    options = TASKS["factcheck"].options if task == "factcheck" else ("a", "b", "c", NONE)
    images = images or [f"{i}.png" for i in range(len(answers))]
    return [Record(task, images[i], "x", "", "?", options, answer, i) for i, answer in enumerate(answers)]


def test_micro_f1_by_hand():
    records = asked("AABBCD")
    whole = score(records, ["A", "B", "B", "B", "D", "D"])
    assert (whole["micro_f1"], whole["precision"], whole["recall"]) == (4 / 6, 4 / 6, 4 / 6)  # the accuracy
    assert (whole["questions"], whole["answered"], whole["right"]) == (6, 6, 4)
    # two answers missing: P = 3/4, R = 3/6
    some = score(records, ["A", None, "B", "B", "D", None])
    assert (some["precision"], some["recall"], some["micro_f1"]) == (0.75, 0.5, 2 * 0.75 * 0.5 / 1.25)
    none = score(records, [None] * 6)
    assert (none["precision"], none["recall"], none["micro_f1"]) == (0, 0, 0)
    table = whole["classes"]
    assert set(table) == {"True", "False", "Partially True", "Not Verifiable"}
    # False: asked twice, answered three times, twice right
    assert [table["False"][name] for name in ("precision", "recall", "questions", "answered", "right")] == [
        2 / 3, 1, 2, 3, 2,
    ]  # fmt: skip
    assert table["Partially True"]["micro_f1"] == 0 and table["Partially True"]["answered"] == 0


def test_classes_of_hallucination():
    records = asked("ABDD", "hallucination")
    table = score(records, ["A", "C", "D", "B"])["classes"]
    assert set(table) == {NONE, "hallucination"}
    assert [table[NONE][name] for name in ("questions", "answered", "right")] == [2, 1, 1]
    assert [table["hallucination"][name] for name in ("questions", "answered", "right")] == [2, 3, 1]
    shout = [replace(one, options=("a", "b", "c", "NO HALLUCINATION")) for one in records]
    assert score(shout, ["A", "C", "D", "B"])["classes"] == table
    assert score(asked(["AB"]), ["AB"])["classes"].keys() == {"True + False"}


def test_marks_score_as_score_does():
    generator = torch.Generator().manual_seed(0)
    letters = [*"ABCD", None]

    def drawn(count, known):
        return [letters[i] for i in torch.randint(known, (count,), generator=generator)]

    truth = drawn(200, 4)
    records = asked(truth, images=[f"{i // 4}.png" for i in range(200)])
    ours, theirs = (
        [right if keep else other for right, keep, other in zip(truth, kept, drawn(200, 5), strict=True)]
        for kept in (torch.rand(200, generator=generator) < 0.7, torch.rand(200, generator=generator) < 0.4)
    )
    found = bootstrap.paired([choices.grade(records, ours)], [choices.grade(records, theirs)], "f1", resamples=200)
    gap = score(records, ours)["micro_f1"] - score(records, theirs)["micro_f1"]
    assert found.difference == pytest.approx(gap, abs=1e-12) and found.low < gap < found.high
    assert (found.images, found.pairs) == (50, 1)
    # a drawn image counts with all its questions: two images, the first drawn twice
    two = records[:4] + records[4:8]
    weights = [[2.0, 0.0], [1.0, 1.0]]
    graded = choices.grade(two, ours[:8])
    counts, _ = bootstrap.table([graded], [graded])
    for times in weights:
        total = (torch.tensor(times, dtype=torch.float64) @ counts.flatten(1)).view(2, 4)[0]
        repeated = [pair for pair, image in zip(zip(two, ours[:8], strict=True), [0] * 4 + [1] * 4, strict=True)
                    for _ in range(int(times[image]))]  # fmt: skip
        expected = score([pair[0] for pair in repeated], [pair[1] for pair in repeated])["micro_f1"]
        tp, fp, _, fn = total.tolist()
        assert 2 * tp / (2 * tp + fp + fn) == pytest.approx(expected)


def test_answers_come_back(tmp_path):
    records = asked("ABCD")
    answers = ["A", None, "BD", "C"]
    challenge.write_answers(tmp_path / "r" / "results.json", records, answers)
    assert read_answers(tmp_path / "r" / "results.json", records) == answers
    assert read_answers(saved(tmp_path / "a", ["A", None, "DB", "c"]), records) == answers
    by_id = [{"question_id": 3, "answer": "C"}, {"question_id": 0, "choice": "A"}, {"question_id": 2, "answer": "BD"}]
    assert read_answers(saved(tmp_path / "a", by_id), records) == answers
    assert read_answers(saved(tmp_path / "a", by_id, lines=True), records) == answers
    in_order = [{"image_id": f"{i}.png", "choice": a or ""} for i, a in enumerate(answers)]
    assert read_answers(saved(tmp_path / "a", in_order, lines=True), records) == answers


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["A", "E"], r"a:entry 2: answer is 'E', expected letters of A to D"),
        (["A"] * 5, "entry 5: more answers than the 4 questions"),
        ([{"question_id": 9, "choice": "A"}], "entry 1: question_id 9 is not among the questions"),
        ([{"question_id": [9], "choice": "A"}], r"entry 1: question_id is \[9\], expected int or str"),
        ([{"question_id": 1, "choice": "A"}] * 2, "entry 2: question_id 1 is answered twice"),
        ([{"question_id": 1, "image_id": "0.png", "choice": "A"}], "image_id is '0.png', expected '1.png'"),
        ([{"image_id": "1.png", "choice": "A"}], "image_id is '1.png', expected '0.png'"),
        ([{"question_id": 1}], "entry 1: no field 'answer'; found 'question_id'"),
        ([{"question_id": 1, "choice": 2}], "choice is 2, expected str or list or NoneType"),
        ([3], "answer is 3, expected letters"),
        (["A", "Bad", "C", "D"], "entry 2: answer is 'Bad', expected letters of A to D"),
        (["ad"] * 4, "entry 1: answer is 'ad', expected letters"),
        (["A cab"] * 4, "entry 1: answer is 'A cab', expected letters"),
        (["a, b and c"] * 4, "entry 1: answer is 'a, b and c', expected letters"),
        ([["A", "Bad"]] * 4, "entry 1: answer is .*, expected letters"),
        (["True"] * 4, r"entry 1: answer is 'True' \('True' is the text of A\), expected letters of A to D"),
        (["A", "B"], "2 answers for 4 questions: without question_id the file must have an entry for each"),
        ([{"choice": "A"}] * 3, "3 answers for 4 questions"),
        ([{"question_id": 1, "choice": "A"}, {"choice": "B"}], "entry 2: no question_id, unlike the answers before"),
        (["A", {"question_id": 1, "choice": "A"}], "entry 2: a question_id, unlike the answers before it"),
    ],
)
def test_answers_refuse(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        read_answers(saved(tmp_path / "a", entries), asked("ABCD"))


@pytest.mark.parametrize(
    ("chances", "letters"),
    [
        ([0.9, 0.2, 0.7, 0.1], "AC"),
        ([0.9, 0.2, 0.7, 0.95], "AC"),  # D is "No hallucination"
        ([0.1, 0.2, 0.3, 0.6], "D"),
        ([0.1, 0.4, 0.3, 0.2], "B"),  # the best of those that are unlikely
    ],
)
def test_several_letters_are_all_that_are_likely(chances, letters):
    record = Record("hallucination", "0.png", "", "", "", ("a cat", "a dog", "a cow", NONE))
    scores, best = [math.log(chance) for chance in chances], chances.index(max(chances))
    assert letters_of(record, best, scores, multi_answer=True) == letters
    assert letters_of(record, best, scores) == LETTERS[best]


def test_score_refuses():
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        score(asked("AB"), ["A"])
    with pytest.raises(ValueError, match="1 questions have no answer, the first is 1"):
        score(asked(["A", None]), ["A", "B"])
    wrongs = [({"method": "x"}, "unknown method 'x'"), ({"batch_size": 0}, "batch_size must be at least 1")]
    wrongs += [({"multi_answer": True}, "method is 'letters', not \"per_option\"")]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            ChoiceInference(**wrong)
    with pytest.raises(ValueError, match="shifts is 30, expected 1 to 24"):
        ChoiceInference(shifts=30).check(asked("A"))
    with pytest.raises(ValueError, match="template 9"):
        ChoiceInference(template=9).check(asked("A"))


# The command


@pytest.fixture
def command(capfd):
    def run(*words):
        capfd.readouterr()
        try:
            code = main(["evaluate", "choices", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def test_the_command_scores_answers_that_exist(tmp_path, command):
    records = asked("AABBCD")
    write(tmp_path / "q.json", records)
    saved(tmp_path / "ours.json", ["A", None, "B", "B", "D", None])
    saved(tmp_path / "theirs.json", ["A", "B", "B", "C", "D", "D"])
    words = ["--task", "factcheck", "--data", tmp_path / "q.json", "--answers", tmp_path / "ours.json"]
    code, out, err = command(*words, "--against", tmp_path / "theirs.json", "--output", tmp_path / "s.json")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["questions", "number", "micro_f1", "precision", "recall"]
    assert rows[1] == ["q", "6", "60.00", "75.00", "50.00"]
    assert ["False", "2", "100.00", "100.00", "100.00"] in rows and ["against", "6", *["50.00"] * 3] in rows
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["task"] == "factcheck" and report["inference"] is None
    assert report["sets"]["q"]["difference"]["micro_f1"]["difference"] == pytest.approx(0.1)
    # two seeds are averaged
    code, out, _ = command(*words, tmp_path / "theirs.json", "--output", tmp_path / "two.json")
    assert code == 0 and out.splitlines()[1].split()[2] == "55.00"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--answers", "a.json", "--against", "a.json", "a.json"], "1 draws of each question against 2"),
        (["--answers", "a.json", "a.json", "--data", "q.json", "q2.json", "q3.json"], "--answers lists 2 files for 3"),
        (["--answers", "b.json"], "b.json:entry 1: answer is 'X'"),
        (["--answers", "a.json", "--data", "t.json"], "t.json:entry 1: no field 'correct_choice'"),
        (["--answers", "a.json", "--base"], "--base needs --adapter"),
        (["--answers", "a.json", "--shifts", "round"], None),
        (["--model", "m"], "--model needs --images"),
        (["--model", "m", "--images", "."], "--model needs --output"),
        (["--model", "m", "--images", ".", "--output", "o.json", "--shifts", "99"], "shifts is 99, expected 1 to 24"),
        (["--model", "m", "--images", ".", "--output", "o.json", "--shifts", "round"], "unknown shifts 'round'"),
        (["--model", "m", "--images", ".", "--output", "o.json", "--template", "5"], "template 5 of factcheck"),
        (["--model", "m", "--images", ".", "--output", "o.json", "--batch-size", "0"], "batch_size must be at least 1"),
        (
            ["--model", "m", "--images", ".", "--output", "o.json", "--data", "half.json"],
            "1 of 2 questions have no answer",
        ),
        (
            ["--model", "m", "--images", ".", "--output", "done.json"],
            "has the answers of an earlier run: pass --resume",
        ),
        (
            ["--model", "m", "--images", ".", "--output", "x.answers"],
            "--output x.answers is the folder of the answers, expected a file with another name",
        ),
    ],
)
def test_the_command_refuses(tmp_path, command, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("0.png", "1.png"):
        (tmp_path / name).touch()
    for name in ("q", "q2", "q3"):
        write(f"{name}.json", asked("AB"))
    write("t.json", asked([None, None]))
    write("half.json", asked(["A", None]))
    saved(tmp_path / "a.json", ["A", "B"])
    saved(tmp_path / "b.json", ["X", "B"])
    (tmp_path / "done.answers").mkdir()
    (tmp_path / "done.answers" / "q.jsonl.partial").touch()
    data = [] if "--data" in words else ["--data", "q.json"]
    code, out, err = command("--task", "factcheck", *data, *words)
    if message is None:  # what does not matter for answers that exist
        assert code == 0
    else:
        assert code == 2 and message in err and out == ""
    assert not (tmp_path / "o.json").exists()


transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("PIL.Image")

import zoo  # noqa: E402

from hkdfast.choices import LETTERS, shifts  # noqa: E402
from hkdfast.data import challenge  # noqa: E402
from hkdfast.hf import choices as hf  # noqa: E402
from hkdfast.hf import generate  # noqa: E402

one_thread = zoo.one_thread
WORDS = (
    *"bcd.,",
    "claim",
    "context",
    "true",
    "false",
    "partially",
    "not",
    "verifiable",
    "letter",
    "with",
    "of",
    "option",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with model/, adapter/ (LoRA, and a head of its own), images/, and questions of both tasks."""
    home = tmp_path_factory.mktemp("choices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "WORDS", zoo.WORDS + WORDS)
        zoo.processor().save_pretrained(home / "model")
    model = zoo.build("llava", seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and parameter.dim() > 1:
                parameter.mul_(2)  # so that answers depend on image, question and order
    model.save_pretrained(home / "model")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted.get_output_embeddings().weight.copy_(torch.randn(61, zoo.WIDTH) * 0.3)
    adapted.save_pretrained(home / "adapter")
    (home / "images").mkdir()
    for i in range(3):
        zoo.picture(i).save(home / f"images/{i}.png")
    images = [f"{i % 3}.png" for i in range(7)]
    claims = [f"There is {('a cat', 'no dog', 'one cow')[i // 3]} in the image" for i in range(7)]
    records = asked("ABCDABC", images=images)
    write(home / "claims.json", [replace(one, statement=claims[i]) for i, one in enumerate(records)])
    options = ("a cat", "one dog", "the cow", NONE)
    captions = [
        Record("hallucination", images[i], "a cat, one dog, the cow.", "", "?", options[: 3 + i % 2], "A", f"c{i}")
        for i in range(7)
    ]
    write(home / "captions.json", captions)
    return home


def by_hand(model, processor, record, home, how):
    """(shifts, options) log-probabilities in float64 of one prompt at a time, from the model's own full logits."""
    orders = shifts(len(record.options), how, [i for i, one in enumerate(record.options) if one == NONE])
    found = torch.empty(len(orders), len(record.options), dtype=torch.float64)
    tokens = [processor.tokenizer.convert_tokens_to_ids(letter.lower()) for letter in LETTERS[: len(record.options)]]
    for row, order in zip(found, orders, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question(record, order)}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=generate.read_image(home / "images" / record.image), return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1, tokens].double()
        row[list(order)] = logits.log_softmax(0)
    return found


@pytest.mark.parametrize("how", ["cyclic", "none", 3])
@pytest.mark.parametrize("name", ["claims", "captions"])
def test_a_model_answers_as_one_prompt_at_a_time(home, tmp_path, name, how):
    model, processor = generate.load(home / "model", device="cpu")
    task = "factcheck" if name == "claims" else "hallucination"
    records = read(home / f"{name}.json", task)
    inference = ChoiceInference(shifts=how, fixed=TASKS[task].fixed, batch_size=3)
    lines = hf.answer_file(model, processor, records, home / "images", tmp_path / "a.jsonl", inference, progress=False)
    for record, line in zip(records, lines, strict=True):
        expected = by_hand(model, processor, record, home, how)
        mean = expected.mean(0).log_softmax(0)
        assert line["scores"] == pytest.approx(mean.tolist(), abs=1e-5)
        assert line["choice"] == LETTERS[mean.argmax()] and line["unshifted"] == LETTERS[expected[0].argmax()]
        assert (line["question_id"], line["prompt"]) == (record.question_id, question(record))
    assert read_answers(tmp_path / "a.jsonl", records) == [line["choice"] for line in lines]
    assert len({tuple(round(score, 3) for score in line["scores"]) for line in lines}) > 3  # else this says little


@pytest.mark.parametrize(
    "options",
    [
        {"method": "per_option"},
        {"method": "per_option", "multi_answer": True},
        {"method": "calibrated"},
        {"scoring": "sequence"},
        {"aggregate": "vote"},
    ],
)
def test_other_forms_run_on_a_model(home, tmp_path, options):
    model, processor = generate.load(home / "model", device="cpu")
    records = read(home / "captions.json", "hallucination")[:2]
    inference = ChoiceInference(**options)
    lines = hf.answer_file(model, processor, records, home / "images", tmp_path / "a.jsonl", inference, progress=False)
    for record, line in zip(records, lines, strict=True):
        finite = [value for value in line["scores"] if value is not None]
        assert len(line["scores"]) == len(record.options)
        assert set(line["choice"]) <= set(LETTERS[: len(record.options)])
        if options.get("method") == "per_option":
            best = max(range(len(record.options)), key=line["scores"].__getitem__)
            assert line["choice"] == letters_of(record, best, line["scores"], "multi_answer" in options)
        else:
            assert sum(map(math.exp, finite)) == pytest.approx(1)
    if "scoring" in options:  # here a letter is one token, and the end of its turn follows in its own context
        token = hf.answer_file(model, processor, records, home / "images", tmp_path / "b.jsonl", progress=False)
        assert [line["scores"] for line in token] != [line["scores"] for line in lines]


def test_the_command_asks_a_model_with_and_without_its_adapter(home, tmp_path, command):
    words = [
        "--task",
        "hallucination",
        "--data",
        home / "captions.json",
        "--images",
        home / "images",
        "--batch-size",
        2,
    ]
    model = ["--model", home / "model", "--adapter", home / "adapter", "--device", "cpu", "--resamples", 100]
    code, out, err = command(*words, *model, "--base", "--output", tmp_path / "s.json")
    assert code == 0, err
    report = json.loads((tmp_path / "s.json").read_text())
    found = report["sets"]["captions"]
    assert found["mean"]["questions"] == found["unshifted"]["mean"]["questions"] == 7
    assert report["inference"]["fixed"] == [NONE]
    gap = found["mean"]["micro_f1"] - found["against"]["mean"]["micro_f1"]
    assert found["difference"]["micro_f1"]["difference"] == pytest.approx(gap)
    shifted = found["mean"]["micro_f1"] - found["unshifted"]["mean"]["micro_f1"]
    assert found["shift"]["micro_f1"]["difference"] == pytest.approx(shifted)
    files = sorted(file.name for file in (tmp_path / "s.answers").iterdir())
    assert files == ["captions.base.json", "captions.base.jsonl", "captions.json", "captions.jsonl"]
    # the base is the model itself: the adapter's own head is off with it
    records = read(home / "captions.json", "hallucination")
    plain, processor = generate.load(home / "model", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "s.answers" / "captions.base.jsonl").read_text().splitlines()]
    for record, line in zip(records, lines, strict=True):
        mean = by_hand(plain, processor, record, home, "cyclic").mean(0).log_softmax(0)
        assert line["scores"] == pytest.approx(mean.tolist(), abs=1e-5)
    # the results score again to the same numbers
    results = [tmp_path / "s.answers" / f"captions{kind}.json" for kind in ("", ".base")]
    again = ["--answers", results[0], "--against", results[1], "--resamples", 100, "--output", tmp_path / "again.json"]
    code, _, err = command(*words[:6], *again)
    assert code == 0, err
    scored = json.loads((tmp_path / "again.json").read_text())["sets"]["captions"]
    assert {name: found[name] for name in scored} == scored
    # nothing that is done is written over
    code, _, err = command(*words, *model, "--output", tmp_path / "s.json")
    assert code == 2 and "--resume" in err


def test_a_stopped_run_goes_on(home, tmp_path, command, monkeypatch):
    words = [
        "--task",
        "factcheck",
        "--data",
        home / "claims.json",
        "--images",
        home / "images",
        "--model",
        home / "model",
    ]
    words += ["--batch-size", 2, "--device", "cpu"]
    assert command(*words, "--output", tmp_path / "whole.json")[0] == 0
    inner, batches = hf.head_fn, []

    def stopping(model):
        run = inner(model)

        def counted(batch):
            batches.append(len(batch["input_ids"]))
            if len(batches) == 3:
                raise ValueError("power cut")
            return run(batch)

        return counted

    monkeypatch.setattr(hf, "head_fn", stopping)
    code, _, err = command(*words, "--output", tmp_path / "cut.json")
    assert code == 2 and "power cut" in err
    partial = tmp_path / "cut.answers" / "claims.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 4 and not (tmp_path / "cut.json").exists()
    # a line that the stop cut in two, in the middle of a batch: the batch is done again
    partial.write_text("".join(partial.read_text().splitlines(keepends=True)[:3]) + '{"question_id": 3, "ima')
    assert command(*words, "--output", tmp_path / "cut.json")[0] == 2  # not without being told
    assert command(*words, "--output", tmp_path / "cut.json", "--resume")[0] == 0
    assert batches == [8, 8, 8, 8, 8, 4]
    for name in ("claims.jsonl", "claims.json"):
        assert (tmp_path / "cut.answers" / name).read_bytes() == (tmp_path / "whole.answers" / name).read_bytes()
    assert json.loads((tmp_path / "cut.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert command(*words, "--output", tmp_path / "cut.json", "--resume")[0] == 0
    assert batches == [8, 8, 8, 8, 8, 4]
    # other settings are another run
    assert command(*words, "--shifts", "none", "--output", tmp_path / "cut.json", "--resume")[0] == 0
    assert batches[6:] == [2, 2, 2, 1]


def test_a_test_set_is_answered_without_being_scored(home, tmp_path, command):
    write(tmp_path / "t.json", [replace(one, answer=None) for one in read(home / "claims.json", "factcheck")])
    words = ["--task", "factcheck", "--data", tmp_path / "t.json", "--images", home / "images", "--device", "cpu"]
    code, out, err = command(*words, "--model", home / "model", "--output", tmp_path / "s.json")
    assert code == 0, err
    assert out == "t: answered, but not scored, because its questions have no answers\n"
    assert json.loads((tmp_path / "s.json").read_text())["sets"] == {}
    found = read_answers(tmp_path / "s.answers" / "t.json", read(tmp_path / "t.json", "factcheck", labels=None))
    assert len(found) == 7 and set(found) <= set("ABCD")


def test_a_broken_image_is_named_before_the_model_is_loaded(tmp_path, command):
    write(tmp_path / "q.json", asked("A"))
    (tmp_path / "0.png").write_text("not an image")
    words = ["--task", "factcheck", "--data", tmp_path / "q.json", "--images", tmp_path, "--model", tmp_path / "none"]
    code, _, err = command(*words, "--output", tmp_path / "s.json")
    assert code == 2 and "0.png" in err and "has no format that Pillow reads" in err
