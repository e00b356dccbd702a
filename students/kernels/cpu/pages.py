"""Memory in large pages, for weights that are read row by row: a row here and a row there is then found with fewer
look-ups of pages, and fetched ahead across the borders of small ones."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PIECE = 16 * 2**20
"""Bytes that small tensors share, which is several large pages."""


class LargePages:
    """Hands out tensors, small ones side by side. Memory goes back once none of those that share it is left."""

    def __init__(self) -> None:
        self._piece: mmap.mmap | None = None
        self._used = 0

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of this shape, of another's type and device; in large pages where there are any."""
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
    with suppress(OSError):  # a kernel without them
        piece.madvise(mmap.MADV_HUGEPAGE)
    return piece


large_pages = LargePages()
"""That of the process."""
