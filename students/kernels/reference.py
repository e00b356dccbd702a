"""References of all operators, in torch's own operators, for any device and dtype: the implementation where there is no
other, and the expectation in tests. Arguments and results are explained in ops.py; results are contiguous.

Where the number of rows or channels to read depends on the data, a reference waits for the device once a call.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from students.kernels.merging import merge_below as merge_below
from students.kernels.merging import merge_lowest as merge_lowest
from students.kernels.merging import merge_normed as merge_normed

TOGETHER = 64
"""Outputs whose squares `fused_channels` adds up to one partial sum."""


def with_rest(
    out: Tensor, x: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, ends: list[int]
) -> Tensor:
    """Return the products out [..., O] with biases and the low-rank corrections of x [..., I] added."""
    if bias is not None:
        out = out + bias
    if down is not None and up is not None:
        low = F.linear(x, down).chunk(len(ends), -1)
        out = out + torch.cat([low[p] @ up[:, a:b] for p, (a, b) in enumerate(pairwise([0, *ends]))], -1)
    return out


def read_channels(x: Tensor, limit: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = (x.abs() >= limit).nonzero().squeeze(1)
    bag = rows.unsqueeze(0)
    if len(rows):
        out = F.embedding_bag(bag, weight, mode="sum", per_sample_weights=x[bag]).squeeze(0)
    else:
        out = x.new_zeros(weight.shape[1])
    return with_rest(out, x, *rest), torch.tensor(len(rows), device=x.device)


def few_channels(x: Tensor, limit: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needed = x.abs() >= limit
    rows = needed.any(0).nonzero().squeeze(1)
    out = (x * needed)[:, rows] @ weight[rows]
    return with_rest(out, x, *rest), torch.tensor(len(rows), device=x.device)


def entering(x: Tensor, other: Tensor | None, squares: Tensor | None, epsilon: float, kind: int) -> Tensor:
    """Return the input [B, I] of the layers of `ops.fused_channels`."""
    if squares is not None and other is not None:
        wide, gain = _wide(x), _wide(other) + (kind == 2)
        scale = torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[1] + epsilon)
        scaled = (wide * scale).to(x.dtype) if kind == 0 else wide * scale
        return (scaled * gain).to(x.dtype)
    if other is not None:
        return (F.silu(x) if kind == 3 else F.gelu(x, approximate="tanh")) * other
    return x


def leaving(out: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out [B, O] plus the residual stream, and the partial sums of squares [B, n] (empty without a stream)."""
    if residual is None:
        return out, out.new_empty(0, dtype=torch.float32)
    out = residual + out
    squares = F.pad(_wide(out).square(), (0, -out.shape[1] % TOGETHER)).unflatten(1, (-1, TOGETHER)).sum(2)
    return out, squares.float()


