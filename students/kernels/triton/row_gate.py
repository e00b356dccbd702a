"""Logits that are exact where a preview reaches a limit and guessed elsewhere, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_gate(exact, preview, limit, tail, out, share, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kind = exact.dtype.element_ty
    least = tl.load(limit + row).to(kind).to(tl.float32)
    added = tl.load(tail).to(kind).to(tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < vocabulary
        guess = tl.load(preview + row * vocabulary + token, mask=here, other=0.0).to(tl.float32)
        keep = (guess >= least) & here
        value = tl.load(exact + row * vocabulary + token, mask=keep, other=0.0)
        tl.store(out + row * vocabulary + token, tl.where(keep, value, (guess + added).to(kind)), mask=here)
        count += keep.to(tl.int32)
    tl.store(share + row, tl.div_rn(tl.sum(count, 0).to(tl.float32), (vocabulary + 0.0).to(tl.float32)))


@triton.jit
def _row_gate_grad(
    grad,
    price,
    exact,
    preview,
    limit,
    tail,
    to_exact,
    to_preview,
    to_limit,
    to_tail,
    vocabulary,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kind = exact.dtype.element_ty
    threshold = tl.load(limit + row).to(tl.float32)
    least = threshold.to(kind).to(tl.float32)
    lower, upper = (threshold - 0.5).to(kind).to(tl.float32), (threshold + 0.5).to(kind).to(tl.float32)
    added = tl.load(tail).to(kind).to(tl.float32)
    cost = tl.load(price + row).to(tl.float32) / vocabulary
    slope, rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < vocabulary
        place = row * vocabulary + token
        guess = tl.load(preview + place, mask=here, other=0.0).to(tl.float32)
        value = tl.load(exact + place, mask=here, other=0.0).to(tl.float32)
        out = tl.load(grad + place, mask=here, other=0.0)
        keep = guess >= least
        near = (guess >= lower) & (guess < upper) & here
        tl.store(to_exact + place, tl.where(keep, out, 0.0), mask=here)
        tl.store(to_preview + place, tl.where(keep, 0.0, out), mask=here)
        out = out.to(tl.float32)
        rest += tl.where(keep, 0.0, out)
        slope += tl.where(near, (value - (guess + added).to(kind).to(tl.float32)) * out + cost, 0.0)
    tl.store(to_limit + row, -tl.sum(slope, 0))
    tl.store(to_tail + row, tl.sum(rest, 0))


def row_gate(exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.row_gate` in Triton."""
    exact, preview, limit = exact.contiguous(), preview.contiguous(), limit.contiguous()
    vocabulary = exact.shape[-1]
    out, share = torch.empty_like(exact), exact.new_empty(exact.shape[:-1], dtype=torch.float32)
    if exact.numel():
        block = min(4096, triton.next_power_of_2(vocabulary))
        _row_gate[(share.numel(),)](exact, preview, limit, tail, out, share, vocabulary, BLOCK=block, num_warps=8)
    return out, share


def row_gate_grad(
    grad_out: Tensor, grad_share: Tensor, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.row_gate_grad` in Triton."""
    grad_out, grad_share = grad_out.contiguous(), grad_share.contiguous()
    exact, preview, limit = exact.contiguous(), preview.contiguous(), limit.contiguous()
    grads = torch.empty_like(exact), torch.empty_like(preview), torch.empty_like(limit)
    rest, vocabulary = torch.zeros_like(limit, dtype=torch.float32), exact.shape[-1]
    if exact.numel():
        block = min(4096, triton.next_power_of_2(vocabulary))
        _row_gate_grad[(grad_share.numel(),)](
            *(grad_out, grad_share, exact, preview, limit, tail, *grads, rest, vocabulary), BLOCK=block, num_warps=8
        )
    return *grads, rest.sum().to(tail.dtype)
