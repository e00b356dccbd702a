"""Memory in large pages, for weights of which scattered rows are read: finding a row takes fewer page-table look-ups,
and prefetching is not stopped at the boundaries of small pages."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PIECE = 16 * 2**20
"""Bytes of a mapping that small tensors share: several large pages."""


class LargePages:
    """Allocates tensors, small ones side by side. Memory is freed once no tensor that shares it is left."""

    def __init__(self) -> None:
        self._piece: mmap.mmap | None = None
        self._used = 0

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor of this shape, with the dtype and device of `like`; in large pages on a CPU if
        the operating system has them."""
        count = math.prod(shape)
        if not like.is_cpu or not count or not hasattr(mmap, "MADV_HUGEPAGE"):
            return like.new_empty(shape)
        size = -(-count * like.element_size() // 64) * 64
        if size > PIECE:
            return torch.frombuffer(_mapped(size), dtype=like.dtype, count=count).view(shape)
        if self._piece is None or self._used + size > PIECE:
            self._piece, self._used = _mapped(PIECE), 0
        out = torch.frombuffer(self._piece, dtype=like.dtype, count=count, offset=self._used)
        self._used += size
        return out.view(shape)


def _mapped(size: int) -> mmap.mmap:
    piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        piece.madvise(mmap.MADV_HUGEPAGE)
    return piece


large_pages = LargePages()
"""The allocator of this process."""
