"""Autograd functions of the operators in ops.py; each gradient is an operator too.

torch's autograd would store intermediate results that these backward passes recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from students.kernels import ops

Norm = Callable[[Tensor, Tensor], Tensor]


class ChannelGate(torch.autograd.Function):
    """`ops.channel_gate` with a surrogate gradient; hand-written because it runs at every linear layer.

    The hard comparison |x| >= limit gets the gradient of a ramp in log|x| - log(limit), of slope 1 on [-1/2, 1/2]: a
    limit learns from the channels near it, and other channels cost nothing. The gradient is taken by log(limit).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_limit: Tensor) -> tuple[Tensor, Tensor]:
        limit = log_limit.exp()
        ctx.save_for_backward(x, limit)
        return ops.channel_gate(x, limit)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_share: Tensor) -> tuple[Tensor, Tensor | None]:
        x, limit = ctx.saved_tensors
        grad_x, grad_limit = ops.channel_gate_grad(grad_out, grad_share, x, limit)
        return grad_x, grad_limit if ctx.needs_input_grad[1] else None


class GatedChannelGate(torch.autograd.Function):
    """`ChannelGate` of an MLP's product x = activation(gate) * up, which the caller has computed without a gradient.

    Neither the product nor the activation is stored: backward recomputes both from gate and up, the outputs of the
    linear layers. kind: the activation, as in `ops.gated_grad`.
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
        by_gate, by_up, by_limit = ops.gated_grad(grad_out, grad_share, gate, up, limit, ctx.kind)
        return None, by_limit if ctx.needs_input_grad[1] else None, by_gate, by_up, None


class RowGate(torch.autograd.Function):
    """`ops.row_gate` with a surrogate gradient: a ramp of slope 1 that extends half a nat to either side of the limit.

    Hand-written because its tensors [rows, V] are large.
    """

    @staticmethod
    def forward(ctx: Any, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(exact, preview, limit, tail)
        return ops.row_gate(exact, preview, limit, tail)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_share: Tensor) -> tuple[Tensor | None, ...]:
        grads = ops.row_gate_grad(grad_out, grad_share, *ctx.saved_tensors)
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))


class GateOfChannel(torch.autograd.Function):
    """Gates [..., N] as gates [..., C] of the channels that belong to them. members: index [C] of each channel's gate.

    torch's gradient of `index_select` adds up all channels of a group by atomics on GPUs, in the gates' precision and
    in no fixed order; a matrix product adds them in float32, in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, members: Tensor) -> Tensor:
        ctx.save_for_backward(members)
        ctx.gates = gate.shape[-1]
        return gate.index_select(-1, members)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (members,) = ctx.saved_tensors
        return grad @ F.one_hot(members, ctx.gates).to(grad.dtype), None


class ForwardKL(torch.autograd.Function):
    """`ops.forward_kl` with the gradient by the student's logits; the teacher's logits are constants."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        value, logs = ops.forward_kl(student, teacher)
        ctx.save_for_backward(student, teacher, logs)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ops.forward_kl_grad(*ctx.saved_tensors, grad), None


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) [N] of logits [N, V] in nats; the teacher's logits are constants."""
    value: Tensor = ForwardKL.apply(student, teacher)
    return value


