"""The gate that closes channels by their magnitude, in one launch with what makes the channels: the sum of residual
stream and branch with its norm, or an MLP's gated product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched
from students.kernels.triton.listing import inputs_at

BLOCK = 2048
"""Channels of a gated product that one program computes."""


@triton.jit
def _store(value, limit, out, place, channel, here):
    """Write value where its magnitude reaches the channel's limit, if there is one, else 0."""
    if limit is not None:
        least = tl.load(limit + channel, mask=here, other=0.0).to(value.dtype).to(tl.float32)
        value = tl.where(tl.abs(value.to(tl.float32)) >= least, value, 0.0)
    tl.store(out + place, value, mask=here)


@launched()
def _normed_gate(x, weight, residual, limit, out, stream, width, epsilon, KIND: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    here, place = channel < width, tl.program_id(0).to(tl.int64) * width + channel
    kind = x.dtype.element_ty
    value = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + place, mask=here, other=0.0).to(tl.float32)
        tl.store(stream + place, value.to(kind), mask=here)
        value = value.to(kind).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    gain = tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    if KIND == 0:
        value = value.to(kind).to(tl.float32)
    if KIND == 2:
        gain += 1.0
    _store((value * gain).to(kind), limit, out, place, channel, here)


@launched()
def _active_gate(x, other, limit, out, width, by_row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = channel < width
    value = inputs_at(x, other, 1.0, row * by_row + channel, channel, here, here, KIND)
    _store(value, limit, out, row * width + channel, channel, here)


def fused_gate(
    x: Tensor, other: Tensor, residual: Tensor | None, epsilon: float, kind: int, limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.fused_gate` in Triton."""
    rows, width = x.shape
    limit, out = None if limit is None else limit.contiguous(), x.new_empty(rows, width)
    stream = x.new_empty(0 if residual is None else x.shape)
    if not rows:
        return out, stream
    if kind < 3:
        block = triton.next_power_of_2(width)
        _normed_gate[(rows,)](
            *(x.contiguous(), other, None if residual is None else residual.contiguous()),
            *(limit, out, stream, width, epsilon),
            KIND=kind,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )
        return out, stream
    if x.stride(1) != 1 or other.stride() != x.stride():
        x, other = x.contiguous(), other.contiguous()
    grid = rows, triton.cdiv(width, BLOCK)
    _active_gate[grid](x, other, limit, out, width, x.stride(0), KIND=kind, BLOCK=BLOCK, num_warps=8)
    return out, stream
