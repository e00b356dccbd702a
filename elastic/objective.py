"""What one batch costs: divergence from the teacher, plus what routing has to pay."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.config import BudgetConfig, DataConfig, LossConfig
from losses import (
    DIVERGENCES,
    HIDDEN_DISTANCES,
    capacity_hinge,
    chunked,
    default_chunk_rows,
    load_balance,
    per_layer,
    topk_bce,
)
from students import RouterSpec, Student
from students.compute import PHASES, Phase
from students.runtime import Decisions


@dataclass
class Measured:
    """Sums over the tokens of a batch, on the device; add them up and divide by `tokens`."""

    tokens: Tensor
    """Tokens that quality is measured on."""
    kl: Tensor
    """Divergence from the teacher, in nats (the configured one in training, forward KL in evaluation)."""
    agreement: Tensor
    """Tokens at which student and teacher have the same most likely next token; like the two below, not in training."""
    nll: Tensor
    """Student's negative log-likelihood of the text."""
    teacher_nll: Tensor
    predicted: Tensor
    """Tokens that nll is summed over: those with a successor."""
    macs: dict[Phase, Tensor]
    """Student's compute, by phase."""
    dense: dict[Phase, Tensor]
    """Teacher's compute, by phase."""

    def __add__(self, other: Measured) -> Measured:
        def add(a: Any, b: Any) -> Any:
            return {key: a[key] + b[key] for key in a} if isinstance(a, dict) else a + b

        return Measured(*(add(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


def prompt_mask(ids: Tensor, length: int) -> Tensor:
    """[B, T] bool: the first `length` tokens of each window, from which sequence-level routers decide."""
    return (torch.arange(ids.shape[1], device=ids.device) < length).expand(ids.shape)


class Distillation(nn.Module):
    """Student and loss in one module, so that accelerate can wrap it whole."""

    def __init__(self, student: Student, loss: LossConfig, budget: BudgetConfig, data: DataConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.budget = budget
        self.prompt = data.prompt
        options = {"jensen_shannon": {"beta": loss.beta}, "topk_kl": {"k": loss.k}}.get(loss.logits, {})
        self.options = {"temperature": loss.temperature, **options}
        self.sequence_level = any(r.granularity == "sequence" for r in student.spec.routers)

    def forward(self, ids: Tensor, price: Tensor | float = 0.0) -> tuple[Tensor, Measured]:
        """ids [B, T] without padding; price: nats per unit of compute. Returns the loss and what was measured."""
        student, loss = self.student, self.loss
        prompt = prompt_mask(ids, self.prompt)
        counted = ~prompt if self.sequence_level else torch.ones_like(prompt)
        states = {"output_hidden_states": loss.hidden_weight > 0 and loss.hidden_layers == "all"}
        with student.teacher(), torch.no_grad():
            teacher, _ = student.features(ids, **states)
        out, decisions = student.features(ids, prompt=prompt, **states)

        valid = torch.ones_like(prompt)
        phase = self.budget.phase
        dense = {p: student.compute.dense(valid, p).sum() for p in PHASES}
        macs = {p: student.compute.routed_blocks(decisions, valid, p).sum() for p in PHASES}
        head, sums = self._head_loss(
            out.last_hidden_state, teacher.last_hidden_state, ids, counted, price, dense[phase]
        )
        tokens = counted.sum()
        total = head / tokens + price * macs[phase] / dense[phase]
        total = total + self._routing_loss(decisions)
        if loss.hidden_weight:
            distance = HIDDEN_DISTANCES[loss.hidden]
            pairs = (
                (out.hidden_states[1:], teacher.hidden_states[1:])
                if states["output_hidden_states"]
                else ([out.last_hidden_state], [teacher.last_hidden_state])
            )
            total = total + loss.hidden_weight * per_layer(distance, *pairs, counted)
        macs = {p: m.detach() + sums[4 + i] for i, (p, m) in enumerate(macs.items())}
        return total, Measured(tokens, *sums[:4], counted[:, :-1].sum(), macs, dense)

    def _head_loss(
        self, hidden: Tensor, teacher_hidden: Tensor, ids: Tensor, counted: Tensor, price: Tensor | float, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """LM head and everything on logits, chunk by chunk. Sums: kl, agreement, nll, teacher's nll, head's MACs twice.

        The head's compute is that of the counted tokens, scaled up to all.
        """
        student, loss = self.student, self.loss
        divergence = DIVERGENCES[loss.logits]
        targets = ids.roll(-1, dims=1)
        follows = torch.ones_like(ids, dtype=torch.bool)
        follows[:, -1] = False
        scale = counted.numel() / counted.sum()
        tensors = student.head_tensors()

        def chunk_loss(h: Tensor, t: Tensor, target: Tensor, follows: Tensor) -> tuple[Tensor, Tensor]:
            logits, share = student.logits(h, *tensors)
            with torch.no_grad():
                teacher_logits, _ = student.logits(t)
            kl = divergence(logits, teacher_logits, **self.options).sum()
            costs = {p: torch.as_tensor(student.compute.routed_head(share, p), device=h.device) for p in PHASES}
            cost = {p: c.expand(len(h)).sum() * scale for p, c in costs.items()}
            total = loss.logits_weight * kl
            if loss.cross_entropy_weight:
                total = total + loss.cross_entropy_weight * _nll(logits, target, follows)
            if share is not None and self.budget.control == "price":
                total = total + price * cost[self.budget.phase] * counted.sum() / dense
            with torch.no_grad():
                quality = [h.new_zeros(())] * 3
                if not self.training:
                    agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
                    quality = [agreement, _nll(logits, target, follows), _nll(teacher_logits, target, follows)]
                return total, torch.stack([s.double() for s in (kl, *quality, *cost.values())])

        rows = [x.flatten(0, 1) for x in (hidden, teacher_hidden, targets, follows)]
        vocabulary = student.model.config.vocab_size
        return chunked(
            chunk_loss,
            rows,
            tensors,
            chunk_rows=default_chunk_rows(vocabulary, hidden.dtype, hidden.device),
            mask=counted.flatten() if self.sequence_level else None,
        )

    def _routing_loss(self, decisions: Decisions) -> Tensor | float:
        """What presets with fixed capacities add: the hinge, top-k prediction, even use."""
        student, loss, total = self.student, self.loss, 0.0
        capacity = student.runtime.capacity
        if self.budget.control == "capacity":
            free = [k for k in decisions.share if student.router_spec(k).selection == "threshold"]
            if free:
                shares = torch.stack([decisions.share[k].mean() for k in free])
                total = total + self.budget.hinge * capacity_hinge(shares, capacity)
        if loss.topk_weight:
            keys = [k for k in decisions.score if _over_tokens(student.router_spec(k))]
            if keys:
                parts = [topk_bce(decisions.score[k].squeeze(-1), capacity) for k in keys]
                total = total + loss.topk_weight * torch.stack(parts).mean()
        if loss.load_balance_weight:
            keys = [k for k in decisions.score if student.router_spec(k).kind in ("head", "expert")]
            if keys:
                parts = [load_balance(decisions.score[k].softmax(-1)) for k in keys]
                total = total + loss.load_balance_weight * torch.stack(parts).mean()
        return total


def _over_tokens(spec: RouterSpec) -> bool:
    return spec.selection == "topk" and spec.kind in ("token", "layer")


def _nll(logits: Tensor, target: Tensor, follows: Tensor) -> Tensor:
    """Sum over rows that have a successor."""
    return F.cross_entropy(logits.float(), torch.where(follows, target, -100), ignore_index=-100, reduction="sum")
