"""The placeholder of the image in questions of LLaVA's format."""

from .jsonl import shown

MARK = "<image>"


def without_mark(where, text):
    """A question without the placeholder of its image at its beginning or end. The chat template adds the model's own.

    Args:
        where: prefix of an error message.
        text: the question.

    Raises:
        ValueError: a placeholder in the middle, more than one, or no other text.
    """
    count = text.count(MARK)
    found = text.strip()
    if count == 1 and found.startswith(MARK) or count == 1 and found.endswith(MARK):
        text, count = found.removeprefix(MARK).removesuffix(MARK).strip(), 0
    if count:
        what = "more than one" if count > 1 else "in the middle"
        raise ValueError(
            f"{where} has {MARK} {what}, expected a question about one image, with {MARK} first, last or not at "
            f"all: {shown(text)}"
        )
    if not text.strip():
        raise ValueError(f"{where} is {shown(text)}, expected a question")
    return text
