"""The study of HKD4VLM's reconstruction."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hkd import cost, export, study, table
from hkd.cells import Cells
from hkd.chains import asking, load
from hkd.command import parts
from hkd.study import make_cell, stage_file, tuned
from hkd.tune import SPLITS, Reader, Stage, Track, examine, lessons, pictures, seen
from hkdfast import UNLABELED
from hkdfast.batch import answer_rows
from hkdfast.choices import LETTERS
from hkdfast.evaluate.choices import choice, score
from world.results import RESULTS
from world.tinyllava import normalised, prompt, see
from world.tracks import (
    TEMPLATES,
    TRACKS,
    ask,
    file_name,
    photos,
)

pytestmark = pytest.mark.study


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study on few images, and where it may write."""
    monkeypatch.setitem(SPLITS, "train", (128, 21))
    monkeypatch.setitem(SPLITS, "unlabelled", (150, 23))
    monkeypatch.setitem(SPLITS, "test", (40, 22))
    for made in (pictures, seen):
        made.cache_clear()
    yield tmp_path
    for made in (pictures, seen):
        made.cache_clear()


@pytest.mark.parametrize("size", "LMS")
def test_an_exported_chain_loads_as_any_model_and_answers_as_the_study_asks_it(size, tmp_path):
    images, contents, _ = photos(5, 11)
    model, tokenizer = load(1, size)
    export.write(f"chains/seed1/{size}", tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    for track in TRACKS:
        asked = [choice(record, TEMPLATES[track]) for record in ask(track, contents, 2)]
        batch = processor(
            images=[Image.fromarray(image) for image in images],
            text=[prompt(one.prompt()) for one in asked],
            return_tensors="pt",
        )
        with torch.no_grad():
            expected = exported(**batch).logits[:, -1]
            reader = Reader(tokenizer, type("Few", (), {"seen": see(model, batch["pixel_values"])[None]}))
            head = reader.rows(model)(reader([one.prompt() for one in asked], [one.image for one in asked]))
        torch.testing.assert_close(head.hidden @ head.weight.T, expected, atol=1e-4, rtol=1e-4)
        assert tokenizer.unk_token_id not in batch["input_ids"]


@pytest.mark.parametrize("size", "LMS")
def test_every_model_has_emerged(size):
    """Pretrained, without any tuning: far from chance, 25 %, on questions that are harder than those it learnt."""
    model, tokenizer = load(1, size)
    for track in TRACKS:
        images, contents, _ = photos(300, 31)
        few = type("Few", (), {})()
        few.seen = see(model, normalised(images))[None]
        few.choices = [choice(record, TEMPLATES[track]) for record in ask(track, contents, 31)]
        truth = np.array([LETTERS.index(record.answer) for record in ask(track, contents, 31)])
        assert (examine(model, Reader(tokenizer, few))[0, 1] == truth).mean() > 0.45


def test_rewrites_change_no_labelled_question(small):
    track = Track("factcheck", "train")
    model, tokenizer = load(1, "S")
    reader = Reader(tokenizer, track)
    plain = next(lessons(reader, Stage("S", 1), 1, 7))
    true = next(lessons(reader, Stage("S", 1, rewrites=2), 1, 7))
    open_ = next(lessons(reader, Stage("S", 1, teachers=(("L", None),), rewrites=2), 1, 7))
    assert torch.equal(answer_rows(plain)[1], answer_rows(true)[1][::3])
    assert torch.equal(answer_rows(plain)[1], answer_rows(open_)[1][::3])
    assert (answer_rows(open_)[1] == UNLABELED).view(-1, 3).tolist() == [[False, True, True]] * 64
    with torch.no_grad():
        alone, beside = reader.rows(model)(plain), reader.rows(model)(open_)
    torch.testing.assert_close(beside.hidden[::3], alone.hidden, atol=1e-5, rtol=1e-4)


def test_unlabelled_questions_go_beside_the_labelled_ones_and_tell_no_answer(small):
    more = Track("hallucination", "unlabelled")
    assert {record.answer for record in more.records} == {None} == set(more.answers)
    reader = Reader(load(1, "S")[1], Track("hallucination", "train"))
    stage = Stage("S", 1, teachers=(("L", None),), rewrites=1)
    for plain, both in zip(lessons(reader, stage, 3, 7), lessons(reader, stage, 3, 7, more), strict=True):
        for name in ("input_ids", "seen", "shift_labels", "distill_only"):
            assert len(both[name]) == 128 and torch.equal(both[name][:64], plain[name])
        labels = answer_rows(both)[1].view(128, 2)
        assert (labels[64:] == UNLABELED).all() and (labels[:64, 0] >= 0).all()
        assert not torch.equal(both["seen"][64:], plain["seen"])


def test_views_are_of_the_same_images(small):
    track = Track("hallucination", "train", 3)
    assert torch.equal(track.seen[0], Track("hallucination", "train").seen[0])
    assert not torch.equal(track.seen[1], track.seen[2])
    whole = track.seen.float().mean(2)  # over patches, for a flip moves objects from one to another
    near = torch.cdist(whole[1], whole[0]).argmin(1)
    assert (near == torch.arange(128)).float().mean() > 0.8
    reader, stage = Reader(load(1, "S")[1], track), Stage("S", 1, views=3)
    plain, changed = (next(lessons(reader, one, 1, 7)) for one in (replace(stage, views=1), stage))
    assert torch.equal(plain["input_ids"], changed["input_ids"]) and not torch.equal(plain["seen"], changed["seen"])


def test_a_pyramid_stage_is_kept_and_not_run_again(small, monkeypatch):
    for name in ("pyramid M", "pyramid"):
        monkeypatch.setitem(study.STAGES, name, replace(study.STAGES[name], epochs=1))
    model, _ = tuned("hallucination", 1, "S", "pyramid", small)
    before = load(1, "S")[0]
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert stage_file(small, "hallucination", 1, "pyramid M/live").exists()
    monkeypatch.setattr(study, "fit", None)  # whoever trains now fails
    again, _ = tuned("hallucination", 1, "S", "pyramid", small)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(
        tuned("hallucination", 1, "M", "pyramid/live", small)[0].lm_head.weight, before.lm_head.weight
    )


def test_every_cell_of_the_results_is_of_this_study():
    cells = Cells(RESULTS / "hkd", RESULTS / "none")
    for track in TRACKS:
        for seed in (1, 2, 3):
            for system in study.SYSTEMS:
                answers = study.read_cell(cells, track, seed, system)  # an error where the recipe is another
                assert answers.shape == (2, 2, SPLITS["test"][0]) and answers.dtype == np.int8


def test_new_cells_are_gathered_and_those_of_another_recipe_are_refused(tmp_path):
    cells, one, two = Cells(tmp_path, tmp_path / "new"), np.int8([[[1, 2]]]), np.int8([[[3, 0]]])
    file = tmp_path / "factcheck.npz"
    assert cells.read("factcheck", 1, "whole - ternary", "a") is None
    cells.gather("factcheck", {(1, "whole - ternary"): "a"})
    assert not file.exists()
    cells.write("factcheck", 1, "whole - ternary", "a", one)
    cells.write("factcheck", 2, "whole - ternary", "b", two)
    cells.gather("factcheck", {(1, "whole - ternary"): "a"})
    cells.gather("factcheck", {(2, "whole - ternary"): "b", (3, "whole - ternary"): "c"})
    for fresh in (tmp_path / "new", tmp_path / "none"):  # as long as the new cells are there, and after
        cells = Cells(tmp_path, fresh)
        assert (cells.read("factcheck", 1, "whole - ternary", "a") == one).all()
        assert (cells.read("factcheck", 2, "whole - ternary", "b") == two).all()
    assert cells.read("factcheck", 1, "whole", "a") is None and cells.read("hallucination", 1, "whole", "a") is None
    with pytest.raises(ValueError, match=r"factcheck\.npz holds answers of 'whole - ternary', seed 2.*--remake"):
        cells.read("factcheck", 2, "whole - ternary", "c")
    assert cells.read("factcheck", 2, "whole - ternary", "c", remake=True) is None
    cells.write("factcheck", 2, "whole - ternary", "c", one)
    assert (cells.read("factcheck", 2, "whole - ternary", "c") == one).all()
    before = file.read_bytes()
    cells.gather("factcheck", {(2, "whole - ternary"): "b"})  # what is gathered already is not written again
    assert file.read_bytes() == before
    cells.gather("factcheck", {(2, "whole - ternary"): "c"})
    assert (Cells(tmp_path, tmp_path / "nowhere").read("factcheck", 2, "whole - ternary", "c") == one).all()


def test_what_a_system_needs_is_run_once_and_in_order(tmp_path):
    needed = study.missing("hallucination", 1, "whole - augmentation", tmp_path)
    assert needed == ["pyramid M", "pyramid", "large", "whole - augmentation"]
    found = parts([("hallucination", 1, name) for name in needed], [("hallucination", 1, "whole - augmentation")])
    titles = [title.split(",")[0] for title, _ in found.values()]
    assert titles == [*(f"stage {k} of 4" for k in (1, 2, 3, 4)), "answers"]
    assert all(work > 0 for _, work in found.values())


def test_what_a_table_means_is_one_sentence():
    found = {"systems": {"whole": {"against small": [7.0, 4.8, 9.8], "against large": [-0.1, -1.0, 0.8]}}}
    assert table.meaning(found, "factcheck") == (
        "On factcheck, the small model that the whole system makes is, in points of micro-F1, 7.0 above the small one "
        "tuned directly [+4.8, +9.8] and not told apart from the large one tuned directly [-1.0, +0.8]."
    )
    assert table.meaning({"systems": {}}, "factcheck") == ""


def test_the_results_file_says_how_the_study_is_made_now():
    written, found = json.loads(table.FILE.read_text()), table.settings()
    assert {name: written[name] for name in found} == found


def test_both_ways_of_a_stage_that_are_timed_compute_the_same(monkeypatch):
    monkeypatch.setattr(cost, "VOCABULARY", 300)
    fused, eager = cost.stage("fused"), cost.stage("eager")
    for name in ("losses", "norms"):
        assert fused[name] == pytest.approx(eager[name], rel=1e-5)


def test_cells_become_a_table(small, monkeypatch):
    cells = Cells(small, small / "new")
    for name in ("small", "large"):
        monkeypatch.setitem(study.STAGES, name, replace(study.STAGES[name], epochs=1))
        make_cell("hallucination", 1, name, small, cells)
    study.gather(cells, "hallucination", [1])
    found = table.report(cells, "hallucination", [1])
    assert list(found["systems"]) == ["large", "small"]
    right = table.read_cells(cells, "hallucination", [1])["small"]
    records = ask("hallucination", photos(40, 22)[1], 22)
    answers = np.load(small / "hallucination.npz")["1/small/answers"][0, 1]
    expected = score(records, [LETTERS[place] for place in answers])["micro_f1"]
    assert found["systems"]["small"]["chains"] == {1: pytest.approx(100 * expected, abs=0.01)}
    assert right[1].shape == (2, 2, 40)
    assert found["parts"]["pyramid"] == {"added": None, "left out": None}
    lines = table.text(found).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["micro-F1", "large", "small"] and len(lines) == 3


def test_the_shift_left_out_is_the_same_model_asked_once(monkeypatch):
    right = {name: {1: np.random.default_rng(i).random((2, 2, 40)) < 0.8} for i, name in enumerate(("whole", "small"))}
    monkeypatch.setattr(table, "read_cells", lambda *where: dict(right))
    found = table.report(None, "hallucination", [1])
    once = found["systems"]["whole - shift"]["f1"]["fixed"]
    assert once["shift"] == once["no shift"] == found["systems"]["whole"]["f1"]["fixed"]["no shift"]
    assert "distilled - shift" not in found["systems"] and set(right) == {"whole", "small"}


def test_an_interval_knows_of_questions_and_of_chains():
    rng = np.random.default_rng(0)
    theirs = rng.random((3, 1000)) < 0.7
    assert table.interval(theirs, theirs, 1000) == [0, 0, 0]
    better = theirs | (rng.random((3, 1000)) < 0.2)
    point, low, high = table.interval(better, theirs, 2000)
    assert low < point < high and abs(point - 100 * (better.mean() - theirs.mean())) < 0.01
    gap = better[0].astype(float) - theirs[0]
    _, low1, high1 = table.interval(better[:1], theirs[:1], 2000)
    assert abs((high1 - low1) / (2 * 1.96 * 100 * gap.std() / 1000**0.5) - 1) < 0.1
    # chains that disagree: the same mean, a wider interval
    apart = theirs.copy()
    apart[0] = True
    even = theirs | (rng.random((3, 1000)) < 1 / 3)
    wide, narrow = (np.diff(table.interval(x, theirs, 2000)[1:])[0] for x in (apart, even))
    assert wide > 2 * narrow


def test_the_prompt_is_that_of_the_template():
    assert prompt("x") == "USER: <image>\n" + asking("x")
    assert file_name(7) == "000007.png"
