"""Augmentation: what it must keep (answers, sides, truth), what it must draw, and that a seed gives it again."""

import random
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
Image = pytest.importorskip("PIL.Image")

import numpy as np  # noqa: E402
import zoo  # noqa: E402

from hkdfast.choices import LETTERS  # noqa: E402
from hkdfast.data.augment import (  # noqa: E402
    Augment,
    Augmented,
    Color,
    Crop,
    Flip,
    Noise,
    Paraphrase,
    RandomApply,
    ShuffleOptions,
    mirrored,
)
from hkdfast.data.synthetic import Claim, Corruptions, RewriteStatement, SyntheticCaption, phrase  # noqa: E402
from hkdfast.data.tasks import record_of  # noqa: E402
from hkdfast.evaluate.choices import NONE, TASKS, Record, example, question  # noqa: E402

CAPTION = Record(
    "hallucination",
    "1.png",
    "A cat sleeps beside two dogs and a red ball.",
    "What is there?",
    "Which part is hallucinated?",
    ("A cat", "two dogs", "a red ball", NONE),
    "C",
    7,
)
CLAIM = Record("factcheck", "2.png", "The cat is black.", "Cats came.", "Is it so?", TASKS["factcheck"].options, "B", 8)
THINGS = [
    {"name": "cat", "attribute": "black", "count": 2},
    {"name": "cat", "attribute": "white", "count": 1},
    {"name": "ox", "attribute": None, "count": 3, "plural": "oxen"},
    {"name": "apple", "attribute": "red"},
]
FACTS = Corruptions(
    objects=["cat", "dog", "cow", "ox", "apple", "pear"],
    attributes={"black": ["white", "gray"], "white": ["black", "gray"], "red": ["green", "blue"]},
)


@pytest.fixture
def picture():
    return zoo.picture(0)


def given(record=CAPTION, picture=None, **others):
    return example(record) | ({} if picture is None else {"image": picture}) | others


def test_an_example_asks_as_evaluation_does():
    made = example(CAPTION, "photos")
    assert (made["image"], made["answer"], made["text"]) == ("photos/1.png", "C", question(CAPTION))
    assert record_of(made) == replace(CAPTION, image="photos/1.png")
    again = Augment([])(made, 0)
    assert again == made and again is not made


@pytest.mark.parametrize("record", [CAPTION, CLAIM, replace(CAPTION, answer="AC"), replace(CLAIM, answer=None)])
@pytest.mark.parametrize("fixed", [None, ()])
def test_shuffled_options_take_their_answer_along(record, fixed):
    augment, orders = Augment([ShuffleOptions(fixed)]), Counter()
    right = None if record.answer is None else {record.options[LETTERS.index(letter)] for letter in record.answer}
    for index in range(480):
        made = augment(given(record), index)
        if right is not None:
            assert {made["options"][LETTERS.index(letter)] for letter in made["answer"]} == right
            assert made["answer"] == "".join(sorted(made["answer"]))
        else:
            assert made["answer"] is None
        assert made["text"] == question(record, [record.options.index(option) for option in made["options"]])
        orders[tuple(made["options"])] += 1
    held = fixed is None and record.task == "hallucination"
    assert len(orders) == (6 if held else 24)
    assert all(order[3] == NONE for order in orders) == held


def test_paraphrases_are_those_of_the_task():
    made = {Augment([Paraphrase()])(given(CLAIM), index)["text"] for index in range(60)}
    assert made == {question(CLAIM, template=number) for number in range(len(TASKS["factcheck"].templates))}
    own = Augment([Paraphrase(["{statement}?\n{options}"])])(given(CLAIM), 0)["text"]
    assert own.startswith("The cat is black.?\nA. True")


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("the Left cat, LEFT of it", "the Right cat, RIGHT of it"),
        ("leftmost and right-hand, rightwards", "rightmost and left-hand, leftwards"),
        ("bright leftovers and human rights", None),
        ("turn left. Right?", "turn right. Left?"),
        ("upright", None),
    ],
)
def test_sides_change_or_refuse(text, other, picture):
    flipped = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert mirrored(text) == (other or text)
    for name in ("statement", "context", "question"):
        record = replace(CAPTION, **{name: text})
        refused = Augment([Flip()])(given(record, picture), 0)
        assert refused["image"] == (picture if other else flipped)
        assert refused[name] == text and refused["text"] == question(record)
        swapped = Augment([Flip("swap")])(given(record, picture), 0)
        assert swapped["image"] == flipped
        assert swapped[name] == (other or text) and swapped["text"] == question(
            replace(record, **{name: other or text})
        )
    record = replace(CAPTION, options=(text, "two dogs", NONE))
    swapped = Augment([Flip("swap")])(given(record, picture), 0)
    assert swapped["image"] == flipped and swapped["options"] == [other or text, "two dogs", NONE]
    plain = {"image": picture, "text": text, "answer": "Yes"}
    assert Augment([Flip()])(plain, 0)["image"] == (picture if other else flipped)
    assert Augment([Flip("swap")])(plain, 0) == {"image": flipped, "text": other or text, "answer": "Yes"}


