"""Linear layers side by side that read only the channels that a few inputs need: select.py lists them, a gather of rows
of the weight multiplies by them.

A program owns a strip of outputs and a slice of the list. The slices' sums meet in memory, where the program that comes
last adds them up, in the order of the slices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton import tuning
from students.kernels.triton.channel_gate import channel_gate
from students.kernels.triton.select import select


@triton.jit
def _write(total, bias, out, row, column, rows, outputs):
    """Round total [R, STRIP] into out [rows, outputs]."""
    inside = (column < outputs)[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * outputs + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["rows", "rank"])
def _gather(
    index,
    value,
    count,
    low,
    arrivals,
    weight,
    bias,
    up,
    partial,
    out,
    rows,
    inputs,
    outputs,
    stride,
    rank,
    ENDS: tl.constexpr,
    ROWS: tl.constexpr,
    STRIP: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    strip, part = tl.program_id(0), tl.program_id(1)
    column = strip * STRIP + tl.arange(0, STRIP)
    row = tl.arange(0, ROWS)
    inside = column < outputs
    listed = tl.load(count).to(tl.int32)
    each = tl.cdiv(tl.cdiv(listed, SPLIT), STEP) * STEP
    first = part * each
    last = tl.minimum(first + each, listed)
    step = tl.arange(0, STEP)
    if ROWS == 1:
        sums = tl.zeros([STEP, STRIP], tl.float32)
        for start in tl.range(first, last, STEP, num_stages=STAGES):
            some = start + step < last
            channel = tl.load(index + start + step, mask=some, other=0).to(tl.int64)
            factor = tl.load(value + start + step, mask=some, other=0.0).to(tl.float32)
            place = channel[:, None] * stride + column[None, :]
            part_of_weight = tl.load(weight + place, mask=some[:, None] & inside[None, :], other=0.0)
            sums += factor[:, None] * part_of_weight.to(tl.float32)
        total = tl.sum(sums, 0)[None, :]
    else:  # tensor cores multiply 16 rows at a time
        total = tl.zeros([ROWS, STRIP], tl.float32)
        for start in tl.range(first, last, STEP, num_stages=STAGES):
            some = start + step < last
            channel = tl.load(index + start + step, mask=some, other=0).to(tl.int64)
            factor = tl.load(
                value + row[:, None] * inputs + (start + step)[None, :],
                mask=(row < rows)[:, None] & some[None, :],
                other=0.0,
            )
            place = channel[:, None] * stride + column[None, :]
            part_of_weight = tl.load(weight + place, mask=some[:, None] & inside[None, :], other=0.0)
            total = tl.dot(factor, part_of_weight, total, input_precision="ieee")
    if up is not None:
        layer = tl.zeros([STRIP], tl.int32)
        for place in tl.static_range(len(ENDS) - 1):
            layer += (column >= ENDS[place]).to(tl.int32)
        for feature in range(part, rank, SPLIT):
            where = row[:, None] * (rank * len(ENDS)) + layer[None, :] * rank + feature
            factor = tl.load(low + where, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
            total += factor * tl.load(up + feature * outputs + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SPLIT == 1:
        _write(total, bias, out, row, column, rows, outputs)
    else:
        place = row[:, None] * outputs + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        tl.store(partial + part * rows * outputs + place, total, mask=mask)
        tl.debug_barrier()  # all of this program's sums are written before it says so
        if tl.atomic_add(arrivals + strip, 1, sem="acq_rel") == SPLIT - 1:
            whole = tl.zeros([ROWS, STRIP], tl.float32)
            for other in tl.static_range(SPLIT):
                whole += tl.load(partial + other * rows * outputs + place, mask=mask, other=0.0, cache_modifier=".cg")
            _write(whole, bias, out, row, column, rows, outputs)


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
    (rows, inputs), outputs = x.shape, weight.shape[1]
    strips, split = triton.cdiv(outputs, plan.strip), plan.split(inputs, outputs)
    chosen = select(x, limit, down, strips)
    out = x.new_empty(rows, outputs)
    partial = x.new_empty(split, rows, outputs, dtype=torch.float32) if split > 1 else None
    _gather[(strips, split)](
        chosen.index,
        chosen.value,
        chosen.count,
        chosen.low,
        chosen.arrivals,
        weight,
        bias,
        None if up is None else up.contiguous(),
        partial,
        out,
        rows,
        inputs,
        outputs,
        weight.stride(0),
        0 if up is None else len(up),
        ENDS=tuple(ends),
        ROWS=1 if rows == 1 else 16,
        STRIP=plan.strip,
        STEP=plan.step,
        SPLIT=split,
        STAGES=plan.stages,
        num_warps=plan.warps,
    )
    return out, chosen.count


def read_channels(x: Tensor, *rest: Tensor | list[int] | None) -> tuple[Tensor, Tensor]:
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
    if up is not None:
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        low = (x @ down.T).chunk(len(ends), 1)
        out += torch.cat([part @ to for part, to in zip(low, up.split(sizes, 1), strict=True)], 1)
    return out, (x.abs() >= limit).any(0).sum()
