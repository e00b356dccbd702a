"""RMS norms in one pass, with the same bits as torch's own operators on GPUs, and their gradient.

torch (2.11 to 2.14) sums a contiguous row [D] of float32 as follows. Threads side by side take four numbers each at a
time and keep four sums, which are then added from left to right; the threads' sums are added, the second half to the
first half, until one sum is left. The number of threads for a row follows from D and the number of rows.
"""

from __future__ import annotations

from ctypes import c_float
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched


def threads_of(rows: int, width: int) -> tuple[int, int]:
    """Return (threads side by side, groups of such threads) with which torch sums each of `rows` rows of `width`
    numbers: a block has at most 512 threads, which are divided between rows and numbers."""
    most = 512
    across, along = (min(most, 1 << (max(1, n).bit_length() - 1)) for n in (width // 4, rows))
    height = min(along, most // min(across, 32))
    across = min(across, most // height)
    each = triton.cdiv(width, across)
    return across, height if each >= min(16 * height, 256) else 1


@triton.jit
def _total(value, GROUPS: tl.constexpr, N: tl.constexpr):
    """Return the row sums [GROUPS, 1] of value [GROUPS, N], adding the second half to the first until one is left."""
    if N == 1:
        return value
    else:
        return _total(tl.sum(tl.reshape(value, [GROUPS, 2, N // 2]), 1), GROUPS, N // 2)


@launched()
def _rms_norm(
    x,
    weight,
    out,
    width,
    epsilon,
    factor,
    KIND: tl.constexpr,
    THREADS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    BLOCK: tl.constexpr = THREADS * GROUPS * 4
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.load(x + row + start + lane, mask=start + lane < width, other=0.0).to(tl.float32)
        squares += value * value
    even, odd = tl.split(tl.reshape(squares, [THREADS * GROUPS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    sums = tl.reshape(first + second + third + fourth, [GROUPS, THREADS])
    groups = tl.reshape(_total(sums, GROUPS, THREADS), [1, GROUPS])
    total = tl.sum(tl.reshape(_total(groups, 1, GROUPS), [1]), 0)
    scale = tl.rsqrt(total * factor + epsilon)
    for start in range(0, width, BLOCK):
        place = start + lane
        here = place < width
        value = tl.load(x + row + place, mask=here, other=0.0).to(tl.float32) * scale
        gain = tl.load(weight + place, mask=here, other=0.0).to(tl.float32)
        if KIND == 0:
            value = value.to(x.dtype.element_ty).to(tl.float32)
        if KIND == 2:
            gain += 1.0
        tl.store(out + row + place, (value * gain).to(out.dtype.element_ty), mask=here)


@launched()
def _rms_norm_grad(grad, x, weight, out, width, epsilon, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, BLOCK)
    here = place < width
    value = tl.load(x + row + place, mask=here, other=0.0).to(tl.float32)
    gain = tl.load(weight + place, mask=here, other=0.0).to(tl.float32)
    if KIND == 2:
        gain += 1.0
    slope = tl.load(grad + row + place, mask=here, other=0.0).to(tl.float32) * gain
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    back = tl.sum(value * slope, 0) * scale * scale * scale / width
    tl.store(out + row + place, (scale * slope - back * value).to(out.dtype.element_ty), mask=here)


@lru_cache(maxsize=64)
def _launch_of(rows: int, width: int) -> tuple[float, dict[str, int]]:
    """Return what a sum is multiplied by, rounded to float32 where torch does, and the constants of the launch."""
    threads, groups = threads_of(rows, width)
    factor = c_float(c_float(rows).value / c_float(rows * width).value).value
    return factor, {"THREADS": threads, "GROUPS": groups, "num_warps": max(1, threads * groups // 32)}


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, kind: int) -> Tensor:
    """`ops.rms_norm` in Triton."""
    x, width = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // width
    if rows:
        factor, constants = _launch_of(rows, width)
        # with fusion a product and a sum would be rounded once, where torch rounds twice
        _rms_norm[rows,](x, weight, out, width, epsilon, factor, KIND=kind, **constants, enable_fp_fusion=False)
    return out


def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, kind: int) -> Tensor:
    """`ops.rms_norm_grad` in Triton."""
    x, grad, width = x.contiguous(), grad.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(width)
        _rms_norm_grad[(x.numel() // width,)](
            *(grad, x, weight, out, width, epsilon),
            KIND=kind,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )
    return out
