"""How an answer is taken from a model: every option of it, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationOptions:
    """Greedy or sampled decoding. Whatever else the model's own generation config says is left aside."""

    sample: bool = False  # from the whole vocabulary; otherwise the most probable word, greedily
    temperature: float = 1.0  # of the sampling
    seed: int = 0  # of the sampling
    draw: int = 0  # another draw under the same seed
    instruction: str = "Please answer this question with one word."  # follows every question, as in VCD; or empty
    max_new_tokens: int = 16
    batch_size: int = 8  # also the unit of the sampling's random numbers: another size, another draw

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number above 0")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


DTYPES = ("auto", "float32", "bfloat16", "float16")


def with_instruction(text, instruction):
    """A question's text and the instruction behind it."""
    return f"{text} {instruction}".strip()
