"""Merged tokens that carry the output of the layer norm that reads them next: one launch on a GPU writes both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.kernels import devices, ops


class NormedTokens(Tensor):
    """Tokens [B, n, D] that carry their layer norm with one weight; F.layer_norm with that weight returns it.

    For every other function they are an ordinary tensor.
    """

    weight: Tensor
    normed: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.layer_norm and kwargs.get("weight") is getattr(args[0], "weight", None):
                return args[0].normed
            return function(*args, **kwargs)


def merge_for(block: nn.Module, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return `ops.merge_lowest` of tokens x [B, n, D], which the first layer norm of `block` reads next. On a GPU the
    merged tokens are NormedTokens where the kernel can apply that layer norm."""
    norm = next((part for part in block.children() if isinstance(part, nn.LayerNorm)), None)
    ahead = devices.runs_ahead(x.device) and ops.compiled(x) and not torch.compiler.is_compiling()
    if norm is None or not ahead or norm.weight is None or norm.weight.dtype != x.dtype:
        return ops.merge_lowest(x, *rest)
    normed, tokens, *found = ops.merge_normed(x, *rest, norm.weight, norm.bias, norm.eps)
    tokens = tokens.as_subclass(NormedTokens)
    tokens.weight, tokens.normed = norm.weight, normed
    return tokens, *found
