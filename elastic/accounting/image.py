"""Compute of image students on images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from students.families.image import ImageStudent


@torch.no_grad()
def measured_compute(student: ImageStudent, batches: Sequence[Tensor]) -> float:
    """The compute ratio on batches of pixels."""
    sums = [student.spent(pixels, student(pixels)[1]) for pixels in batches]
    return float(sum(macs.sum() for macs, _ in sums) / sum(dense.sum() for _, dense in sums))
