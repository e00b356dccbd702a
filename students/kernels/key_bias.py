"""Attention masks that say only how many patches each key stands for, for a kernel that takes no more than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from students.kernels import devices, ops


def key_mask(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, K, K] of keys that stand for so many each, size [B, K]: their logarithms; dtype: of what
    attends."""
    has_kernel = dtype.itemsize == 2 and devices.runs_ahead(size.device) and ops.compiled(size)
    if not has_kernel or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _of_queries(size.log().to(dtype))
    return _of_queries(size).as_subclass(KeyBias)


def _of_queries(x: Tensor) -> Tensor:
    return x[:, None, None].expand(-1, 1, x.shape[1], -1)


class KeyBias(Tensor):
    """Numbers [B, 1, T, K], the same for every query, with which torch's attention is `ops.biased_attention`.

    Every other function gets their logarithms, an additive mask.
    """

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.scaled_dot_product_attention:
                return _attend(*args, **(kwargs or {}))
            return function(*tree_map_only(cls, _logarithms, args), **tree_map_only(cls, _logarithms, kwargs or {}))


def _logarithms(mask: KeyBias) -> Tensor:
    return mask.as_subclass(Tensor).log()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: KeyBias,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or query.ndim != 4 or not query.shape[1] == key.shape[1] == value.shape[1]:
        mask = _logarithms(attn_mask).to(query.dtype)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, **options)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return ops.biased_attention(query, key, value, attn_mask[:, 0, 0], scale).transpose(1, 2)