def test_the_wording_of_a_template_does_not_stop_a_flip(picture):
    number = next(i for i, text in enumerate(TASKS["factcheck"].templates) if "right" in text)
    made = Augment([Paraphrase([number]), Flip()])(given(CLAIM, picture), 0)
    assert "right" in made["text"] and made["image"] == picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_crops_keep_size_and_proportions():
    x = np.linspace(0, 250, 60)[None, :].repeat(40, 0)
    ramp = Image.fromarray(np.stack([x, x, x], -1).astype(np.uint8))
    starts = []
    for index in range(200):
        made = np.asarray(Augment([Crop(0.5)])({"image": ramp, "text": "?"}, index)["image"]).astype(float)
        assert made.shape == (40, 60, 3)
        starts.append(made[:, 0, 0].mean())
        slope = (made[0, -5, 0] - made[0, 4, 0]) / (x[0, -5] - x[0, 4])
        assert 0.45 < slope < 1.05  # a part between half and the whole, stretched to the full width
    assert min(starts) < 5 and 60 < max(starts) <= 127
    assert Augment([Crop(1.0)])({"image": ramp, "text": "?"}, 0)["image"] == ramp


def test_colors_change_within_bounds(picture):
    def mean(image):
        return np.asarray(image).astype(float).mean()

    bright = [Augment([Color(0.2, 0, 0)])({"image": picture, "text": "?"}, i)["image"] for i in range(100)]
    ratios = [mean(image) / mean(picture) for image in bright]
    assert 0.79 < min(ratios) < 0.85 and 1.08 < max(ratios) < 1.21  # white cannot become brighter
    gray = Image.new("RGB", (8, 8), (90, 90, 90))
    assert Augment([Color(0, 0.5, 0.5)])({"image": gray, "text": "?"}, 3)["image"] == gray
    assert Augment([Color(0, 0, 0)])({"image": picture, "text": "?"}, 3)["image"] == picture


def test_noise_is_of_every_strength_up_to_the_most():
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    spread = [np.asarray(Augment([Noise(0.1)])({"image": gray, "text": "?"}, i)["image"]).std() for i in range(100)]
    assert min(spread) < 3 and 23 < max(spread) < 26.5  # of 25.5
    assert Augment([Noise(0)])({"image": gray, "text": "?"}, 3)["image"] == gray
    black = np.asarray(Augment([Noise(1)])({"image": Image.new("RGB", (64, 64)), "text": "?"}, 3)["image"])
    assert 0.4 < (black == 0).mean() < 0.6  # what would be below black is black


def test_an_image_may_be_a_path(tmp_path, picture):
    picture.save(tmp_path / "1.png")
    made = Augment([Flip()])(example(CAPTION, tmp_path), 0)
    assert made["image"] == picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


EVERYTHING = [
    RandomApply(RewriteStatement(["a hen", "three cows"]), 0.7),
    RandomApply(Flip("swap")),
    Crop(0.8),
    Color(),
    Noise(),
    Paraphrase(),
    ShuffleOptions(),
]


def same(ours, theirs):
    return all(ours[name] == theirs[name] for name in ours) and ours.keys() == theirs.keys()


def test_choices_depend_on_seed_epoch_and_index_alone(picture):
    augment = Augment(EVERYTHING, seed=1)
    source = given(CAPTION, picture)
    before = dict(source)
    first = [augment(source, index) for index in range(12)]
    random.seed(5)
    np.random.seed(5)
    assert all(same(augment(source, index), first[index]) for index in reversed(range(12)))
    assert all(same(augment.at(0)(source, index), first[index]) for index in range(12))
    for other in (Augment(EVERYTHING, seed=2), augment.at(1)):
        assert sum(same(other(source, index), first[index]) for index in range(12)) < 3
    assert len({made["text"] for made in first}) > 6
    assert source == before  # nothing is changed in place


