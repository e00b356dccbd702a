"""A choice between two pieces of work that depends on data, on CPUs, also within work that is recorded for a replay."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from students.kernels.cpu.toolchain import recording

Calls = list[Callable[[int], Any]]


def either(condition: Tensor, if_true: Callable[[], Tensor], if_false: Callable[[], Tensor]) -> Tensor:
    """Return the result of one of two functions, as condition [1] (bool, on a CPU) says.

    While calls are recorded (replay.py), both functions run, first the one that does not apply, and a replay runs the
    calls of one of them. Their results have one shape, and neither is needed elsewhere. What else one writes, the other
    may have written.
    """
    parent = recording.calls
    if parent is None:
        return if_true() if condition.item() else if_false()
    place = condition.data_ptr()
    now = ctypes.c_bool.from_address(place).value
    with _noting() as of_other:
        out = if_false() if now else if_true()
    with _noting() as of_now:
        out.copy_(if_true() if now else if_false())

    def choose(threads: int) -> None:
        for call in of_now if ctypes.c_bool.from_address(place).value == now else of_other:
            call(threads)

    parent.append(choose)
    return out


@contextmanager
def _noting() -> Iterator[Calls]:
    """A context in which calls are recorded in a list of their own."""
    before, recording.calls = recording.calls, []
    try:
        yield recording.calls
    finally:
        recording.calls = before
