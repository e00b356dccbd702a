"""The objective of vision-language students: divergence on the tokens of answers, and compute."""

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
    """Image tokens that were kept."""
    image: Tensor
    """Image tokens."""
    vision: Tensor
    """Student's compute in vision tower and projector."""


class Distillation(Objective):
    """Divergence of the distributions of answers, and compute."""

    student: VisionLanguageStudent

    @torch.no_grad()
    def teacher_signals(self, prompts: Prompts) -> TeacherSignals:
        """The teacher's "hidden" states [rows, D] in front of the LM head, of the tokens that the loss looks at."""
        with self.student.teacher():
            hidden = self.student.features(**prompts.inputs)[0].last_hidden_state
        return {"hidden": hidden[self._looked_at(prompts)]}

    @property
    def keeps(self) -> str:
        """A name for what `teacher_signals` returns, which caches are kept under."""
        return "text-states" if self.loss.hidden_weight else "answer-states"

    def lengths(self, prompts: Prompts) -> list[int]:
        """How many rows of what `teacher_signals` returns each prompt has."""
        return self._looked_at(prompts).sum(1).tolist()

    def _looked_at(self, prompts: Prompts) -> Tensor:
        """Tokens [B, T] bool of answers, and where states are compared all text."""
        return prompts.answers | _text(prompts) if self.loss.hidden_weight else prompts.answers

    def forward(
        self, prompts: Prompts, price: Tensor | float = 0.0, signals: TeacherSignals | None = None
    ) -> tuple[Tensor, Measured]:
        """price: loss per unit of compute, for all prompts or each [B]; signals: the teacher's, where they are known.
        Returns the loss and what was measured."""
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
        if not student.by_count:  # a share that is fixed has nothing to learn from a price
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
    """Tokens [B, T] bool that are of no image."""
    return prompts.inputs["attention_mask"].bool() & ~prompts.image


def text_rows(chosen: Tensor, decisions: Decisions) -> Tensor:
    """Where text tokens chosen [B, T] are in the output, which may have no rows for some image tokens."""
    if decisions.index is None or decisions.valid is None:
        return chosen
    return chosen.gather(1, decisions.index) & decisions.valid


def measured_on(
    prompts: Prompts, decisions: Decisions, kl: Tensor, macs: Tensor, vision: Tensor, dense: Tensor
) -> Measured:
    """Sums of a batch; kl: of each token of the answers, the others as `spent_on` gives them."""
    image, share = prompts.image.sum(), decisions.share.get("image")
    kept = image if share is None else (share.detach() * prompts.image).sum()
    owner = prompts.answers.nonzero()[:, 0]
    each = kl.new_zeros(len(prompts)).index_add(0, owner, kl) / prompts.answers.sum(1)
    spent: dict[Phase, Tensor] = {"prefill": macs.sum()}
    whole: dict[Phase, Tensor] = {"prefill": dense.sum()}
    rows = {"kl": each, "compute": macs / dense}
    return Measured(prompts.answers.sum(), kl.sum(), spent, whole, rows, kept, image, vision.sum())