def test_a_dataset_of_copies_and_epochs(picture):
    sources = [given(CAPTION, picture), given(CLAIM, picture)]
    dataset = Augmented(sources, Augment([Paraphrase(), ShuffleOptions()], seed=3), copies=20)
    assert len(dataset) == 40
    texts = [dataset[i]["text"] for i in range(40)]
    assert [dataset[i]["task"] for i in range(40)] == ["hallucination", "factcheck"] * 20
    assert len(set(texts[::2])) > 8
    dataset.set_epoch(1)
    assert [dataset[i]["text"] for i in range(40)] != texts
    dataset.set_epoch(0)
    assert [dataset[i]["text"] for i in range(40)] == texts
    with pytest.raises(IndexError, match="index 40 of 40"):
        dataset[40]


def test_trainer_sets_the_epoch_of_a_dataset(picture):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    dataset = Augmented([given(CAPTION, picture)], Augment([Paraphrase()]))
    loader = Accelerator(cpu=True).prepare(DataLoader(dataset, collate_fn=list))
    loader.set_epoch(5)
    assert dataset.augment.epoch == 5


def test_it_maps_a_dataset(picture):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{**given(CAPTION), "image": picture}] * 6)
    augment = Augment(EVERYTHING, seed=1)
    mapped = table.map(augment, with_indices=True)
    for index, row in enumerate(mapped):
        expected = augment(table[index], index)
        assert row["text"] == expected["text"] and row["answer"] == expected["answer"]
        assert np.array_equal(np.asarray(row["image"]), np.asarray(expected["image"]))


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ({"name": "cat"}, "a cat"),
        ({"name": "apple"}, "an apple"),
        ({"name": "apple", "attribute": "red"}, "a red apple"),
        ({"name": "cat", "attribute": "orange", "count": 1}, "an orange cat"),
        ({"name": "box", "count": 2}, "two boxes"),
        ({"name": "puppy", "attribute": "small", "count": 11}, "11 small puppies"),
        ({"name": "toy", "count": 3}, "three toys"),
        ({"name": "ox", "count": 4, "plural": "oxen"}, "four oxen"),
    ],
)
def test_phrases(thing, words):
    assert phrase(thing) == words


def true_phrases():
    return {"two black cats", "a white cat", "three oxen", "a red apple"}


def false_phrases():
    """Everything that FACTS may say and the image of THINGS does not show; by hand."""
    others = {"two black {}s", "a white {}", "three {}s", "a red {}"}
    swapped = {text.format(name) for text in others for name in ("dog", "cow", "pear")}
    attributes = {"two gray cats", "a gray cat", "a green apple", "a blue apple"}
    counts = {"two oxen", "four oxen", "five oxen"}  # of cats there are two kinds, of the apple no number
    return swapped | attributes | counts


def test_captions_are_wrong_where_their_answer_says_and_nowhere_else():
    source, said, answers = {"image": "1.png", "objects": THINGS}, set(), Counter()
    augment = Augment([SyntheticCaption(FACTS, none=0.25)], seed=2)
    for index in range(1500):
        made = augment(source, index)
        phrases, right = made["options"][:3], LETTERS.index(made["answer"])
        assert made["options"][3] == NONE and made["task"] == "hallucination"
        assert made["statement"] == f"The image shows {phrases[0]}, {phrases[1]} and {phrases[2]}."
        for place, text in enumerate(phrases):
            assert text in (false_phrases() if place == right else true_phrases())
        said |= set(phrases)
        answers[made["answer"]] += 1
        assert made["text"] == question(record_of(made))
    assert said == true_phrases() | false_phrases()  # every change happens
    assert abs(answers["D"] / 1500 - 0.25) < 0.05
    assert min(answers.values()) > 250


def test_claims_are_as_true_as_their_answer_says():
    source, answers = {"image": "1.png", "objects": THINGS, "context": "A farm."}, Counter()
    claim = Claim(FACTS, parts=3)
    for index in range(1500):
        made = Augment([claim], seed=2)(source, index)
        told, *rest = made["statement"].removeprefix("The image shows ").split(". ", 1)
        phrases = told.rstrip(".").replace(" and ", ", ").split(", ")
        assert len(phrases) == 3 and made["context"] == "A farm."
        assert len(set(phrases)) == 3
        wrong = [text in false_phrases() for text in phrases]
        assert all(text in true_phrases() | false_phrases() for text in phrases)
        verdict = made["options"][LETTERS.index(made["answer"])]
        expected = "False" if all(wrong) else "Partially True" if any(wrong) else "True"
        assert verdict == ("Not Verifiable" if rest else expected)
        assert not rest or rest[0] in claim.unverifiable and not any(wrong)
        answers[verdict] += 1
    assert all(abs(count / 1500 - 0.25) < 0.05 for count in answers.values()) and len(answers) == 4


