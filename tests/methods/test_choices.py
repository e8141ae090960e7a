"""Mapping shift on models small enough to be checked by hand: prompts are words, a model is a rule or one matrix."""

import math
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hkdfast import Head, choices
from hkdfast.batch import answer_rows
from hkdfast.choices import Choice, answer, shifts, shuffle_options

END = 1  # token of the end of a turn
ANIMALS = ("cat", "dog", "cow", "hen")


class Words:
    """A tokenizer of words, as `encode`. `spelt` says how a word is cut where it is not one token."""

    def __init__(self, spelt=None, glue=False):
        self.ids, self.spelt, self.glue = {"<pad>": 0, "<end>": END}, spelt or {}, glue
        self.asked = []

    def tokens(self, text):
        words = [part for word in re.findall(r"\w+|\S", text) for part in self.spelt.get(word, [word])]
        return [self.ids.setdefault(word, len(self.ids)) for word in words]

    def __call__(self, prompts, abouts, answers=None):
        self.asked.append((list(prompts), list(abouts)))
        asked = [self.tokens(prompt) for prompt in prompts]
        after = [[]] * len(asked) if answers is None else [[*self.tokens(text), END] for text in answers]
        if self.glue and answers is not None:  # the answer melts into the last token of the prompt
            after = [[self.ids.setdefault(f"?{word}", len(self.ids)), *rest] for word, *rest in after]
            asked = [prompt[:-1] for prompt in asked]
        width = max(len(a) + len(b) for a, b in zip(asked, after, strict=True))
        rows = [[0] * (width - len(a) - len(b)) + a + b for a, b in zip(asked, after, strict=True)]
        batch = {"input_ids": torch.tensor(rows)}
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
        if answers is not None:
            labels = [[-100] * (width - len(b)) + b for b in after]
            batch["labels"] = torch.tensor(labels)
        return batch

    def texts(self, batch):
        names = {number: word for word, number in self.ids.items()}
        return [[names[i] for i in row if i] for row in batch["input_ids"].tolist()]


class Reader:
    """A model that reads its prompt: `say(words)` is {word: logit} of what comes next."""

    def __init__(self, words, say):
        self.words, self.say, self.batches = words, say, []

    def __call__(self, batch):
        self.batches.append(len(batch["input_ids"]))
        logits = torch.full((len(batch["input_ids"]), 200), -30.0, dtype=torch.float64)
        for row, text in zip(logits, self.words.texts(batch), strict=True):
            for word, logit in self.say(text).items():
                row[self.words.ids[word]] = logit
        return logits


class Recurrent:
    """A model of random weights that depends on every token before, as a Head or as logits."""

    def __init__(self, seed=0, dtype=torch.float64, logits=False, **head):
        draw = torch.Generator().manual_seed(seed)
        self.embedding, self.weight = (torch.randn(200, 24, generator=draw, dtype=dtype) for _ in range(2))
        self.turn = torch.linalg.qr(torch.randn(24, 24, generator=draw, dtype=torch.float64))[0].to(dtype) * 0.9
        self.bias = torch.randn(200, generator=draw, dtype=dtype)
        self.head, self.as_logits, self.seen = head, logits, []

    def states(self, batch):
        state, states = torch.zeros(len(batch["input_ids"]), 24, dtype=self.weight.dtype), []
        for ids in batch["input_ids"].T:
            state = torch.where((ids != 0).unsqueeze(1), state @ self.turn + self.embedding[ids], state)
            states.append(state)
        return torch.stack(states, 1)

    def logits(self, hidden):
        found = self.head.get("scale", 1.0) * (hidden @ self.weight.T + self.bias)
        cap = self.head.get("softcap")
        return found if cap is None else cap * torch.tanh(found / cap)

    def __call__(self, batch):
        hidden = self.states(batch)[answer_rows(batch)[0]]
        self.seen.append(batch)
        return self.logits(hidden) if self.as_logits else Head(hidden, self.weight, self.bias, **self.head)


def letter_of(text, word):
    """The letter in front of a word in a prompt."""
    return text[text.index(word) - 2]


QUESTION = Choice("Which animal is it?", ANIMALS, image="1.png")


