"""Where a tile of logits comes from, and how its gradient goes back.

Head and Purified are what the public functions take. Inside the tile loop a side is a Logits, a Projection or an
Average: three classes with the same few methods. Their tiles hold the numbers before scale and softcap, which the row
operation applies.
"""

from dataclasses import dataclass

import torch

from .objective import Law, Transform

CAST_BYTES = 32 << 20  # of float32 copies of 16-bit weights at a time, on devices whose GEMM cannot widen its result


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head not multiplied out yet: logits = cap(scale * (hidden @ weight.T + bias)).

    Args:
        hidden: (..., H) states that enter the head, any float dtype. Gets a gradient as the student's.
        weight: (V, H), hidden's dtype unless autocast is on. Gets a gradient as the student's.
        bias: (V,) or None, weight's dtype. Gets a gradient as the student's.
        scale: factor of the logits (Granite and Cohere call it logit scale), finite and not 0.
        softcap: if given, logits become softcap * tanh(logits / softcap), as in Gemma 2. Positive.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, or a scale or softcap out of range.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., H) and (V, H) with one H"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {tuple(bias.shape)} must be ({weight.shape[0]},) for weight {tuple(weight.shape)}")
        if not hidden.is_floating_point() or not weight.is_floating_point():
            raise ValueError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}: cast one, or use autocast")
        if hidden.device != weight.device:
            raise ValueError(f"hidden is on {hidden.device} but weight is on {weight.device}")
        if not (self.scale and abs(self.scale) < float("inf")):
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap must be positive and finite, got {self.softcap}")

    @property
    def shape(self):
        """Of the logits: (..., V)."""
        return *self.hidden.shape[:-1], self.weight.shape[0]

    @property
    def transform(self):
        return Transform(float(self.scale), None if self.softcap is None else float(self.softcap))


@dataclass(frozen=True, eq=False)
class Purified:
    """A teacher contrasted row by row: what `hkdfast.purify` returns."""

    clean: torch.Tensor | Head
    noisy: tuple[torch.Tensor | Head, ...]
    law: Law
    alpha: torch.Tensor | None  # (...) weights of the rows if law.weight == "rows"

    @property
    def shape(self):
        return tuple(self.clean.shape)


def device_of(source):
    return source.hidden.device if isinstance(source, Head) else source.device


def transform_of(source):
    return source.transform if isinstance(source, Head) else Transform()


def parts(source, rows):
    """The tensors of a source, its leading dimensions made one: (x, weight, bias)."""
    if isinstance(source, Head):
        return (
            source.hidden.reshape(rows, source.hidden.shape[-1]),
            source.weight,
            source.bias,
        )
    return source.reshape(rows, source.shape[-1]), None, None


class Logits:
    """Logits that exist. A tile is a slice."""

    def __init__(self, x, vocab):
        self.x, self.vocab, self.index = x[:, :vocab], vocab, None
        self.full, self.dtype = x, x.dtype
        self.bytes_per_row = self.fixed_bytes = 0

    def select(self, index):
        """Keep these rows alone: a block then has to be gathered."""
        self.index, self.bytes_per_row = index, self.vocab * self.x.element_size()

    def allocate(self, rows):
        pass

    def tile(self, start, stop):
        return self.x[start:stop] if self.index is None else self.x[self.index[start:stop]]

    def want(self, x, weight, bias):
        """Say which gradients are asked for. fp16 would lose small entries before a loss scaler's factor comes: the
        gradient is float32 then."""
        self.grad_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        if self.index is not None:
            self.bytes_per_row += self.vocab * self.grad_dtype.itemsize

    def reset(self):
        """Gradients of nothing yet."""
        covered = self.index is None and self.vocab == self.full.shape[1]
        like = torch.empty if covered else torch.zeros
        self.grad = like(self.full.shape, dtype=self.grad_dtype, device=self.full.device)

    def gradient(self, start, stop, tile):
        """Where the row operation writes the gradient of a block."""
        if self.index is None:
            return self.grad[start:stop, : self.vocab]
        return torch.empty(tile.shape, dtype=self.grad_dtype, device=tile.device)

    def back(self, grad, start, stop):
        if self.index is not None:
            self.grad[self.index[start:stop], : self.vocab] = grad

    def gradients(self):
        return self.grad, None, None


