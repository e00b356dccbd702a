"""The LM head, exact only for rows whose preview reaches a limit.

The first launch writes the guesses and lists the rows to read, one list for each chunk of the vocabulary. In the second
launch, a fixed number of programs share the concatenated lists, whose lengths they read from memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton import tuning
from students.kernels.triton.dot_rows import products
from students.kernels.triton.launching import launched

CHUNK = 1024
"""Rows of the head in a chunk, for which one program makes the list."""


@launched(do_not_specialize=["rows"])
def _choose_rows(
    preview,
    limit,
    tail,
    out,
    chosen,
    lengths,
    rows,
    vocabulary,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the guesses of one chunk of the vocabulary, and list the rows of the head that some input needs.

    lengths [1 + rows, chunks]: the number of listed rows, then the number of rows that each input needs.
    """
    me, chunks = tl.program_id(0), tl.num_programs(0)
    row, token = tl.arange(0, ROWS)[:, None], me * CHUNK + tl.arange(0, CHUNK)
    mask = (row < rows) & (token < vocabulary)[None, :]
    place = row.to(tl.int64) * vocabulary + token[None, :]
    guess = tl.load(preview + place, mask=mask, other=float("nan")).to(tl.float32)  # no more than any limit
    least = tl.load(limit + row, mask=row < rows, other=0.0).to(tl.float32)
    needed = tl.where(guess >= least, 1.0, 0.0)  # as truth values LLVM would put some into local memory
    tl.store(out + place, (guess + tl.load(tail).to(tl.float32)).to(out.dtype.element_ty), mask=mask)
    listed = (tl.max(needed, 0) > 0).to(tl.int32)
    tl.store(chosen + me * CHUNK + tl.cumsum(listed, 0) - 1, token, mask=listed > 0)
    tl.store(lengths + me, tl.sum(listed, 0))
    own = tl.arange(0, ROWS)
    tl.store(lengths + (1 + own) * chunks + me, tl.sum(needed, 1).to(tl.int32), mask=own < rows)


@launched(do_not_specialize=["rows", "chunks"])
def _exact_rows(
    x,
    head,
    bias,
    preview,
    limit,
    chosen,
    lengths,
    out,
    count,
    rows,
    inputs,
    vocabulary,
    chunks,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunk = tl.arange(0, CHUNKS)
    length = tl.load(lengths + chunk, mask=chunk < chunks, other=0)
    end, listed = tl.cumsum(length, 0), tl.sum(length, 0)
    batch = tl.arange(0, ROWS)
    if tl.program_id(0) == 0:
        place = (1 + batch)[:, None] * chunks + chunk[None, :]
        each = tl.load(lengths + place, mask=(batch < rows)[:, None] & (chunk < chunks)[None, :], other=0)
        tl.store(count + batch, tl.sum(each, 1).to(tl.int64), mask=batch < rows)
    for start in range(tl.program_id(0) * STEP, listed, tl.num_programs(0) * STEP):
        slot = start + tl.arange(0, STEP)
        wanted = slot < listed
        passed = (end[None, :] <= slot[:, None]).to(tl.int32)  # [STEP, CHUNKS]: lists that end before the slot
        which, before = tl.sum(passed, 1), tl.sum(passed * length[None, :], 1)
        token = tl.load(chosen + which * CHUNK + slot - before, mask=wanted, other=0)
        total = products(x, head, token, wanted, rows, inputs, ROWS, STEP, WIDTH, STAGES)
        if bias is not None:
            total += tl.load(bias + token, mask=wanted, other=0.0).to(tl.float32)[:, None]
        place = batch.to(tl.int64)[None, :] * vocabulary + token[:, None]
        mask = wanted[:, None] & (batch < rows)[None, :]
        guess = tl.load(preview + place, mask=mask, other=0.0).to(tl.float32)
        least = tl.load(limit + batch, mask=batch < rows, other=float("inf")).to(tl.float32)[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask & (guess >= least))


def exact_rows(
    x: Tensor, head: Tensor, bias: Tensor | None, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.exact_rows` in Triton: logits [B, V] and the numbers of exact logits [B]."""
    (rows, inputs), vocabulary = x.shape, len(head)
    if rows > tuning.MOST_ROWS:
        needed = preview >= limit.unsqueeze(1)
        return torch.where(needed, F.linear(x, head, bias), preview + tail), needed.sum(1)
    x, preview, limit = x.contiguous(), preview.contiguous(), limit.contiguous()
    plan, chunks = tuning.rows_of(x.device, rows), triton.cdiv(vocabulary, CHUNK)
    out, count = torch.empty_like(preview), x.new_empty(rows, dtype=torch.int64)
    chosen = x.new_empty(chunks * CHUNK, dtype=torch.int32)
    lengths = x.new_empty(1 + rows, chunks, dtype=torch.int32)
    _choose_rows[(chunks,)](
        *(preview, limit, tail, out, chosen, lengths, rows, vocabulary),
        ROWS=triton.next_power_of_2(rows),
        CHUNK=CHUNK,
        num_warps=8,
    )
    _exact_rows[(min(plan.programs, triton.cdiv(vocabulary, plan.step)),)](
        *(x, head, bias, preview, limit, chosen, lengths, out, count, rows, inputs, vocabulary, chunks),
        ROWS=1 if rows == 1 else 16,
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        STEP=plan.step,
        WIDTH=plan.width,
        STAGES=plan.stages,
        num_warps=plan.warps,
    )
    return out, count
