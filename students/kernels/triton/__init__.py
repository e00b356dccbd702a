"""The operators' kernels for GPUs, in Triton: a file each, imported when a tensor on a GPU first meets the operator.

None waits for the device, and none adds in an order that could change: the same inputs give the same bits. Shapes of
launches follow from shapes of tensors alone, so that every call can be captured into a CUDA graph. What varies between
calls (rows, chunks, tokens that stay) is not specialised for, so that nothing compiles in the middle of a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module, util
from typing import Any

import torch

OPERATORS = {
    "read_channels": "read_channels",
    "few_channels": "read_channels",
    "fused_channels": "read_channels",
    "dot_rows": "dot_rows",
    "exact_rows": "exact_rows",
    "channel_gate": "channel_gate",
    "channel_gate_grad": "channel_gate",
    "gated_grad": "gated_grad",
    "row_gate": "row_gate",
    "row_gate_grad": "row_gate",
    "forward_kl": "forward_kl",
    "forward_kl_grad": "forward_kl",
    "routed_kl": "routed_kl",
    "routed_kl_grad": "routed_kl",
    "softmax_grad": "softmax_grad",
    "rms_norm": "rms_norm",
    "rms_norm_grad": "rms_norm",
    "rotary": "rotary",
    "rotary_grad": "rotary",
    "write_slot": "write_slot",
    "biased_attention": "biased_attention",
    "decode_attention": "decode_attention",
    "list_open": "list_open",
    "merge_lowest": "merge_lowest",
    "merge_normed": "merge_lowest",
    "merge_below": "merge_lowest",
}
"""Where each operator is: the name of the file, in which a function has the operator's name and arguments."""


@cache
def installed() -> bool:
    """Whether Triton is there, for NVIDIA's GPUs: torch brings it where it is built for them."""
    return util.find_spec("triton") is not None and torch.version.hip is None


_launches: list[bool] = []
"""What `available` says, once it has been asked; torch.compile can read a list, and cannot look for a compiler."""


def available() -> bool:
    """Whether Triton can launch kernels on the GPU that is here, for which it compiles functions in C first; where it
    cannot, a warning says why, and operators run as their references."""
    if not _launches:
        _launches.append(installed() and _starts())
    return _launches[0]


def _starts() -> bool:
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"Triton cannot be used here, and nothing gets faster on this GPU ({reason}): it needs a C compiler and "
            "Python's headers, as in Debian's gcc and python3-dev",
            stacklevel=4,
        )
        return False
    return True


def implementation(operator: str) -> Callable[..., Any]:
    """The operator for tensors on a GPU; its file is imported at the first call."""

    @cache
    def kernel() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"{__name__}.{OPERATORS[operator]}"), operator)
        return found

    return lambda *arguments: kernel()(*arguments)
