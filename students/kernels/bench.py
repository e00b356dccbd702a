"""Time the kernels on the available GPU, else on the CPU: `python -m students.kernels.bench`. With `--tune`, try other
launch configurations than those in triton/tuning.py and print the fastest as entries for that file.

Competing calls run in turn, over enough copies of a weight to exceed every cache; a time is the median of one call. On
a GPU, calls are captured into a CUDA graph, as in decoding. GB/s counts the bytes that must be read (in the last table
also written). "dense" is the product with the whole weight: by cuBLAS, or by oneDNN with packed weights.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from students.kernels import cpu, ops
from students.kernels.timing import ON_CPU, ON_GPU, Call, Setup, limits, reading

SHARES = (0.5, 0.2, 0.05)
"""Shares of the LM head's rows that are read."""


def row_of(name: str, rows: int, size: int, times: Mapping[str, float], read: Mapping[str, float]) -> str:
    """Return a table line: microseconds and GB/s of the dense product, then of the calls in `read`, which maps a call's
    name to the share that the call reads of a weight of `size` bytes."""
    whole = min(time for name, time in times.items() if name not in read)
    cells = [f"{whole:.0f} | {size / whole / 1000:.0f}"]
    cells += [
        f"{times[n]:.0f} | {share * size / times[n] / 1000:.0f} | {times[n] / whole:.2f}" for n, share in read.items()
    ]
    return f"| {name} | {rows} | {' | '.join(cells)} |"


def head_of(first: str, shares: Sequence[float]) -> list[str]:
    """Return the two header lines of a table whose other lines come from `row_of`."""
    kept = " | ".join(f"{share:g}: us | GB/s | of dense" for share in shares)
    return [f"| {first} | rows | dense us | GB/s | {kept} |", "|---" * (4 + 3 * len(shares)) + "|"]


def channel_lines(on: Setup) -> Iterator[str]:
    """Yield the lines of a table of products that read a share of the channels."""
    yield from head_of("read_channels, few_channels", on.keeps)
    for inputs, outputs in on.weights:
        matrices = on.copies(inputs, outputs)
        for count in on.rows:
            x = on.make(count, inputs)
            works, read = on.dense(x, [matrix.T for matrix in matrices]), {str(keep): keep for keep in on.keeps}
            for name, keep in read.items():
                one = count == 1
                call = ops.read_channels if one else ops.few_channels
                works[name] = reading(call, x[0] if one else x, limits(x, keep), matrices)
            size = inputs * outputs * on.dtype.itemsize
            yield row_of(f"{inputs}x{outputs}", count, size, on.medians(works), read)