def test_prompts():
    assert QUESTION.prompt() == "Which animal is it?\nA. cat\nB. dog\nC. cow\nD. hen"
    assert QUESTION.prompt((2, 3, 0, 1)) == "Which animal is it?\nA. cow\nB. hen\nC. cat\nD. dog"
    marked = Choice("About {options}?\n{options}\nOne letter.", ("x", "{y}"))
    assert marked.prompt((1, 0)) == "About {options}?\nA. {y}\nB. x\nOne letter."
    assert marked.stem == "About {options}?"


@pytest.mark.parametrize(
    ("n", "how", "fixed", "expected"),
    [
        (3, "cyclic", (), [(0, 1, 2), (1, 2, 0), (2, 0, 1)]),
        (4, "cyclic", (3,), [(0, 1, 2, 3), (1, 2, 0, 3), (2, 0, 1, 3)]),
        (4, "cyclic", (0, 2), [(0, 1, 2, 3), (0, 3, 2, 1)]),
        (2, "cyclic", (0, 1), [(0, 1)]),
        (3, "none", (), [(0, 1, 2)]),
        (3, "all", (), list(permutations(range(3)))),
        (4, "all", (1,), [(a, 1, b, c) for a, b, c in permutations((0, 2, 3))]),
        (4, 1, (), [(0, 1, 2, 3)]),
    ],
)
def test_shifts(n, how, fixed, expected):
    assert shifts(n, how, fixed) == expected


def test_cyclic_shifts_put_each_option_once_in_each_place():
    for n in (2, 4, 7):
        assert all(sorted(column) == list(range(n)) for column in zip(*shifts(n), strict=True))


def test_drawn_shifts_are_different_and_depend_on_the_seed():
    drawn = shifts(5, 30, seed=1)
    assert len(set(drawn)) == 30 and drawn[0] == (0, 1, 2, 3, 4)
    assert drawn == shifts(5, 30, seed=1) != shifts(5, 30, seed=2)
    assert sorted(shifts(4, 6, (2,))) == sorted(shifts(4, "all", (2,)))
    firsts = Counter(order for seed in range(600) for order in shifts(3, 2, seed=seed)[1:])
    assert len(firsts) == 5 and max(firsts.values()) - min(firsts.values()) < 80  # 120 each, sigma 10


def test_a_letter_bias_cancels_under_the_full_cycle():
    words = Words()
    bias = dict(zip("ABCD", (3.0, 0.5, -2.0, 1.0), strict=True))
    model = Reader(words, lambda text: bias)
    found = answer(model, words, [QUESTION])
    assert found.scores.tolist()[0] == pytest.approx([-math.log(4)] * 4, abs=1e-14)
    assert answer(model, words, [QUESTION], shifts="all").scores.tolist()[0] == pytest.approx([-math.log(4)] * 4)
    plain = answer(model, words, [QUESTION], shifts="none")
    assert plain.choice.tolist() == [0]
    assert plain.scores[0].tolist() == pytest.approx(torch.tensor(list(bias.values())).log_softmax(0).tolist())
    # with an option held in its place, the others are still even among themselves
    held = answer(model, words, [QUESTION], fixed=("Hen",)).scores[0]
    assert held[:3].tolist() == pytest.approx([held[0].item()] * 3)
    assert held[3] != pytest.approx(held[0].item())
    loud = replace(QUESTION, options=("CAT", "DOG", "COW", "HEN"))
    assert torch.equal(answer(model, words, [loud], fixed=(" hen",)).scores[0], held)


def test_content_gives_the_same_answer_under_any_shift():
    words = Words()
    worth = dict(zip(ANIMALS, (0.5, -1.0, 2.0, 0.0), strict=True))
    model = Reader(words, lambda text: {letter_of(text, word): worth[word] for word in ANIMALS})
    expected = torch.tensor(list(worth.values()), dtype=torch.float64).log_softmax(0)
    for how in ("none", "cyclic", "all", 7):
        found = answer(model, words, [QUESTION], shifts=how)
        assert found.by_shift[0].shape == (len(shifts(4, how)), 4)
        torch.testing.assert_close(found.by_shift[0], expected.expand_as(found.by_shift[0]), rtol=0, atol=1e-14)
        torch.testing.assert_close(found.scores[0], expected, rtol=0, atol=1e-14)
        assert found.choice.tolist() == [2]


