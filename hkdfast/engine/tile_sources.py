"""The three tile sources of the loop: logits, a projected head, and the averaged logits of several draws.

Tiles hold values before scale and softcap, which the row operation applies.
"""

import torch

from .memory import empty_hugepages

ALIGNED = 64  # tokens; the row stride of a tile is a multiple: wide loads and GEMMs stay fast for odd vocabulary sizes
# torch 2.8 and 2.9 do not add 16-bit products to a float32 tensor (pytorch/pytorch#167931)
WIDE_SUM = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)


class LogitTiles:
    """Logits in memory. A tile is a slice."""

    d_hidden = None

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
        """Restrict the loop to these rows; each block is gathered."""
        self.index = index

    def allocate(self, rows):
        pass

    def release(self):
        self.grad = None

    def tile(self, start, stop):
        return self.x[start:stop] if self.index is None else self.x[self.index[start:stop]]

    def request_grads(self, x, weight, bias, separate_grad=False):
        """Set which gradients are required. That of fp16 logits is float32: fp16 would lose small entries before the
        loss scaler multiplies."""
        kept = torch.float32 if self.dtype == torch.float16 else self.dtype
        self.grad_dtype = kept if x else None

    def leave_out(self, weight):
        """Rows of weight 0 get a zero gradient, whatever they hold; the row operation writes it."""

    def reset(self):
        """Start a sweep with zero gradients."""
        covered = self.index is None and self.vocab == self.full.shape[1]
        self.grad = empty_hugepages(self.full.shape, dtype=self.grad_dtype, device=self.full.device)
        if not covered:
            self.grad.zero_()

    def grad_buffer(self, start, stop, tile):
        """The tensor to which the row operation writes the gradient of a block."""
        if self.index is None:
            return self.grad[start:stop, : self.vocab]
        return torch.empty(tile.shape, dtype=self.grad_dtype, device=tile.device)

    def backward(self, grad, start, stop):
        if self.index is not None:
            self.grad[self.index[start:stop], : self.vocab] = grad

    def grads(self):
        return self.grad, None, None


def has_wide_gemm(tensor):
    """Whether the GEMM of the tensor's device accumulates and writes float32 from 16-bit operands."""
    return tensor.is_cuda


