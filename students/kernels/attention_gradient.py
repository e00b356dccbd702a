"""A faster gradient of attention on CPUs, whose forward pass stays as it is, bit for bit.

torch's CPU kernel takes six to fifteen times as long backward as forward where there are a few hundred tokens or fewer;
here backward makes the attention weights again, as one matrix of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from students.kernels.cpu import toolchain

LARGEST = 8 * 2**20
"""Bytes of scores up to which this is faster: above, they do not stay in a core's cache."""


def fast_attention_gradients(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, attention over few tokens has the faster gradient, whoever calls it; for passes that nobody recomputes
    in backward."""
    return _ShortAttention() if device.type == "cpu" and torch.is_grad_enabled() else nullcontext()


class _ShortAttention(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return function(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    size = query.shape[:-1].numel() * key.shape[-2] * query.element_size()
    learns = any(x is not None and x.requires_grad for x in (query, key, value, attn_mask))
    if not learns or dropout_p or query.ndim != 4 or size > LARGEST:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return _Attention.apply(query, key, value, attn_mask, options)


class _Attention(torch.autograd.Function):
    """query [B, H, T, d], key and value [B, K, C, d] -> [B, H, T, d]; each key head serves H / K query heads."""

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
        shape, matrices = (*query.shape[:-1], key.shape[2]), key.shape[0] * key.shape[1]
        q, out, k, v = (x.reshape(matrices, -1, x.shape[-1]) for x in (query * ctx.scale, grad, key, value))
        score = torch.bmm(q, k.transpose(1, 2)).view(shape)
        if mask is not None:
            least = torch.finfo(score.dtype).min
            score = score.masked_fill_(~mask, least) if mask.dtype == torch.bool else score + mask
        weight, slope = _softmax_grad(score, torch.bmm(out, v.transpose(1, 2)).view(shape), ctx.causal)
        grad_mask = slope.sum_to_size(mask.shape).to(mask.dtype) if ctx.needs_input_grad[3] else None
        slope, weight = slope.view(len(q), -1, shape[-1]), weight.view(len(q), -1, shape[-1])
        grad_query = torch.bmm(slope, k).mul_(ctx.scale).view(query.shape)
        grad_key = torch.bmm(slope.transpose(1, 2), q).view(key.shape)
        grad_value = torch.bmm(weight.transpose(1, 2), out).view(value.shape)
        return grad_query, grad_key, grad_value, grad_mask, None


def _softmax_grad(score: Tensor, grad: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(softmax of the scores [B, H, T, K], gradient by the scores) for the gradient by that softmax. Overwrites both.

    causal: query t sees keys 0 ... t.
    """
    tokens, keys = score.shape[-2:]
    if toolchain.native(score) is not None:
        score, grad = score.contiguous(), grad.contiguous()
        toolchain.call("softmax_grad", score, grad, score.numel() // keys, keys, tokens if causal else 0)
        return score, grad
    if causal:
        score.masked_fill_(torch.ones(tokens, keys, dtype=torch.bool).triu(1), torch.finfo(score.dtype).min)
    weight = score.softmax(-1)
    return weight, torch._softmax_backward_data(grad, weight, -1, score.dtype)
