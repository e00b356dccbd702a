"""The objective of vision-language students: divergence on the tokens of answers, plus the price of compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic import launch
from elastic.accounting.vision_language import spent_on
from elastic.objectives.sums import Objective, Sums, TeacherSignals, routing_loss
from losses import HIDDEN_DISTANCES
from students.compute import Phase
from students.decisions import Decisions
from students.families.vision_language import VISION, VisionLanguageStudent
from teachers.data.prompts import Prompts


@dataclass
class Measured(Sums):
    """Sums over the prompts of a batch."""

    kept: Tensor
    """Number of image tokens that the image router kept."""
    image: Tensor
    """Number of image tokens in the prompts."""
    vision: Tensor
    """The student's multiply-accumulates in the vision tower and projector."""


class Distillation(Objective):
    """Divergence of next-token distributions on answers from the teacher's, plus the price of compute."""

    student: VisionLanguageStudent

    @torch.no_grad()
    def teacher_signals(self, prompts: Prompts) -> TeacherSignals:
        """Return the teacher's final "hidden" states [rows, D] of the tokens that the loss compares."""
        with self.student.teacher():
            hidden = self.student.features(**prompts.inputs)[0].last_hidden_state
        return {"hidden": hidden[self._looked_at(prompts)]}

    @property
    def keeps(self) -> str:
        """Name of the kind of signals that `teacher_signals` returns, part of the name of a cache's folder."""
        return "text-states" if self.loss.hidden_weight else "answer-states"

    def lengths(self, prompts: Prompts) -> list[int]:
        """Return the number of rows that each prompt has in the signals of `teacher_signals`."""
        return self._looked_at(prompts).sum(1).tolist()

    def _looked_at(self, prompts: Prompts) -> Tensor:
        """Return which tokens [B, T] bool the loss compares: those of answers, or all text if it compares states."""
        return prompts.answers | _text(prompts) if self.loss.hidden_weight else prompts.answers

    def forward(
        self, prompts: Prompts, price: Tensor | float = 0.0, signals: TeacherSignals | None = None
    ) -> tuple[Tensor, Measured]:
        """Return the loss and the measured sums for a batch of prompts.

        price: loss per unit of compute, one number or one for each prompt [B]; signals: the teacher's signals, if they
        are known (None: computed here).
        """
        student, loss = self.student, self.loss
        signals = self.teacher_signals(prompts) if signals is None else signals
        teacher, looked_at = signals["hidden"], self._looked_at(prompts)
        with student.teacher(), torch.no_grad():
            teacher_logits = student.logits(teacher[prompts.answers[looked_at]])[0]
        out, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        hidden = out.last_hidden_state
        logits, _ = student.logits(hidden[text_rows(prompts.answers, decisions)], *student.head_tensors())
        kl = self.divergence(logits, teacher_logits)
        macs, vision, dense = spent_on(student, prompts, decisions)
        total = loss.logits_weight * launch.average(kl)
        if not student.by_count:  # otherwise compute is fixed: a price has no gradient
            total = total + launch.average(price * macs / dense)

        def counted(key: str) -> Tensor | None:
            valid = prompts.inputs["attention_mask"].bool()
            return None if key.startswith(VISION) else prompts.image if key == "image" else valid

        total = total + routing_loss(student, decisions, loss, self.budget, len(prompts), counted)
        if loss.hidden_weight:
            text, distance = _text(prompts), HIDDEN_DISTANCES[loss.hidden]
            apart = distance(hidden[text_rows(text, decisions)], teacher[text[looked_at]], None)
            total = total + loss.hidden_weight * launch.mean_of(apart, text.sum())
        return total, measured_on(prompts, decisions, kl.detach(), macs.detach(), vision.detach(), dense)


def _text(prompts: Prompts) -> Tensor:
    """Return which tokens [B, T] bool are text: neither padding nor image tokens."""
    return prompts.inputs["attention_mask"].bool() & ~prompts.image


def text_rows(chosen: Tensor, decisions: Decisions) -> Tensor:
    """Return a mask [B, n] bool of the text tokens `chosen` [B, T] within the student's output of n tokens, which may
    lack dropped image tokens."""
    if decisions.index is None or decisions.valid is None:
        return chosen
    return chosen.gather(1, decisions.index) & decisions.valid


def measured_on(
    prompts: Prompts, decisions: Decisions, kl: Tensor, macs: Tensor, vision: Tensor, dense: Tensor
) -> Measured:
    """Return the sums of a batch; kl: divergence [answer tokens]; macs, vision, dense [B]: as `spent_on` returns."""
    image, share = prompts.image.sum(), decisions.share.get("image")
    kept = image if share is None else (share.detach() * prompts.image).sum()
    owner = prompts.answers.nonzero()[:, 0]
    each = kl.new_zeros(len(prompts)).index_add(0, owner, kl) / prompts.answers.sum(1)
    spent: dict[Phase, Tensor] = {"prefill": macs.sum()}
    whole: dict[Phase, Tensor] = {"prefill": dense.sum()}
    rows = {"kl": each, "compute": macs / dense}
    return Measured(prompts.answers.sum(), kl.sum(), spent, whole, rows, kept, image, vision.sum())
