"""The gate that closes channels by their magnitude, and its gradient, also of an MLP's gated product, which is computed
again; sums over tokens take two launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.launching import launched

ROWS = 64
"""Tokens over which one program sums gradients."""


@launched(do_not_specialize=["each"])
def _channel_gate(x, limit, out, share, channels, each, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        here = channel < channels
        value = tl.load(x + row * channels + channel, mask=here, other=0.0)
        least = tl.load(limit + row // each * channels + channel, mask=here, other=0.0).to(value.dtype)
        keep = (tl.abs(value.to(tl.float32)) >= least.to(tl.float32)) & here
        tl.store(out + row * channels + channel, tl.where(keep, value, 0.0), mask=here)
        count += keep.to(tl.int32)
    tl.store(share + row, tl.div_rn(tl.sum(count, 0).to(tl.float32), (channels + 0.0).to(tl.float32)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@launched(do_not_specialize=["rows"])
def _gate_grad(
    grad,
    price,
    x,
    up,
    limit,
    to_x,
    to_up,
    partial,
    channels,
    rows,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of one block of channels for ROWS of the `rows` rows that share a limit. KIND: as in
    `ops.gated_grad`, where x is the gate; -1: the channels of x itself are closed, and there is no `up`.

    partial [groups, chunks, channels]: the limit's gradient, negated, summed over these ROWS rows.
    """
    chunk, group = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = channel < channels
    own = group * channels + channel
    kind = x.dtype.element_ty
    exact = tl.load(limit + own, mask=here, other=0.0)[None, :]
    least = exact.to(kind).to(tl.float32)
    lower = (exact * 0.6065306597126334).to(kind).to(tl.float32)  # exp(-1/2)
    upper = (exact * 1.6487212707001282).to(kind).to(tl.float32)  # exp(1/2)
    sums = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, rows), TILE):
        token = start + tl.arange(0, TILE)
        row = group.to(tl.int64) * rows + token
        mask = (token < rows)[:, None] & here[None, :]
        place = row[:, None] * channels + channel[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        cost = tl.load(price + row, mask=token < rows, other=0.0) / channels
        if KIND >= 0:
            other = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
            if KIND == 0:
                soft = sigmoid(value)
                active, rise = value * soft, soft * (1 + value * (1 - soft))
            else:
                soft = 2 * sigmoid(2 * 0.7978845608028654 * (value + 0.044715 * value * value * value)) - 1
                active = 0.5 * value * (1 + soft)
                rise = value * (1 - soft * soft) * 0.7978845608028654 * (1 + 3 * 0.044715 * value * value)
                rise = 0.5 * (1 + soft + rise)
            active = active.to(kind).to(tl.float32)
            value = (active * other).to(kind).to(tl.float32)
        size = tl.abs(value)
        kept = tl.where(size >= least, out, 0.0)
        if KIND >= 0:
            tl.store(to_x + place, (kept * other * rise).to(kind), mask=mask)
            tl.store(to_up + place, (kept * active).to(kind), mask=mask)
        else:
            tl.store(to_x + place, kept.to(kind), mask=mask)
        near = (size >= lower) & (size < upper) & mask
        sums += tl.where(near, out * value + cost[:, None], 0.0)
    chunks = tl.num_programs(1)
    tl.store(partial + (group * chunks + chunk).to(tl.int64) * channels + channel, tl.sum(sums, 0), mask=here)


@launched(do_not_specialize=["chunks"])
def _add_chunks(partial, to_limit, channels, chunks, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the negated sum over chunks of partial [groups, chunks, channels] to to_limit [groups, channels]."""
    group = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, chunks, TILE):
        chunk = start + tl.arange(0, TILE)
        place = (group * chunks + chunk).to(tl.int64)[:, None] * channels + channel[None, :]
        sums += tl.load(partial + place, mask=(chunk < chunks)[:, None] & (channel < channels)[None, :], other=0.0)
    tl.store(to_limit + group * channels + channel, -tl.sum(sums, 0), mask=channel < channels)


def channel_gate(x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.channel_gate` in Triton."""
    x, limit = x.contiguous(), limit.contiguous()
    channels = x.shape[-1]
    out, share = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        block = min(4096, triton.next_power_of_2(channels))
        _channel_gate[(share.numel(),)](x, limit, out, share, channels, _each(x, limit), BLOCK=block, num_warps=8)
    return out, share


def _each(x: Tensor, limit: Tensor) -> int:
    """Return how many rows of x [..., C] share a row of limit [C] or [B, 1, C]."""
    return max(1, x.numel() // limit.numel())


def channel_gate_grad(grad_out: Tensor, grad_share: Tensor, x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.channel_gate_grad` in Triton."""
    grad_x, _, grad_limit = gated_grad(grad_out, grad_share, x, None, limit, -1)
    return grad_x, grad_limit


def gated_grad(
    grad_out: Tensor, grad_share: Tensor, x: Tensor, up: Tensor | None, limit: Tensor, kind: int
) -> tuple[Any, ...]:
    """`ops.gated_grad` in Triton, where x is the gate; with kind -1, and without `up`, `ops.channel_gate_grad`."""
    grad_out, grad_share, x = grad_out.contiguous(), grad_share.contiguous(), x.contiguous()
    up, limit = None if up is None else up.contiguous(), limit.contiguous()
    channels, rows = x.shape[-1], _each(x, limit)
    groups, chunks = limit.numel() // channels, triton.cdiv(rows, ROWS)
    grads = torch.empty_like(x), None if up is None else torch.empty_like(up), torch.empty_like(limit)
    if not x.numel():
        return *grads[:2], grads[2].zero_()
    partial = limit.new_empty(groups, chunks, channels)
    block = min(256, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    _gate_grad[(blocks, chunks, groups)](
        *(grad_out, grad_share, x, up, limit, *grads[:2], partial, channels, rows),
        KIND=kind,
        ROWS=ROWS,
        TILE=8,
        BLOCK=block,
        num_warps=4 if up is None else 8,
    )
    _add_chunks[(blocks, groups)](partial, grads[2], channels, chunks, TILE=8, BLOCK=block, num_warps=4)
    return grads