def test_no_two_parts_of_a_claim_become_the_same():
    source = {"image": "1.png", "objects": [{"name": "cat"}, {"name": "ox"}]}
    said = {Augment([Claim(Corruptions(["dog", "cow"]))], seed=4)(source, index)["statement"] for index in range(100)}
    assert "The image shows a dog and a cow." in said
    assert not said & {f"The image shows {one} and {one}." for one in ("a dog", "a cow")}


def test_where_nothing_can_be_made_wrong_nothing_is():
    source = {"image": "1.png", "objects": [{"name": "cat"}]}
    for index in range(20):
        assert Augment([SyntheticCaption(Corruptions(["cat"]), none=0)])(source, index)["answer"] == "B"  # of the two
        verdict = Augment([Claim(Corruptions(["cat"]))])(source, index)
        assert verdict["answer"] in "AD"
    only = Corruptions(["dog"], kinds=["object"])
    assert {Augment([SyntheticCaption(only, none=0)])(source, i)["options"][0] for i in range(5)} == {"a dog"}
    table = Corruptions({"cat": ["tiger"]})
    assert Augment([SyntheticCaption(table, none=0)])(source, 0)["options"] == ["a tiger", NONE]


def test_rewritten_statements_lose_their_answer():
    seen = set()
    for index in range(200):
        made = Augment([RewriteStatement(["a hen", "three cows", "two dogs"])])(given(CAPTION, answer=None), index)
        assert made["answer"] is None and made["options"][3] == NONE
        (place,) = (i for i in range(3) if made["options"][i] != CAPTION.options[i])
        new = made["options"][place]
        assert new.lower() in ("a hen", "three cows")  # two dogs are in the caption
        assert made["statement"] == CAPTION.statement.replace(CAPTION.options[place], new)
        assert made["text"] == question(record_of(made))
        seen.add(new)
    assert seen == {"A hen", "a hen", "three cows", "Three cows"}
    two = Augment([RewriteStatement(["a hen", "three cows"], changes=2)])(given(CAPTION, answer=None), 0)
    assert sum(a != b for a, b in zip(two["options"], CAPTION.options, strict=True)) == 2
    claim = Augment([RewriteStatement(swaps={"cat": ["dog"], "true": ["wrong"]})])(given(CLAIM), 0)
    assert claim["statement"] == "The dog is black." and claim["options"] == list(CLAIM.options)
    assert claim["answer"] is None
    # an option that is a part of another stays whole
    trees = replace(CAPTION, statement="A cat tree. A cat.", options=("a cat", "a cat tree", *CAPTION.options[2:]))
    made = Augment([RewriteStatement(["a hen"])])(given(trees, answer=None), 3)
    assert (made["statement"], made["options"][:2]) in (
        ("A cat tree. A hen.", ["a hen", "a cat tree"]),
        ("A hen. A cat.", ["a cat", "a hen"]),
    )
    # what is known to be wrong goes first, and where nothing is, anything
    for letters, places in (("C", {2}), ("AC", {0, 2}), ("D", {0, 1, 2})):
        told = [Augment([RewriteStatement(["a hen"])])(given(CAPTION, answer=letters), index) for index in range(40)]
        changed = {i for one in told for i in range(3) if one["options"][i] != CAPTION.options[i]}
        assert changed == places and not any(one["answer"] for one in told)
    # the words of a swap are found in options, and nowhere within the words of a longer one
    swaps = {"cat": ["fox"], "dogs": ["pigs"], "red": ["blue"], "red ball": ["kite"]}
    for letters, told in (("A", {"A fox"}), ("C", {"a kite"}), ("AB", {"A fox", "two pigs"}), (None, None)):
        made = [Augment([RewriteStatement(swaps=swaps)])(given(CAPTION, answer=letters), index) for index in range(40)]
        new = {one for each in made for one in each["options"]} - set(CAPTION.options)
        assert new == (told or {"A fox", "two pigs", "a kite"}) and not any(each["answer"] for each in made)
        assert all(option in each["statement"] for each in made for option in each["options"][:3])
    # a caption whose wrong phrase cannot be replaced stays: another would be a second one
    assert Augment([RewriteStatement(swaps={"cat": ["fox"]})])(given(CAPTION), 0) == given(CAPTION)
    twice = replace(CAPTION, answer="A", options=("A cat", "two dogs", "A FOX", NONE))
    assert Augment([RewriteStatement(swaps={"cat": ["fox"]})])(given(twice), 0)["answer"] == "A"
    # nothing to replace: the example and its answer stay
    assert Augment([RewriteStatement(swaps={"tree": ["bush"]})])(given(CLAIM), 0) == given(CLAIM)
    assert Augment([RewriteStatement(["two dogs"])])(given(replace(CAPTION, statement="Nothing.")), 0)["answer"] == "C"


