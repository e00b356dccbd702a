"""Operators with their gradients, which are operators too: torch would keep what backward can make again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from students.kernels import ops

Norm = Callable[[Tensor, Tensor], Tensor]


class ChannelGate(torch.autograd.Function):
    """x where |x| >= limit, else 0, and the share of channels kept; written out because it runs at every linear layer.

    The surrogate gradient of the hard comparison is that of a ramp in log|x| - log(limit), of slope 1 on [-1/2, 1/2]:
    channels near their limit learn, the others cost nothing. The limit's gradient is taken for log(limit).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_limit: Tensor) -> tuple[Tensor, Tensor]:
        limit = log_limit.exp()
        ctx.save_for_backward(x, limit)
        return ops.channel_gate(x, limit)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_share: Tensor) -> tuple[Tensor, Tensor | None]:
        x, limit = ctx.saved_tensors
        grad_x, grad_limit = ops.channel_gate_grad(grad_out, grad_share, x, *_ramp(limit))
        return grad_x, grad_limit if ctx.needs_input_grad[1] else None


def _ramp(limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The limit, and the ends of the ramp around it."""
    return limit, limit * math.exp(-0.5), limit * math.exp(0.5)


class GatedChannelGate(torch.autograd.Function):
    """`ChannelGate` of an MLP's product x = activation(gate) * up, which somebody has made without its gradient.

    Neither product nor activation is kept for backward, which makes them again from what the linear layers put out.
    kind: as in `ops.gated_grad`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_limit: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        limit = log_limit.exp()
        ctx.save_for_backward(gate, up, limit)
        ctx.kind = kind
        return ops.channel_gate(x, limit)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_share: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, limit = ctx.saved_tensors
        by_gate, by_up, by_limit = ops.gated_grad(grad_out, grad_share, gate, up, *_ramp(limit), ctx.kind)
        return None, by_limit if ctx.needs_input_grad[1] else None, by_gate, by_up, None


class RowGate(torch.autograd.Function):
    """Written out because it runs on [rows, V]. Surrogate gradient: a ramp of slope 1, half a nat to either side."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(exact, preview, limit, tail)
        return ops.row_gate(exact, preview, limit, tail)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_share: Tensor) -> tuple[Tensor | None, ...]:
        grads = ops.row_gate_grad(grad_out, grad_share, *ctx.saved_tensors)
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))


class ForwardKL(torch.autograd.Function):
    """KL(teacher || student) of each row; the teacher's logits are fixed."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        value, logs = ops.forward_kl(student, teacher)
        ctx.save_for_backward(student, teacher, logs)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ops.forward_kl_grad(*ctx.saved_tensors, grad), None


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) [N] of logits [N, V] in nats; the teacher's are fixed."""
    value: Tensor = ForwardKL.apply(student, teacher)
    return value


class RMSNorm(torch.autograd.Function):
    """`ops.rms_norm` with the gradient by its input; the weight is frozen. run: the operator with its settings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, run: Norm, epsilon: float, kind: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = epsilon, kind
        return run(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return ops.rms_norm_grad(grad, x, weight, *ctx.settings), None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, run: Norm, epsilon: float, kind: int) -> Tensor:
    """`ops.rms_norm`, called through `run`, which has the other settings."""
    out: Tensor = RMSNorm.apply(x, weight, run, epsilon, kind)
    return out


class Attention(torch.autograd.Function):
    """torch's attention, of which backward makes the weights again as one matrix of scores.

    query [B, H, T, d], key and value [B, K, C, d] -> [B, H, T, d]; each key head serves H / K query heads.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        ctx.causal = options["is_causal"]
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        batch, heads, tokens, _ = key.shape
        shape = (*query.shape[:-1], tokens)
        # the query heads that share a key head follow each other, as rows of one matrix
        q, out, k, v = (
            rearrange(x, "b (h g) t d -> (b h) (g t) d", h=heads) for x in (query * ctx.scale, grad, key, value)
        )
        score = torch.bmm(q, k.transpose(1, 2)).view(shape)
        if mask is not None:
            least = torch.finfo(score.dtype).min
            score = score.masked_fill_(~mask, least) if mask.dtype == torch.bool else score + mask
        weight, slope = score.contiguous(), torch.bmm(out, v.transpose(1, 2)).view(shape)
        ops.softmax_grad(weight, slope, shape[-2] if ctx.causal else 0)
        grad_mask = slope.sum_to_size(mask.shape).to(mask.dtype) if ctx.needs_input_grad[3] else None
        slope, weight = (rearrange(x, "b (h g) t k -> (b h) (g t) k", h=heads) for x in (slope, weight))
        grad_query = torch.bmm(slope, k).mul_(ctx.scale).view(query.shape)
        grad_key, grad_value = (
            rearrange(torch.bmm(by.transpose(1, 2), x), "(b h) k d -> b h k d", b=batch)
            for by, x in ((slope, q), (weight, out))
        )
        return grad_query, grad_key, grad_value, grad_mask, None
