"""Work that is recorded once into a CUDA graph and replayed: one launch where there were some two thousand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

WARM_UP = 2
"""Runs before the recorded one, in which libraries take their workspaces and kernels are compiled."""


class Recorder(Protocol):
    """Makes of work on tensors that stay where they are a function that does it again and returns the same tensor."""

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]: ...


class CudaGraph:
    """A recorder: work on the current device, which may neither wait for it nor copy from the host.

    The result is overwritten by the next call.
    """

    def __init__(self, work: Callable[[], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = work()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._out


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on this device; None: nothing does."""
    return CudaGraph if device.type == "cuda" else None


class Fetched:
    """A tensor on its way to the host, asked for now and waited for later: what is launched between runs meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._done = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor
