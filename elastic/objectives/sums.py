"""What the families' objectives share: sums over a batch, and what routing has to pay."""

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
"""The teacher's outputs that a loss needs, by name: [rows, ...], the rows of a batch's samples concatenated, of which
each sample has as many as `lengths` of the objective says."""


@dataclass
class Sums:
    """Sums over a batch, on the device: tensors and dictionaries of tensors that add up field by field; `rows` are
    concatenated. These fields are every family's."""

    tokens: Tensor
    """What quality is measured on: tokens of text or of answers, or images."""
    kl: Tensor
    """Their divergence from the teacher, in nats (the configured one in training, forward KL in evaluation); 0 where an
    image model has no classifier."""
    macs: dict[Phase, Tensor]
    """Student's compute, by phase."""
    dense: dict[Phase, Tensor]
    """Teacher's compute, by phase."""
    rows: dict[str, Tensor]
    """For each window, image or prompt its "kl", in nats per token, and its "compute", as a share of the teacher's."""

    def __add__(self: T, other: T) -> T:
        def added(name: str, a: Any, b: Any) -> Any:
            if name == "rows":
                return {key: torch.cat([a[key], b[key]]) for key in a}
            return {key: a[key] + b[key] for key in a} if isinstance(a, dict) else a + b

        return type(self)(*(added(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def cpu(self: T) -> T:
        """The same on the host."""

        def moved(a: Any) -> Any:
            return {key: tensor.cpu() for key, tensor in a.items()} if isinstance(a, dict) else a.cpu()

        return type(self)(*(moved(getattr(self, f.name)) for f in fields(self)))


class Objective(nn.Module):
    """Student and loss in one module; the loss is that of the rows of all processes."""

    student: Student

    def __init__(self, student: Student, loss: LossConfig, budget: BudgetConfig, data: DataConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.budget = budget
        self.prompt = data.prompt
        self.divergence = divergence_of(loss)
        self.layers = loss.hidden_weight > 0 and loss.hidden_layers == "all"
        """Whether states behind every block are compared."""


def of_all(measured: T | None) -> T:
    """The sum over all processes, None where one has measured nothing; on the host where there are several."""
    found = [measured] if launch.size() == 1 else launch.gather(measured and measured.cpu())
    return reduce(add, [part for part in found if part is not None])


def divergence_of(loss: LossConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """(student's logits, teacher's logits) -> the configured divergence of each row."""
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
    """What presets with fixed capacities add: the hinge, top-k prediction, even use; of `rows` rows, and those of the
    other processes. counted: which tokens [B, T] bool count of a decision, by its key; None: all."""
    total: Tensor | float = 0.0

    def flat(key: str, x: Tensor) -> Tensor:
        """x [B, T, ...] or [B, 1, ...] of the tokens that count, [N, ...]."""
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
