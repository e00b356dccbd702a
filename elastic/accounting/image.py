"""Measured compute of image students."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.data_parallel import sum_over_processes
from students.calibration.data_shard import DataShard
from students.families.image import ImageStudent


@torch.no_grad()
def measured_compute(student: ImageStudent, batches: Sequence[Tensor], shard: DataShard | None = None) -> float:
    """Return the student's multiply-accumulates over the teacher's on the batches [B, C, H, W] of all processes; shard:
    which of these are this process's (None: all)."""
    spent = whole = 0.0
    for pixels, info in (shard or DataShard()).enumerate(batches):
        macs, dense = student.spent(pixels, student(pixels)[1])
        spent, whole = spent + info.counts * float(macs.sum()), whole + info.counts * float(dense.sum())
    spent, whole = sum_over_processes(spent, whole)
    return spent / whole
