"""A gradient times the upstream gradient of its loss, which only the device knows: the host does not wait for it."""

import torch
import triton
import triton.language as tl

from .row import narrow

BLOCK, WARPS = 4096, 8  # two 16-byte loads of bf16 for each thread


@triton.jit
def scale_kernel(
    x_ptr,  # (n,)
    factor_ptr,  # one number
    out_ptr,  # (n,), may be x
    n,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if IN_PLACE:
        if factor == 1.0:
            return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < n).to(tl.float32)
        tl.store(out_ptr + at, narrow(x * factor, out_ptr.dtype.element_ty), at < n)


def scale(x, factor, out):
    """out = x * factor in one pass; none at all where out is x and the factor is 1, as after a plain backward().

    Args:
        x: contiguous, float32 or 16 bits.
        factor: a tensor of one number on x's device.
        out: of x's shape, contiguous, any of these dtypes; may be x itself.

    Returns:
        out.
    """
    # few programs, each with many blocks, so that there are few to start where there is nothing to do
    most = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8
    grid = (min(triton.cdiv(x.numel(), BLOCK), most),)
    if x.numel():
        with torch.cuda.device_of(x):
            scale_kernel[grid](x, factor, out, x.numel(), out is x, BLOCK, num_warps=WARPS)
    return out
