"""The backends of operators: their references in torch, C, Triton's interpreter, and Triton on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from students.kernels import trial, triton
from students.kernels.cpu import toolchain
from tests import interpreter

KERNELS = ["c", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Backends with kernels of their own, as opposed to the reference."""
BACKENDS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def running_on(name: str, library: object) -> Iterator[torch.device]:
    """Within this context, run operators on the named backend; yields the device that their tensors have to be on.

    Skips the test where the backend is not available. library: the C library, None where there is no compiler."""
    if name == "c" and library is None:
        pytest.skip("no C compiler")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name == "interpreter" and (not triton.installed() or torch.cuda.is_available()):
        pytest.skip("Triton is not installed, or runs on a GPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "loaded", library if name == "c" else None)
        if name != "interpreter":
            yield torch.device("cuda" if name == "cuda" else "cpu")
            return
        interpreter.mend(patch)
        with torch.library._scoped_library("elastic", "IMPL") as operators:
            for operator in triton.OPERATORS:
                operators.impl(operator, trial.on_gpu(operator), "CPU", allow_override=True)
            yield torch.device("cpu")
