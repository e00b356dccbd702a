"""Which channels of a few inputs are needed, as a list in order: what the gather of read_channels.py walks along."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Channels that one program lists."""


class Selection(NamedTuple):
    """The channels that some of B inputs x [B, I] needs, on the device as a whole."""

    index: Tensor
    """int32 [I]: the channels in order; what is behind `count` is not written."""
    value: Tensor
    """[B, I]: each input's own values at these, 0 where it does not need them."""
    count: Tensor
    """int64 []: how many there are."""
    low: Tensor | None
    """float32 [B, R]: products of all channels with `down` [R, I]."""
    arrivals: Tensor
    """int32 [n], zeros: for programs to count one another."""


@triton.jit(do_not_specialize=["rows", "ranks", "chunks", "counters"])
def _select(
    x,
    limit,
    down,
    index,
    value,
    count,
    low,
    arrivals,
    rows,
    inputs,
    ranks,
    chunks,
    counters,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """The first `chunks` programs list CHUNK channels each, the others make one column of `low` each."""
    me = tl.program_id(0)
    row = tl.arange(0, ROWS)[:, None]
    if me < chunks:
        lane = tl.arange(0, WIDE)
        seen = tl.zeros([WIDE], tl.int32)
        for start in range(0, me * CHUNK, WIDE):  # how many the chunks before this one list
            channel = start + lane
            here = channel < tl.minimum(me * CHUNK, inputs)
            least = tl.load(limit + channel, mask=here, other=float("inf"))
            values = tl.load(x + row * inputs + channel[None, :], mask=(row < rows) & here[None, :], other=0.0)
            needed = (tl.abs(values.to(tl.float32)) >= least[None, :]) & (row < rows) & here[None, :]
            seen += tl.max(needed.to(tl.int32), 0)
        before = tl.sum(seen, 0)
        channel = me * CHUNK + tl.arange(0, CHUNK)
        here = channel < inputs
        least = tl.load(limit + channel, mask=here, other=float("inf"))
        values = tl.load(x + row * inputs + channel[None, :], mask=(row < rows) & here[None, :], other=0.0)
        needed = (tl.abs(values.to(tl.float32)) >= least[None, :]) & (row < rows) & here[None, :]
        listed = tl.max(needed.to(tl.int32), 0)
        place = before + tl.cumsum(listed, 0) - 1
        tl.store(index + place, channel, mask=listed > 0)
        kept = tl.where(needed, values, 0.0)
        tl.store(value + row * inputs + place[None, :], kept, mask=(listed > 0)[None, :] & (row < rows))
        if me == chunks - 1:
            tl.store(count, (before + tl.sum(listed, 0)).to(tl.int64))
        if me == 0:
            for start in range(0, counters, COUNTERS):
                counter = start + tl.arange(0, COUNTERS)
                tl.store(arrivals + counter, tl.zeros([COUNTERS], tl.int32), mask=counter < counters)
    elif down is not None:
        which = me - chunks
        sums = tl.zeros([ROWS, WIDE], tl.float32)
        for start in range(0, inputs, WIDE):
            channel = start + tl.arange(0, WIDE)
            here = channel < inputs
            weight = tl.load(down + which * inputs + channel, mask=here, other=0.0).to(tl.float32)
            values = tl.load(x + row * inputs + channel[None, :], mask=(row < rows) & here[None, :], other=0.0)
            sums += weight[None, :] * values.to(tl.float32)
        tl.store(low + tl.arange(0, ROWS) * ranks + which, tl.sum(sums, 1), mask=tl.arange(0, ROWS) < rows)


def select(x: Tensor, limit: Tensor, down: Tensor | None, counters: int) -> Selection:
    """The channels of x [B, I] with |x| >= limit [I] (float32) in some row, and x times down [R, I] of all of them."""
    x, (rows, inputs) = x.contiguous(), x.shape
    limit = limit.contiguous()
    down = None if down is None else down.contiguous()
    selection = Selection(
        index=x.new_empty(inputs, dtype=torch.int32),
        value=x.new_empty(rows, inputs),
        count=x.new_empty((), dtype=torch.int64),
        low=None if down is None else x.new_empty(rows, len(down), dtype=torch.float32),
        arrivals=x.new_empty(counters, dtype=torch.int32),
    )
    chunks, ranks = triton.cdiv(inputs, CHUNK), 0 if down is None else len(down)
    padded = triton.next_power_of_2(rows)
    _select[(chunks + ranks,)](
        x,
        limit,
        down,
        selection.index,
        selection.value,
        selection.count,
        selection.low,
        selection.arrivals,
        rows,
        inputs,
        ranks,
        chunks,
        counters,
        ROWS=padded,
        CHUNK=CHUNK,
        WIDE=max(1024, 8192 // padded),
        COUNTERS=512,
        num_warps=8,
    )
    return selection
