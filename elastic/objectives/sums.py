"""Parts shared by the families' objectives: sums over a batch, and the losses of routers with fixed capacities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial, reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elastic import launch
from elastic.config import BudgetConfig, DataConfig, LossConfig
from losses import DIVERGENCES, capacity_hinge, load_balance, topk_bce
from students import Student
from students.compute import Phase
from students.decisions import Decisions
from students.kernels.autograd import forward_kl

T = TypeVar("T", bound="Sums")

TeacherSignals = dict[str, Tensor]
"""The teacher's outputs [rows, ...] that a loss needs, by name. The rows of a batch's samples are concatenated; the
objective's `lengths` returns how many rows each sample has."""


@dataclass
class Sums:
    """Sums over a batch, as tensors and dictionaries of tensors on the device.

    Adding two instances adds every field, except that `rows` are concatenated. Families may add fields.
    """

    tokens: Tensor
    """Number of items on which quality is measured: tokens of text, tokens of answers, or images."""
    kl: Tensor
    """Divergence from the teacher, summed over these items, in nats (the configured divergence in training, forward KL
    in evaluation); 0 for image models without a classifier."""
    macs: dict[Phase, Tensor]
    """The student's multiply-accumulates, by phase."""
    dense: dict[Phase, Tensor]
    """The teacher's multiply-accumulates, by phase."""
    rows: dict[str, Tensor]
    """For each window, image or prompt [B] its "kl", in nats per token or image, and its "compute", the student's
    multiply-accumulates over the teacher's."""

    def __add__(self: T, other: T) -> T:
        def added(name: str, a: Any, b: Any) -> Any:
            if name == "rows":
                return {key: torch.cat([a[key], b[key]]) for key in a}
            return {key: a[key] + b[key] for key in a} if isinstance(a, dict) else a + b

        return type(self)(*(added(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def cpu(self: T) -> T:
        """Return a copy of these sums on the host."""

        def moved(a: Any) -> Any:
            return {key: tensor.cpu() for key, tensor in a.items()} if isinstance(a, dict) else a.cpu()

        return type(self)(*(moved(getattr(self, f.name)) for f in fields(self)))


class Objective(nn.Module):
    """Base of all objectives: the student and its loss in one module; the loss covers the rows of all processes."""

    student: Student

    def __init__(self, student: Student, loss: LossConfig, budget: BudgetConfig, data: DataConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.budget = budget
        self.prompt = data.prompt
        self.divergence = divergence_of(loss)
        self.layers = loss.hidden_weight > 0 and loss.hidden_layers == "all"
        """Whether the loss compares the states after every block."""


def of_all(measured: T | None) -> T:
    """Return the sum over all processes; measured: this process's sums, None if it has measured nothing. The result is
    on the host if there are several processes."""
    found = [measured] if launch.size() == 1 else launch.gather(measured and measured.cpu())
    return reduce(add, [part for part in found if part is not None])


def divergence_of(loss: LossConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the configured divergence, a function (student's logits, teacher's logits) -> divergence of each row."""
    if loss.logits == "forward_kl" and loss.temperature == 1:
        return forward_kl
    own: dict[str, dict[str, Any]] = {"jensen_shannon": {"beta": loss.beta}, "topk_kl": {"k": loss.k}}
    return partial(DIVERGENCES[loss.logits], temperature=loss.temperature, **own.get(loss.logits, {}))


def routing_loss(
    student: Student,
    decisions: Decisions,
    loss: LossConfig,
    budget: BudgetConfig,
    rows: int,
    counted: Callable[[str], Tensor | None] = lambda key: None,
) -> Tensor | float:
    """Return the loss terms of presets with fixed capacities, over the rows of all processes: the capacity hinge, the
    prediction of top-k choices, and the balance of use between parts.

    rows: number of rows of this process. counted: by the key of a decision, which tokens [B, T] bool count (None: all).
    """
    total: Tensor | float = 0.0

    def flat(key: str, x: Tensor) -> Tensor:
        """Return the rows [N, ...] of x [B, T, ...] at tokens that count; of x [B, 1, ...] all rows."""
        where = counted(key)
        return x.flatten(0, 1) if where is None or x.shape[1] == 1 else x[where]

    capacity = student.runtime.capacity
    if budget.control == "capacity":
        free = [k for k, spec in decisions.spec.items() if spec.selection == "threshold"]
        if free:
            shares = torch.stack([flat(k, decisions.share[k]).mean() for k in free])
            total = total + budget.hinge * capacity_hinge(launch.mean_of(shares, rows), capacity)
    if loss.topk_weight:
        specs = decisions.spec
        keys = [k for k in decisions.score if specs[k].selection == "topk" and specs[k].of_kind.over_tokens]
        if keys:
            parts = [topk_bce(decisions.score[k].squeeze(-1), capacity, counted(k)) for k in keys]
            total = total + loss.topk_weight * launch.mean_of(torch.stack(parts).mean(), rows)
    if loss.load_balance_weight:
        keys = [k for k in decisions.score if decisions.spec[k].of_kind.over_parts]
        if keys:
            sums = [flat(k, decisions.score[k]).softmax(-1).float().sum(0) for k in keys]
            parts = [load_balance(launch.all_reduce(use).unsqueeze(0)) for use in sums]
            total = total + loss.load_balance_weight * torch.stack(parts).mean()
    return total
