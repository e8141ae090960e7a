"""The three makers of tiles in the loop: logits that exist, a head that is multiplied, the mean of several draws.

Tiles hold the numbers before scale and softcap, which the row operation applies.
"""

import torch

from .memory import empty

ALIGNED = 64  # words: where the rows of a tile begin, so that wide loads and GEMMs of odd vocabularies stay fast
# torch 2.8 and 2.9 take no float32 summand beside 16-bit operands (pytorch/pytorch#167931)
WIDE_SUM = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)


class Logits:
    """Logits that exist. A tile is a slice."""

    def __init__(self, x, vocab):
        self.full = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        self.x, self.vocab, self.index = self.full[:, :vocab], vocab, None
        self.dtype, self.grad, self.grad_dtype = x.dtype, None, None
        self.fixed_bytes = 0

    @property
    def bytes_per_row(self):
        if self.index is None:
            return 0
        return self.vocab * (self.x.element_size() + (self.grad_dtype.itemsize if self.grad_dtype else 0))

    def select(self, index):
        """Keep these rows alone: a block then has to be gathered."""
        self.index = index

    def allocate(self, rows):
        pass

    def release(self):
        self.grad = None

    def tile(self, start, stop):
        return self.x[start:stop] if self.index is None else self.x[self.index[start:stop]]

    def want(self, x, weight, bias, apart=False):
        """Say which gradients are asked for. fp16 would lose small entries before a loss scaler's factor comes: the
        gradient is float32 then."""
        kept = torch.float32 if self.dtype == torch.float16 else self.dtype
        self.grad_dtype = kept if x else None

    def leave_out(self, weight):
        """Rows of weight 0 have no gradient, whatever they hold: the row operation sees to that."""

    def reset(self):
        """Gradients of nothing yet."""
        covered = self.index is None and self.vocab == self.full.shape[1]
        self.grad = empty(self.full.shape, dtype=self.grad_dtype, device=self.full.device)
        if not covered:
            self.grad.zero_()

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


def widens(tensor):
    """Whether the GEMM of a tensor's device can sum and write float32 from 16-bit operands."""
    return tensor.is_cuda


