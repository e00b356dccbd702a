"""Shapes on which kernels are timed, and the method: medians of calls in turn, over copies of a weight that together
exceed every cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from students.kernels.capture import CudaGraph
from students.kernels.cpu.pages import large_pages
from students.kernels.packing import PackedProduct

Call = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """The device, shapes and dtype of the timed calls."""

    device: torch.device
    weights: Sequence[tuple[int, int]]
    """(inputs, outputs) of weights: MLP down, MLP gate and up, attention q, k and v, LM head."""
    head: tuple[int, int]
    """Rows and width of an LM head."""
    logits: tuple[int, int]
    """Rows and vocabulary of logits."""
    tokens: tuple[int, int]
    """Tokens and width of activations."""
    images: Sequence[tuple[int, int, int]]
    """Images, tokens and width of batches of images."""
    rows: Sequence[int]
    """Numbers of inputs per call."""
    dtype: torch.dtype = torch.bfloat16
    beyond: int = 256 * 2**20
    """Bytes that all copies of a weight together reach at least."""
    replays: int = 10
    """Measurements of each contender."""
    keeps: Sequence[float] = (1.0, 0.7, 0.4)
    """Shares of channels that are read."""

    def make(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return standard normal numbers of this shape, by default in the dtype that is timed."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def copies(self, rows: int, columns: int) -> list[Tensor]:
        """Return copies of a random weight [rows, columns], laid out in memory as in students."""
        probe = self.make(rows, columns)
        count = max(1, -(-self.beyond // (probe.numel() * probe.element_size())))
        return [large_pages.empty(probe, rows, columns).copy_(probe) for _ in range(count)]

    def medians(self, contenders: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        """Return the median microseconds of one call of each contender, measured in turn."""
        timers = {name: self._timer(calls) for name, calls in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(self.replays):
            for name, timer in timers.items():
                times[name].append(timer())
        return {name: median(each) for name, each in times.items()}

    def _timer(self, calls: Sequence[Call]) -> Callable[[], float]:
        def work() -> None:
            for call in calls:
                call()

        def on_cpu() -> float:
            start = time.perf_counter()
            work()
            return 1e6 * (time.perf_counter() - start) / len(calls)

        if self.device.type == "cpu":
            work()
            return on_cpu
        graph = CudaGraph(work)
        graph()

        def on_gpu() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph()
            end.record()
            end.synchronize()
            return 1000 * float(start.elapsed_time(end)) / len(calls)

        return on_gpu

    def dense(self, x: Tensor, matrices: Sequence[Tensor]) -> dict[str, list[Call]]:
        """Return calls of products of x [B, I] with each weight [O, I]. On a GPU, also with the weights stored as
        [I, O]: either layout can be the faster one."""
        if self.device.type == "cpu":
            return {"dense": [partial(_packed(matrix), x, matrix) for matrix in matrices]}
        turned = [matrix.T.contiguous() for matrix in matrices]
        rows: list[Call] = [partial(F.linear, x, matrix.contiguous()) for matrix in matrices]
        return {"dense": rows, "dense, turned": [partial(torch.matmul, x, matrix) for matrix in turned]}


def _packed(weight: Tensor) -> PackedProduct:
    product = PackedProduct()
    product.prepare(weight)
    return product


ON_GPU = Setup(  # shapes of a model with 8 B parameters
    torch.device("cuda"),
    weights=((14336, 4096), (4096, 28672), (4096, 6144), (4096, 128256)),
    head=(128256, 4096),
    logits=(2048, 128256),
    tokens=(4096, 4096),
    images=((1, 197, 768), (64, 197, 768), (64, 197, 1024), (64, 577, 1024)),
    rows=(1, 4, 16),
    keeps=(1.0, 0.6, 0.4),
)
ON_CPU = Setup(  # shapes of models with 1 B and 0.1 B parameters
    torch.device("cpu"),
    weights=((8192, 2048), (2048, 16384), (2048, 3072), (1536, 576), (576, 3072)),
    head=(128256, 2048),
    logits=(64, 128256),
    tokens=(512, 2048),
    images=((1, 197, 384), (8, 197, 768)),
    rows=(1, 4),
)


def limits(x: Tensor, keep: float) -> Tensor:
    """Return a limit [I] that a share `keep` of the channels reaches, each in at least one row of x [B, I]."""
    size = x.abs().float().max(0).values
    cut = size.sort(descending=True).values[round(keep * len(size)) - 1]
    return cut.expand(len(size)).contiguous()


def reading(call: Callable[..., object], x: Tensor, limit: Tensor, matrices: Sequence[Tensor]) -> list[Call]:
    """Return one call for each weight [I, O] of `few_channels`, or of a function with the same arguments."""
    return [partial(call, x, limit, matrix, None, None, None, [matrix.shape[1]]) for matrix in matrices]
