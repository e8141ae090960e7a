"""Options of generating an answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationOptions:
    """Greedy or sampled decoding. Of the model's own generation config only the special tokens are used."""

    sample: bool = False  # sample from the whole vocabulary; False: greedy decoding
    temperature: float = 1.0  # of the sampling
    seed: int = 0  # of the sampling
    draw: int = 0  # number of the draw; draws under one seed differ
    instruction: str = "Please answer this question with one word."  # appended to every question, as in VCD; may be ""
    max_new_tokens: int = 16
    batch_size: int = 8  # changes the sampled answers too: each batch has its own random numbers

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number above 0")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


DTYPES = ("auto", "float32", "bfloat16", "float16")


def with_instruction(text, instruction):
    """A question's text, followed by the instruction."""
    return f"{text} {instruction}".strip()
