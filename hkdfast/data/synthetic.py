"""New captions and claims about images: with answers, made from annotations, or without, for the teacher to answer.

An annotated example has "image" and "objects", a list of {"name": "cat", "attribute": "black", "count": 2}. attribute
and count are optional; "plural" gives an irregular plural. Each object becomes a phrase ("two black cats"). Some
phrases are made wrong: another object, another attribute, another number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ..choices import LETTERS, check_list
from .jsonl import shown
from .tasks import NONE, TASKS, is_none, record_of

KINDS = ("object", "attribute", "count")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def phrase(thing):
    """An annotated object in words: "a black cat", "two cats"."""
    name, attribute, count = thing["name"], thing.get("attribute"), thing.get("count") or 1
    words = [] if not attribute else [attribute]
    if count == 1:
        words.append(name)
        return f"{'an' if words[0][0].lower() in 'aeiou' else 'a'} {' '.join(words)}"
    return " ".join([NUMBERS[count] if count < len(NUMBERS) else str(count), *words, plural(thing)])


def plural(thing):
    name = thing["name"]
    if thing.get("plural"):
        return thing["plural"]
    if re.search("[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name + ("es" if re.search("(s|x|z|ch|sh)$", name) else "s")


def listed(phrases):
    """Phrases as an enumeration: "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


@dataclass(frozen=True)
class Corruptions:
    """How an annotated fact is made wrong.

    Args:
        objects: names that may replace the name of an object: a list, or {name: alternatives}.
        attributes: {attribute: alternatives that exclude it}.
        kinds: what may be changed: some of "object", "attribute" and "count".

    Raises:
        ValueError: an unknown kind, or none.
    """

    objects: Sequence[str] | Mapping[str, Sequence[str]] = ()
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kinds: Sequence[str] = KINDS

    def __post_init__(self):
        for name, value in (("objects", self.objects), ("attributes", self.attributes), ("kinds", self.kinds)):
            check_list(name, value)
        for name in ("objects", "attributes"):
            value = getattr(self, name)
            for key, others in value.items() if isinstance(value, Mapping) else ():
                check_list(f"{name}[{key!r}]", others)
        wrong = [kind for kind in self.kinds if kind not in KINDS]
        if wrong or not self.kinds:
            raise ValueError(f"kinds are {list(self.kinds)}, expected some of {', '.join(KINDS)}")

    def wrong(self, thing, objects, rng):
        """A changed copy of an annotated object that the image does not show.

        Args:
            objects: everything that the image shows under these names.

        Returns:
            a dict like `thing`, or None if nothing about it can be changed.
        """
        kinds = list(self.kinds)
        rng.shuffle(kinds)
        for kind in kinds:
            found = getattr(self, f"wrong_{kind}")(thing, objects)
            if found:
                return thing | rng.choice(found)
        return None

    def wrong_object(self, thing, objects):
        there = {other["name"] for other in objects}
        names = self.objects.get(thing["name"], ()) if isinstance(self.objects, Mapping) else self.objects
        return [{"name": name, "plural": None} for name in names if name not in there]

    def wrong_attribute(self, thing, objects):
        there = {other.get("attribute") for other in objects if other["name"] == thing["name"]}
        words = self.attributes.get(thing.get("attribute"), ())
        # a cat whose color is not annotated may have any color
        return [{"attribute": word} for word in words if word not in there and None not in there]

    def wrong_count(self, thing, objects):
        if not thing.get("count") or sum(other["name"] == thing["name"] for other in objects) > 1:
            return []
        count = thing["count"]
        # never one: an image of two cats also shows a cat
        return [{"count": other} for other in range(max(2, count - 2), count + 3) if other != count]


def objects_of(example):
    """The annotated objects of an example; of several with the same phrase, one.

    Raises:
        ValueError: if the example has none.
    """
    objects = example.get("objects")
    if not objects:
        raise ValueError(f"the example has no annotated 'objects', only {', '.join(example)}")
    for thing in objects:
        check_object(thing)
    return list({phrase(thing): thing for thing in objects}.values())


