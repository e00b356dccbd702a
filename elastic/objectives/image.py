"""The objective of image students: divergence of class distributions and features, plus the price of compute."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic import launch
from elastic.objectives.sums import Objective, Sums, TeacherSignals, routing_loss
from losses import HIDDEN_DISTANCES, per_layer
from students.families.image import Features, ImageStudent


class Distillation(Objective):
    """Divergence of class distributions and features from the teacher's, plus the price of compute."""

    student: ImageStudent

    @torch.no_grad()
    def teacher_signals(self, pixels: Tensor) -> TeacherSignals:
        """Return the teacher's "logits" [B, classes], if the model has a classifier, and the states that the loss
        compares (see `_compared`)."""
        with self.student.teacher():
            features, _ = self.student.features(pixels, self.layers)
        return {**({} if features.logits is None else {"logits": features.logits}), **self._compared(features)}

    @property
    def keeps(self) -> str:
        """Name of the kind of signals that `teacher_signals` returns, part of the name of a cache's folder."""
        return "layers" if self.layers else "features" if self.loss.hidden_weight else "logits"

    def lengths(self, pixels: Tensor) -> list[int]:
        """Return the number of rows that each image has in the signals of `teacher_signals`: one."""
        return [1] * len(pixels)

    def forward(
        self, pixels: Tensor, price: Tensor | float = 0.0, signals: TeacherSignals | None = None
    ) -> tuple[Tensor, Sums]:
        """Return the loss and the measured sums for pixels [B, C, H, W].

        price: loss per unit of compute, one number or one for each image [B]; signals: the teacher's signals, if they
        are known (None: computed here).
        """
        student, loss = self.student, self.loss
        signals = self.teacher_signals(pixels) if signals is None else signals
        out, decisions = student.features(pixels, self.layers)
        macs, dense = student.spent(pixels, decisions)
        total = launch.average(price * macs / dense)
        total = total + routing_loss(student, decisions, loss, self.budget, len(pixels))
        kl = pixels.new_zeros(len(pixels), dtype=torch.float32)
        if out.logits is not None:
            kl = self.divergence(out.logits, signals["logits"])
            total = total + loss.logits_weight * launch.average(kl)
        if loss.hidden_weight:
            compared = self._compared(out)
            pairs = list(compared.values()), [signals[name] for name in compared]
            apart = per_layer(HIDDEN_DISTANCES[loss.hidden], *pairs)
            total = total + loss.hidden_weight * launch.mean_of(apart, len(pixels))
        macs, kl = macs.detach(), kl.detach()
        images, rows = torch.full((), len(pixels), device=pixels.device), {"kl": kl, "compute": macs / dense}
        return total, Sums(images, kl.sum(), {"prefill": macs.sum()}, {"prefill": dense.sum()}, rows)

    def _compared(self, features: Features) -> TeacherSignals:
        """Return the states that the loss compares: the pooled features [B, D] that the classifier reads; or, for all
        layers, the prefix tokens after every block, which are never dropped (all tokens if there is no prefix); or
        nothing."""
        if self.layers:
            prefix = self.student.record.prefix or None
            return {f"layer.{number}": x[:, :prefix] for number, x in enumerate(features.layers)}
        return {"pooled": features.pooled} if self.loss.hidden_weight else {}
