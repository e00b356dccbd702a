"""Linear layers side by side that read only the channels that a few inputs need.

A program owns a strip of one layer's outputs and a range of the inputs, and copies rows of the weight for those
channels alone that an input needs: what is not copied costs no bandwidth, which is all that a product with one input
takes. Ranges' sums meet in memory, where the program that comes last adds them up, in the order of the ranges.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton import counters, tuning
from students.kernels.triton.channel_gate import channel_gate


@triton.jit
def _write(total, bias, out, row, column, end, rows, outputs):
    """Round total [R, STRIP] into out [rows, outputs]."""
    if bias is not None:
        total += tl.load(bias + column, mask=column < end, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * outputs + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < end)[None, :])


@triton.jit
def _values(x, row, channel, last, rows, inputs):
    """Values [R, STEP] of a few inputs at these channels."""
    mask = (row < rows)[:, None] & (channel < last)[None, :]
    return tl.load(x + row[:, None] * inputs + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _lows(x, correction, row, corrects, first, last, rows, inputs, lows):
    """lows [R, RANK] and the products of a few inputs with a correction's rows, in a loop of their own: of two products
    in one loop, Triton has every warp do all rows."""
    for start in range(first, last, 128):
        channel = start + tl.arange(0, 128)
        shrunk = tl.load(correction + channel[None, :], mask=corrects & (channel < last)[None, :], other=0.0)
        value = _values(x, row, channel, last, rows, inputs)
        lows = tl.dot(value, tl.trans(shrunk), lows, input_precision="ieee")
    return lows


@triton.jit(do_not_specialize=["rows", "rank"])
def _gather(
    x,
    limit,
    weight,
    bias,
    down,
    up,
    partial,
    counts,
    arrivals,
    out,
    count,
    rows,
    inputs,
    outputs,
    stride,
    rank,
    ENDS: tl.constexpr,
    STRIPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    STRIP: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [rows, outputs], and how many channels were read. One function, because what it keeps in registers from the
    first line to the last (where its strip lies, what it has summed) would be most of what parts of it hand over."""
    strip, part = tl.program_id(0), tl.program_id(1)
    layer, begin, end, own = 0, 0, ENDS[0], strip
    for other in tl.static_range(1, len(ENDS)):
        if strip >= STRIPS[other]:
            layer, begin, end, own = other, ENDS[other - 1], ENDS[other], strip - STRIPS[other]
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
        end = tl.multiple_of(end, 16)
    column = begin + own * STRIP + tl.arange(0, STRIP)
    inside = column < end
    each = tl.cdiv(tl.cdiv(inputs, SPLIT), STEP) * STEP
    first = part * each
    last = tl.minimum(first + each, inputs)
    step, row, feature = tl.arange(0, STEP), tl.arange(0, ROWS), tl.arange(0, RANK)
    channel, listed = first + step, tl.zeros([STEP], tl.int32)
    place = weight + channel.to(tl.int64)[:, None] * stride + column[None, :]
    corrects = (feature < rank)[:, None]
    correction = down + (layer * rank + feature)[:, None] * inputs if down is not None else down
    # inputs and limits are read a step ahead, while weights are on their way
    least = tl.load(limit + channel, mask=channel < last, other=float("inf"))
    if ONE:
        value = tl.load(x + channel, mask=channel < last, other=0.0)
    else:
        value = _values(x, row, channel, last, rows, inputs)
    total = tl.zeros([ROWS, STRIP], tl.float32)
    lows = tl.zeros([RANK, STEP] if ONE else [ROWS, RANK], tl.float32)
    if down is not None and not ONE:
        lows = _lows(x, correction, row, corrects, first, last, rows, inputs, lows)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        if ONE:
            some = tl.abs(value.to(tl.float32)) >= least
            kept = tl.broadcast_to(tl.where(some, value, 0.0)[None, :], [ROWS, STEP])  # all rows of the product are one
        else:
            needed = tl.abs(value.to(tl.float32)) >= least[None, :]
            some = tl.max(needed.to(tl.int32), 0) > 0
            kept = tl.where(needed, value, 0.0)
        listed += some.to(tl.int32)
        mask = some[:, None] if WHOLE else some[:, None] & inside[None, :]
        copied = tl.load(place, mask=mask, other=0.0)
        total = tl.dot(kept, copied, total, input_precision="ieee")
        if down is not None and ONE:
            here = corrects & (start + step < last)[None, :]
            shrunk = tl.load(correction + (start + step)[None, :], mask=here, other=0.0)
            lows += value.to(tl.float32)[None, :] * shrunk.to(tl.float32)
        channel = start + STEP + step
        least = tl.load(limit + channel, mask=channel < last, other=float("inf"))
        if ONE:
            value = tl.load(x + channel, mask=channel < last, other=0.0)
        else:
            value = _values(x, row, channel, last, rows, inputs)
        place += STEP * stride
    if ONE:
        total = tl.sum(tl.where((row == 0)[:, None], total, 0.0), 0)[None, :]
        row = tl.arange(0, 1)
    if up is not None and ONE:
        grown = tl.load(up + feature[:, None] * outputs + column[None, :], mask=corrects & inside[None, :], other=0.0)
        total += tl.sum(tl.sum(lows, 1)[:, None] * grown.to(tl.float32), 0)[None, :]
    elif up is not None:
        for which in range(rank):
            grown = tl.load(up + which * outputs + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tl.where((feature == which)[None, :], lows, 0.0), 1)[:, None] * grown[None, :]
    read = tl.sum(listed, 0)
    if SPLIT == 1:
        _write(total, bias, out, row, column, end, rows, outputs)
        if strip == 0:
            tl.store(count, read.to(tl.int64))
    else:
        place = row[:, None] * outputs + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        tl.store(partial + part * rows * outputs + place, total, mask=mask)
        if strip == 0:
            tl.store(counts + part, read)
        tl.debug_barrier()  # all of this program's sums are written before it says so
        if tl.atomic_add(arrivals + strip, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals + strip, 0)
            whole = tl.zeros_like(total)
            for one in tl.range(0, SPLIT, loop_unroll_factor=4):
                whole += tl.load(partial + one * rows * outputs + place, mask=mask, other=0.0, cache_modifier=".cg")
            _write(whole, bias, out, row, column, end, rows, outputs)
            if strip == 0:
                reads = tl.zeros([], tl.int32)
                for other in tl.static_range(SPLIT):
                    reads += tl.load(counts + other, cache_modifier=".cg")
                tl.store(count, reads.to(tl.int64))


