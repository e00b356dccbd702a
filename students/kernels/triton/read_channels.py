"""Linear layers side by side that read only the channels that a few inputs need.

A program owns a strip of one layer's outputs and a range of the inputs (split-K). It lists the channels of its range
that some input needs, and applies the operators in front of the layers (a norm, an MLP's gated product) on the way. It
then copies the listed rows of the weight: a row that is not copied costs neither bandwidth, on which alone the time of
a product with one input depends, nor steps of the loop. All programs of a range write the same list to the same place.
The ranges' partial sums go to memory, where the program that finishes last adds them up in the order of the ranges, and
adds the residual stream behind the layers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import reference
from students.kernels.triton import counters, tuning
from students.kernels.triton.chaining import chained, follow
from students.kernels.triton.channel_gate import channel_gate
from students.kernels.triton.launching import launched
from students.kernels.triton.listing import list_channels, scales

_TOGETHER = tl.constexpr(reference.TOGETHER)


@triton.jit
def _write(total, bias, residual, out, squares, row, column, end, rows, outputs, strip, STRIP: tl.constexpr):
    """Round total [R, STRIP] into out [rows, outputs]. With a residual stream: add it, and write the partial sums of
    squares of the result."""
    if bias is not None:
        total += tl.load(bias + column, mask=column < end, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * outputs + column[None, :]
    mask = (row < rows)[:, None] & (column < end)[None, :]
    kind = out.dtype.element_ty
    if residual is not None:
        total = total.to(kind).to(tl.float32) + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        total = total.to(kind).to(tl.float32)
        sums = tl.cdiv(outputs, _TOGETHER)
        PARTS: tl.constexpr = STRIP // _TOGETHER
        part = strip * PARTS + tl.arange(0, PARTS)
        found = tl.sum(tl.reshape(total * total, [total.shape[0], PARTS, _TOGETHER]), 2)
        here = (row < rows)[:, None] & (part < sums)[None, :]
        tl.store(squares + row[:, None] * sums + part[None, :], found, mask=here)
    tl.store(out + place, total.to(kind), mask=mask)


@triton.jit
def _lows(x, down, row, first, last, rows, inputs, rank, layer, RANK: tl.constexpr, ROWS: tl.constexpr):
    """Return the products [R, RANK] of a few inputs' channels `first` to `last` with a layer's correction `down`."""
    feature = tl.arange(0, RANK)
    lows = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(first, last, 128):
        channel = start + tl.arange(0, 128)
        here = (channel < last)[None, :]
        place = down + (layer * rank + feature)[:, None] * inputs + channel[None, :]
        shrunk = tl.load(place, mask=(feature < rank)[:, None] & here, other=0.0)
        value = tl.load(x + row[:, None] * inputs + channel[None, :], mask=(row < rows)[:, None] & here, other=0.0)
        lows = tl.dot(value, tl.trans(shrunk), lows, input_precision="ieee")
    return lows


@triton.jit
def _listed(values, row, slot, stop, rows, inputs, ROWS: tl.constexpr, STEP: tl.constexpr, ONE: tl.constexpr):
    """Return the inputs' values [ROWS, STEP] in some slots of the list; with ONE input, all rows are equal."""
    if ONE:
        value = tl.load(values + slot, mask=slot < stop, other=0.0)
        return tl.broadcast_to(value[None, :], [ROWS, STEP])
    else:
        mask = (row < rows)[:, None] & (slot < stop)[None, :]
        return tl.load(values + row[:, None] * inputs + slot[None, :], mask=mask, other=0.0)