def fused_channels(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, count = few_channels(entering(x, *rest[:4]), *rest[5:])
    out, found = leaving(out, rest[4])
    return out, count, found


def dot_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    if rows is None:
        return F.linear(x, weight, bias)
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


def gated_rows(x: Tensor, weight: Tensor, bias: Tensor | None, is_open: Tensor) -> Tensor:
    return F.linear(x, weight, bias).masked_fill(~is_open, 0)


def exact_rows(
    x: Tensor, head: Tensor, bias: Tensor | None, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor]:
    needed = preview >= limit.unsqueeze(1)
    rows = needed.any(0).nonzero().squeeze(1)
    exact = F.linear(x, head[rows], None if bias is None else bias[rows])
    guess = preview + tail
    return guess.index_copy(1, rows, torch.where(needed[:, rows], exact, guess[:, rows])), needed.sum(1)


def channel_gate(x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    keep = _reaches(x.abs(), limit)
    return x * keep, keep.mean(-1, dtype=torch.float32)


def fused_gate(
    x: Tensor, other: Tensor, residual: Tensor | None, epsilon: float, kind: int, limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    stream = x.new_empty(0) if residual is None else x + residual
    if kind < 3:
        x = rms_norm(x if residual is None else stream, other, epsilon, kind)
    else:
        x = entering(x, other, None, epsilon, kind)
    return x if limit is None else channel_gate(x, limit)[0], stream


def sum_norm(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    total = (x + other).contiguous()
    return F.layer_norm(total, weight.shape, weight, bias, epsilon), total


def channel_gate_grad(grad_out: Tensor, grad_share: Tensor, x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    x, grad_out = x.contiguous(), grad_out.contiguous()
    size = x.abs()
    near = _reaches(size, limit * math.exp(-0.5)) - _reaches(size, limit * math.exp(0.5))
    slope = _sum_tokens(None, (grad_out * x).mul_(near), limit.shape)
    slope += _sum_tokens(grad_share, near, limit.shape) / x.shape[-1]
    return grad_out * _reaches(size, limit), -slope


def gated_grad(
    grad_out: Tensor, grad_share: Tensor, gate: Tensor, up: Tensor, limit: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, wide = gate.contiguous(), up.contiguous(), _wide(gate)
    if kind == 0:
        active, soft = F.silu(gate), wide.sigmoid()
        slope = soft * (1 + wide * (1 - soft))
    else:
        active, root = F.gelu(gate, approximate="tanh"), (2 / math.pi) ** 0.5
        soft = (root * (wide + 0.044715 * wide.pow(3))).tanh()
        slope = (1 + soft + wide * (1 - soft.square()) * root * (1 + 3 * 0.044715 * wide.square())) / 2
    grad, grad_limit = channel_gate_grad(grad_out, grad_share, active * up, limit)
    return (_wide(grad * up) * slope).to(gate.dtype), grad * active, grad_limit


def row_gate(exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    exact, preview = exact.contiguous(), preview.contiguous()
    keep = _reaches(preview, limit)
    guess = preview + tail.to(preview.dtype)
    # the factors are 0 and 1: both products are exact, and one of them is zero
    return torch.addcmul(guess * (1 - keep), exact, keep), keep.mean(-1, dtype=torch.float32)


def row_gate_grad(
    grad_out: Tensor, grad_share: Tensor, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact, preview, grad_out = exact.contiguous(), preview.contiguous(), grad_out.contiguous()
    grad_exact = grad_out * _reaches(preview, limit)
    near = _reaches(preview, limit - 0.5) - _reaches(preview, limit + 0.5)
    guess = preview + tail.to(preview.dtype)
    grad_limit = -((exact - guess).mul_(grad_out).mul_(near)).sum(-1, keepdim=True, dtype=torch.float32)
    grad_limit -= grad_share.unsqueeze(-1) * near.mean(-1, keepdim=True, dtype=torch.float32)
    grad_tail = grad_out.sum(dtype=torch.float32) - grad_exact.sum(dtype=torch.float32)
    return grad_exact, grad_out - grad_exact, grad_limit, grad_tail


def _reaches(x: Tensor, limit: Tensor) -> Tensor:
    """Return 1 where x >= limit, else 0, in x's dtype: on CPUs faster than a bool mask, and so are products with it."""
    return torch.ge(x, limit.to(x.dtype), out=torch.empty_like(x))


def _sum_tokens(weight: Tensor | None, x: Tensor, shape: torch.Size) -> Tensor:
    """Return sum_n weight[n] x[n, C] over all tokens (shape [C]) or over those of each row ([B, 1, C]).

    It is computed as a matrix product. x [..., C], weight [...] (None: all ones).
    """
    weight = x.new_ones(x.shape[:-1]) if weight is None else weight.to(x.dtype)
    if len(shape) == 1:
        x, weight = x.flatten(0, -2), weight.flatten()
    return (weight.unsqueeze(-2) @ x).float().view(shape)


def forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    s, t = _wide(student), _wide(teacher)
    logs = torch.stack([s.logsumexp(1), t.logsumexp(1)])
    return torch.linalg.vecdot((t - logs[1, :, None]).exp(), t - s) - (logs[1] - logs[0]), logs


def forward_kl_grad(student: Tensor, teacher: Tensor, logs: Tensor, grad: Tensor) -> Tensor:
    q: Tensor = (_wide(student.contiguous()) - logs[0].unsqueeze(1)).exp_()
    p = (_wide(teacher) - logs[1].unsqueeze(1)).exp_()
    return q.sub_(p).mul_(grad.unsqueeze(1)).to(student.dtype)


def routed_kl(
    exact: Tensor, preview: Tensor, teacher: Tensor, limit: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    student, share = row_gate(exact, preview, limit, tail)
    value, logs = forward_kl(student, teacher)
    return value, share, logs


def routed_kl_grad(
    exact: Tensor,
    preview: Tensor,
    teacher: Tensor,
    limit: Tensor,
    tail: Tensor,
    logs: Tensor,
    grad: Tensor,
    grad_share: Tensor,
) -> tuple[Tensor, Tensor]:
    student, _ = row_gate(exact, preview, limit, tail)
    slope = forward_kl_grad(student, teacher, logs, grad)
    by_exact, by_preview, by_limit, by_tail = row_gate_grad(slope, grad_share, exact, preview, limit, tail)
    exact.copy_(by_exact), preview.copy_(by_preview)
    return by_limit, by_tail


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_grad(score: Tensor, grad: Tensor, tokens: int) -> None:
    if tokens:
        hidden = torch.ones(tokens, score.shape[-1], dtype=torch.bool, device=score.device).triu(
            score.shape[-1] - tokens + 1
        )
        score.masked_fill_(hidden, torch.finfo(score.dtype).min)
    weight = score.softmax(-1)
    grad.copy_(torch._softmax_backward_data(grad, weight, -1, score.dtype))
    score.copy_(weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, kind: int) -> Tensor:
    wide = _wide(x.contiguous())
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if kind == 0:
        return wide.to(x.dtype) * weight
    return (wide * (_wide(weight) + (kind == 2))).to(x.dtype)


def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, kind: int) -> Tensor:
    wide, slope = _wide(x.contiguous()), _wide(grad) * (_wide(weight) + (kind == 2))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    back = (wide * slope).mean(-1, keepdim=True) * scale.pow(3)
    return (scale * slope - back * wide).to(x.dtype)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned(query, cos, sin), _turned(key, cos, sin)


def rotary_grad(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned_back(query, cos, sin), _turned_back(key, cos, sin)


def write_slot(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> None:
    keys.index_copy_(2, slot, key)
    values.index_copy_(2, slot, value)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    slot: Tensor | None,
    scale: float,
    window: int,
    cap: float,
) -> Tensor:
    batch, heads, _, size = query.shape
    score = _wide(query).reshape(batch, keys.shape[1], -1, size) @ _wide(keys).mT * scale
    score = cap * torch.tanh(score / cap) if cap else score
    place = torch.arange(keys.shape[2], device=query.device)
    newest = place[-1:] if slot is None else slot
    seen = place <= newest
    seen = seen & (place > newest - window) if window else seen
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        score = score + mask
    out = score.masked_fill(~seen, -torch.inf).softmax(-1) @ _wide(values)
    return out.to(query.dtype).reshape(batch, 1, heads, -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)
    first, second, rest = x.split([width // 2, width // 2, x.shape[-1] - width], -1)
    turned = x[..., :width] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1).contiguous().transpose(1, 2)


def _turned_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    grad, cos, sin = grad.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = (grad[..., :width] * sin).chunk(2, -1)
    turned = grad[..., :width] * cos + torch.cat([second, -first], -1)
    return torch.cat([turned, grad[..., width:]], -1).contiguous().transpose(1, 2)


def biased_attention(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float) -> Tensor:
    mask = size.log().to(query.dtype)[:, None, None].expand(-1, 1, query.shape[2], -1)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2).contiguous()


def open_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    up: Tensor | None,
    shift: Tensor,
    position: Tensor | None,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    open_ = open_by_score(F.linear(x, weight, bias), up, shift, position, prefix)
    order = (~open_).flatten().int().argsort(stable=True)
    return open_, order, order.argsort(), open_.sum()


def open_by_score(low: Tensor, up: Tensor | None, shift: Tensor, position: Tensor | None, prefix: int) -> Tensor:
    score = low[..., 0] if up is None else low[..., 0] + F.gelu(low[..., 1 : 1 + len(up)]) @ up
    open_ = score.float() + shift >= 0
    return open_ if position is None else open_ | (position < prefix)


def thin_product(x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x if rows is None else x.index_select(0, rows), weight, bias)


def list_open(score: Tensor, bias: Tensor | None, limit: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    score = score if bias is None else score + bias
    open_ = score.clone() if limit is None else score >= limit
    upto = open_.flatten().cumsum(0, dtype=torch.int32)
    numbers = torch.arange(1, len(upto) + 1, dtype=torch.int32, device=upto.device)
    return open_.contiguous(), torch.searchsorted(upto[:-1], numbers), upto - open_.flatten().int(), upto


def put_open(some: Tensor, before: Tensor, is_open: Tensor, other: Tensor | None) -> Tensor:
    rest = some.new_zeros(()) if other is None else other
    if len(some) == 0:
        return rest.expand(len(before), some.shape[1]).clone()
    rows = some.index_select(0, before.clamp(max=len(some) - 1))
    return torch.where(is_open.flatten().unsqueeze(1), rows, rest)


def substitute_closed(
    some: Tensor,
    before: Tensor | None,
    is_open: Tensor,
    low: Tensor,
    up: Tensor,
    bias: Tensor,
    residual: Tensor | None,
) -> Tensor:
    rest = F.linear(low, up, bias)
    if before is None:
        out = torch.where(is_open.flatten().unsqueeze(1), some, rest)
    else:
        out = put_open(some, before, is_open, rest)
    return out if residual is None else residual + out
