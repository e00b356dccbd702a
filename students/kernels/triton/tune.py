"""Search for the fastest launches of read_channels.py on this GPU: `python -m students.kernels.bench --tune`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from triton.runtime.errors import OutOfResources

from students.kernels.timing import Setup, limits, reading
from students.kernels.triton import tuning
from students.kernels.triton.read_channels import launch


def tune(on: Setup, keep: float = 0.6) -> Iterator[str]:
    """Yield the lines of an entry of tuning.GATHER: the fastest launches at a share `keep` of channels, timed on one
    weight for each class of widths in that table."""
    on = replace(on, replays=4)
    shapes = {tuning.width_of(outputs): (inputs, outputs) for inputs, outputs in (*on.weights, on.head[::-1])}
    yield f"{tuning.capability(on.device)}: {{"
    for (kind, count), (width, shape) in itertools.product((("one", 1), ("few", 4)), shapes.items()):
        x, matrices = on.make(count, shape[0]), on.copies(*shape)
        limit, times = limits(x, keep), {}
        usual = tuning.gather(on.device, count, shape[1])
        assert usual is not None, "there are launches for so few inputs"
        for plan in _neighbours(usual):
            try:
                times[plan] = on.medians({"": reading(partial(_launch, plan), x, limit, matrices)})[""]
            except OutOfResources as problem:
                print(f"{plan}: {problem}", file=sys.stderr)
        best = min(times, key=times.__getitem__)
        whole = min(on.medians(on.dense(x, [matrix.T for matrix in matrices])).values())
        yield f"    ({kind!r}, {width!r}): {best},  # {times[best] / whole:.2f} of cuBLAS at {keep}"
    yield "},"


def _launch(plan: tuning.Gather, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return launch(plan, x, None, None, 0.0, -1, None, *rest)


def _neighbours(usual: tuning.Gather) -> list[tuning.Gather]:
    """Return a launch configuration, and others that differ from it in one or two fields."""
    shapes = ({"strip": usual.strip // 2}, {"strip": usual.strip * 2}, {"step": usual.step * 2}, {"warps": 8})
    counts = ({"resident": usual.resident // 2}, {"resident": usual.resident * 2}, {"stages": 3}, {"stages": 8})
    one = [replace(usual, **change) for change in (*shapes, *counts)]
    two = [replace(usual, **a, **b) for a, b in itertools.product(shapes, counts)]
    return [usual, *one, *two]
