"""Attention masks that say only what is added to the scores of each key, for a kernel that takes no more than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from students.kernels import devices, ops


def key_mask(bias: Tensor, queries: int) -> Tensor:
    """The additive mask [B, 1, T, K] of so many queries, from bias [B, 1, 1, K] in the type of what attends."""
    mask = bias.expand(-1, 1, queries, -1)
    has_kernel = bias.element_size() == 2 and devices.runs_ahead(bias.device) and ops.compiled(bias)
    if not has_kernel or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return mask
    return mask.as_subclass(KeyBias)


class KeyBias(Tensor):
    """An additive mask [B, 1, T, K], the same for every query, with which torch's attention is `ops.biased_attention`.

    For every other function it is a tensor like any other, and so is all that is made of it.
    """

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return (_attend if function is F.scaled_dot_product_attention else function)(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or query.ndim != 4 or not query.shape[1] == key.shape[1] == value.shape[1]:
        mask = attn_mask.as_subclass(Tensor)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, **options)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return ops.biased_attention(query, key, value, attn_mask[:, 0, 0], scale).transpose(1, 2)
