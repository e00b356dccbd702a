"""The objective of language students: divergence of next-token distributions, plus the price of compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic import launch
from elastic.accounting.language import prompt_mask
from elastic.config import BudgetConfig, DataConfig, LossConfig
from elastic.objectives.sums import Objective, Sums, TeacherSignals, routing_loss
from losses import HIDDEN_DISTANCES, chunked, default_chunk_rows, per_layer, top_of, topk_kl_to
from students.compute import PHASES
from students.families.language import LanguageStudent
from students.kernels.autograd import forward_kl


@dataclass
class Measured(Sums):
    """Sums over the tokens of a batch."""

    agreement: Tensor
    """Number of tokens at which student and teacher have the same most likely next token; 0 in training."""
    nll: Tensor
    """The student's negative log-likelihood of the text, in nats; 0 in training."""
    teacher_nll: Tensor
    """The teacher's negative log-likelihood of the text, in nats; 0 in training."""
    predicted: Tensor
    """Number of tokens over which `nll` is summed: counted tokens with a successor in their window."""


class Distillation(Objective):
    """Divergence of next-token distributions from the teacher's, plus the price of compute; measures both phases.

    Logits are made and compared in chunks of tokens, never for a whole batch at once.
    """

    student: LanguageStudent

    def __init__(self, student: LanguageStudent, loss: LossConfig, budget: BudgetConfig, data: DataConfig) -> None:
        super().__init__(student, loss, budget, data)
        self.sequence_level = any(r.granularity == "sequence" for r in student.spec.routers)
        self.likeliest = loss.logits == "topk_kl" and not loss.hidden_weight
        """Whether training needs only the masses and tokens of the teacher's k most likely next tokens."""

    @torch.no_grad()
    def teacher_signals(self, ids: Tensor) -> TeacherSignals:
        """Return the teacher's signals for token ids [B, T].

        These are the final hidden states "hidden" [B * T, D], because logits would be many times as large and are cheap
        to recompute, and the states after each block if the loss compares these; or, in training, if the loss needs no
        more, the "masses" and "tokens" [B * T, ...] of `top_of`.
        """
        *layers, final = self.student.teacher_states(ids, self.layers)
        states = {"hidden": final, **{f"layer.{number}": layer for number, layer in enumerate(layers)}}
        signals = {name: x.flatten(0, 1) for name, x in states.items()}
        if not (self.likeliest and self.training):
            return signals
        options: dict[str, Any] = {"k": self.loss.k, "temperature": self.loss.temperature}
        parts = [top_of(self.student.logits(x)[0], **options) for x in signals["hidden"].split(self._chunk_rows(ids))]
        return {n: torch.cat(part) for n, part in zip(("masses", "tokens"), zip(*parts, strict=True), strict=True)}

    def _chunk_rows(self, ids: Tensor) -> int:
        model = self.student.model
        weight = model.get_input_embeddings().get_parameter("weight")
        return default_chunk_rows(model.config.vocab_size, weight.dtype, ids.device)

    @property
    def keeps(self) -> str:
        """Name of the kind of signals that `teacher_signals` returns, part of the name of a cache's folder."""
        if self.likeliest:
            return f"top{self.loss.k}-at{self.loss.temperature:g}"
        return "layers" if self.layers else "final-states"

    def lengths(self, ids: Tensor) -> list[int]:
        """Return the number of rows that each window has in the signals of `teacher_signals`: one per token."""
        return [ids.shape[1]] * len(ids)

    def forward(
        self, ids: Tensor, price: Tensor | float = 0.0, signals: TeacherSignals | None = None
    ) -> tuple[Tensor, Measured]:
        """Return the loss and the measured sums for token ids [B, T] without padding.

        price: nats per unit of compute, one number or one for each row [B]; signals: the teacher's signals, if they are
        known (None: computed here).
        """
        student, loss = self.student, self.loss
        prompt = prompt_mask(ids, self.prompt)
        counted = ~prompt if self.sequence_level else torch.ones_like(prompt)
        signals = self.teacher_signals(ids) if signals is None else signals
        out, decisions = student.features(ids, prompt=prompt, output_hidden_states=self.layers)

        valid = torch.ones_like(prompt)
        phase = self.budget.phase
        dense = {p: student.compute.dense(valid, p).sum() for p in PHASES}
        macs = {p: student.compute.routed_blocks(decisions, valid, p).sum(1) for p in PHASES}
        if not isinstance(price, Tensor):
            price = torch.full((), price, device=ids.device)  # a copy from the host would wait for queued work
        price = price.expand(len(ids))
        tokens, whole = launch.all_reduce(counted.sum()), launch.all_reduce(dense[phase])
        hidden = out.last_hidden_state
        head, sums, rows = self._head_loss(hidden, signals, ids, counted, price, (tokens, whole))
        total = launch.all_reduce(head / tokens + (price * macs[phase]).sum() / whole)
        total = total + routing_loss(student, decisions, loss, self.budget, len(ids))
        if loss.hidden_weight:
            distance = HIDDEN_DISTANCES[loss.hidden]
            compared = self._compared(out)
            pairs = list(compared.values()), [signals[name].view_as(hidden) for name in compared]
            apart = per_layer(distance, *pairs, counted)
            total = total + loss.hidden_weight * launch.mean_of(apart, counted.sum())
        macs = {p: m.detach() + rows[:, 1 + i] for i, (p, m) in enumerate(macs.items())}
        each = {
            "kl": rows[:, 0] / counted.sum(1),
            "compute": macs[phase] / student.compute.dense(valid, phase).sum(1),
        }
        macs = {p: m.sum() for p, m in macs.items()}
        agreement, nll, teacher_nll = sums
        kl, predicted = rows[:, 0].sum(), counted[:, :-1].sum()
        return total, Measured(counted.sum(), kl, macs, dense, each, agreement, nll, teacher_nll, predicted)

    def _compared(self, out: Any) -> TeacherSignals:
        """Return the states [B, T, D] that the loss compares, by name: the final states, or those after each block."""
        if self.layers:
            return {f"layer.{number}": layer for number, layer in enumerate(out.hidden_states[1:])}
        return {"hidden": out.last_hidden_state}

    def _head_loss(
        self,
        hidden: Tensor,
        signals: TeacherSignals,
        ids: Tensor,
        counted: Tensor,
        price: Tensor,
        of: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the LM head and all losses on logits, chunk by chunk, on final hidden states [B, T, D].

        Returns the loss; the sums (agreement, nll, the teacher's nll); and, for each row of the batch [B, 3], the sums
        of kl and of the head's MACs in both phases. counted [B, T] bool: tokens on which the loss is defined; of: the
        number of counted tokens, and the teacher's MACs, of all processes. The head's MACs are those at counted tokens,
        scaled up to all tokens.
        """
        student, loss = self.student, self.loss
        targets = ids.roll(-1, dims=1)
        follows = (torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - 1).expand(ids.shape)
        scale = (counted.numel() / counted.sum()).expand(ids.numel())
        tensors = student.head_tensors()
        owners = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)

        likeliest = "tokens" in signals
        plain = self.training and self.divergence is forward_kl and not (likeliest or loss.cross_entropy_weight)

        def chunk_loss(
            h: Tensor, target: Tensor, follows: Tensor, owner: Tensor, *signals: Tensor
        ) -> tuple[Tensor, Tensor]:
            if not likeliest:
                with torch.no_grad():
                    teacher_logits, _ = student.logits(*signals)
            if plain:
                kl, share = student.forward_kl(h, teacher_logits, *tensors, owner=owner)
            else:
                logits, share = student.logits(h, *tensors, owner=owner)
                if likeliest:
                    kl = topk_kl_to(logits, *signals, temperature=loss.temperature)
                else:
                    kl = self.divergence(logits, teacher_logits)
            cost = {p: student.compute.routed_head(share, p) * scale[: len(h)] for p in PHASES}
            total = loss.logits_weight * kl.sum()
            if loss.cross_entropy_weight:
                total = total + loss.cross_entropy_weight * _nll(logits, target, follows)
            if share is not None and self.budget.control == "price":
                total = total + (price[owner] * cost[self.budget.phase]).sum() * of[0] / of[1]
            with torch.no_grad():
                quality = [h.new_zeros(())] * 3
                if not self.training:
                    quality = [_agreement(logits, teacher_logits)]
                    quality += [_nll(x, target, follows) for x in (logits, teacher_logits)]
                parts = torch.stack([kl, *cost.values()], 1).double()
                each = parts.new_zeros(len(ids), 3).index_add(0, owner, parts)
                return total, torch.cat([torch.stack(quality).double(), each.flatten()])

        known = [signals[name].view(*ids.shape, -1) for name in (("masses", "tokens") if likeliest else ("hidden",))]
        first = self.prompt if self.sequence_level else 0  # first counted token, known to the host
        rows = [x[:, first:].flatten(0, 1) for x in (hidden, targets, follows, owners, *known)]
        total, sums = chunked(chunk_loss, rows, tensors, chunk_rows=self._chunk_rows(ids))
        return total, sums[:3], sums[3:].view(len(ids), 3)


def _agreement(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the number of rows [N, V] of which both name the same token as the likeliest."""
    first, other = (x.max(-1).indices for x in (logits, teacher_logits))  # argmax is slow in bfloat16
    return (first == other).sum()


def _nll(logits: Tensor, target: Tensor, follows: Tensor) -> Tensor:
    """Return the negative log-likelihood of targets [N] under logits [N, V], summed over rows where `follows` [N] is
    True: those whose token has a successor."""
    return F.cross_entropy(logits.float(), torch.where(follows, target, -100), ignore_index=-100, reduction="sum")
