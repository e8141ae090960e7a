"""What is timed: rows, vocabularies and hidden sizes. GPU vocabularies are those of released models."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (rows, vocabulary) of logits
LOGITS = {
    "cpu": {"llama-2, 512 rows": (512, 32_000), "llama-3, 256 rows": (256, 128_256)},
    "cuda": {
        "llama-3": (8192, 128_256),
        "qwen-2.5": (8192, 151_936),
        "gemma-2": (8192, 256_000),
    },
}[DEVICE]

# (rows, hidden size of the student, of the teacher, vocabulary) of heads
HEADS = {
    "cpu": {"1024 rows, 512 x 32000": (1024, 512, 512, 32_000)},
    "cuda": {
        "A: 8192 rows, 4096/4096 x 151936": (8192, 4096, 4096, 151_936),
        "B: 8192 rows, 896/3584 x 151936": (8192, 896, 3584, 151_936),
        "C: 8192 rows, 2048/3584 x 151936": (8192, 2048, 3584, 151_936),
        "D: 8192 rows, 4096/8192 x 128256": (8192, 4096, 8192, 128_256),
        "E: 8192 rows, 2304/3584 x 262144": (8192, 2304, 3584, 262_144),
    },
}[DEVICE]


def logits(shape, dtype, apart=1.0):
    """(student, teacher): teacher = student + noise, as a student some way into its training has it."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    student = torch.randn(shape, generator=generator, device=DEVICE)
    teacher = student + apart * torch.randn(shape, generator=generator, device=DEVICE)
    return student.to(dtype), teacher.to(dtype)


def heads(shape, dtype, apart=0.1):
    """(hidden, weight, teacher's hidden, teacher's weight): logits of standard deviation 3. Where the hidden sizes
    agree the teacher is the student plus noise, KL about 0.05: near convergence, where rounding shows."""
    rows, h_student, h_teacher, vocab = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, device=DEVICE)

    hidden, weight = draw(rows, h_student), draw(vocab, h_student) * 3 / h_student**0.5
    if h_teacher == h_student:
        hidden_t, weight_t = hidden + apart * draw(rows, h_student), weight
    else:
        hidden_t, weight_t = draw(rows, h_teacher), draw(vocab, h_teacher) * 3 / h_teacher**0.5
    hidden, hidden_t, weight = (t.to(dtype) for t in (hidden, hidden_t, weight))
    return hidden, weight, hidden_t, weight.clone() if h_teacher == h_student else weight_t.to(dtype)


def relative(got, exact):
    """Error of a gradient as a share of the true one."""
    return ((got.double() - exact).norm() / exact.norm()).item()