class Projection:
    """A Head, flattened: a tile costs one GEMM, its gradient one for the hidden states and one for the weight.

    In exact arithmetic (tiles="float32") products are summed and kept in float32, whatever the dtype of the weight:
    by the GEMM itself on CUDA, from float32 copies of CAST_BYTES of the weight at a time elsewhere. Narrow tiles are
    made, and their gradient multiplied, in the weight's 16-bit dtype.
    """

    def __init__(self, hidden, weight, bias, vocab, tiles, compute):
        self.hidden, self.weight = hidden.to(compute), weight[:vocab].to(compute)
        self.bias = None if bias is None else bias[:vocab]
        self.shapes = hidden.shape, weight.shape
        self.index, self.vocab, self.minus = None, vocab, None
        narrow = compute if compute in (torch.bfloat16, torch.float16) else torch.bfloat16
        exact = torch.promote_types(compute, torch.float32)
        self.dtype = exact if tiles == "float32" else narrow
        if tiles != "float32":
            self.hidden, self.weight = self.hidden.to(narrow), self.weight.to(narrow)
        self.widens = hidden.is_cuda and self.dtype == torch.float32 and self.weight.dtype != torch.float32
        self.casts = self.weight.dtype != self.dtype and not self.widens
        self.grad_dtype = self.weight.dtype if self.widens else self.dtype
        self.bytes_per_row = self.vocab * self.dtype.itemsize
        copied = 0 if self.weight.dtype == weight.dtype else self.weight.nbytes
        self.fixed_bytes = copied + (CAST_BYTES if self.casts else 0)
        self.wants = (False, False, False)

    @property
    def width(self):
        return self.hidden.shape[1]

    def select(self, index):
        self.index, self.hidden = index, self.hidden[index]

    def subtract(self, other):
        """Make tiles of the difference to another projection through the same weight."""
        self.minus = other
        difference = self.hidden.float() - other.hidden.float()
        self.hidden, self.bias = difference.to(self.weight.dtype), None

    def allocate(self, rows):
        self.space = torch.empty(rows, self.vocab, dtype=self.dtype, device=self.hidden.device)
        self.grad_space = None
        if any(self.wants) and self.grad_dtype != self.dtype:
            self.grad_space = torch.empty(rows, self.vocab, dtype=self.grad_dtype, device=self.hidden.device)

    def spans(self):
        """The vocabulary in pieces: (columns, weight in the tile's dtype)."""
        if not self.casts:
            yield slice(0, self.vocab), self.weight
            return
        step = max(1, CAST_BYTES // (self.width * self.dtype.itemsize))
        for start in range(0, self.vocab, step):
            columns = slice(start, min(start + step, self.vocab))
            yield columns, self.weight[columns].to(self.dtype)

    def tile(self, start, stop):
        out = self.space[: stop - start]
        hidden = self.hidden[start:stop]
        if self.widens:
            torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=out)
        else:
            hidden = hidden.to(self.dtype)
            for columns, weight in self.spans():
                torch.mm(hidden, weight.T, out=out[:, columns])
        if self.bias is not None:
            out += self.bias.to(self.dtype)
        return out

    def want(self, x, weight, bias):
        """Say which gradients are asked for: of hidden, weight, bias."""
        self.wants = (x, weight, bias)
        if self.grad_dtype != self.dtype:
            self.bytes_per_row += self.vocab * self.grad_dtype.itemsize

    def reset(self):
        """Gradients of nothing yet, in float32 or better."""
        x, weight, bias = self.wants
        like = dict(
            dtype=torch.promote_types(self.dtype, torch.float32),
            device=self.hidden.device,
        )
        self.d_hidden = torch.empty(self.hidden.shape, **like) if x else None
        self.d_weight = torch.zeros(self.shapes[1], **like) if weight else None
        self.d_bias = torch.zeros(self.shapes[1][:1], **like) if bias else None

    def gradient(self, start, stop, tile):
        return tile if self.grad_space is None else self.grad_space[: stop - start]

    def back(self, grad, start, stop):
        x, weight, bias = self.wants
        if bias:
            self.d_bias[: self.vocab] += grad.sum(0, dtype=self.d_bias.dtype)
        if x:
            self.back_to_hidden(grad, self.d_hidden[start:stop])
        if weight:
            self.back_to_weight(grad, self.hidden[start:stop], self.d_weight[: self.vocab])

    def back_to_hidden(self, grad, out):
        if self.widens:
            torch.mm(grad, self.weight, out_dtype=out.dtype, out=out)
        elif not self.casts:
            out.copy_(grad @ self.weight) if out.dtype != grad.dtype else torch.mm(grad, self.weight, out=out)
        else:
            out.zero_()
            for columns, weight in self.spans():
                out.addmm_(grad[:, columns], weight)

    def back_to_weight(self, grad, hidden, out):
        if self.widens:
            torch.addmm(out, grad.T, hidden, out_dtype=out.dtype, out=out)
        elif out.dtype == grad.dtype:
            out.addmm_(grad.T, hidden.to(grad.dtype))
        else:
            # narrow tiles: each product is rounded once, the sum over blocks is kept in float32
            step = max(1, CAST_BYTES // (self.width * grad.element_size()))
            for start in range(0, self.vocab, step):
                out[start : start + step] += grad[:, start : start + step].T @ hidden

    def gradients(self):
        if self.index is None or self.d_hidden is None:
            return self.d_hidden, self.d_weight, self.d_bias
        d_hidden = self.d_hidden.new_zeros(self.shapes[0])
        d_hidden[self.index] = self.d_hidden
        return d_hidden, self.d_weight, self.d_bias


class Average:
    """The mean of the logits of several sides, each with its own scale and softcap."""

    def __init__(self, sides, transforms):
        self.sides, self.transforms = sides, transforms
        self.dtype = torch.promote_types(sides[0].dtype, torch.float32)
        self.vocab = sides[0].vocab

    @property
    def bytes_per_row(self):
        # the sum, and a draw while it is transformed
        own = 2 * self.vocab * self.dtype.itemsize
        return own + sum(side.bytes_per_row for side in self.sides)

    @property
    def fixed_bytes(self):
        return max(side.fixed_bytes for side in self.sides)

    def select(self, index):
        for side in self.sides:
            side.select(index)

    def allocate(self, rows):
        for side in self.sides:
            side.allocate(rows)

    def tile(self, start, stop):
        total = None
        for side, transform in zip(self.sides, self.transforms, strict=True):
            x = side.tile(start, stop).to(self.dtype) * transform.scale
            if transform.softcap is not None:
                x = x.div_(transform.softcap).tanh_().mul_(transform.softcap)
            total = x if total is None else total.add_(x)
        return total.div_(len(self.sides))
