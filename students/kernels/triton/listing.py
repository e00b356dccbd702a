"""The first part of read_channels.py: the list of channels that some input needs, with the inputs' values there."""

from __future__ import annotations

import triton
import triton.language as tl

from students.kernels.triton.channel_gate import sigmoid


@triton.jit
def scales(squares, row, inputs, sums, epsilon, SUMS: tl.constexpr, ONE: tl.constexpr):
    """Return one over the root mean square of each input [R, 1], or of ONE input [], from its partial sums of squares
    [R, sums]."""
    part = tl.arange(0, SUMS)
    if ONE:
        total = tl.sum(tl.load(squares + part, mask=part < sums, other=0.0), 0)
    else:
        place = row[:, None] * sums + part[None, :]
        total = tl.sum(tl.load(squares + place, mask=(part < sums)[None, :], other=0.0), 1)[:, None]
    return tl.rsqrt(total / inputs + epsilon)


@triton.jit
def inputs_at(x, other, scale, place, channel, mask, here, KIND: tl.constexpr):
    """Return the layers' input at `place` of x (KIND: see `ops.fused_channels`), each step rounded as in the model."""
    kind = x.dtype.element_ty
    value = tl.load(x + place, mask=mask, other=0.0)
    if KIND >= 0 and KIND < 3:
        gain = tl.load(other + channel, mask=here, other=0.0).to(tl.float32)
        if KIND == 2:
            gain += 1.0
        wide = value.to(tl.float32) * scale
        if KIND == 0:
            wide = wide.to(kind).to(tl.float32)
        value = (wide * gain).to(kind)
    elif KIND >= 3:
        factor = tl.load(other + place, mask=mask, other=0.0).to(tl.float32)
        wide = value.to(tl.float32)
        if KIND == 3:
            soft = sigmoid(wide)
        else:
            soft = sigmoid(2 * 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide))
        value = ((wide * soft).to(kind).to(tl.float32) * factor).to(kind)
    return value


@triton.jit
def list_channels(
    x,
    other,
    scale,
    limit,
    down,
    lows,
    chosen,
    values,
    row,
    start,
    into,
    last,
    rows,
    inputs,
    stride,
    rank,
    layer,
    unit,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE: tl.constexpr,
):
    """List those of CHUNK channels that some input needs, with the inputs' values there; return their number and lows.

    lows [1, RANK]: for ONE input, the running products with the low-rank correction's rows. For several inputs, all
    values of these channels are stored behind the list instead, and multiplied later.
    unit: 1, but not known to the compiler, which would otherwise let a thread load several adjacent channels and then
    have to exchange them between threads for the scan.
    """
    channel = start + tl.arange(0, CHUNK) * unit
    here = channel < last
    least = tl.load(limit + channel, mask=here, other=float("inf"))
    if ONE:
        value = inputs_at(x, other, scale, channel, channel, here, here, KIND)
        if down is not None:
            all_of_it, feature = start + tl.arange(0, CHUNK), tl.arange(0, RANK)
            mask = (feature < rank)[:, None] & (all_of_it < last)[None, :]
            place = down + (layer * rank + feature)[:, None] * inputs + all_of_it[None, :]
            shrunk = tl.load(place, mask=mask, other=0.0)
            lows += tl.sum(value.to(tl.float32)[None, :] * shrunk.to(tl.float32), 1)[None, :]
        some = (tl.abs(value.to(tl.float32)) >= least).to(tl.int32)
        slot = into + tl.cumsum(some, 0) - 1
        tl.store(values + slot, value, mask=some > 0)
    else:
        place, beside = row[:, None] * stride + channel[None, :], here[None, :]
        value = inputs_at(x, other, scale, place, channel[None, :], beside, beside, KIND)
        if down is not None:
            tl.store(values + (rows + row)[:, None] * inputs + channel[None, :], value, mask=beside)
        needed = tl.abs(value.to(tl.float32)) >= least[None, :]
        some = tl.max(needed.to(tl.int32), 0)
        slot = into + tl.cumsum(some, 0) - 1
        listed = values + row[:, None] * inputs + slot[None, :]
        tl.store(listed, tl.where(needed, value, 0.0), mask=(some > 0)[None, :])
    tl.store(chosen + slot, channel, mask=some > 0)
    return tl.sum(some, 0), lows
