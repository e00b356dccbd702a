"""Some outputs of a linear layer whose weight has a row for each output: the other rows are not read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton import tuning
from students.kernels.triton.launching import launched


@triton.jit
def products(
    x,
    weight,
    row,
    wanted,
    rows,
    inputs,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the products [STEP, ROWS] of x [rows, inputs] with the rows `row` [STEP] of weight [*, inputs]; 0 where
    `wanted` [STEP] is false."""
    lane, batch = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    from_row = row.to(tl.int64)[:, None] * inputs
    if ROWS == 1:
        sums = tl.zeros([STEP, WIDTH], tl.float32)
        for start in tl.range(0, inputs, WIDTH, num_stages=STAGES):
            place = start + lane
            here = place < inputs
            values = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
            part = tl.load(weight + from_row + place[None, :], mask=wanted[:, None] & here[None, :], other=0.0)
            sums += values[None, :] * part.to(tl.float32)
        total = tl.sum(sums, 1)[:, None]
    else:  # tensor cores multiply with 16 columns at a time
        total = tl.zeros([STEP, ROWS], tl.float32)
        for start in tl.range(0, inputs, WIDTH, num_stages=STAGES):
            place = start + lane
            here = place < inputs
            mask = here[:, None] & (batch < rows)[None, :]
            values = tl.load(x + batch[None, :] * inputs + place[:, None], mask=mask, other=0.0)
            part = tl.load(weight + from_row + place[None, :], mask=wanted[:, None] & here[None, :], other=0.0)
            total = tl.dot(part, values, total, input_precision="ieee")
    return total


@launched(do_not_specialize=["count"])
def _dot_rows(
    x,
    weight,
    bias,
    rows,
    out,
    count,
    inputs,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    wanted = slot < count
    row = tl.load(rows + slot, mask=wanted, other=0)
    total = tl.sum(products(x, weight, row, wanted, 1, inputs, 1, STEP, WIDTH, STAGES), 1)
    if bias is not None:
        total += tl.load(bias + row, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + slot, total.to(out.dtype.element_ty), mask=wanted)


def dot_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    """`ops.dot_rows` in Triton: x [I] with the rows [n] of weight [O, I] -> [n]."""
    if rows is None:
        return F.linear(x, weight, bias)
    x, rows, out = x.contiguous(), rows.contiguous(), x.new_empty(len(rows))
    plan = tuning.rows_of(x.device, 1)
    if len(rows):
        _dot_rows[(triton.cdiv(len(rows), plan.step),)](
            *(x, weight, bias, rows, out, len(rows), len(x)),
            STEP=plan.step,
            WIDTH=plan.width,
            STAGES=plan.stages,
            num_warps=plan.warps,
        )
    return out


@launched()
def _gated_rows(
    x,
    weight,
    bias,
    is_open,
    out,
    outputs,
    inputs,
    EACH: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * STEP + tl.arange(0, STEP)
    here = row < outputs
    wanted = here & (tl.load(is_open + row * EACH, mask=here, other=0) != 0)
    total = tl.zeros([STEP], tl.float32)
    if tl.sum(wanted.to(tl.int32), 0) > 0:
        total = tl.sum(products(x, weight, row, wanted, 1, inputs, 1, STEP, WIDTH, STAGES), 1)
        if bias is not None:
            total += tl.load(bias + row, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=here)


def gated_rows(x: Tensor, weight: Tensor, bias: Tensor | None, is_open: Tensor) -> Tensor:
    """`ops.gated_rows` in Triton: x [I] with the rows of weight [O, I] -> [O], 0 where is_open [1 or O] is false."""
    outputs, inputs = weight.shape
    x, out, plan = x.contiguous(), x.new_empty(outputs), tuning.rows_of(x.device, 1)
    _gated_rows[(triton.cdiv(outputs, plan.step),)](
        *(x, weight, bias, is_open.contiguous().view(torch.uint8), out, outputs, inputs),
        EACH=int(len(is_open) > 1),
        STEP=plan.step,
        WIDTH=plan.width,
        STAGES=plan.stages,
        num_warps=plan.warps,
    )
    return out