def test_the_average_of_content_and_bias_is_the_content():
    words = Words()
    worth = dict(zip(ANIMALS, (0.5, -1.0, 2.0, 0.0), strict=True))
    bias = dict(zip("ABCD", (9.0, 0.5, -2.0, 1.0), strict=True))
    model = Reader(words, lambda text: {(a := letter_of(text, word)): worth[word] + bias[a] for word in ANIMALS})
    assert answer(model, words, [QUESTION], shifts="none").choice.tolist() == [0]
    found = answer(model, words, [QUESTION])
    assert found.choice.tolist() == [2]
    expected = torch.tensor(list(worth.values()), dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(found.scores[0], expected, rtol=0, atol=1e-13)


def test_one_forward_for_all_shifts_of_a_batch_of_questions():
    words, model = Words(), Recurrent()
    questions = [Choice(f"Question {i}?", ANIMALS[: 2 + i % 3], image=i) for i in range(7)]
    told = []
    found = answer(model, words, questions, batch_size=3, on_batch=told.append)
    assert [len(batch["input_ids"]) for batch in model.seen] == [2 + 3 + 4, 2 + 3 + 4, 2]
    prompts, abouts = words.asked[-2]
    assert abouts == [3] * 2 + [4] * 3 + [5] * 4
    assert prompts[:2] == [questions[3].prompt(), questions[3].prompt((1, 0))]
    assert [len(part.choice) for part in told] == [3, 3, 1]
    assert torch.cat([part.choice for part in told]).tolist() == found.choice.tolist()
    assert found.scores.shape == (7, 4)
    assert found.scores.isneginf().sum(1).tolist() == [2, 1, 0, 2, 1, 0, 2]
    torch.testing.assert_close(found.scores.exp().sum(1), torch.ones(7, dtype=torch.float64))
    for rows in found.by_shift:
        torch.testing.assert_close(rows.exp().sum(1), torch.ones(len(rows), dtype=torch.float64))
    alone = answer(Recurrent(), Words(), questions[4:5], batch_size=1)  # words get other ids in another order
    assert alone.scores.shape == (1, 3)
    again = answer(model, words, questions, batch_size=1)
    torch.testing.assert_close(again.scores, found.scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "head", [{}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}, {"logits": True}], ids=lambda head: str(head)
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_letters_score_as_the_full_logits_restricted_to_them(head, dtype):
    words, model = Words(), Recurrent(dtype=dtype, **head)
    found = answer(model, words, [QUESTION])
    (batch,) = model.seen
    exact = Recurrent(**head)
    exact.weight, exact.bias = model.weight.double(), model.bias.double()
    hidden = model.states(batch)[:, -1]
    logits = model.logits(hidden).double() if head.get("logits") else exact.logits(hidden.double())
    tokens = [words.ids[letter] for letter in "ABCD"]
    expected = torch.empty(4, 4, dtype=torch.float64)
    for shift, order in enumerate(shifts(4)):
        for place, option in enumerate(order):
            expected[shift, option] = logits[shift, tokens].log_softmax(0)[place]
    torch.testing.assert_close(found.by_shift[0], expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.scores[0], expected.mean(0).log_softmax(0), rtol=1e-13, atol=1e-13)


def test_only_the_letters_rows_of_the_head_are_multiplied():
    words = Words()
    for prompt in [QUESTION.prompt(), *"ABCD"]:
        words.tokens(prompt)
    hidden, weight = torch.randn(4, 24), torch.randn(200, 24)
    model = lambda batch: Head(hidden[: len(batch["input_ids"])], weight)  # noqa: E731
    with FlopCounterMode(display=False) as counter:
        answer(model, words, [QUESTION])
    assert counter.get_total_flops() == 2 * 4 * 24 * 4


SPELT = {letter: ["option", letter.lower()] for letter in "ABCD"}


def eager_sequences(model, words, prompts, letters):
    """(prompts, letters): the log-probability of a letter's tokens and the end, one forward each, in float64."""
    found = torch.empty(len(prompts), len(letters), dtype=torch.float64)
    for i, prompt in enumerate(prompts):
        for j, letter in enumerate(letters):
            batch = words([prompt], [None], [letter])
            logits = model.logits(model.states(batch)[0]).log_softmax(-1)
            target = batch["input_ids"][0]
            count = (batch["labels"][0] != -100).sum().item()
            found[i, j] = sum(logits[t - 1, target[t]] for t in range(len(target) - count, len(target)))
    return found


@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 4.0}, {"logits": True}], ids=lambda head: str(head))
@pytest.mark.parametrize("spelt", [None, SPELT], ids=["one_token", "two_tokens"])
def test_sequences_score_as_one_prompt_at_a_time(spelt, head):
    words, model = Words(spelt), Recurrent(**head)
    questions = [QUESTION, Choice("And this?", ("sun", "moon"))]
    found = answer(model, words, questions, scoring="sequence")
    assert len(model.seen) == 1 and len(model.seen[0]["input_ids"]) == 4 * 4 + 2 * 2
    for number, question in enumerate(questions):
        n = len(question.options)
        orders = shifts(n)
        raw = eager_sequences(model, words, [question.prompt(order) for order in orders], "ABCD"[:n]).log_softmax(-1)
        expected = torch.empty_like(raw)
        for shift, order in enumerate(orders):
            expected[shift, list(order)] = raw[shift]
        torch.testing.assert_close(found.by_shift[number], expected, rtol=1e-9, atol=1e-9)


