"""Time the kernels on the GPU that is here: `python -m students.kernels.triton.bench`; with `--tune`, try other
launches than those in tuning.py, and print what to write there.

Calls are captured into a CUDA graph, as decoding does, over as many copies of a weight as no cache holds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources

from students.execution.capture import CudaGraph
from students.kernels.triton import tuning
from students.kernels.triton.channel_gate import channel_gate, channel_gate_grad
from students.kernels.triton.exact_rows import exact_rows
from students.kernels.triton.forward_kl import forward_kl, forward_kl_grad
from students.kernels.triton.merge_lowest import merge_lowest
from students.kernels.triton.read_channels import few_channels, launch
from students.kernels.triton.rms_norm import rms_norm
from students.kernels.triton.row_gate import row_gate, row_gate_grad

DEVICE = torch.device("cuda")
SHAPES = {"narrow": (14336, 4096), "middle": (4096, 28672), "wide": (4096, 128256)}
"""Inputs and outputs of an 8 B model's down projection, its gate and up, its LM head: see tuning.width_of."""
MORE_SHAPES = {"narrow": (4096, 6144)}
"""Its queries, keys and values."""
KEEPS = (1.0, 0.6, 0.4)
CACHE = 256 * 2**20
"""Bytes that copies of a weight have to exceed together."""
LOGITS = (2048, 128256)
TOKENS = (4096, 4096)
IMAGES = ((1, 197, 768), (64, 197, 768), (64, 197, 1024), (64, 577, 1024))


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 10) -> float:
    """The median time of one of the calls, captured together."""

    def work() -> None:
        for call in calls:
            call()

    graph, times = CudaGraph(work), list[float]()
    graph()
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return median(times)


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def weights(inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    """Copies of a weight [inputs, outputs]."""
    copies = max(2, -(-CACHE // (inputs * outputs * dtype.itemsize)))
    return [make(inputs, outputs, dtype=dtype) for _ in range(copies)]


def limits(x: Tensor, keep: float) -> Tensor:
    """A limit [I] that the share `keep` of channels reaches, each in some of x [B, I]."""
    size = x.abs().float().max(0).values
    cut = size.sort(descending=True).values[round(keep * len(size)) - 1]
    return cut.expand(len(size)).contiguous()


def dense(x: Tensor, matrices: Sequence[Tensor]) -> float:
    """cuBLAS's time for x [B, I], with weights [I, O] as they lie or as [O, I], whichever is faster."""
    as_they_lie = microseconds([partial(torch.matmul, x, matrix) for matrix in matrices])
    return min(as_they_lie, microseconds([partial(F.linear, x, matrix.T.contiguous()) for matrix in matrices]))


def reading(call: Callable[..., object], x: Tensor, limit: Tensor, matrices: Sequence[Tensor]) -> list[partial[object]]:
    """Calls of `few_channels`, or of what takes the same, with one weight after the other."""
    return [partial(call, x, limit, matrix, None, None, None, [matrix.shape[1]]) for matrix in matrices]


def gather_lines(dtype: torch.dtype, counts: Sequence[int]) -> Iterator[str]:
    """A table of reading channels, as fractions of cuBLAS's time."""
    kept = [f"{keep:.1f}: fraction | us | GB/s" for keep in KEEPS]
    yield f"| weight | rows | cuBLAS us | GB/s | {' | '.join(kept)} |"
    yield "|---" * (4 + 3 * len(KEEPS)) + "|"
    for (inputs, outputs), count in itertools.product([*SHAPES.values(), *MORE_SHAPES.values()], counts):
        x, matrices = make(count, inputs, dtype=dtype), weights(inputs, outputs, dtype)
        size, whole = inputs * outputs * dtype.itemsize, dense(x, matrices)
        cells = [f"{whole:.1f}", f"{size / whole / 1000:.0f}"]
        for keep in KEEPS:
            time = microseconds(reading(few_channels, x, limits(x, keep), matrices))
            cells += [f"{time / whole:.2f}", f"{time:.1f}", f"{keep * size / time / 1000:.0f}"]
        yield f"| {inputs}x{outputs} | {count} | {' | '.join(cells)} |"


def other_lines(dtype: torch.dtype) -> Iterator[str]:
    """What the other kernels take, and how fast what they must move goes by."""

    def line(name: str, moved: float, call: Callable[[], object], other: Callable[[], object] | None = None) -> str:
        time = microseconds([call] * 4)
        beside = "" if other is None else f"{microseconds([other] * 4):.1f}"
        return f"| {name} | {time:.1f} | {moved / time / 1000:.0f} | {beside} |"

    yield "| kernel | us | GB/s | torch us |"
    yield "|---|---|---|---|"
    size, vocabulary = dtype.itemsize, LOGITS[1]
    head = make(vocabulary, TOKENS[1], dtype=dtype)
    for rows, share in itertools.product((1, 4), (0.05, 0.3)):
        x, preview, tail = make(rows, TOKENS[1], dtype=dtype), make(rows, vocabulary, dtype=dtype), make()
        limit = preview.float().sort(descending=True).values[:, round(share * vocabulary)].contiguous()
        read = int((preview >= limit[:, None]).any(0).sum())
        call: Callable[[], object] = partial(exact_rows, x, head, None, preview, limit, tail)
        moved = read * head.shape[1] * size
        yield line(f"exact_rows, {rows} of {read / vocabulary:.2f}", moved, call, partial(F.linear, x, head))
    x, tokens, limit = make(*TOKENS, dtype=dtype), make(TOKENS[0]), make(TOKENS[1]).abs()
    call = partial(channel_gate_grad, x, tokens, x, limit, limit * 0.6, limit * 1.6)
    yield line(f"channel_gate {tuple(TOKENS)}", 2 * x.numel() * size, partial(channel_gate, x, limit))
    yield line("channel_gate_grad", 3 * x.numel() * size, call)
    s, t = (make(*LOGITS, dtype=dtype) for _ in range(2))
    each, tail, limit = make(LOGITS[0]), make(), make(LOGITS[0], 1)
    yield line(f"row_gate {LOGITS}", 3 * s.numel() * size, partial(row_gate, s, t, limit, tail))
    yield line("row_gate_grad", 5 * s.numel() * size, partial(row_gate_grad, s, each, s, t, limit, tail))
    yield line(f"forward_kl {LOGITS}", 2 * s.numel() * size, partial(forward_kl, s, t))
    logs = forward_kl(s, t)[1]
    yield line("forward_kl_grad", 3 * s.numel() * size, partial(forward_kl_grad, s, t, logs, each))
    for rows in (1, 4, TOKENS[0]):
        x, gain = make(rows, TOKENS[1], dtype=dtype), make(TOKENS[1], dtype=dtype)
        call = partial(rms_norm, x, gain, 1e-5, 0)
        yield line(f"rms_norm {tuple(x.shape)}", 2 * x.numel() * size, call, partial(_plain_norm, x, gain))
    for shape in IMAGES:
        x, bias, top = make(*shape, dtype=dtype), make(1), make(1) + 1e30
        call = partial(merge_lowest, x, None, None, make(shape[2]), bias, make(), top, shape[1] - shape[1] // 8)
        yield line(f"merge_lowest {shape}", 2 * x.numel() * size, call)


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def tune(dtype: torch.dtype, keep: float = 0.6) -> Iterator[str]:
    """The fastest launches of read_channels.py for a share of channels, as lines for tuning.GATHER."""
    yield f"{tuning.capability(DEVICE)}: {{"
    for (kind, count), (width, shape) in itertools.product((("one", 1), ("few", 4)), SHAPES.items()):
        x, matrices = make(count, shape[0], dtype=dtype), weights(*shape, dtype)
        limit, times = limits(x, keep), {}
        usual = tuning.gather(DEVICE, count, shape[1])
        assert usual is not None, "there are launches for so few inputs"
        for plan in _neighbours(usual):
            try:
                times[plan] = microseconds(reading(partial(launch, plan), x, limit, matrices), replays=4)
            except OutOfResources as problem:
                print(f"{plan}: {problem}", file=sys.stderr)
        best, whole = min(times, key=times.__getitem__), dense(x, matrices)
        yield f"    ({kind!r}, {width!r}): {best},  # {times[best] / whole:.2f} of cuBLAS at {keep}"
    yield "},"


def _neighbours(usual: tuning.Gather) -> list[tuning.Gather]:
    """A launch, and others that differ from it in one or two respects."""
    shapes = ({"strip": usual.strip // 2}, {"strip": usual.strip * 2}, {"step": usual.step * 2}, {"warps": 8})
    counts = ({"resident": usual.resident // 2}, {"resident": usual.resident * 2}, {"stages": 3}, {"stages": 8})
    one = [replace(usual, **change) for change in (*shapes, *counts)]
    two = [replace(usual, **a, **b) for a, b in itertools.product(shapes, counts)]
    return [usual, *one, *two]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="inputs at a time")
    parser.add_argument("--gather", action="store_true", help="only what reads channels, beside cuBLAS")
    parser.add_argument("--tune", action="store_true", help="minutes of trying other launches than those in tuning.py")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here that torch can use")
    dtype = getattr(torch, asked.dtype)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.dtype}\n")
    usual = gather_lines(dtype, asked.rows)
    if not asked.gather:
        usual = itertools.chain(usual, [""], other_lines(dtype))
    for line in tune(dtype) if asked.tune else usual:
        print(line, flush=True)


if __name__ == "__main__":
    main()
