"""POPE and MME scored as the official scripts do, quirks included; intervals that cover what they promise."""

import json
import math

import pytest
import torch

from hkdfast.data import outputs
from hkdfast.evaluate import bootstrap, mme, pope
from hkdfast.evaluate.pope import Graded, Question

# (answer, right if the label is yes, right if the label is no), read off the text of the scripts by hand
VCD = [
    ("Yes", True, False),
    ("yes, there is a cat.", True, False),
    ("YES", True, False),
    ("No", False, True),
    ("There is not a cat", False, True),  # "not" holds "no"
    ("I don't know", False, True),  # and so does "know"
    ("A field of snow", False, True),
    ("It has two eyes", True, False),  # "eyes" holds "yes"
    ("maybe", False, False),  # neither word: wrong under both
    ("", False, False),
    ("Nein", False, False),
    ("yes and no", True, True),  # both words: right under both
    ("Yes, a snowman", True, True),
]
POPE = [
    ("Yes", True, False),
    ("No", False, True),
    ("no", False, True),
    ("NO", True, False),  # only these three spellings are a no
    ("No, there is not", False, True),
    ("There is, not here", False, True),
    ("Yes. There is no dog.", True, False),  # only the first sentence counts
    (". No", True, False),  # which may be empty
    ("None", True, False),
    ("I know", True, False),
    ("A field of snow", True, False),
    ("maybe", True, False),  # everything else is a yes
    ("", True, False),
    ("\nNo", True, False),  # words are parted by spaces only
    ("  No", False, True),
]


@pytest.mark.parametrize(("rule", "table"), [("vcd", VCD), ("pope", POPE)])
def test_rules(rule, table):
    for answer, under_yes, under_no in table:
        assert pope.is_right(answer, "yes", rule) is under_yes, answer
        assert pope.is_right(answer, "no", rule) is under_no, answer


def test_answers_that_are_not_plain_are_counted_and_change_no_number():
    plain = ["Yes", "no.", "The answer is YES!", "No, there is no cat", "yes\nyes", "_no_", "Yes1"]
    other = ["", "maybe", "not", "I know", "snow", "eyes", "yes and no", "No. Yes", "Nein", "1", "yesno"]
    assert pope.count_unreadable(plain) == 0
    assert pope.count_unreadable(other) == len(other)
    assert pope.count_unreadable([*plain, *other, "Yes"]) == len(other)


def asked(labels, images=None):
    return [
        Question(i, images[i] if images else f"{i}.png", "Is there a cat in the image?", label)
        for i, label in enumerate(labels)
    ]


def test_score_by_hand():
    labels = ["yes"] * 5 + ["no"] * 5
    answers = ["Yes", "yes", "Yes, a cat", "No", "maybe", "No", "not", "I know", "no", "maybe"]
    # vcd: 3 of 5 yes found; of the noes "maybe" alone counts as a yes
    score = pope.score(pope.grade(asked(labels), answers, "vcd"))
    assert score == {
        "accuracy": 7 / 10, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5),
        "yes_rate": 4 / 10, "questions": 10,
    }  # fmt: skip
    # pope: "maybe" and "I know" are a yes
    score = pope.score(pope.grade(asked(labels), answers, "pope"))
    assert score == {
        "accuracy": 7 / 10, "precision": 4 / 6, "recall": 4 / 5, "f1": 2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5),
        "yes_rate": 6 / 10, "questions": 10,
    }  # fmt: skip


def test_the_yes_rate_of_the_vcd_script_counts_by_the_label():
    # "yes and no" counts as yes under yes and as no under no; "maybe" the other way round
    assert pope.score(pope.grade(asked(["yes", "no"]), ["yes and no"] * 2))["yes_rate"] == 0.5
    assert pope.score(pope.grade(asked(["yes", "no"]), ["maybe"] * 2))["yes_rate"] == 0.5
    assert pope.score(pope.grade(asked(["yes"] * 2), ["yes and no"] * 2))["yes_rate"] == 1
    assert pope.score(pope.grade(asked(["no"] * 2), ["maybe"] * 2))["yes_rate"] == 1


