"""Give Triton's interpreter the arithmetic that GPUs have for bfloat16, and fewer programs to run.

GPUs round to the nearest bfloat16; the interpreter truncates, and multiplies bfloat16 matrices as if their bits were
integers. It runs programs one after the other and takes a millisecond for an operation, so that kernels are launched as
on a GPU of a few multiprocessors, where programs have several steps, and sums of integers are not checked for overflow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

MULTIPROCESSORS = 4


def mend(patch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    from students.kernels.triton import tuning

    make, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def widened(x: Any) -> np.ndarray:
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def cast(self: Any, x: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.asarray(widened(x), dtype=np.float32)).bfloat16()
            return make(rounded.view(torch.int16).numpy().view(np.uint16), kind.scalar)
        if x.dtype.scalar == tl.bfloat16:
            return make(widened(x).astype(interpreter._get_np_dtype(kind)), kind.scalar)
        return plain(self, x, kind)

    def dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        return make(np.matmul(widened(a), widened(b), dtype=total.data.dtype) + total.data, total.dtype.scalar)

    plain = builder.cast_impl
    patch.setattr(builder, "cast_impl", cast)
    patch.setattr(builder, "create_dot", dot)
    options = interpreter.interpreter_builder.options
    patch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
    patch.setattr(tuning, "multiprocessors", lambda device: MULTIPROCESSORS)
    rows = {kind: replace(plan, programs=MULTIPROCESSORS) for kind, plan in tuning.ROWS[90].items()}
    patch.setitem(tuning.ROWS, 90, rows)
