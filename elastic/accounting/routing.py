"""Where a student's compute goes, as plain data: what a sweep keeps for its report."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from students import Student
from students.compute import Phase
from students.decisions import Decisions

BRANCHES = ("attention", "MLP")
"""What a report calls the branches of a block."""


def routing_profile(
    student: Student,
    decisions: Decisions,
    sample: Tensor,
    valid: Tensor,
    phase: Phase,
    kept: Tensor | None = None,
) -> dict[str, Any]:
    """Where the compute of a batch went, and what was open to each token.

    sample: the input that was decided on; valid [B, T] bool: its tokens; kept [B, T] bool: those that get to the
    student's blocks at all, if not all do. Keys: phase; sample, a fingerprint of the input, for only decisions on the
    same one can be compared; branches, their names; blocks, for each block a share of the teacher's compute for each
    branch; outside, such shares by name of what is in no block (the family's to add); tokens, for each block the share
    of gates that is open to each token, in thousandths, the prefix left out.
    """
    spent, dense = student.compute.by_branch(decisions, valid, phase)
    if kept is not None:
        spent, _ = student.compute.by_branch(decisions, kept, phase)
    blocks = spent.sum((2, 3)) / dense.sum((2, 3))
    open_ = open_shares(decisions, valid, len(blocks)) * (1 if kept is None else kept)
    tokens = open_[..., student.compute.prefix :].flatten(1)
    return {
        "phase": phase,
        "sample": hashlib.sha256(sample.cpu().double().numpy().tobytes()).hexdigest()[:16],
        "branches": list(BRANCHES),
        "blocks": [[round(share, 4) for share in block] for block in blocks.tolist()],
        "outside": {},
        "tokens": (1000 * tokens).round().int().tolist(),
    }


def open_shares(decisions: Decisions, valid: Tensor, blocks: int) -> Tensor:
    """[blocks, B, T]: the share of gates that is open to each token, a mean over the routers of each block.

    Compute would not do to compare tokens by: those further back in a text cost more, whatever was decided.
    """
    shares = []
    for number in range(blocks):
        found = [share.expand(valid.shape) for key, share in decisions.share.items() if key.startswith(f"{number}.")]
        shares.append(torch.stack(found).mean(0) if found else torch.ones(valid.shape, device=valid.device))
    return torch.stack(shares)
