"""The objective of image students: divergence of class distributions and features, and compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic import launch
from elastic.config import BudgetConfig, DataConfig, LossConfig
from elastic.objectives.sums import Sums, divergence_of, routing_loss
from losses import HIDDEN_DISTANCES, per_layer
from students.families.image import Features, ImageStudent


@dataclass
class Measured(Sums):
    """Sums over the images of a batch, on the device; add them up and divide by `tokens`."""

    tokens: Tensor
    """Images."""
    kl: Tensor
    """Divergence of the class distributions, in nats; 0 where the model has no classifier."""
    macs: dict[str, Tensor]
    """Student's compute."""
    dense: dict[str, Tensor]
    """Teacher's compute."""
    rows: dict[str, Tensor]
    """For each image its "kl", in nats, and its "compute", as a share of the teacher's."""


class Distillation(nn.Module):
    """Student and loss in one module; the loss is that of the images of all processes."""

    def __init__(self, student: ImageStudent, loss: LossConfig, budget: BudgetConfig, data: DataConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.budget = budget
        self.divergence = divergence_of(loss)

    def forward(self, pixels: Tensor, price: Tensor | float = 0.0) -> tuple[Tensor, Measured]:
        """pixels [B, C, H, W]; price: loss per unit of compute, for all rows or each [B]. Returns the loss and what was
        measured."""
        student, loss = self.student, self.loss
        layers = loss.hidden_weight > 0 and loss.hidden_layers == "all"
        with student.teacher(), torch.no_grad():
            teacher, _ = student.features(pixels, layers)
        out, decisions = student.features(pixels, layers)
        macs, dense = student.spent(pixels, decisions)
        total = launch.average(price * macs / dense)
        total = total + routing_loss(student, decisions, loss, self.budget, len(pixels))
        kl = pixels.new_zeros(len(pixels), dtype=torch.float32)
        if out.logits is not None:
            kl = self.divergence(out.logits, teacher.logits)
            total = total + loss.logits_weight * launch.average(kl)
        if loss.hidden_weight:
            total = total + loss.hidden_weight * launch.mean_of(self._hidden_loss(out, teacher), len(pixels))
        macs, kl = macs.detach(), kl.detach()
        phases = {"prefill": macs.sum()}, {"prefill": dense.sum()}
        rows = {"kl": kl, "compute": macs / dense}
        return total, Measured(torch.tensor(len(pixels), device=pixels.device), kl.sum(), *phases, rows)

    def _hidden_loss(self, out: Features, teacher: Features) -> Tensor:
        """Distance of what the classifier reads, or after every block of the tokens that are always there."""
        distance = HIDDEN_DISTANCES[self.loss.hidden]
        if self.loss.hidden_layers == "final":
            return distance(out.pooled, teacher.pooled)
        prefix = self.student.record.prefix or None
        pairs = ([x[:, :prefix] for x in features.layers] for features in (out, teacher))
        return per_layer(distance, *pairs)