class RoutedKL(torch.autograd.Function):
    """KL(teacher || student) [N] of the logits that `RowGate` returns, and the share of exact logits [N].

    The student's logits are never stored. No other code may use `exact` and `preview`: backward, which can run only
    once, overwrites the two tensors with their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, exact: Tensor, preview: Tensor, limit: Tensor, tail: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        value, share, logs = ops.routed_kl(exact, preview, teacher, limit, tail)
        ctx.save_for_backward(exact, preview, teacher, limit, tail, logs)
        return value, share

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_share: Tensor) -> tuple[Tensor | None, ...]:
        exact, preview, *rest = (x.detach() for x in ctx.saved_tensors)
        by_limit, by_tail = ops.routed_kl_grad(exact, preview, *rest, grad, grad_share)
        return exact, preview, by_limit, by_tail, None


class RMSNorm(torch.autograd.Function):
    """`ops.rms_norm` with the gradient by x; the weight is frozen. run: the operator with epsilon and kind bound."""

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
    """Return `ops.rms_norm` of x with its gradient; run: the operator with epsilon and kind bound."""
    out: Tensor = RMSNorm.apply(x, weight, run, epsilon, kind)
    return out


class Rotary(torch.autograd.Function):
    """`ops.rotary` with the gradients by query and key; cos and sin are constants."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return ops.rotary(query, key, cos, sin)

    @staticmethod
    def backward(ctx: Any, by_query: Tensor, by_key: Tensor) -> tuple[Tensor | None, ...]:
        return *ops.rotary_grad(by_query, by_key, *ctx.saved_tensors), None, None


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return `ops.rotary` of query and key with its gradients."""
    out: tuple[Tensor, Tensor] = Rotary.apply(query, key, cos, sin)
    return out


class Attention(torch.autograd.Function):
    """torch's attention, with a backward pass that recomputes the attention weights block by block.

    A block is a range of queries of some sequences.
    query [B, H, T, d], key and value [B, K, C, d] -> [B, H, T, d]; each key head serves H / K query heads.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        ctx.causal = options["is_causal"]
        mask = None if mask is None else mask.detach()  # torch is slow for a mask that requires a gradient
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        heads, tokens, causal = key.shape[1], key.shape[2], ctx.causal and query.shape[2] == key.shape[2]
        if ctx.causal and not causal:
            mask = torch.ones(query.shape[2], tokens, dtype=torch.bool, device=query.device).tril()
        key, value = key.contiguous(), value.contiguous()
        bias = None if mask is None else mask[(None,) * (4 - mask.ndim)]
        blind = None  # queries that see no key: torch's output is zero there
        if bias is not None and bias.dtype == torch.bool and not bool((seeing := bias.any(-1, keepdim=True)).all()):
            blind = ~seeing
        by_query = torch.empty_like(query)
        by_key, by_value = (torch.zeros_like(x, dtype=_wide(x)) for x in (key, value))
        by_bias = torch.zeros_like(bias, dtype=_wide(bias)) if bias is not None and ctx.needs_input_grad[3] else None
        for some, rows in _blocks(query, tokens, causal):
            here = some, slice(None), slice(rows.stop if causal else tokens)
            k, v, to_key, to_value = (x[here].flatten(0, 1) for x in (key, value, by_key, by_value))
            # query heads that share a key head are adjacent, so their queries become rows of one matrix
            q, out = (rearrange(x[some, :, rows], "b (h g) t d -> (b h) (g t) d", h=heads) for x in (query, grad))
            q = q * ctx.scale
            weight, slope = torch.bmm(q, k.transpose(1, 2)), torch.bmm(out, v.transpose(1, 2))
            shape = -1, query.shape[1], rows.stop - rows.start, k.shape[1]
            if bias is not None:
                part = _part(bias, some, rows)
                score, least = weight.view(shape), torch.finfo(weight.dtype).min
                score.masked_fill_(~part, least) if part.dtype == torch.bool else score.add_(part)
            ops.softmax_grad(weight.view(shape), slope.view(shape), shape[2] if causal else 0)
            if blind is not None:
                for x in (weight, slope):
                    x.view(shape).masked_fill_(_part(blind, some, rows), 0)
            if by_bias is not None:
                part = _part(by_bias, some, rows)
                part += slope.view(shape).sum_to_size(part.shape)
            to_query = rearrange(torch.bmm(slope, k), "(b h) (g t) d -> b (h g) t d", h=heads, t=shape[2])
            torch.mul(to_query, ctx.scale, out=by_query[some, :, rows])
            to_key += torch.bmm(slope.transpose(1, 2), q)
            to_value += torch.bmm(weight.transpose(1, 2), out)
        grad_mask = None if by_bias is None else by_bias.view(mask.shape).to(mask.dtype)
        return by_query, by_key.to(key.dtype), by_value.to(value.dtype), grad_mask, None


SCORES = 2**21
"""Maximum bytes of attention scores in a block of `Attention`, so that the scores stay in a core's cache."""
QUERIES = 64
"""Maximum queries of a sequence in a block of causal attention, where keys behind a block's last query are not read."""
LEAST = 16
"""Minimum queries of a sequence in a block, unless the sequence has fewer."""


def _blocks(query: Tensor, keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the slices of sequences and of queries of each block, for query [B, H, T, d] and `keys` keys."""
    batch, heads, tokens, _ = query.shape
    row = heads * keys * query.element_size()
    most = max(LEAST, SCORES // row)
    step = min(most, QUERIES) if causal else min(most, tokens)
    some = max(1, most // step)
    for first in range(0, batch, some):
        for start in range(0, tokens, step):
            yield slice(first, min(first + some, batch)), slice(start, min(start + step, tokens))


def _part(x: Tensor, some: slice, rows: slice) -> Tensor:
    """Return the part of a mask x [B or 1, H or 1, T or 1, C or 1] for sequences `some` and queries `rows`."""
    return x[some if len(x) > 1 else slice(None), :, rows if x.shape[2] > 1 else slice(None)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