def test_everything_together(picture):
    source = {"image": picture, "objects": THINGS}
    augment = Augment([SyntheticCaption(FACTS), *EVERYTHING[1:]])
    for index in range(50):
        made = augment(source, index)
        wrong = [text in false_phrases() for text in made["options"]]
        assert wrong.index(True) == LETTERS.index(made["answer"]) if any(wrong) else made["answer"] == "D"
        assert made["text"] == question(record_of(made), template=made["template"])


def annotated(thing):
    return Augment([SyntheticCaption(Corruptions())])({"image": "0.png", "objects": [thing]}, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomApply(Flip(), 1.5), "probability must be between 0 and 1, got 1.5"),
        (lambda: Flip("drop"), "unknown text 'drop', expected refuse or swap"),
        (lambda: Crop(0), "min_scale must be above 0 and at most 1, got 0"),
        (lambda: Noise(1.5), "max_std must be between 0 and 1, got 1.5"),
        (lambda: Color(contrast=1), "contrast must be at least 0 and below 1, got 1"),
        (lambda: Paraphrase([]), "templates is empty"),
        (lambda: Augment([Paraphrase([9])])(given(), 0), "template 9 of hallucination does not exist, expected 0 to 3"),
        (lambda: Augment([Paraphrase(["{options}"])])(given(), 0), r"has no \{statement\}"),
        (lambda: Augment([ShuffleOptions()])({"image": 1, "text": "?"}, 0), "the example has no task, statement, "),
        (lambda: Augmented([], Augment([]), copies=0), "copies must be at least 1, got 0"),
        (lambda: Corruptions(kinds=["color"]), r"kinds are \['color'\], expected some of object, attribute, count"),
        (lambda: SyntheticCaption(Corruptions(), phrases=0), "phrases is 0"),
        (lambda: SyntheticCaption(Corruptions(), phrases=26), "phrases is 26 .* expected 1 to 25"),
        (lambda: SyntheticCaption(Corruptions(), caption="An image."), "caption is 'An image.', expected {} in it"),
        (lambda: Claim(Corruptions(), parts=1), "parts is 1"),
        (lambda: Claim(Corruptions(), claim="x"), "claim is 'x', expected {} in it"),
        (
            lambda: Augment([SyntheticCaption(Corruptions())])(given(), 0),
            "the example has no annotated 'objects', only task",
        ),
        (lambda: RewriteStatement(), "give phrases or swaps"),
        (lambda: RewriteStatement(["x", " "]), "every phrase must be a text that is not empty, got ' '"),
        (lambda: RewriteStatement(swaps={"": ["x"]}), "got ''"),
        (lambda: RewriteStatement(swaps={"x": [3]}), "got 3"),
        (lambda: RewriteStatement("dog"), "phrases is the text 'dog', expected a list of texts"),
        (lambda: RewriteStatement(swaps={"cat": "dog"}), r"swaps\['cat'\] is the text 'dog', expected a list of texts"),
        (lambda: Corruptions(objects="dog"), "objects is the text 'dog', expected a list"),
        (lambda: Corruptions(objects={"cat": "dog"}), r"objects\['cat'\] is the text 'dog', expected a list"),
        (lambda: Corruptions(attributes={"red": "blue"}), r"attributes\['red'\] is the text 'blue', expected a list"),
        (lambda: Corruptions(kinds="count"), "kinds is the text 'count', expected a list"),
        (lambda: Claim(Corruptions(), unverifiable="On a Monday."), "unverifiable is the text 'On a Monday.'"),
        (lambda: Paraphrase("{statement} {options}"), "templates is the text"),
        (lambda: Augment([ShuffleOptions(NONE)])(given(), 0), "fixed is the text 'No hallucination', expected a list"),
        (lambda: annotated({"name": "cat", "count": "2"}), "count of the object 'cat' is '2', expected a whole number"),
        (lambda: annotated({"name": "cat", "attribute": 3}), "attribute of the object 'cat' is 3, expected a text"),
        (lambda: annotated("cat"), "an annotated object is 'cat', expected a dict with a 'name'"),
        (lambda: Augment([Crop()])({"text": "?"}, 0), "the example has no 'image', only text"),
        (lambda: RewriteStatement(["x"], changes=0), "changes must be at least 1, got 0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
