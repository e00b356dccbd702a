"""Merged tokens and what the layer norm that reads them next makes of them: one launch on a GPU writes both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.kernels import devices, ops


class NormedTokens(Tensor):
    """Tokens [B, n, D] whose layer norm with one weight is known; to every other function a tensor like any other."""

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
    """What `ops.merge_lowest` makes of tokens x [B, n, D] for a block, whose first layer norm reads them."""
    norm = next((part for part in block.children() if isinstance(part, nn.LayerNorm)), None)
    ahead = devices.runs_ahead(x.device) and ops.compiled(x) and not torch.compiler.is_compiling()
    if norm is None or not ahead or norm.weight is None or norm.weight.dtype != x.dtype:
        return ops.merge_lowest(x, *rest)
    normed, tokens, *found = ops.merge_normed(x, *rest, norm.weight, norm.bias, norm.eps)
    tokens = tokens.as_subclass(NormedTokens)
    tokens.weight, tokens.normed = norm.weight, normed
    return tokens, *found
