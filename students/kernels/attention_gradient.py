"""A faster backward pass of attention on CPUs; the forward pass remains torch's own, bit for bit.

torch's CPU kernel takes two to three times as long backward as forward, and up to fifteen times with few tokens. The
backward pass used here recomputes the attention weights block by block, with matrix products. On GPUs torch's own is
used, and is not asked for the gradients that it cannot compute (see `learning` and `_without_cudnn`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from students.kernels import devices
from students.kernels.autograd import Attention


def attention_gradients(device: torch.device, masks: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which every call of `scaled_dot_product_attention` on a CPU has the faster gradient, and, if
    calls take masks, none on a GPU has cuDNN's."""
    if not torch.is_grad_enabled():
        return nullcontext()
    return _FastAttention() if device.type == "cpu" else _without_cudnn() if masks else nullcontext()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Context without cuDNN's attention, which torch prefers on Hopper: its gradients may be NaN if a mask covers 64
    keys more than a multiple of 128 (torch 2.11 to 2.14; pytorch issue 196678)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def recomputing(
    device: torch.device, masks: bool = False
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a forward pass within `attention_gradients` and of its recomputation in backward, as
    `context_fn` of torch's checkpoint has to."""
    return nullcontext(), attention_gradients(device, masks)


def learning(x: Tensor, mask: Tensor) -> Tensor:
    """Return x, the input of a block whose attention takes this mask; on a GPU it requires a gradient if the mask does.

    Backward of torch's attention on a GPU reads an address that was never set, which ends the process, if the mask
    requires a gradient but neither queries, keys nor values do (torch 2.11; pytorch issue 148476).
    """
    alone = mask.requires_grad and not x.requires_grad and devices.runs_ahead(x.device)
    return x.detach().requires_grad_() if alone else x


class _FastAttention(TorchFunctionMode):
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
    options: dict[str, Any] = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    learns = any(x is not None and x.requires_grad for x in (query, key, value, attn_mask))
    if not learns or dropout_p or query.ndim != 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    out: Tensor = Attention.apply(query, key, value, attn_mask, options)
    return out