@pytest.mark.parametrize(
    ("labels", "answers", "expected"),
    [
        (["yes", "no"], ["no", "no"], {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}),
        (["no", "no"], ["no", "no"], {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}),
        (["yes", "yes"], ["yes", "no"], {"accuracy": 0.5, "precision": 1, "recall": 0.5, "f1": 2 / 3, "yes_rate": 0.5}),
    ],
)
def test_ratios_over_nothing_are_zero(labels, answers, expected):
    score = pope.score(pope.grade(asked(labels), answers))
    assert {name: score[name] for name in expected} == pytest.approx(expected, abs=1e-15)


# Files


def write(path, *records):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in records))
    return path


def line(number, **other):
    text = "Is there a dog in the image?"
    return {"question_id": number, "image": f"{number}.png", "text": text, "label": "no"} | other


def test_read_questions(tmp_path):
    path = write(tmp_path / "q.json", line(1, label="Yes "), "\n", line("two"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    text = "Is there a dog in the image?"
    assert pope.read_questions(path) == [Question(1, "1.png", text, "yes"), Question("two", "two.png", text, "no")]
    assert [question.label for question in pope.read_questions(path, labels=False)] == [None, None]


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"question_id": 2, "image"', r"q\.json:2: not JSON"),
        ("[1, 2]\n", r"q\.json:2: expected one JSON object per line, found a list"),
        (without(line(2), "image"), r"q\.json:2: no field 'image'; found 'question_id', 'text', 'label'"),
        (line(2, text=3), r"q\.json:2: text is 3, expected str"),
        (line(True), r"q\.json:2: question_id is True, expected int or str"),
        (line(2, label="maybe"), r"q\.json:2: label is 'maybe', expected 'yes' or 'no'"),
        (line(1), r"q\.json:2: question_id 1 is already on line 1"),
    ],
)
def test_read_questions_refuses(tmp_path, second, message):
    with pytest.raises(ValueError, match=message):
        pope.read_questions(write(tmp_path / "q.json", line(1), second))