@triton.jit
def _products(
    total,
    weight,
    stride,
    column,
    inside,
    chosen,
    values,
    row,
    first,
    stop,
    rows,
    inputs,
    WHOLE: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return total [ROWS, STRIP] plus the products with the weight's rows in slots `first` to `stop` of the list."""
    step = tl.arange(0, STEP)
    # the list is read a step ahead, while weights are in flight
    channel = tl.load(chosen + first + step, mask=first + step < stop, other=0)
    value = _listed(values, row, first + step, stop, rows, inputs, ROWS, STEP, ONE)
    for start in tl.range(first, stop, STEP, num_stages=STAGES):
        some = (start + step < stop)[:, None]
        mask = some if WHOLE else some & inside[None, :]
        copied = tl.load(weight + channel.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
        total = tl.dot(value, copied, total, input_precision="ieee")
        slot = start + STEP + step
        channel = tl.load(chosen + slot, mask=slot < stop, other=0)
        value = _listed(values, row, slot, stop, rows, inputs, ROWS, STEP, ONE)
    return total


@triton.jit
def _added(partial, row, column, inside, rows, outputs, STRIP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Return the sums [R, STRIP] over all ranges, added in order; as many as fit into registers are loaded together."""
    place = row[:, None] * outputs + column[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    total = tl.zeros([ROWS, STRIP], tl.float32)
    for part in tl.range(0, SPLIT, loop_unroll_factor=32 // ROWS):
        total += tl.load(partial + part * rows * outputs + place, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@launched(do_not_specialize=["rows", "rank", "sums", "unit"])
def _gather(
    x,
    other,
    squares,
    limit,
    weight,
    bias,
    down,
    up,
    residual,
    chosen,
    values,
    partial,
    counts,
    arrivals,
    out,
    count,
    sums_out,
    rows,
    inputs,
    outputs,
    by_row,
    stride,
    rank,
    sums,
    epsilon,
    unit,
    ENDS: tl.constexpr,
    STRIPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    KIND: tl.constexpr,
    SUMS: tl.constexpr,
    LISTING: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    STRIP: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Write out [rows, outputs], and how many channels were read. This is one function, because the values that it
    keeps in registers throughout (where its strip lies, its sums) would be most of what parts of it would pass on."""
    follow(CHAINED)
    strip, part = tl.program_id(0), tl.program_id(1)
    layer, begin, end, own = 0, 0, ENDS[0], strip
    for another in tl.static_range(1, len(ENDS)):
        if strip >= STRIPS[another]:
            layer, begin, end, own = another, ENDS[another - 1], ENDS[another], strip - STRIPS[another]
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
        end = tl.multiple_of(end, 16)
    column = begin + own * STRIP + tl.arange(0, STRIP)
    inside = column < end
    each = tl.cdiv(tl.cdiv(inputs, SPLIT), STEP) * STEP
    first = part * each
    last = tl.minimum(first + each, inputs)
    row, feature = tl.arange(0, ROWS), tl.arange(0, RANK)
    listing = tl.arange(0, LISTING)
    held = tl.minimum(listing, rows - 1)  # rows beyond the last input repeat the last input
    scale = 1.0 if squares is None else scales(squares, held, inputs, sums, epsilon, SUMS, ONE)
    total = tl.zeros([ROWS, STRIP], tl.float32)
    lows = tl.zeros([1 if ONE else ROWS, RANK], tl.float32)
    read = tl.zeros([], tl.int32)
    for begun in range(first, last, CHUNK):
        into = first + read if ONE else begun
        listed, lows = list_channels(
            *(x, other, scale, limit, down, lows, chosen, values, held, begun, into, last, rows, inputs, by_row, rank),
            *(layer, unit, KIND, RANK, CHUNK, ONE),
        )
        read += listed
        if not ONE:  # while some programs of a multiprocessor list the next channels, others read weights
            tl.debug_barrier()  # the whole list is written before it is read
            total = _products(
                *(total, weight, stride, column, inside, chosen, values, row, into, into + listed, rows, inputs),
                *(WHOLE, ONE, ROWS, STEP, STAGES),
            )
    if ONE:
        tl.debug_barrier()
        total = _products(
            *(total, weight, stride, column, inside, chosen, values, row, first, first + read, rows, inputs),
            *(WHOLE, ONE, ROWS, STEP, STAGES),
        )
    if down is not None and not ONE:
        lows = _lows(values + rows * inputs, down, row, first, last, rows, inputs, rank, layer, RANK, ROWS)
    if ONE:
        total = tl.sum(tl.where((row == 0)[:, None], total, 0.0), 0)[None, :]
        row = tl.arange(0, 1)
    if up is not None:
        if ONE or (RANK > 32 or up.dtype.element_ty == tl.float32):
            for which in range(rank):
                grown = tl.load(up + which * outputs + column, mask=inside, other=0.0).to(tl.float32)
                total += tl.sum(tl.where((feature == which)[None, :], lows, 0.0), 1)[:, None] * grown[None, :]
        else:  # on tensor cores with half as many registers, so that two programs fit on a multiprocessor
            place = feature[:, None] * outputs + column[None, :]
            grown = tl.load(up + place, mask=(feature < rank)[:, None] & inside[None, :], other=0.0)
            total = tl.dot(lows.to(grown.dtype), grown, total)
    if SPLIT == 1:
        _write(total, bias, residual, out, sums_out, row, column, end, rows, outputs, strip, STRIP)
        if strip == 0:
            tl.store(count, read.to(tl.int64))
    else:
        place = row[:, None] * outputs + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        tl.store(partial + part * rows * outputs + place, total, mask=mask)
        if strip == 0:
            tl.store(counts + part, read)
        tl.debug_barrier()  # all of this program's sums are written before it counts as finished
        if tl.atomic_add(arrivals + strip, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals + strip, 0)
            whole = _added(partial, listing, column, inside, rows, outputs, STRIP, LISTING, SPLIT)
            _write(whole, bias, residual, out, sums_out, listing, column, end, rows, outputs, strip, STRIP)
            if strip == 0:
                reads = tl.zeros([], tl.int32)
                for another in tl.static_range(SPLIT):
                    reads += tl.load(counts + another, cache_modifier=".cg")
                tl.store(count, reads.to(tl.int64))


def few_channels(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`ops.few_channels` in Triton: out [B, O] for x [B, I], and how many channels some input needs."""
    return fused_channels(x, None, None, 0.0, -1, None, *rest)[:2]


def read_channels(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`ops.read_channels` in Triton: out [O] for x [I], and how many channels x needs."""
    out, count = few_channels(x.unsqueeze(0), *rest)
    return out.squeeze(0), count


def fused_channels(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.fused_channels` in Triton; a dense product where the tuning table has no launch."""
    plan = tuning.gather(x.device, len(x), rest[6].shape[1])
    return _all_channels(x, *rest) if plan is None else launch(plan, x, *rest)


def launch(
    plan: tuning.Gather,
    x: Tensor,
    other: Tensor | None,
    squares: Tensor | None,
    epsilon: float,
    kind: int,
    residual: Tensor | None,
    limit: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ends: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `ops.fused_channels` with the launch configuration `plan`."""
    (rows, inputs), outputs = x.shape, weight.shape[1]
    if x.stride(1) != 1 or (kind >= 3 and other is not None and other.stride() != x.stride()):
        x, other = x.contiguous(), None if other is None else other.contiguous()
    starts, strips = [], 0
    for begin, end in zip([0, *ends], ends, strict=False):
        starts.append(strips)
        strips += triton.cdiv(end - begin, plan.strip)
    split = plan.split(inputs, strips, tuning.multiprocessors(x.device))
    rank, sums = 1 if up is None else len(up), 1 if squares is None else squares.shape[1]
    out, count = x.new_empty(rows, outputs), x.new_empty((), dtype=torch.int64)
    shape = (rows, triton.cdiv(outputs, reference.TOGETHER)) if residual is not None else 0
    found = x.new_empty(shape, dtype=torch.float32)
    each = triton.next_power_of_2(triton.cdiv(inputs, split))
    chunk = 256 * plan.warps // max(2, triton.next_power_of_2(rows))
    _gather[(strips, split)](
        *(x, other, squares, limit.contiguous(), weight, bias),
        *(None if low is None else low.contiguous() for low in (down, up, residual)),
        x.new_empty(inputs, dtype=torch.int32),
        x.new_empty(rows if down is None or rows == 1 else 2 * rows, inputs),
        x.new_empty(split, rows, outputs, dtype=torch.float32) if split > 1 else None,
        x.new_empty(split, dtype=torch.int32) if split > 1 else None,
        counters.zeros(x.device, strips) if split > 1 else None,
        *(out, count, found, rows, inputs, outputs, x.stride(0), weight.stride(0), rank, sums, epsilon, 1),
        ENDS=tuple(ends),
        STRIPS=tuple(starts),
        ALIGNED=not any(end % 16 for end in ends),
        WHOLE=not any(end % plan.strip for end in ends),
        KIND=kind,
        SUMS=triton.next_power_of_2(sums),
        LISTING=triton.next_power_of_2(rows),
        CHUNK=max(16, min(each, 2 * chunk if chunk == plan.strip else chunk)),
        ONE=rows == 1,
        ROWS=16,
        RANK=max(1 if rows == 1 else 16, triton.next_power_of_2(rank)),
        STRIP=plan.strip,
        STEP=plan.step,
        SPLIT=split,
        STAGES=plan.stages,
        CHAINED=chained(x.device),
        launch_pdl=chained(x.device),
        num_warps=plan.warps,
    )
    return out, count, found


def _all_channels(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `ops.fused_channels` with a dense product of the whole weight."""
    *front, residual, limit, weight = rest[:7]
    x = reference.entering(x, *front)
    out = reference.with_rest(channel_gate(x, limit)[0] @ weight, x, *rest[7:])
    out, found = reference.leaving(out, residual)
    return out, (x.abs() >= limit).any(0).sum(), found
