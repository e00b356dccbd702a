"""Launches that find their compiled kernel with little work of the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver

KEPT = 1024
"""Maximum kinds of launches that are remembered for a kernel."""
OPTIONS = {"enable_fp_fusion": True}
"""Options of launches that do not give them: releases of Triton differ in whether a product and the sum that it enters
become one instruction, with one rounding."""


class Kernel:
    """A kernel of triton.jit, launched as that is: kernel[grid](*tensors and numbers, **constants and options).

    Triton compiles a kernel for what it sees of an argument: a tensor's type and whether it begins at a multiple of 16
    bytes, a whole number's size and whether it is 1 or divisible by 16. At every launch it looks at all of this, and at
    settings of its own, which takes the host several times as long as the launch. Here the same facts, with a number's
    value for what is seen of it, find the compiled kernel in one look, and it is launched as torch.compile does it.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid: tuple[int, ...], first: Tensor, *rest: Any, **given: Any) -> None:
        seen = [(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in rest]
        device = first.get_device()
        key = device, first.dtype, first.data_ptr() % 16, *seen, *map(type, rest), *given.items()  # 1 == 1.0 == True
        found = self._compiled.get(key)
        if found is None:
            kernel = self._function[grid](first, *rest, **{**OPTIONS, **given})
            if kernel is not None:  # Triton's interpreter compiles nothing
                if len(self._compiled) == KEPT:
                    self._compiled.clear()
                constants = [given[name] for name in self._function.arg_names[1 + len(rest) :]]
                self._compiled[key] = kernel.run, kernel.function, kernel.packed_metadata, constants
            return
        run, function, metadata, constants = found
        stream = driver.active.get_current_stream(device)
        run(*grid, stream, function, metadata, None, None, None, first, *rest, *constants)


def launched(**options: Any) -> Callable[[Any], Kernel]:
    """Decorate a kernel's function, with options of triton.jit."""
    return lambda function: Kernel(triton.jit(function, **options))
