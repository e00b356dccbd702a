"""The operators' kernels for GPUs, in Triton; a kernel's file is imported when the operator first gets a GPU tensor.

No kernel makes the host wait for the device, and none sums in an order that could change: equal inputs give equal bits.
Launch grids follow from tensor shapes alone, so that every call can be captured into a CUDA graph. Numbers that vary
between calls (rows, chunks, tokens that stay) are not specialised on, so that nothing compiles in the middle of a run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch

_FILES = {
    "read_channels": ("read_channels", "few_channels", "fused_channels"),
    "dot_rows": ("dot_rows", "gated_rows"),
    "exact_rows": ("exact_rows",),
    "channel_gate": ("channel_gate", "channel_gate_grad", "gated_grad"),
    "fused_gate": ("fused_gate",),
    "sum_norm": ("sum_norm",),
    "row_gate": ("row_gate", "row_gate_grad", "routed_kl", "routed_kl_grad"),
    "forward_kl": ("forward_kl", "forward_kl_grad"),
    "rms_norm": ("rms_norm", "rms_norm_grad"),
    "rotary": ("rotary", "rotary_grad"),
    "write_slot": ("write_slot",),
    "biased_attention": ("biased_attention",),
    "decode_attention": ("decode_attention",),
    "list_open": ("list_open",),
    "open_by_score": ("open_by_score",),
    "substitute_closed": ("substitute_closed",),
    "put_open": ("put_open",),
    "merge_lowest": ("merge_lowest", "merge_normed", "merge_below"),
}
OPERATORS = {operator: file for file, operators in _FILES.items() for operator in operators}
"""The file of each operator; a function in the file has the operator's name and arguments."""


@cache
def installed() -> bool:
    """Return whether Triton for NVIDIA GPUs is installed: builds of torch for these GPUs depend on it."""
    return util.find_spec("triton") is not None and torch.version.hip is None


def keep_in(folder: Path) -> None:
    """Let Triton keep what it compiles in `folder`, unless the environment says where."""
    if not os.environ.keys() & {"TRITON_CACHE_DIR", "TRITON_HOME"}:
        os.environ["TRITON_CACHE_DIR"] = str(folder)


_launches: list[bool] = []
"""The result of `available`, after its first call. torch.compile can read a list, but cannot look for a compiler."""


def available() -> bool:
    """Return whether Triton can launch kernels on the available GPU, for which it first compiles C functions. If it
    cannot, a warning gives the reason, and operators run as their references."""
    if not _launches:
        _launches.append(installed() and _starts())
    return _launches[0]


def _starts() -> bool:
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        warnings.warn(f"Triton cannot be used here, and nothing gets faster on this GPU {_why(error)}", stacklevel=4)
        return False
    return True


def _why(error: Exception) -> str:
    """Return, for a warning, why Triton cannot start, and what it needs."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.filename:
        return f"({reason}): it keeps what it compiles there; TRITON_CACHE_DIR names another folder"
    return f"({reason}): it needs a C compiler and Python's headers, as in Debian's gcc and python3-dev"


def implementation(operator: str) -> Callable[..., Any]:
    """Return the Triton implementation of an operator; the first call of the returned function imports the file."""

    @cache
    def kernel() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"{__name__}.{OPERATORS[operator]}"), operator)
        return found

    return lambda *arguments: kernel()(*arguments)
