"""Softmax of attention scores and the gradient by the scores, both in place; each row is read twice."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.forward_kl import rescale


@triton.jit(do_not_specialize=["tokens"])
def _softmax_grad(score, grad, keys, tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    seen = keys
    if tokens > 0:
        seen = keys - tokens + (row % tokens).to(tl.int32) + 1
    kind = score.dtype.element_ty
    most = float("-inf")
    total, along = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, seen, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here = place < seen
        value = tl.load(score + row * keys + place, mask=here, other=float("-inf")).to(tl.float32)
        slope = tl.load(grad + row * keys + place, mask=here, other=0.0).to(tl.float32)
        most, safe, shrink = rescale(most, value)
        weight = tl.exp(value - safe)
        total = total * shrink + weight
        along = along * shrink + weight * slope
    whole = tl.sum(total, 0)
    mean = tl.sum(along, 0) / whole
    for start in range(0, keys, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here, inside = place < keys, place < seen
        value = tl.load(score + row * keys + place, mask=inside, other=float("-inf")).to(tl.float32)
        slope = tl.load(grad + row * keys + place, mask=inside, other=0.0).to(tl.float32)
        weight = tl.where(inside, tl.exp(value - most) / whole, 0.0)
        tl.store(score + row * keys + place, weight.to(kind), mask=here)
        tl.store(grad + row * keys + place, tl.where(inside, weight * (slope - mean), 0.0).to(kind), mask=here)


def softmax_grad(score: Tensor, grad: Tensor, tokens: int) -> None:
    """`ops.softmax_grad` in Triton."""
    keys = score.shape[-1]
    if score.numel():
        block = min(2048, triton.next_power_of_2(keys))
        _softmax_grad[(score.numel() // keys,)](
            *(score, grad, keys, tokens), BLOCK=block, num_warps=max(1, min(8, block // 256))
        )
