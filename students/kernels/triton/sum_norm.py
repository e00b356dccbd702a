"""The sum of residual stream and branch with its layer norm, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched


@triton.jit
def layer_norm(value, gain, offset, lane, width, epsilon, out, place, here):
    """Write the layer norm of value [R, N] to out [*, width] at place [R, N] where here [R, N] is true; lane [N]."""
    wide = (lane < width)[None, :]
    apart = tl.where(wide, value - (tl.sum(value, 1) / width)[:, None], 0.0)
    unit = apart * tl.rsqrt(tl.sum(apart * apart, 1) / width + epsilon)[:, None]
    scaled = unit * tl.load(gain + lane, mask=lane < width, other=0.0).to(tl.float32)[None, :]
    if offset is not None:
        scaled += tl.load(offset + lane, mask=lane < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, scaled.to(out.dtype.element_ty), mask=here)


@launched(do_not_specialize=["rows"])
def _sum_norm(x, other, gain, offset, normed, total, rows, width, epsilon, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    here = (row < rows)[:, None] & (lane < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + lane[None, :]
    value = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    value += tl.load(other + place, mask=here, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)
    tl.store(total + place, value, mask=here)
    layer_norm(value.to(tl.float32), gain, offset, lane, width, epsilon, normed, place, here)


def sum_norm(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """`ops.sum_norm` in Triton."""
    x, other, width = x.contiguous(), other.contiguous(), x.shape[-1]
    normed, total = torch.empty_like(x), torch.empty_like(x)
    lanes = triton.next_power_of_2(width)
    each = max(1, 2048 // lanes)
    if x.numel():
        rows = x.numel() // width
        _sum_norm[(triton.cdiv(rows, each),)](
            *(x, other, weight, bias, normed, total, rows, width, epsilon),
            ROWS=each,
            WIDTH=lanes,
            num_warps=max(4, min(16, lanes // 1024)),
        )
    return normed, total