def check_object(thing):
    """Refuse an annotated object that `phrase` cannot express."""
    if not isinstance(thing, Mapping) or not isinstance(thing.get("name"), str) or not thing["name"].strip():
        raise ValueError(f"an annotated object is {shown(thing)}, expected a dict with a 'name'")
    for name in ("attribute", "plural"):
        if not isinstance(thing.get(name), str | None):
            raise ValueError(f"{name} of the object {thing['name']!r} is {shown(thing[name])}, expected a text")
    count = thing.get("count")
    if count is not None and (type(count) is not int or count < 0):
        raise ValueError(f"count of the object {thing['name']!r} is {shown(count)}, expected a whole number")


def fields_of(example, task, **changed):
    """The fields of a question about the example's image, for one of TASKS."""
    known = TASKS[task]
    fields = {"question_id": 0, "context": ""} | example
    return fields | {"task": task, "question": known.asked, "template": 0} | changed


@dataclass(frozen=True)
class SyntheticCaption:
    """A question of the task "hallucination": a caption of the annotated objects, in which one phrase is made wrong.

    The options are the caption's phrases, in their order, and "No hallucination". Apply ShuffleOptions afterwards.

    Args:
        corruptions: Corruptions, which makes a phrase wrong.
        phrases: largest number of phrases in a caption.
        none: probability that nothing is made wrong.
        caption: the caption, with {} for the phrases.

    Raises:
        ValueError: phrases outside 1 to 25, none outside 0 to 1, a caption without {}; when called, an example
            without "objects".
    """

    corruptions: Corruptions
    phrases: int = 3
    none: float = 0.25
    caption: str = "The image shows {}."

    def __post_init__(self):
        most = len(LETTERS) - 1  # one letter is for "No hallucination"
        if not 1 <= self.phrases <= most or not 0 <= self.none <= 1:
            raise ValueError(f"phrases is {self.phrases} and none is {self.none}, expected 1 to {most} and 0 to 1")
        if "{}" not in self.caption:
            raise ValueError(f"caption is {self.caption!r}, expected {{}} in it")

    def __call__(self, example, rng):
        objects = objects_of(example)
        mentioned = rng.sample(objects, min(self.phrases, len(objects)))
        wrong = None
        if rng.random() >= self.none:
            for place in rng.sample(range(len(mentioned)), len(mentioned)):
                made = self.corruptions.wrong(mentioned[place], objects, rng)
                if made is not None:
                    mentioned[place], wrong = made, place
                    break
        phrases = [phrase(thing) for thing in mentioned]
        statement = self.caption.replace("{}", listed(phrases))
        answer = LETTERS[len(phrases) if wrong is None else wrong]
        return fields_of(example, "hallucination", statement=statement, options=[*phrases, NONE], answer=answer)


@dataclass(frozen=True)
class Claim:
    """A question of the task "factcheck": a claim about the annotated objects.

    Its verdict is drawn uniformly from those that the objects allow. "True": all facts of the claim hold. "False": none
    holds. "Partially True": some hold. "Not Verifiable": neither image nor context can confirm the claim.

    Args:
        corruptions: Corruptions, which makes a fact wrong.
        parts: number of facts in a claim, at least 2; fewer if the example has fewer objects.
        unverifiable: sentences about an image that nobody can judge by looking at it.
        claim: the claim, with {} for the facts.

    Raises:
        ValueError: parts below 2, no unverifiable sentence, a claim without {}; when called, an example without
            "objects".
    """

    corruptions: Corruptions
    parts: int = 2
    unverifiable: Sequence[str] = (
        "The picture was taken on a Monday.",
        "The photographer was born in a small town.",
        "Somebody paid for this picture.",
    )
    claim: str = "The image shows {}."

    def __post_init__(self):
        check_list("unverifiable", self.unverifiable)
        if self.parts < 2 or not self.unverifiable:
            raise ValueError(f"parts is {self.parts} and unverifiable {self.unverifiable}, expected at least 2 and 1")
        if "{}" not in self.claim:
            raise ValueError(f"claim is {self.claim!r}, expected {{}} in it")

    def __call__(self, example, rng):
        objects = objects_of(example)
        mentioned = rng.sample(objects, min(self.parts, len(objects)))
        made = []
        for thing in mentioned:  # two objects never become the same wrong one
            made.append(self.corruptions.wrong(thing, objects + [other for other in made if other], rng))
        candidates = [place for place, thing in enumerate(made) if thing is not None]
        verdicts = TASKS["factcheck"].options
        can = {
            "True": True,
            "False": len(candidates) == len(mentioned),
            "Partially True": bool(candidates) and len(mentioned) > 1,
        }
        verdict = rng.choice([name for name in verdicts if can.get(name, True)])
        wrong = candidates if verdict == "False" else []
        if verdict == "Partially True":
            wrong = rng.sample(candidates, rng.randint(1, min(len(candidates), len(mentioned) - 1)))
        phrases = [phrase(made[place] if place in wrong else thing) for place, thing in enumerate(mentioned)]
        statement = self.claim.replace("{}", listed(phrases))
        if verdict == "Not Verifiable":
            statement = f"{statement} {rng.choice(self.unverifiable)}"
        answer = LETTERS[verdicts.index(verdict)]
        return fields_of(example, "factcheck", statement=statement, options=list(verdicts), answer=answer)