def test_letters_of_several_tokens_are_scored_by_their_sequence():
    words, model = Words(SPELT), Recurrent()
    found = answer(model, words, [QUESTION])
    torch.testing.assert_close(found.scores, answer(model, words, [QUESTION], scoring="sequence").scores)
    with pytest.raises(ValueError, match="'A' and 'B' are not one token each: .*scoring=\"sequence\""):
        answer(model, words, [QUESTION], scoring="token")
    with pytest.raises(ValueError, match="'A' and 'C' are not one token each"):
        answer(model, Words({"C": ["see", "x"]}), [QUESTION], scoring="token")
    with pytest.raises(ValueError, match="the answer 'A' changes the tokens at the end of its prompt"):
        answer(model, Words(glue=True), [QUESTION], scoring="token")
    glued = answer(Recurrent(), Words(glue=True), [QUESTION])
    assert glued.scores.isfinite().all()
    # letters that the tokenizer does not know are one and the same
    unknown = Words({"C": ["<unk>"], "D": ["<unk>"]})
    for scoring in choices.SCORINGS:
        with pytest.raises(ValueError, match="'C' and 'D' have the same tokens"):
            answer(model, unknown, [QUESTION], scoring=scoring)


def test_tokens_that_are_given_are_taken():
    words, model = Words(), Recurrent()
    found = answer(model, words, [QUESTION])
    tokens = [words.ids[letter] for letter in "ABCD"]
    asked = len(words.asked)
    again = answer(model, words, [QUESTION], tokens=[*tokens, 7])
    assert len(words.asked) == asked + 1  # nothing was looked up
    assert torch.equal(found.scores, again.scores)
    assert not torch.equal(found.scores, answer(model, words, [QUESTION], tokens=tokens[::-1]).scores)


def test_votes_and_their_ties():
    words = Words()

    def vote(answers, **options):
        left = iter(answers)
        model = Reader(words, lambda text: dict(zip("ABCD", next(left), strict=True)))
        return answer(model, words, [QUESTION], aggregate="vote", **options)

    # shifts start at options 0, 1, 2, 3: letter A is option 0, then 1, 2, 3
    two = vote([(5, 0, 0, 0), (0, 0, 0, 5), (0, 0, 5, 1), (0, 0, 0, 5)])
    # options 0, 0, 0 (place 2 of the third shift is option 0), 2 (place 3 of the fourth)
    assert two.scores[0].exp().tolist() == pytest.approx([0.75, 0, 0.25, 0])
    assert two.choice.tolist() == [0]
    thirds = vote([(5, 0, 0, 0), (0, 5, 0, 0), (0, 0, 5, 0)], shifts=3).scores[0].exp()
    assert (thirds * 3 - (thirds * 3).round()).abs().max() < 1e-14  # shares in float64
    # one vote each for 0, 1, 2, 3, but the vote for 2 is the surest
    tie = vote([(1, 0, 0, 0), (1, 0, 0, 0), (3, 0, 0, 0), (1, 0, 0, 0)])
    assert tie.scores[0].exp().tolist() == pytest.approx([0.25] * 4)
    assert tie.choice.tolist() == [2]
    # votes for 1, 1, 2 and 0 win over the higher mean of 3, a close second everywhere
    most = vote([(0, 1, 0, 0.9), (1, 0, 0.9, 0), (5, 4.9, 0, -9), (4.9, 5, -9, 0)])
    assert most.by_shift[0].mean(0).argmax() == 3 and most.choice.tolist() == [1]
    # nothing to choose between: the first
    assert vote([(1, 1, 1, 1)] * 4).choice.tolist() == [0]


