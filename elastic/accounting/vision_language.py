"""Measured compute of vision-language students."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.data_parallel import sum_over_processes
from students.calibration.data_shard import DataShard
from students.decisions import Decisions
from students.families.vision_language import VisionLanguageStudent
from teachers.data.prompts import Prompts


def spent_on(student: VisionLanguageStudent, prompts: Prompts, decisions: Decisions) -> tuple[Tensor, Tensor, Tensor]:
    """Return multiply-accumulates of each prompt [B]: the student's, the part of these in the vision tower and
    projector, and the teacher's."""
    valid = prompts.inputs["attention_mask"].bool()
    return student.spent(decisions, prompts.image, valid, prompts.answers.sum(1))


@torch.no_grad()
def measured_compute(
    student: VisionLanguageStudent, batches: Sequence[Prompts], shard: DataShard | None = None
) -> float:
    """Return the student's multiply-accumulates over the teacher's on the batches of prompts of all processes; shard:
    which of these are this process's (None: all)."""
    spent = whole = 0.0
    for prompts, info in (shard or DataShard()).enumerate(batches):
        if student.by_count:
            decisions = student.passing(prompts.image, prompts.inputs["attention_mask"].bool())
        else:
            _, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        macs, _, dense = spent_on(student, prompts, decisions)
        spent, whole = spent + info.counts * float(macs.sum()), whole + info.counts * float(dense.sum())
    spent, whole = sum_over_processes(spent, whole)
    return spent / whole