def multiply(out, a, b, first):
    """out = a @ b at first, later out += a @ b, the sum kept in out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif widens(out):
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif WIDE_SUM:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:  # a narrow GEMM of the CPU rounds each product once
        out.copy_(a @ b) if first else out.add_(a @ b)


class Projection:
    """A Head, flattened: a tile costs one GEMM, its gradient one for the hidden states and one for the weight.

    Exact tiles (precision="float32") hold products summed in float32, whatever the dtype of the weight: by the GEMM itself
    where the device can widen (bfloat16 on CUDA), otherwise from float32 copies of a piece of the weight at a time, and
    the gradient's products likewise. Narrow tiles are made, and their gradient multiplied, in 16 bits. Sums over blocks
    are float32 or better everywhere.

    Args:
        hiddens: list of (N, H). Several are draws whose logits are averaged: a head is linear, so their mean is
            projected, at the cost of one.
        weight: (V, H). bias: (V,) or None.
        vocab: words to compare.
        tiles: one of tiles.TILES.
        compute: dtype to which autocast casts operands, or None.
        piece: bytes that a piece of the weight may take in other dtypes.
    """

    def __init__(self, hiddens, weight, bias, vocab, precision, compute, piece):
        self.hiddens, self.weight = hiddens, weight[:vocab]
        self.bias = None if bias is None else bias[:vocab]
        self.shapes = hiddens[0].shape, weight.shape
        self.index, self.vocab, self.minus, self.left_out = None, vocab, None, None
        self.stride = -(-vocab // ALIGNED) * ALIGNED
        self.wants, self.apart = (False, False, False), False  # apart: the gradient has a tile of its own
        self.operand = weight.dtype if compute is None or weight.dtype == torch.float64 else compute
        wide = torch.promote_types(self.operand, torch.float32)
        self.exact = precision == "float32"
        if self.exact:
            self.dtype = wide
            # fp16 is not widened by the GEMM: its gradient tile would underflow
            self.gemm = self.operand if widens(weight) and self.operand == torch.bfloat16 else wide
        else:
            self.dtype = self.gemm = self.operand if self.operand != wide else torch.bfloat16
        self.width, self.device, self.piece = weight.shape[1], weight.device, piece
        self.casts = not weight.dtype == self.operand == self.gemm
        self.release()

    @property
    def bytes_per_row(self):
        tile = self.stride * self.dtype.itemsize
        if self.apart:
            tile += self.stride * self.gemm.itemsize
        return tile + 3 * self.width * 4  # hidden states on their way into a GEMM, or their gradient on its way out

    @property
    def fixed_bytes(self):
        return min(self.piece, 8 * self.vocab * self.width) if self.casts or not self.exact else 0

    def select(self, index):
        """Keep these rows alone."""
        self.index = index

    def subtract(self, other):
        """Make tiles of the difference to another projection through the same weight and bias."""
        self.minus, self.bias = other, None

    def allocate(self, rows):
        self.space = empty((rows, self.stride), dtype=self.dtype, device=self.device)[:, : self.vocab]
        if self.apart:
            self.grad_space = empty((rows, self.stride), dtype=self.gemm, device=self.device)[:, : self.vocab]

    def release(self):
        self.space = self.grad_space = self.d_hidden = self.d_weight = self.d_bias = None

    def pieces(self, depth):
        """The columns of a tile, so many at a time that a matrix of this depth over them fits in two dtypes at once."""
        step = max(1, self.piece // (8 * max(depth, 1)))
        return [slice(start, min(start + step, self.vocab)) for start in range(0, self.vocab, step)]

    def weights(self):
        """(columns, weight in the GEMM's dtype), over the vocabulary. What autocast would round is rounded."""
        if not self.casts:
            yield slice(0, self.vocab), self.weight
            return
        space = None
        for columns in self.pieces(self.width):
            weight = self.weight[columns]
            if space is None:
                space = torch.empty(weight.shape, dtype=self.gemm, device=self.device)
            if self.operand.itemsize < self.gemm.itemsize:
                weight = weight.to(self.operand)
            yield columns, space[: len(weight)].copy_(weight)

    def hidden(self, start, stop):
        """Hidden states of a block: the mean over the draws, less the student's in the difference form; both are kept
        in float32 or better."""
        block = slice(start, stop) if self.index is None else self.index[start:stop]
        first, *others = (hidden[block].to(self.operand) for hidden in self.hiddens)
        wide = torch.promote_types(self.operand, torch.float32)
        if others:
            first = sum((other.to(wide) for other in others), first.to(wide)) / len(self.hiddens)
        return first if self.minus is None else first.to(wide) - self.minus.hidden(start, stop)

    def tile(self, start, stop):
        out, hidden = self.space[: stop - start], self.hidden(start, stop)
        high = hidden.to(self.gemm)
        for columns, weight in self.weights():
            multiply(out[:, columns], high, weight.T, True)
            # a mean of draws is wider than the operands of a widening GEMM: what they do not hold takes a second one
            if self.gemm != self.dtype and self.gemm != hidden.dtype:
                multiply(out[:, columns], (hidden - high).to(self.gemm), weight.T, False)
        if self.bias is not None:
            out += self.bias.to(self.operand).to(self.dtype)
        return out

    def want(self, x, weight, bias, apart=False):
        """Say which gradients are asked for: of hidden, weight, bias. apart: the tile has to outlive its gradient."""
        self.wants = x, weight, bias
        self.apart = any(self.wants) and (apart or self.gemm != self.dtype)

    def leave_out(self, weight):
        """Rows of weight 0 have no gradient, whatever they hold: 0 times a NaN would reach the gradient of the head."""
        self.left_out = weight == 0 if self.wants[1] else None

    def reset(self):
        """Gradients of nothing yet, in float32 or better."""
        x, weight, bias = self.wants
        like = dict(dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        self.d_hidden = torch.zeros(self.shapes[0], **like) if x else None
        self.d_weight = empty(self.shapes[1], **like) if weight else None
        self.d_bias = torch.zeros(self.shapes[1][:1], **like) if bias else None
        self.first = True

    def gradient(self, start, stop, tile):
        return tile if self.grad_space is None else self.grad_space[: stop - start]

    def back(self, grad, start, stop):
        if self.d_bias is not None:
            for columns in self.pieces(len(grad)):
                self.d_bias[columns] += grad[:, columns].sum(0, dtype=self.d_bias.dtype)
        if self.d_hidden is not None:
            self.back_to_hidden(grad, start, stop)
        if self.d_weight is not None:
            hidden = self.hidden(start, stop).to(self.gemm)
            if self.left_out is not None:
                hidden = hidden.masked_fill(self.left_out[start:stop].unsqueeze(1), 0)
            for columns in [slice(0, self.vocab)] if self.exact else self.pieces(self.width):
                multiply(self.d_weight[columns], grad[:, columns].T, hidden, self.first)
            self.first = False

    def back_to_hidden(self, grad, start, stop):
        out = self.d_hidden[start:stop] if self.index is None else self.d_hidden[self.index[start:stop]]
        for columns, weight in self.weights():
            multiply(out, grad[:, columns], weight, columns.start == 0)
        if self.index is not None:
            self.d_hidden[self.index[start:stop]] = out

    def gradients(self):
        if self.d_weight is not None:
            self.d_weight[0 if self.first else self.vocab :] = 0  # words that no block has reached
        return self.d_hidden, self.d_weight, self.d_bias


class Average:
    """The mean of the logits of several sides, each with its own scale and softcap."""

    def __init__(self, sides, transforms):
        self.sides, self.transforms = sides, transforms
        self.dtype = torch.promote_types(sides[0].dtype, torch.float32)
        self.vocab = sides[0].vocab

    @property
    def bytes_per_row(self):
        # the sum, and a draw while it is transformed
        return 2 * self.vocab * self.dtype.itemsize + max(side.bytes_per_row for side in self.sides)

    @property
    def fixed_bytes(self):
        return max(side.fixed_bytes for side in self.sides)

    def select(self, index):
        for side in self.sides:
            side.select(index)

    def allocate(self, rows):
        self.rows = rows

    def release(self):
        for side in self.sides:
            side.release()

    def tile(self, start, stop):
        total = None
        for side, transform in zip(self.sides, self.transforms, strict=True):
            side.allocate(self.rows)
            x = side.tile(start, stop).to(self.dtype) * transform.scale
            side.release()
            if transform.softcap is not None:
                x = x.div_(transform.softcap).tanh_().mul_(transform.softcap)
            total = x if total is None else total.add_(x)
        return total.div_(len(self.sides))
