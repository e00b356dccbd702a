"""Give Triton's interpreter the arithmetic that GPUs have for bfloat16.

GPUs round to the nearest bfloat16; the interpreter truncates, and multiplies bfloat16 matrices as if their bits were
integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def mend(patch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

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
