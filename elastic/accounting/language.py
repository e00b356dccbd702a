"""Measured compute of language students."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic.data_parallel import local_batches, sum_over_processes
from elastic.reporting.progress import Watched
from students.compute import Phase
from students.families.language import LanguageStudent

BATCH_TOKENS = 1024
"""Tokens per batch of windows that are measured together."""


def prompt_mask(ids: Tensor, length: int) -> Tensor:
    """Return a mask [B, T] bool of the first `length` tokens of each window, from which sequence-level routers
    decide."""
    return (torch.arange(ids.shape[1], device=ids.device) < length).expand(ids.shape)


@torch.no_grad()
def measured_compute(student: LanguageStudent, windows: Tensor, phase: Phase, prompt: int, after: int = 0) -> float:
    """Return the student's multiply-accumulates over the teacher's on token windows [N, T], which all processes share.

    prompt: number of tokens from which sequence-level routers decide; after: number of tokens at the start of each
    window that are not counted.
    """
    spent = whole = 0.0
    batches = local_batches(len(windows), max(1, BATCH_TOKENS // windows.shape[1]))
    for local in Watched("measuring compute", batches):
        batch = windows[local.rows]
        valid = torch.ones_like(batch, dtype=torch.bool)
        out, decisions = student.features(batch, prompt=prompt_mask(batch, prompt))
        head = head_cost(student, out.last_hidden_state, phase)
        spent += local.counts * float((student.compute.routed_blocks(decisions, valid, phase) + head)[:, after:].sum())
        whole += local.counts * float(student.compute.dense(valid, phase)[:, after:].sum())
    spent, whole = sum_over_processes(spent, whole)
    return spent / whole


def head_cost(student: LanguageStudent, hidden: Tensor, phase: Phase) -> Tensor:
    """Return the LM head's multiply-accumulates [B, T] for each of the final hidden states [B, T, D]."""
    cost = student.compute.routed_head(exact_rows(student, hidden), phase)
    return torch.as_tensor(cost, device=hidden.device).expand(hidden.shape[:2])


def exact_rows(student: LanguageStudent, hidden: Tensor) -> Tensor | None:
    """Return the share [B, T] of the LM head's rows that are computed exactly for final hidden states [B, T, D]; None:
    there is no vocab router."""
    if not (tensors := student.head_tensors()):
        return None
    rows = hidden.flatten(0, 1)
    owners = torch.arange(len(hidden), device=rows.device).repeat_interleave(hidden.shape[1])
    parts = zip(rows.split(128), owners.split(128), strict=True)
    share = torch.cat([student.head_share(part, *tensors, owner=owner) for part, owner in parts])
    return share.view(hidden.shape[:2])