def test_calibration_subtracts_what_a_prompt_without_content_gets():
    words = Words()
    bias = dict(zip("ABCD", (4.0, 0.5, -2.0, 1.0), strict=True))
    worth = dict(zip(ANIMALS, (0.5, -1.0, 2.0, 0.0), strict=True))

    def say(text):
        if "cat" not in text:
            assert text[:3] == ["N", "/", "A"]
            return bias
        return {(a := letter_of(text, word)): worth[word] + bias[a] for word in ANIMALS}

    model = Reader(words, say)
    assert answer(model, words, [QUESTION], shifts="none").choice.tolist() == [0]
    found = answer(model, words, [QUESTION], shifts="none", method="calibrated")
    expected = torch.tensor(list(worth.values()), dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(found.scores[0], expected, rtol=0, atol=1e-13)
    assert model.batches[-1] == 2  # the question and its blank twin
    assert words.asked[-1][0][1] == "N/A\nA. N/A\nB. N/A\nC. N/A\nD. N/A"
    assert words.asked[-1][1] == ["1.png"] * 2
    shifted = answer(model, words, [QUESTION], method="calibrated")
    torch.testing.assert_close(shifted.by_shift[0], expected.expand(4, 4), rtol=0, atol=1e-13)
    assert model.batches[-1] == 5
    own = Choice("Which animal is it?", ANIMALS, content_free="N/A, which is it?\n{options}\nSay.")
    answer(model, words, [own], shifts="none", method="calibrated")
    assert words.asked[-1][0][1] == "N/A, which is it?\nA. N/A\nB. N/A\nC. N/A\nD. N/A\nSay."


def test_each_option_alone():
    words = Words()
    worth = dict(zip(ANIMALS, (0.5, -1.0, 2.0, 0.0), strict=True))
    model = Reader(words, lambda text: {"Yes": worth[text[text.index("answer") + 2]], "No": 0.5})
    found = answer(model, words, [Choice("Which?\n{options}\nA letter.", ANIMALS)], method="per_option")
    expected = torch.nn.functional.logsigmoid(torch.tensor(list(worth.values()), dtype=torch.float64) - 0.5)
    torch.testing.assert_close(found.scores[0], expected, rtol=0, atol=1e-14)
    assert found.choice.tolist() == [2] and model.batches == [4]
    voted = answer(
        model, words, [Choice("Which?\n{options}\nA letter.", ANIMALS)], method="per_option", aggregate="vote"
    )
    assert torch.equal(voted.scores, found.scores)
    assert words.asked[-1][0][1] == "Which?\nProposed answer: dog\nIs it right? Answer Yes or No."
    other = answer(
        Reader(words, lambda text: {"so": 1.0 * (text[-2] == "hen"), "not": 0.5}),
        words,
        [QUESTION],
        method="per_option",
        each=" Is it {option}?",
        words=("so", "not"),
    )
    assert other.choice.tolist() == [3]


def test_no_gradient_is_kept():
    words, model = Words(), Recurrent()
    model.weight.requires_grad_()
    assert not answer(model, words, [QUESTION]).scores.requires_grad


@pytest.mark.parametrize("fixed", [(), ("hen",), (1, "HEN "), (0, 1, 2, 3)])
def test_shuffling_keeps_the_answer_and_what_is_fixed(fixed):
    rng, orders = random.Random(0), Counter()
    stay = {ANIMALS.index(each.strip().lower()) if isinstance(each, str) else each for each in fixed}
    for _ in range(2400):
        question, right = shuffle_options(QUESTION, 2, rng, fixed)
        assert question.options[right] == "cow" and sorted(question.options) == sorted(ANIMALS)
        assert all(question.options[place] == ANIMALS[place] for place in stay)
        assert (question.text, question.image) == (QUESTION.text, "1.png")
        orders[question.options] += 1
    assert len(orders) == math.factorial(4 - len(stay))  # every order, each about as often
    mean = 2400 / len(orders)
    assert max(abs(count - mean) for count in orders.values()) <= 5 * mean**0.5
    assert shuffle_options(QUESTION, None, random.Random(3))[1] is None
    assert shuffle_options(QUESTION, 1, random.Random(3)) == shuffle_options(QUESTION, 1, random.Random(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Choice("?", ("a",)), "needs 2 to 26 options, got 1"),
        (lambda: Choice("?", [str(i) for i in range(27)]), "needs 2 to 26 options, got 27"),
        (lambda: Choice("?", ("a", " ")), "every option must be a text that is not empty, got ' '"),
        (lambda: Choice("?", ("a", 3)), "every option must be a text that is not empty, got 3"),
        (lambda: shifts(4, "circular"), "unknown shifts 'circular', expected one of cyclic, all, none or a number"),
        (lambda: shifts(4, True), "unknown shifts True"),
        (lambda: shifts(4, 0), "shifts is 0, expected 1 to 24"),
        (lambda: shifts(4, 7, (3,)), "shifts is 7, expected 1 to 6: 3 options are free"),
        (lambda: shifts(4, fixed=(4,)), r"fixed options \[4\] are not among 4 options \(0 to 3\)"),
        (lambda: shuffle_options(QUESTION, 4, random.Random(0)), "answer is option 4, expected 0 to 3 or None"),
        (lambda: answer(None, None, []), "there are no questions"),
        (
            lambda: answer(None, None, [QUESTION], method="letter"),
            "unknown method 'letter', expected one of letters, per_option",
        ),
        (
            lambda: answer(None, None, [QUESTION], aggregate="max"),
            "unknown aggregate 'max', expected one of mean, vote",
        ),
        (lambda: answer(None, None, [QUESTION], scoring="word"), "unknown scoring 'word', expected one of auto, token"),
        (lambda: answer(None, None, [QUESTION], batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: answer(None, None, [QUESTION], shifts=25), "shifts is 25"),
        (
            lambda: answer(None, None, [QUESTION], tokens=[1, 2, 3]),
            "tokens has 3 ids, expected one for each of A, B, C, D",
        ),
        (lambda: answer(Recurrent(), lambda *a: Words()(a[0], a[1]), [QUESTION]), "encode made no 'labels'"),
        (lambda: answer(lambda b: torch.zeros(3, 200), Words(), [QUESTION]), "returned 3 rows for 4 prompts"),
        (
            lambda: answer(lambda b: torch.zeros(3, 200), Words(), [QUESTION], scoring="sequence"),
            r"returned \(3,\) rows for 32 answer tokens",
        ),
        (lambda: answer(lambda b: torch.full((4, 200), math.nan), Words(), [QUESTION]), "scores are NaN after 'Which"),
        (lambda: answer(lambda b: torch.full((4, 200), -math.inf), Words(), [QUESTION]), "scores are NaN after 'Which"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_option_impossible_under_every_shift_is_never_chosen():
    words = Words()
    model = Reader(words, lambda text: {letter_of(text, "cat"): -math.inf})
    found = answer(model, words, [QUESTION])
    assert found.scores[0].exp().tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    # each letter impossible in turn: nothing is left
    masked = Reader(words, lambda text: {"A": -math.inf})
    with pytest.raises(ValueError, match="question 0 of its batch: under one of the shifts every option"):
        answer(masked, words, [QUESTION])


@pytest.mark.parametrize(("old", "new"), [("form", "method"), ("combine", "aggregate"), ("tell", "on_batch")])
def test_an_old_option_is_an_error_that_names_the_new_one(old, new):
    with pytest.raises(TypeError, match=rf"answer\(\) has no option '{old}': it is called {new} now"):
        answer(None, None, [QUESTION], **{old: None})
