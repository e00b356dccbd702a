"""Memory in large pages: tensors in it are aligned, do not overlap, and behave like other tensors."""

from __future__ import annotations

import torch

from students.kernels.cpu.pages import PIECE, LargePages


def test_tensors_in_large_pages_are_apart_and_aligned():
    pages, like = LargePages(), torch.empty(0, dtype=torch.bfloat16)
    shapes = [(3, 5), (7, 1), (0, 4), (PIECE // 8, 3), (PIECE // 2 + 1,), (2, 2)]
    tensors = [pages.empty(like, *shape).fill_(number) for number, shape in enumerate(shapes)]
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and tensor.dtype == like.dtype and tensor.is_contiguous()
        assert not tensor.numel() or (tensor.data_ptr() % 64 == 0 and bool((tensor == number).all()))


def test_memory_outlives_whoever_handed_it_out():
    tensor = LargePages().empty(torch.empty(0), 100).fill_(1.0)
    assert float(tensor.sum()) == 100
    assert LargePages().empty(torch.empty(0, device="meta"), 2, 3).is_meta
