"""Distances between hidden states of student and teacher.

Shapes: states [..., d], usually [B, T, d]; masks [...], bool, the positions that count. Every distance is a mean over
the counted positions, in float32 or wider, and zero if none counts. The teacher is a constant: it gets no gradient.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HiddenDistance = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student, teacher, mask) -> scalar."""


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of 1 - cos(student, teacher), which lies in [0, 2] and ignores the vectors' lengths."""
    student, teacher = _counted(student, teacher, mask)
    distances = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return distances.sum() / max(1, len(distances))


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference over positions and features."""
    student, teacher = _counted(student, teacher, mask)
    return (student - teacher).square().sum() / max(1, student.numel())


def relative_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared difference divided by the teacher's squared norm: 0 if equal, 1 for a student of all zeros.

    It does not depend on scale, so layers whose states differ in size by orders of magnitude can be added up.
    """
    student, teacher = _counted(student, teacher, mask)
    scale = teacher.square().sum().clamp(min=torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().sum() / scale


def per_layer(
    distance: HiddenDistance, students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Return the mean of a distance over pairs of layers."""
    if not students or len(students) != len(teachers):
        raise ValueError(f"need as many student as teacher layers, got {len(students)} and {len(teachers)}")
    return torch.stack([distance(s, t, mask) for s, t in zip(students, teachers, strict=True)]).mean()


def _counted(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the counted positions of student and teacher, [N, d] each, in float32 or wider."""
    if student.shape != teacher.shape:
        raise ValueError(f"hidden states differ in shape: student {student.shape}, teacher {teacher.shape}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = ((x.flatten(0, -2) if mask is None else x[mask]).to(dtype) for x in (student, teacher.detach()))
    return student, teacher


HIDDEN_DISTANCES: dict[str, HiddenDistance] = {
    "cosine": cosine_distance,
    "mse": mse,
    "relative_mse": relative_mse,
}
