"""The first part of read_channels.py: which channels some input needs, and what the inputs have there."""

from __future__ import annotations

import triton
import triton.language as tl

from students.kernels.triton.gated_grad import sigmoid


@triton.jit
def scales(squares, row, inputs, sums, epsilon, SUMS: tl.constexpr, ONE: tl.constexpr):
    """[R, 1]: one over the root mean square of each input, from sums of squares; [] where there is one input."""
    part = tl.arange(0, SUMS)
    if ONE:
        total = tl.sum(tl.load(squares + part, mask=part < sums, other=0.0), 0)
    else:
        place = row[:, None] * sums + part[None, :]
        total = tl.sum(tl.load(squares + place, mask=(part < sums)[None, :], other=0.0), 1)[:, None]
    return tl.rsqrt(total / inputs + epsilon)


@triton.jit
def _inputs(x, other, scale, place, channel, mask, here, KIND: tl.constexpr):
    """What the layers read in some places of x, each step rounded as the model's own does."""
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
    """How many of CHUNK channels some input needs; each of them, and what the inputs have there, go into the list. One
    input's products with a correction's rows [1, RANK], too; for those of several, all that they have goes there.

    unit: 1, which the compiler is not told. It would have a thread load several neighbours, which then have to change
    places for the scan.
    """
    channel = start + tl.arange(0, CHUNK) * unit
    here = channel < last
    least = tl.load(limit + channel, mask=here, other=float("inf"))
    if ONE:
        value = _inputs(x, other, scale, channel, channel, here, here, KIND)
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
        value = _inputs(x, other, scale, place, channel[None, :], beside, beside, KIND)
        if down is not None:
            tl.store(values + (rows + row)[:, None] * inputs + channel[None, :], value, mask=beside)
        needed = tl.abs(value.to(tl.float32)) >= least[None, :]
        some = tl.max(needed.to(tl.int32), 0)
        slot = into + tl.cumsum(some, 0) - 1
        listed = values + row[:, None] * inputs + slot[None, :]
        tl.store(listed, tl.where(needed, value, 0.0), mask=(some > 0)[None, :])
    tl.store(chosen + slot, channel, mask=some > 0)
    return tl.sum(some, 0), lows