def test_read_refuses_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "q.json").write_bytes(json.dumps(line(1)).encode() + b'\n{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"q\.json:2: not UTF-8"):
        pope.read_questions(tmp_path / "q.json")
    with pytest.raises(ValueError, match="no lines"):
        pope.read_questions(write(tmp_path / "empty.json"))
    with pytest.raises(FileNotFoundError, match="none.json"):
        pope.read_questions(tmp_path / "none.json")


def test_images_must_be_there(tmp_path):
    path = write(tmp_path / "q.json", *(line(i) for i in range(4)))
    (tmp_path / "0.png").touch()
    with pytest.raises(FileNotFoundError, match=r"3 of 4 images of .*q\.json are not in .*'1\.png'"):
        pope.read_questions(path, images=tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        pope.read_questions(path, images=tmp_path / "none")
    for i in range(4):
        (tmp_path / f"{i}.png").touch()
    assert len(pope.read_questions(path, images=tmp_path)) == 4


def test_read_answers_in_both_formats(tmp_path):
    questions = asked(["yes", "no"])
    vcd = write(tmp_path / "v.jsonl", *({"question_id": i, "text": f"answer {i}", "metadata": {}} for i in range(2)))
    own = write(tmp_path / "p.jsonl", *({"question": questions[i].text, "answer": f"answer {i}"} for i in range(2)))
    assert pope.read_answers(vcd, questions) == pope.read_answers(own, questions) == ["answer 0", "answer 1"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"question_id": 1, "text": "no"}, {"question_id": 0, "text": "no"}],
            r"a\.jsonl:1: question_id is 1, expected 0",
        ),
        (
            [{"question_id": 0, "text": "no"}, {"question_id": 0, "text": "no"}],
            r"a\.jsonl:2: question_id is 0, expected 1",
        ),
        ([{"question_id": 0, "text": "no"}], "1 answers for 2 questions"),
        ([{"question_id": i, "text": "no"} for i in range(3)], "3 answers for 2 questions"),
        ([{"question_id": 0, "reply": "no"}], r"a\.jsonl:1: no field 'answer'"),
        ([{"question": "Is it?", "answer": "no"}], r"a\.jsonl:1: question is 'Is it\?', expected 'Is there a cat"),
        ([{"text": "no"}], r"a\.jsonl:1: no field 'question_id'"),
    ],
)
def test_read_answers_refuses(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        pope.read_answers(write(tmp_path / "a.jsonl", *records), asked(["yes", "no"]))


def test_mark_refuses():
    with pytest.raises(ValueError, match="unknown rule 'lenient', expected one of vcd, pope"):
        pope.grade(asked(["yes"]), ["yes"], "lenient")
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        pope.grade(asked(["yes", "no"]), ["yes"])
    with pytest.raises(ValueError, match="1 questions have no label"):
        pope.grade(asked(["yes", None]), ["yes", "no"])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "scores.json"
    with pytest.raises(RuntimeError), outputs.replacing(path) as file:
        file.write("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with outputs.replacing(path) as file:
        file.write("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


# Intervals


def marks(right, label=None, images=None):
    right = torch.as_tensor(right).bool()
    label = torch.ones_like(right) if label is None else torch.as_tensor(label).bool()
    return Graded(tuple(images or map(str, range(len(right)))), label, right)


def random_marks(n, share, seed, label=None, images=None):
    generator = torch.Generator().manual_seed(seed)
    return marks(torch.rand(n, generator=generator) < share, label, images)


def by_loops(ours, theirs, metric, times, names):
    """The mean difference of one resample, by lists and counts."""
    total = 0
    for pair in zip(ours, theirs, strict=True):
        found = []
        for one in pair:
            tp = fp = tn = fn = 0
            for image, label, right in zip(one.images, one.label.tolist(), one.right.tolist(), strict=True):
                weight = times[names.index(image)]
                tp, fn = tp + weight * (label and right), fn + weight * (label and not right)
                tn, fp = tn + weight * (not label and right), fp + weight * (not label and not right)
            n = tp + fp + tn + fn
            found.append(
                {
                    "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0,
                    "accuracy": (tp + tn) / n,
                    "yes_rate": (tp + fp) / n,
                }[metric]
            )
        total += found[0] - found[1]
    return total / len(ours)


@pytest.mark.parametrize("metric", ["f1", "accuracy", "yes_rate"])
def test_interval_is_that_of_resampled_lists(metric):
    # three pairs: two on the same images, one on others, in another order
    label = [1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    images = ["a", "b", "c", "a", "b", "c", "d", "d", "d", "e", "e", "e"]
    elsewhere = ["z", "y", "x", "z"] * 3
    ours = [random_marks(12, 0.8, i, label, images if i < 2 else elsewhere) for i in range(3)]
    theirs = [random_marks(12, 0.5, 10 + i, label, images if i < 2 else elsewhere) for i in range(3)]
    strata, names = [5, 3], list("abcdezyx")
    drawn = bootstrap.draw(strata, 40, torch.Generator().manual_seed(3))
    assert drawn[:, :5].sum(1).tolist() == [5] * 40
    assert drawn[:, 5:].sum(1).tolist() == [3] * 40
    expected = torch.tensor([by_loops(ours, theirs, metric, row, names) for row in drawn.tolist()], dtype=torch.float64)
    found = bootstrap.paired(ours, theirs, metric, level=0.9, resamples=40, seed=3)
    bounds = expected.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    assert [found.low, found.high] == pytest.approx(bounds, abs=1e-12)
    assert found.difference == pytest.approx(by_loops(ours, theirs, metric, [1] * 8, names), abs=1e-12)
    assert (found.images, found.pairs, found.resamples) == (8, 3, 40)


def test_width_of_a_known_distribution():
    # 400 independent questions: the difference of accuracies has a known standard error
    ours, theirs = random_marks(400, 0.9, 0), random_marks(400, 0.7, 1)
    gap = ours.right.double() - theirs.right.double()
    expected = 2 * 1.96 * gap.std(correction=0).item() / 400**0.5
    found = bootstrap.paired([ours], [theirs], "accuracy")
    assert found.high - found.low == pytest.approx(expected, rel=0.04)
    assert found.low < found.difference < found.high


def test_questions_of_one_image_count_as_one():
    ours, theirs = random_marks(200, 0.9, 0), random_marks(200, 0.7, 1)
    one = bootstrap.paired([ours], [theirs], "accuracy")
    # six copies of every question on its own image are no news
    images = [str(i // 6) for i in range(1200)]
    six = [marks(each.right.repeat_interleave(6), images=images) for each in (ours, theirs)]
    again = bootstrap.paired([six[0]], [six[1]], "accuracy")
    assert (again.low, again.high, again.images) == pytest.approx((one.low, one.high, one.images), abs=1e-12)
    # on images of their own they would be
    apart = [marks(each.right) for each in six]
    apart = bootstrap.paired([apart[0]], [apart[1]], "accuracy")
    assert apart.high - apart.low == pytest.approx((one.high - one.low) / 6**0.5, rel=0.06)


def test_coverage():
    """95 % intervals hold the truth about 95 % of the time when answers hang together by image; naive ones do not."""
    generator = torch.Generator().manual_seed(0)
    trials, images, each = 200, 60, 6
    names = [str(i // each) for i in range(images * each)]
    covered, naive = 0, 0
    for trial in range(trials):
        # the image decides whether theirs is right 95 % or 15 % of the time, ours always 95 %: 40 points apart
        easy = (torch.rand(images, generator=generator) < 0.5).repeat_interleave(each)
        ours = torch.rand(images * each, generator=generator) < 0.95
        theirs = torch.rand(images * each, generator=generator) < torch.where(easy, 0.95, 0.15)
        for clustered in (True, False):
            sides = ([marks(side, images=names if clustered else None)] for side in (ours, theirs))
            found = bootstrap.paired(*sides, "accuracy", resamples=300, seed=trial)
            holds = found.low <= 0.4 <= found.high
            covered, naive = covered + (clustered and holds), naive + (not clustered and holds)
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)
    assert naive / trials < 0.8


def test_question_sets_keep_their_size():
    # +1 on every question of one set and 0 on the other: with the sets drawn apart there is nothing to be unsure of
    better = (
        marks([1] * 30, images=[f"a{i}" for i in range(30)]),
        marks([0] * 30, images=[f"a{i}" for i in range(30)]),
    )
    same = (marks([1] * 50, images=[f"b{i}" for i in range(50)]),) * 2
    found = bootstrap.paired([better[0], same[0]], [better[1], same[1]], "accuracy", resamples=200)
    assert (found.low, found.difference, found.high) == (0.5, 0.5, 0.5)


def test_sources_keep_equal_file_names_apart():
    questions = asked(["yes", "no"], ["1.png", "2.png"])
    sets = [pope.grade(questions, ["yes", "no"], source=source) for source in ("one/", "two/")]
    assert bootstrap.paired(sets, sets, resamples=10).images == 4
    assert bootstrap.paired([sets[0]] * 2, [sets[0]] * 2, resamples=10).images == 2


def test_intervals_repeat_and_equal_systems_do_not_differ():
    ours, theirs = random_marks(100, 0.8, 0), random_marks(100, 0.6, 1)
    first = bootstrap.paired([ours], [theirs], resamples=500, seed=5)
    assert first == bootstrap.paired([ours], [theirs], resamples=500, seed=5)
    assert first != bootstrap.paired([ours], [theirs], resamples=500, seed=6)
    same = bootstrap.paired([ours], [ours], resamples=100)
    assert (same.low, same.difference, same.high) == (0, 0, 0)


def test_resamples_come_in_blocks(monkeypatch):
    ours, theirs = random_marks(50, 0.8, 0), random_marks(50, 0.6, 1)
    whole = bootstrap.paired([ours], [theirs], "accuracy", resamples=107)
    monkeypatch.setattr(bootstrap, "BLOCK", 50 * 10)
    assert bootstrap.paired([ours], [theirs], "accuracy", resamples=107) == whole


def test_paired_refuses():
    one, other = marks([1, 0]), marks([1, 0], images=["x", "y"])
    for arguments, options, message in [
        (([one], [one, one]), {}, "1 graded sets against 2"),
        (([], []), {}, "at least one"),
        (([one], [other]), {}, "pair 0 is not on the same questions"),
        (([one, one], [one, marks([1, 0], [1, 0])]), {}, "pair 1 is not on the same questions"),
        (([one], [one]), {"metric": "bleu"}, "unknown metric 'bleu', expected one of accuracy, precision"),
        (([one], [one]), {"level": 95}, "level is 95, expected 0 < level < 1"),
        (([one], [one]), {"resamples": 0}, "resamples is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            bootstrap.paired(*arguments, **options)


# MME


def test_mme_by_hand(tmp_path):
    rows = [
        ("1.png", "Is there a cat?", "Yes", "Yes"),
        ("1.png", "Is there a dog?", "No", "No."),  # both right
        ("2.png", "Is there a cat?", "Yes", " yes"),  # four characters are looked at
        ("2.png", "Is there a dog?", "No", "The answer is no"),  # too late: "the "
        ("3.png", "Is there a cat?", "Yes", "I know"),  # "i kn" is neither
        ("3.png", "Is there a dog?", "No", "Not"),
        ("4.png", "Is there a cat?", "Yes", "no yes"),
        ("4.png", "Is there a dog?", "No", "know"),
    ]
    path = tmp_path / "existence.txt"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    score = mme.score(mme.read(path))
    assert score == {"accuracy": 5 / 8, "accuracy_plus": 1 / 4, "score": 62.5 + 25, "questions": 8, "unreadable": 5}
    assert mme.score_folder(tmp_path) == {"existence": score}
    for name in mme.HALLUCINATION:
        (tmp_path / f"{name}.txt").write_text(path.read_text())
    assert mme.score_folder(tmp_path)["hallucination"] == {"score": 4 * 87.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.png\tq\tYes\n", r"count\.txt:1: 3 fields"),
        ("1.png\tq\tYes\tyes\n1.png\tq\tPerhaps\tyes\n", r"count\.txt:2: truth is 'Perhaps', expected Yes or No"),
        ("1.png\tq\tYes\tyes\n2.png\tq\tNo\tyes\n", r"count\.txt:2: image '2\.png' follows '1\.png'"),
        ("1.png\tq\tYes\tyes\n", "1 questions, expected two per image"),
        ("", "0 questions"),
    ],
)
def test_mme_refuses(tmp_path, text, message):
    (tmp_path / "count.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        mme.score_folder(tmp_path)


def test_mme_reads_lines_as_they_were_written(tmp_path):
    text = "\ufeff1.png\tq\tYes\tyes\u2028and more\x0c\r\n1.png\tq\tNo\tno"
    (tmp_path / "a.txt").write_bytes(text.encode())
    rows = mme.read(tmp_path / "a.txt")
    assert rows == [("1.png", "q", "yes", "yes\u2028and more\x0c"), ("1.png", "q", "no", "no")]
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\n2.png\tq\tYes\t\xff")
    with pytest.raises(ValueError, match="a.txt:3: not UTF-8"):
        mme.read(tmp_path / "a.txt")


def test_mme_needs_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .txt file"):
        mme.score_folder(tmp_path)