def few_channels(
    x: Tensor,
    limit: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    """As `ops.few_channels`: out [B, O] for x [B, I], and how many channels some input needs."""
    plan = tuning.gather(x.device, len(x), weight.shape[1])
    if plan is None:
        return _all_channels(x, limit, weight, bias, down, up, ends)
    return launch(plan, x, limit, weight, bias, down, up, ends)


def launch(
    plan: tuning.Gather,
    x: Tensor,
    limit: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    """`few_channels` as a plan has it."""
    x, (rows, inputs), outputs = x.contiguous(), x.shape, weight.shape[1]
    starts, strips = [], 0
    for begin, end in zip([0, *ends], ends, strict=False):
        starts.append(strips)
        strips += triton.cdiv(end - begin, plan.strip)
    split = plan.split(inputs, strips, tuning.multiprocessors(x.device))
    rank = 1 if up is None else len(up)
    out, count = x.new_empty(rows, outputs), x.new_empty((), dtype=torch.int64)
    partial = x.new_empty(split, rows, outputs, dtype=torch.float32) if split > 1 else None
    _gather[(strips, split)](
        x,
        limit.contiguous(),
        weight,
        bias,
        None if down is None else down.contiguous(),
        None if up is None else up.contiguous(),
        partial,
        x.new_empty(split, dtype=torch.int32) if split > 1 else None,
        counters.zeros(x.device, strips) if split > 1 else None,
        out,
        count,
        rows,
        inputs,
        outputs,
        weight.stride(0),
        rank,
        ENDS=tuple(ends),
        STRIPS=tuple(starts),
        ALIGNED=not any(end % 16 for end in ends),
        WHOLE=not any(end % plan.strip for end in ends),
        ONE=rows == 1,
        ROWS=16,
        RANK=max(16, triton.next_power_of_2(rank)),
        STRIP=plan.strip,
        STEP=plan.step,
        SPLIT=split,
        STAGES=plan.stages,
        num_warps=plan.warps,
    )
    return out, count


def read_channels(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As `ops.read_channels`: out [O] for x [I], and how many channels it needs."""
    out, count = few_channels(x.unsqueeze(0), *rest)
    return out.squeeze(0), count


def _all_channels(
    x: Tensor,
    limit: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    """The same from a product with all of the weight."""
    out = channel_gate(x, limit)[0] @ weight
    out = out if bias is None else out + bias
    if down is not None and up is not None:
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        low = (x @ down.T).chunk(len(ends), 1)
        out += torch.cat([part @ to for part, to in zip(low, up.split(sizes, 1), strict=True)], 1)
    return out, (x.abs() >= limit).any(0).sum()
