"""Compute of image students on images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.shares import sums
from students.calibration.share import Share
from students.families.image import ImageStudent


@torch.no_grad()
def measured_compute(student: ImageStudent, batches: Sequence[Tensor], share: Share | None = None) -> float:
    """The compute ratio on batches of pixels of all processes; share: what of them these are (None: all)."""
    spent = whole = 0.0
    for pixels, look in (share or Share()).looks(batches):
        macs, dense = student.spent(pixels, student(pixels)[1])
        spent, whole = spent + look.counts * float(macs.sum()), whole + look.counts * float(dense.sum())
    spent, whole = sums(spent, whole)
    return spent / whole