@dataclass(frozen=True)
class RewriteStatement:
    """Change the statement. Whether the new one is true is unknown: the answer is None, and the teacher provides it.

    Phrases are replaced in the statement and in the options. If the answer of a caption names wrong options, only
    phrases in these are replaced, so the number of wrong phrases does not grow. A phrase inside a longer one that may
    be replaced itself is not replaced. An example without a phrase to replace is returned unchanged, with its answer.

    Args:
        phrases: list of texts, each of which may replace any option that the statement contains.
        swaps: {phrase: alternatives}, for phrases anywhere in the statement.
        changes: largest number of phrases to replace.

    Raises:
        ValueError: if phrases and swaps are both empty, a phrase is empty or not a text, or changes is below 1.
    """

    phrases: Sequence[str] = ()
    swaps: Mapping[str, Sequence[str]] = field(default_factory=dict)
    changes: int = 1

    def __post_init__(self):
        check_list("phrases", self.phrases)
        for phrase, others in self.swaps.items():
            check_list(f"swaps[{phrase!r}]", others)
        if not self.phrases and not self.swaps:
            raise ValueError("RewriteStatement has nothing to replace phrases with: give phrases or swaps")
        for text in (*self.phrases, *self.swaps, *(one for others in self.swaps.values() for one in others)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"every phrase must be a text that is not empty, got {text!r}")
        if self.changes < 1:
            raise ValueError(f"changes must be at least 1, got {self.changes}")

    def __call__(self, example, rng):
        record = record_of(example)
        statement, options = record.statement, list(record.options)
        candidates = {option: self.phrases for option in options if self.phrases and not is_none(option)} | dict(
            self.swaps
        )
        candidates = {old: new for old, new in candidates.items() if self.occurs(old, statement, options)}
        if record.task == "hallucination" and record.answer is not None:
            named = [options[LETTERS.index(letter)] for letter in record.answer]
            if not all(map(is_none, named)):
                candidates = {
                    old: new for old, new in candidates.items() if any(found(old, option) for option in named)
                }
        for old in rng.sample(sorted(candidates), min(self.changes, len(candidates))):
            new = [
                one for one in candidates[old] if not found(one, statement) and not is_none(one) and one not in options
            ]
            if new and self.occurs(old, statement, options):
                one, containing = rng.choice(new), self.containing_phrases(old, options)
                statement = replaced(old, one, statement, containing)
                if record.task == "hallucination":
                    options = [o if is_none(o) else replaced(old, one, o, containing) for o in options]
        if statement == record.statement or len({option.casefold() for option in options}) < len(options):
            return example
        return example | {"statement": statement, "options": options, "answer": None}

    def containing_phrases(self, old, options):
        """Longer phrases that contain this one and may be replaced themselves: "a cat tree" for "a cat"."""
        others = [*self.swaps, *(options if old in options else ())]
        return [other for other in others if len(other) > len(old) and found(old, other)]

    def occurs(self, old, statement, options):
        """Whether a statement contains a phrase outside the longer ones of `containing_phrases`."""
        return (
            found(old, statement) and replaced(old, "_", statement, self.containing_phrases(old, options)) != statement
        )


@lru_cache(2**14)  # every example is searched for every phrase that may be swapped
def whole(*texts):
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, texts))})(?!\w)", re.IGNORECASE)


def found(text, within):
    return whole(text).search(within) is not None


def replaced(old, new, text, containing=()):
    """The text with one phrase replaced by another, except inside the longer phrases. A capital first letter stays."""

    def put(hit):
        if hit[0].casefold() != old.casefold():
            return hit[0]
        return new[0].upper() + new[1:] if hit[0][0].isupper() else new

    return whole(*sorted(containing, key=len, reverse=True), old).sub(put, text)
