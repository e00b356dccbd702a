"""The gradient of an MLP's gated product whose channels are closed by their magnitude; it recomputes the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.channel_gate import ROWS, add_chunks, each


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["rows"])
def _gated_grad(
    grad,
    price,
    gate,
    up,
    limit,
    low,
    high,
    to_gate,
    to_up,
    partial,
    channels,
    rows,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of one block of channels for ROWS of the `rows` rows that share a limit.

    partial [groups, chunks, channels]: the limit's gradient, negated, summed over these ROWS rows.
    """
    chunk, group = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = channel < channels
    own = group * channels + channel
    kind = gate.dtype.element_ty
    least = tl.load(limit + own, mask=here, other=0.0).to(kind).to(tl.float32)[None, :]
    lower = tl.load(low + own, mask=here, other=0.0).to(kind).to(tl.float32)[None, :]
    upper = tl.load(high + own, mask=here, other=0.0).to(kind).to(tl.float32)[None, :]
    sums = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, rows), TILE):
        token = start + tl.arange(0, TILE)
        row = group.to(tl.int64) * rows + token
        mask = (token < rows)[:, None] & here[None, :]
        place = row[:, None] * channels + channel[None, :]
        x = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        cost = tl.load(price + row, mask=token < rows, other=0.0) / channels
        if KIND == 0:
            soft = sigmoid(x)
            active, rise = x * soft, soft * (1 + x * (1 - soft))
        else:
            soft = 2 * sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)) - 1
            active = 0.5 * x * (1 + soft)
            rise = 0.5 * (1 + soft + x * (1 - soft * soft) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x))
        active = active.to(kind).to(tl.float32)
        value = (active * other).to(kind).to(tl.float32)
        size = tl.abs(value)
        kept = tl.where(size >= least, out, 0.0)
        tl.store(to_gate + place, (kept * other * rise).to(kind), mask=mask)
        tl.store(to_up + place, (kept * active).to(kind), mask=mask)
        near = (size >= lower) & (size < upper) & mask
        sums += tl.where(near, out * value + cost[:, None], 0.0)
    chunks = tl.num_programs(1)
    tl.store(partial + (group * chunks + chunk).to(tl.int64) * channels + channel, tl.sum(sums, 0), mask=here)


def gated_grad(
    grad_out: Tensor,
    grad_share: Tensor,
    gate: Tensor,
    up: Tensor,
    limit: Tensor,
    low: Tensor,
    high: Tensor,
    kind: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.gated_grad` in Triton."""
    grad_out, grad_share, gate, up = (x.contiguous() for x in (grad_out, grad_share, gate, up))
    channels, rows = gate.shape[-1], each(gate, limit)
    groups, chunks = limit.numel() // channels, triton.cdiv(rows, ROWS)
    limits = limit.contiguous(), low.contiguous(), high.contiguous()
    grads = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(limits[0])
    if not gate.numel():
        return *grads[:2], grads[2].zero_()
    partial = limit.new_empty(groups, chunks, channels)
    block = min(256, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    _gated_grad[(blocks, chunks, groups)](
        *(grad_out, grad_share, gate, up, *limits, *grads[:2], partial, channels, rows),
        KIND=kind,
        ROWS=ROWS,
        TILE=8,
        BLOCK=block,
        num_warps=8,
    )
    add_chunks[(blocks, groups)](partial, grads[2], channels, chunks, TILE=8, BLOCK=block, num_warps=4)
    return grads
