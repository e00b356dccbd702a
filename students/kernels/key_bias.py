"""Attention masks that hold only how many patches each key stands for, for a kernel that takes one number per key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from students.kernels import devices, ops


def key_mask(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask [B, 1, K, K], log(size), for keys that stand for size [B, K] patches each; a
    KeyBias where there is a kernel for such masks. dtype: that of queries, keys and values."""
    has_kernel = dtype.itemsize == 2 and devices.runs_ahead(size.device) and ops.compiled(size)
    if not has_kernel or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _of_queries(size.log().to(dtype))
    mask = _of_queries(size).as_subclass(KeyBias)
    mask.kind = dtype
    return mask


def _of_queries(x: Tensor) -> Tensor:
    return x[:, None, None].expand(-1, 1, x.shape[1], -1)


class KeyBias(Tensor):
    """Sizes [B, 1, T, K] of keys, equal for all queries, for which F.scaled_dot_product_attention runs
    `ops.biased_attention`.

    Every other function gets log(size) in the dtype `kind`, an additive mask: attention on GPUs takes no other dtype
    than that of queries.
    """

    kind: torch.dtype

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.scaled_dot_product_attention:
                return _attend(*args, **(kwargs or {}))
            return function(*tree_map_only(cls, _logarithms, args), **tree_map_only(cls, _logarithms, kwargs or {}))


def _logarithms(mask: KeyBias) -> Tensor:
    return mask.as_subclass(Tensor).log().to(mask.kind)


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
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(
            query, key, value, _logarithms(attn_mask), dropout_p, is_causal, **options
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return ops.biased_attention(query, key, value, attn_mask[:, 0, 0], scale).transpose(1, 2)