def multiply(out, a, b, first):
    """out = a @ b if first, else out += a @ b, accumulated in out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif has_wide_gemm(out):
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif WIDE_SUM:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:  # a 16-bit GEMM on the CPU rounds each product once
        out.copy_(a @ b) if first else out.add_(a @ b)


class ProjectedTiles:
    """A Head with its rows flattened. A tile costs one GEMM, its gradient one for hidden and one for weight.

    Exact tiles (precision="float32") hold products summed in float32, whatever the weight's dtype: by the GEMM
    itself where it can write float32 (bfloat16 on CUDA), otherwise from float32 copies of one chunk of the weight at a
    time; the gradient's products likewise. With other precisions, tiles and their gradients are multiplied in 16 bits.
    Sums over blocks are always float32 or float64.

    Args:
        hiddens: list of (N, H). Several are draws whose logits are averaged: a head is linear, so their mean is
            projected, at the cost of one product.
        weight: (V, H). bias: (V,) or None.
        vocab: tokens to compare.
        precision: one of options.PRECISIONS.
        compute: dtype to which autocast casts operands, or None.
        piece: bytes that a cast chunk of the weight may take.
    """

    def __init__(self, hiddens, weight, bias, vocab, precision, compute, piece):
        self.hiddens, self.weight = hiddens, weight[:vocab]
        self.bias = None if bias is None else bias[:vocab]
        self.shapes = hiddens[0].shape, weight.shape
        self.index, self.vocab, self.base, self.left_out = None, vocab, None, None
        self.stride = -(-vocab // ALIGNED) * ALIGNED
        self.wants = (False, False, False)
        self.separate_grad = False  # whether the gradient has its own tile
        self.operand = weight.dtype if compute is None or weight.dtype == torch.float64 else compute
        wide = torch.promote_types(self.operand, torch.float32)
        self.exact = precision == "float32"
        if self.exact:
            self.dtype = wide
            # not for fp16, whose gradient tile would underflow
            self.gemm = self.operand if has_wide_gemm(weight) and self.operand == torch.bfloat16 else wide
        else:
            self.dtype = self.gemm = self.operand if self.operand != wide else torch.bfloat16
        self.width, self.device, self.piece = weight.shape[1], weight.device, piece
        self.casts = not weight.dtype == self.operand == self.gemm
        self.release()

    @property
    def bytes_per_row(self):
        tile = self.stride * self.dtype.itemsize
        if self.separate_grad:
            tile += self.stride * self.gemm.itemsize
        return tile + 3 * self.width * 4  # a block's hidden states as GEMM input, or their gradient as output

    @property
    def fixed_bytes(self):
        return min(self.piece, 8 * self.vocab * self.width) if self.casts or not self.exact else 0

    def select(self, index):
        """Restrict the loop to these rows."""
        self.index = index

    def as_difference_to(self, other):
        """Make tiles of the difference to another source that has the same weight and bias."""
        self.base, self.bias = other, None

    def allocate(self, rows):
        self.space = empty_hugepages((rows, self.stride), dtype=self.dtype, device=self.device)[:, : self.vocab]
        if self.separate_grad:
            self.grad_space = empty_hugepages((rows, self.stride), dtype=self.gemm, device=self.device)[:, : self.vocab]

    def release(self):
        self.space = self.grad_space = self.d_hidden = self.d_weight = self.d_bias = None

    def column_chunks(self, depth):
        """Column slices of a tile. A matrix (columns, depth) fits in `piece` bytes in two dtypes at once."""
        step = max(1, self.piece // (8 * max(depth, 1)))
        return [slice(start, min(start + step, self.vocab)) for start in range(0, self.vocab, step)]

    def weights(self):
        """(columns, weight in the GEMM's dtype) over the vocabulary, rounded as autocast would round it."""
        if not self.casts:
            yield slice(0, self.vocab), self.weight
            return
        space = None
        for columns in self.column_chunks(self.width):
            weight = self.weight[columns]
            if space is None:
                space = torch.empty(weight.shape, dtype=self.gemm, device=self.device)
            if self.operand.itemsize < self.gemm.itemsize:
                weight = weight.to(self.operand)
            yield columns, space[: len(weight)].copy_(weight)

    def hidden(self, start, stop):
        """Hidden states of a block: the mean over the draws, minus the student's for difference tiles; both in float32
        or float64."""
        block = slice(start, stop) if self.index is None else self.index[start:stop]
        first, *others = (hidden[block].to(self.operand) for hidden in self.hiddens)
        wide = torch.promote_types(self.operand, torch.float32)
        if others:
            first = sum((other.to(wide) for other in others), first.to(wide)) / len(self.hiddens)
        return first if self.base is None else first.to(wide) - self.base.hidden(start, stop)

    def tile(self, start, stop):
        out, hidden = self.space[: stop - start], self.hidden(start, stop)
        high = hidden.to(self.gemm)
        for columns, weight in self.weights():
            multiply(out[:, columns], high, weight.T, True)
            # a mean of draws is float32: the part that the GEMM's 16-bit operand cannot hold takes a second product
            if self.gemm != self.dtype and self.gemm != hidden.dtype:
                multiply(out[:, columns], (hidden - high).to(self.gemm), weight.T, False)
        if self.bias is not None:
            out += self.bias.to(self.operand).to(self.dtype)
        return out

    def request_grads(self, x, weight, bias, separate_grad=False):
        """Set which gradients are required: of hidden, weight, bias. separate_grad: the tile is read after its gradient
        has been written."""
        self.wants = x, weight, bias
        self.separate_grad = any(self.wants) and (separate_grad or self.gemm != self.dtype)

    def leave_out(self, weight):
        """Rows of weight 0 get a zero gradient, whatever they hold: 0 times a NaN would reach the head's gradient."""
        self.left_out = weight == 0 if self.wants[1] else None

    def reset(self):
        """Start a sweep with zero gradients, in float32 or float64."""
        x, weight, bias = self.wants
        like = dict(dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        self.d_hidden = torch.zeros(self.shapes[0], **like) if x else None
        self.d_weight = empty_hugepages(self.shapes[1], **like) if weight else None
        self.d_bias = torch.zeros(self.shapes[1][:1], **like) if bias else None
        self.first = True

    def grad_buffer(self, start, stop, tile):
        return tile if self.grad_space is None else self.grad_space[: stop - start]

    def backward(self, grad, start, stop):
        if self.d_bias is not None:
            for columns in self.column_chunks(len(grad)):
                self.d_bias[columns] += grad[:, columns].sum(0, dtype=self.d_bias.dtype)
        if self.d_hidden is not None:
            self.backward_to_hidden(grad, start, stop)
        if self.d_weight is not None:
            hidden = self.hidden(start, stop).to(self.gemm)
            if self.left_out is not None:
                hidden = hidden.masked_fill(self.left_out[start:stop].unsqueeze(1), 0)
            for columns in [slice(0, self.vocab)] if self.exact else self.column_chunks(self.width):
                multiply(self.d_weight[columns], grad[:, columns].T, hidden, self.first)
            self.first = False

    def backward_to_hidden(self, grad, start, stop):
        out = self.d_hidden[start:stop] if self.index is None else self.d_hidden[self.index[start:stop]]
        for columns, weight in self.weights():
            multiply(out, grad[:, columns], weight, columns.start == 0)
        if self.index is not None:
            self.d_hidden[self.index[start:stop]] = out

    def grads(self):
        if self.d_weight is not None:
            self.d_weight[0 if self.first else self.vocab :] = 0  # tokens that no block has written
        return self.d_hidden, self.d_weight, self.d_bias


class AveragedTiles:
    """The averaged logits of several sources, each with its own scale and softcap."""

    def __init__(self, sources, transforms):
        self.sources, self.transforms = sources, transforms
        self.dtype = torch.promote_types(sources[0].dtype, torch.float32)
        self.vocab = sources[0].vocab

    @property
    def bytes_per_row(self):
        # the sum, and one draw during its transform
        return 2 * self.vocab * self.dtype.itemsize + max(source.bytes_per_row for source in self.sources)

    @property
    def fixed_bytes(self):
        return max(source.fixed_bytes for source in self.sources)

    def select(self, index):
        for source in self.sources:
            source.select(index)

    def allocate(self, rows):
        self.rows = rows

    def release(self):
        for source in self.sources:
            source.release()

    def tile(self, start, stop):
        total = None
        for source, transform in zip(self.sources, self.transforms, strict=True):
            source.allocate(self.rows)
            x = source.tile(start, stop).to(self.dtype) * transform.scale
            source.release()
            if transform.softcap is not None:
                x = x.div_(transform.softcap).tanh_().mul_(transform.softcap)
            total = x if total is None else total.add_(x)
        return total.div_(len(self.sources))
