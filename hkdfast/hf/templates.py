"""How a model is asked about an image: by the chat template of its processor or tokenizer, in the form it takes."""

import re

import jinja2

from .. import notes

PROBE = "is there a cat"  # a question of no template's own words
# image marks that stand between two more words, which the chat templates of Qwen2-VL and GLM-4V write
FRAMES = {
    "<|image_pad|>": ("<|vision_start|>", "<|vision_end|>"),
    "<|image|>": ("<|begin_of_image|>", "<|end_of_image|>"),
}
MEDIA = re.compile("(image|video|audio|vision|boi|eoi).*_token$")  # attributes of processors


def prompts(processor, texts):
    """The texts as the model wants to be asked, each about one image.

    By the chat template that the processor keeps, or else its tokenizer. Where neither has one, a note on stderr says
    so, and the image's mark comes first and then the text.

    Raises:
        ValueError: a template that cannot be rendered, or shows no image; or several and none of them the default.
    """
    keeper = keeper_of(processor)
    if keeper is None:
        kind = type(processor).__name__
        notes.note_once(f"{kind} and its tokenizer have no chat template: the model is asked without one")
        return [marked(processor, text) for text in texts]
    content = content_of(processor, keeper)
    turns = [[{"role": "user", "content": content(text)}] for text in texts]
    return keeper.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def answered(processor, text, prompt, answer):
    """The conversation to the end of the answer's turn, whose prompt `prompts` made of the text."""
    keeper = keeper_of(processor)
    if keeper is None:
        return f"{prompt} {answer}{processor.tokenizer.eos_token or ''}"
    content = content_of(processor, keeper)
    plain = isinstance(content(text), str)
    turns = [
        {"role": "user", "content": content(text)},
        {"role": "assistant", "content": answer if plain else [{"type": "text", "text": answer}]},
    ]
    return keeper.apply_chat_template(turns, tokenize=False)


def keeper_of(processor):
    """The processor or its tokenizer, whichever has a chat template; None if neither has."""
    for keeper in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(keeper, "chat_template", None)
        if isinstance(template, dict) and template and "default" not in template:
            raise ValueError(
                f"{type(keeper).__name__} has the chat templates {', '.join(template)}, and none of them is the "
                "default: save it with the one to ask by as its chat template"
            )
        if template:
            return keeper
    return None


def image_marks(processor):
    """The texts by which a processor finds its images and other media; a question may hold none of them."""
    tokenizer = processor.tokenizer
    named = tokenizer.special_tokens_map | vars(processor)
    marks = [str(value) for name, value in named.items() if MEDIA.search(name) and value]
    return [*dict.fromkeys(marks), *(each for mark in marks for each in FRAMES.get(mark, ()))]


def marked(processor, text):
    """The text behind the mark of its image, where the processor has one and does not put it there by itself."""
    mark = getattr(processor, "image_token", None)
    # the processors of the BLIP family put their query tokens in front
    if mark is None or hasattr(processor, "num_query_tokens"):
        return text
    tokenizer = processor.tokenizer
    start, end = FRAMES.get(mark, ("", ""))
    if start and not {None, tokenizer.unk_token_id} & set(tokenizer.convert_tokens_to_ids([start, end])):
        return f"{start}{mark}{end}{text}"
    return f"{mark}\n{text}"


def content_of(processor, keeper):
    """The function from a question to the content of its turn, in the first form that the template shows whole.

    Templates take a turn's content as a list of parts, an image among them; or as a list of texts, or one text, in
    which the image's mark is.
    """

    def shown(content):
        try:
            turn = {"role": "user", "content": content}
            return keeper.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template of {type(keeper).__name__} is damaged: {error}") from error
        # what templates make of a content that they do not expect
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            failures.append(str(error))
            return ""

    failures = []
    by_mark = marked(processor, PROBE) != PROBE  # else the processor alone knows where the image goes
    for form in (with_image, with_mark, as_text):
        text = shown(form(processor, PROBE))
        # a list where a text is expected is printed as a list
        whole = text.count(PROBE) == 1 and "'type':" not in text
        if whole and (not by_mark or text.split() != shown(form(None, PROBE)).split()):
            return lambda question, form=form: form(processor, question)
    why = f": {failures[0]}" if failures else ""
    raise ValueError(f"the chat template of {type(keeper).__name__} shows no question about an image{why}")


# The forms of a question about an image; without a processor, of the same question about none.


def with_image(processor, text):
    return [{"type": "image"}] * (processor is not None) + [{"type": "text", "text": text}]


def with_mark(processor, text):
    return [{"type": "text", "text": as_text(processor, text)}]


def as_text(processor, text):
    return text if processor is None else marked(processor, text)
