"""Where a student's compute goes, as plain data: what a sweep keeps for its report."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from students import Student
from students.compute import Phase
from students.runtime import Decisions

BRANCHES = ("attention", "MLP")
"""What a report calls the branches of a block."""


def where(
    student: Student,
    decisions: Decisions,
    sample: Tensor,
    valid: Tensor,
    phase: Phase,
    kept: Tensor | None = None,
) -> dict[str, Any]:
    """The compute of a batch as shares of the teacher's, by place and by token.

    sample: the input that was decided on; valid [B, T] bool: its tokens; kept [B, T] bool: those
    that get to the student's blocks at all, if not all do. Keys: phase; sample, a fingerprint of the
    input, for only decisions on the same one can be compared; branches, their names; blocks, for each block a share for
    each branch; tokens, for each block a share in thousandths for each token, those of the prefix left out.
    """
    spent, dense = student.compute.by_branch(decisions, valid, phase)
    if kept is not None:
        spent, _ = student.compute.by_branch(decisions, kept, phase)
    blocks = spent.sum((2, 3)) / dense.sum((2, 3))
    tokens = (spent.sum(1) / dense.sum(1).clamp(min=1))[..., student.compute.prefix :].flatten(1)
    return {
        "phase": phase,
        "sample": hashlib.sha256(sample.cpu().contiguous().numpy().tobytes()).hexdigest()[:16],
        "branches": list(BRANCHES),
        "blocks": [[round(share, 4) for share in block] for block in blocks.tolist()],
        "tokens": (1000 * tokens).round().int().tolist(),
    }