def head_lines(on: Setup) -> Iterator[str]:
    """Yield the lines of a table of the LM head that reads a share of its rows, and of a table of its preview."""
    yield from head_of("exact_rows", SHARES)
    vocabulary, width = on.head
    matrices = on.copies(vocabulary, width)
    for count in on.rows:
        x, preview, tail = on.make(count, width), on.make(count, vocabulary), on.make()
        works, read = on.dense(x, matrices), {}
        for share in SHARES:
            limit = preview.float().sort(descending=True).values[:, round(share * vocabulary)].contiguous()
            read[str(share)] = float((preview >= limit[:, None]).any(0).float().mean())
            works[str(share)] = [partial(ops.exact_rows, x, matrix, None, preview, limit, tail) for matrix in matrices]
        yield row_of(f"{vocabulary}x{width}", count, matrices[0].nbytes, on.medians(works), read)
    yield ""
    yield from head_of("dot_rows", [1.0])
    matrices, x = on.copies(vocabulary, width // 4), on.make(1, width // 4)
    works = on.dense(x, matrices)
    works["all"] = [partial(ops.dot_rows, x[0], matrix, None, None) for matrix in matrices]
    yield row_of(f"{vocabulary}x{width // 4}", 1, matrices[0].nbytes, on.medians(works), {"all": 1.0})


def other_lines(on: Setup) -> Iterator[str]:
    """Yield the lines of a table of the other kernels: microseconds, GB/s of the bytes that must be read and written,
    and torch's microseconds where torch has a counterpart."""

    def line(name: str, moved: float, call: Call, other: Call | None = None) -> str:
        times = on.medians({"kernel": [call] * 4, **({} if other is None else {"torch": [other] * 4})})
        beside = f"{times['torch']:.1f}" if other is not None else ""
        return f"| {name} | {times['kernel']:.1f} | {moved / times['kernel'] / 1000:.0f} | {beside} |"

    yield "| kernel | us | GB/s | torch us |"
    yield "|---|---|---|---|"
    size, single, wide = on.dtype.itemsize, torch.float32, on.tokens[1]
    x, gate = on.make(*on.tokens), on.make(*on.tokens)
    share, limit = on.make(on.tokens[0], dtype=single), on.make(wide, dtype=single).abs()
    yield line(f"channel_gate {on.tokens}", 2 * x.numel() * size, partial(ops.channel_gate, x, limit))
    yield line("channel_gate_grad", 3 * x.numel() * size, partial(ops.channel_gate_grad, x, share, x, limit))
    yield line("gated_grad", 5 * x.numel() * size, partial(ops.gated_grad, x, share, gate, x, limit, 0))
    s, t = (on.make(*on.logits) for _ in range(2))
    each, tail, limit = on.make(len(s), dtype=single), on.make(dtype=single), on.make(len(s), 1, dtype=single)
    yield line(f"row_gate {on.logits}", 3 * s.numel() * size, partial(ops.row_gate, s, t, limit, tail))
    yield line("row_gate_grad", 5 * s.numel() * size, partial(ops.row_gate_grad, s, each, s, t, limit, tail))
    yield line(f"forward_kl {on.logits}", 2 * s.numel() * size, partial(ops.forward_kl, s, t))
    logs = ops.forward_kl(s, t)[1]
    yield line("forward_kl_grad", 3 * s.numel() * size, partial(ops.forward_kl_grad, s, t, logs, each))
    for rows in (1, 4, on.tokens[0]):
        x, gain = on.make(rows, wide), on.make(wide)
        call: Call = partial(ops.rms_norm, x, gain, 1e-5, 0)
        yield line(f"rms_norm {tuple(x.shape)}", 2 * x.numel() * size, call, partial(_plain_norm, x, gain))
    weight = on.make(on.weights[-1][1], wide)
    for open_ in (True, False):
        call, flag = partial(ops.gated_rows, x[0], weight, None), torch.tensor([open_], device=on.device)
        about = f"gated_rows {tuple(weight.shape)}, {'open' if open_ else 'closed'}"
        yield line(about, open_ * weight.numel() * size, partial(call, flag), partial(F.linear, x[0], weight))
    for slots in (256, 1024, 4096):
        keys, values, query = on.make(1, 8, slots, 128), on.make(1, 8, slots, 128), on.make(1, 32, 1, 128)
        slot, bias = torch.tensor([slots - 1], device=on.device), on.make(1, 1, 1, slots) * 0
        call = partial(ops.decode_attention, query, keys, values, bias, slot, 128**-0.5, 0, 0.0)
        other = partial(F.scaled_dot_product_attention, query.view(1, 8, 4, 128), keys, values, bias)
        yield line(f"decode_attention {tuple(keys.shape)}", 2 * keys.numel() * size, call, other)
    for shape in on.images:
        x, bias, top = on.make(*shape), on.make(1, dtype=single), on.make(1, dtype=single) + 1e30
        settings = on.make(shape[2], dtype=single), bias, on.make(dtype=single), top, shape[1] - shape[1] // 8
        call = partial(ops.merge_lowest, x, None, None, *settings)
        yield line(f"merge_lowest {shape}", 2 * x.numel() * size, call)


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", help="inputs at a time")
    parser.add_argument("--channels", action="store_true", help="only what reads channels, beside dense products")
    parser.add_argument("--tune", action="store_true", help="on a GPU: minutes of trying other launches")
    asked = parser.parse_args()
    on, name = ON_CPU, f"CPU with {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        on, name = ON_GPU, torch.cuda.get_device_name()
    elif asked.tune:
        parser.error("--tune: there is no GPU here that torch can use")
    else:
        with tempfile.TemporaryDirectory() as folder:
            if reason := cpu.build(Path(folder)):
                parser.error(f"the kernels are in C, and {reason}: install gcc or clang")
    on = replace(on, dtype=getattr(torch, asked.dtype), rows=asked.rows or on.rows)
    torch.manual_seed(0)
    print(f"{name}, torch {torch.__version__}, {asked.dtype}\n")
    lines = channel_lines(on)
    if asked.tune:
        from students.kernels.triton.tune import tune

        lines = tune(on)
    elif not asked.channels:
        lines = itertools.chain(lines, [""], head_lines(on), [""], other_lines(on))
    with torch.no_grad():
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
