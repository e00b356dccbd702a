"""Routing profiles: where a student's compute goes, as plain data that a sweep saves for its report."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from students import Student
from students.compute import Phase
from students.decisions import Decisions

BRANCHES = ("attention", "MLP")
"""Names of a block's branches in a report."""


def routing_profile(
    student: Student,
    decisions: Decisions,
    sample: Tensor,
    valid: Tensor,
    phase: Phase,
    kept: Tensor | None = None,
) -> dict[str, Any]:
    """Return where the compute of a batch went, and the share of gates that was open to each token.

    sample: the input of the decisions; valid [B, T] bool: its tokens; kept [B, T] bool: the tokens that enter the
    student's blocks (None: all). Keys of the result: `phase`; `sample`, a fingerprint of the input, because only
    decisions on the same input can be compared; `branches`, their names; `blocks` [blocks][branches], shares of the
    teacher's compute; `outside`, such shares by name of parts in no block (added by the family); `tokens`
    [blocks][tokens], the share of gates open to each token in thousandths, without the prefix.
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
    """Return the share of gates that is open to each token [blocks, B, T], as the mean over the routers of each block.

    Tokens are not compared by their compute, because later tokens of a text cost more, whatever was decided.
    """
    shares = []
    for number in range(blocks):
        found = [share.expand(valid.shape) for key, share in decisions.share.items() if key.startswith(f"{number}.")]
        shares.append(torch.stack(found).mean(0) if found else torch.ones(valid.shape, device=valid.device))
    return torch.stack(shares)
