"""Settings and per-call state that all wrappers of a student share, and how gates are decided from scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from students.decisions import Decisions
from students.execution.block_context import BlockContext, Gates
from students.execution.call import Call
from students.execution.patch_counts import PatchCounts, SoFar
from students.execution.room import Room
from students.execution.tokens import Partition
from students.kernels import devices, direct, ops
from students.routers import Router, Substitute, selection
from students.spec import RouterSpec

JOINT_OUTPUTS = 16
"""The products of router and substitute are a multiple of so many, so that GPUs read and write them in wide words."""


@dataclass
class Runtime:
    """Settings of a student, facts about its last call, and the state that its blocks pass on.

    Settings hold until they are changed, facts about a call until the next call, so that recomputation in backward
    (gradient checkpointing) sees the same values.
    """

    bypass: bool = False
    """Whether routers are bypassed, so that the student is its teacher."""
    recorded: int = 0
    """Number of tokens of the fixed-shape step (recording/step.py) that runs with `bypass`; 0: none runs. Its masks
    change the rounding anyway, so routed layers may run: they read all channels with fewer launches than the model's
    own layers."""
    execution: Literal["skip", "mask"] = "skip"
    """skip: closed parts are not computed. mask: closed parts are computed and multiplied by zero, the reference for
    skip. With gradients on, most gates are masked anyway: they learn from what they leave out (see `skips`)."""
    offset: float | tuple[float, ...] = 0.0
    """The dial: added to every threshold router's scores and to the log odds of `capacity`; higher opens more gates.
    A tuple: one offset for each row of the batch (or for equal groups of neighbouring rows); at infinity a row is
    computed as by the teacher."""
    capacity: float = 1.0
    """The share of gates that top-k routers keep."""
    multiples: int | None = None
    """The largest multiple of tokens that images keep; None: the multiple that a router asks for (`multiple`)."""
    own_multiple: int = 4
    """The multiple of tokens for routers with `multiple` 0."""
    training: bool = False
    """Whether routers are being trained. Causal models choose a top-k of a sequence's tokens only then."""
    pool: selection.Pool = selection.alone
    """Gathers a tensor [n] over the data-parallel ranks that share a batch in training."""
    causal: bool = True
    """Whether attention is causal."""
    prefix: int = 0
    """Number of tokens in front of an image's patches (class and register tokens), which are never closed."""
    restores: bool = True
    """Image models: whether dropped tokens are put back in their places after the last block."""
    recompute: bool = False
    """Whether backward recomputes a block's activations instead of keeping them."""
    probed: dict[str, tuple[Tensor, Tensor]] | None = None
    """Calibration of image and vision-language models: (gates, features that the router reads) by key of the decision.
    While this is set, all gates are open and require gradients."""
    room: Room | None = None
    """Room for open tokens, in passes of fixed shape and in those that such passes take their limits from; None: as
    many tokens as are open are computed, and nobody asks how many these are."""
    decisions: Decisions | None = None
    """The record of this forward pass's decisions; None if nobody asked for it."""
    dial: Tensor | None = None
    """The offset as a tensor [] on the device, for calls that skip. It is overwritten in place, as the rows' offsets
    are, because recorded steps read it (recording/step.py)."""
    limit: Tensor | None = None
    """The score [1] from which on gates are open at the offset `dial`, for routers without gains."""
    call: Call = field(default_factory=Call)
    """Facts about the call that runs, or ran last."""
    contexts: list[BlockContext] = field(default_factory=list)
    """State of each block; empty outside of a forward pass."""
    _dial_at: float | None = None
    _rows: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    """Offsets of rows in calls that skip, with what they were made for, by number of rows."""

    def skips(self, specs: Iterable[RouterSpec]) -> bool:
        """Return whether what these routers close is skipped rather than masked: in mode `skip`, always without
        gradients; with gradients if all gates are a top-k weighted by the score, whose gradient flows through open
        gates alone, so that training gets cheaper with the same result."""
        if self.execution == "mask":
            return False
        return not torch.is_grad_enabled() or all(s.selection == "topk" and s.weight == "score" for s in specs)

    @property
    def kept(self) -> float:
        """The share of gates that top-k routers keep: `capacity` with the offset added to its log odds."""
        if self.offset == 0.0 or not 0 < self.capacity < 1:
            return self.capacity
        return 1 / (1 + (1 / self.capacity - 1) * math.exp(-self.one_offset))

    @property
    def one_offset(self) -> float:
        """The offset that all rows share."""
        assert not isinstance(self.offset, tuple), "rows have offsets of their own"
        return self.offset

    def begin(self, batch: int, device: torch.device, tokens: int = 0) -> Call:
        """Start a call for `batch` rows with `tokens` tokens in all (0: irrelevant). ValueError as in `offsets`."""
        self.drop()
        skipping = self.execution == "skip" and not torch.is_grad_enabled()
        alone, offsets = skipping and tokens == 1, self._offsets(batch, device, skipping)
        self.call = Call(tokens, batch, offsets, skipping, alone)
        return self.call

    def set_dial(self, device: torch.device) -> None:
        """Write the offset to the tensors that calls that skip read, if all rows share it."""
        if not isinstance(self.offset, tuple):
            offset = torch.full((), self.offset, dtype=torch.float32, device=device)
            self.dial, self._dial_at = overwritten(self.dial, offset), self.offset
            self.limit = overwritten(self.limit, -offset.view(1))

    def drop(self) -> None:
        """Clear state between wrappers that a pass may have left because it failed or was recomputed in part."""
        self.call.flow = None
        for context in self.contexts:
            context.clear()

    def offsets(self, batch: int, device: torch.device) -> Tensor | None:
        """Return the offset [B] of each row, or None if all rows share one. ValueError as in `_each`."""
        return _each(self.offset, batch, device) if isinstance(self.offset, tuple) else None

    def _offsets(self, batch: int, device: torch.device, skipping: bool) -> Tensor | None:
        """As `offsets`, but calls that skip, which no backward follows, overwrite the tensor of the last such call for
        as many rows."""
        if not skipping or not isinstance(self.offset, tuple):
            return self.offsets(batch, device)
        made, rows = self._rows.get(batch, (None, None))
        if made != (self.offset, device):
            with torch.inference_mode(False):
                rows = overwritten(rows, _each(self.offset, batch, device))
            self._rows[batch] = (self.offset, device), rows
        return rows

    def dial_of(self, x: Tensor, owner: Tensor | None = None) -> float | Tensor:
        """Return the offset for x [B, ..., C]: one number (in calls that skip a tensor [] on the device), or one for
        each row [B, 1, ..., 1].

        owner: the row of the batch that each token of x [..., C] belongs to, flat, if x is packed; the result is then
        [..., 1].
        """
        rows = self.call.rows
        if rows is not None:
            return _for_tokens(rows, x, owner)
        return self.dial if self.dial is not None and self._on_device else self.one_offset

    @property
    def _on_device(self) -> bool:
        """Whether `dial` and `limit` hold the offset of this call."""
        return self.call.skipping and self._dial_at == self.offset and self.call.rows is None

    def corrected(self, x: Tensor, owner: Tensor | None = None) -> Tensor | None:
        """Return 1 for tokens of x that get low-rank corrections and weights of open gates, 0 for those of rows at the
        teacher's compute; shape as in `dial_of`, x's dtype; None if all tokens get them."""
        rows = self.call.rows
        return None if rows is None else (_for_tokens(rows, x, owner) < math.inf).to(x.dtype)

    @property
    def rounds(self) -> bool:
        """Whether this call may differ from the teacher by rounding with all gates open: routers skip or learn."""
        return self.recorded > 0 if self.bypass else self.call.skipping or self.training

    def counted(self, x: Tensor) -> int:
        """Return how many tokens of x [B, T, D] are not padding."""
        return x.shape[:2].numel() - self.call.padded

    def decide(self, key: str, router: Router, x: Tensor, substitute: Substitute | None = None) -> Gates:
        """Return one router's gates for the branch input x [B, T, D]: [B, T, N] or [B, 1, N], in x's dtype. substitute:
        what replaces tokens that the router closes, if it reads x too; it may be begun with the router."""
        dtype = x.dtype
        spec = router.spec
        if self.probed is not None:
            tokens = x.shape[1] if spec.granularity == "token" and spec.network != "static" else 1
            gate = torch.ones(len(x), tokens, router.gates, dtype=dtype, device=x.device, requires_grad=True)
            self.probed[key] = gate, x.detach()
            return Gates(dtype, gate=gate, closed=1 - gate)
        if self._only_opens(router):
            if devices.runs_ahead(x.device) and (router.only_compares or not torch.compiler.is_compiling()):
                return self._open_ahead(router, x, substitute)
            if ops.compiled(x) and not ops.observed():
                shift, position = self._raised_by(router, x)
                open_, order, place, number = direct.open_tokens(x, *router.joined(dtype), shift, position, spec.prefix)
                partition = None if self.call.fixed else Partition(order, place, int(number))
                return Gates(dtype, partition=partition, open=open_.unsqueeze(-1))
        if spec.granularity == "sequence" and spec.network != "static":
            score = self._score_prompt(key, router, x)
        else:
            score = router(x)
        over_tokens, count = spec.of_kind.over_tokens, None
        if spec.selection == "topk" and not over_tokens:
            gate = selection.topk(score, self.kept, dim=-1)
        elif spec.selection == "topk" and self.causal and self.training:
            gate = selection.topk(score, self.capacity, dim=1)
            count = selection.how_many(score.shape[1], self.capacity) if score.shape[1] == x.shape[1] else None
        elif over_tokens and not self.causal:
            gate, count = self._patches(router, score)
        else:
            raised = self._open_prefix(spec, score + router.shift(self.dial_of(score)))
            if over_tokens and spec.network == "static" and self.call.skipping and self.call.rows is None:
                count = x.shape[1] if router.stands(raised, self.one_offset) else 0
            if self._asked_for_gates_alone(spec):
                return Gates(dtype, count, open=raised >= 0)
            gate = selection.threshold(raised)
        if self.decisions is not None or torch.is_grad_enabled():  # a recomputation runs the same operators
            self.note(key, router.spec, router.share(gate), score)
        closed = 1 - gate
        if spec.weight == "score":
            weight = selection.score_weight(score, over_gates=not over_tokens)
            corrected = self.corrected(score)
            if corrected is not None:
                weight = 1 + (weight - 1) * corrected
            gate, closed = gate.detach() * weight, closed.detach()
        return Gates(dtype, count, gate=gate.to(dtype), closed=closed.to(dtype))

    def _open_prefix(self, spec: RouterSpec, raised: Tensor) -> Tensor:
        """Return scores [B, T, N], with the shift added, that are positive for the first `spec.prefix` tokens of each
        sequence."""
        position = self.call.position
        if not spec.prefix or position is None:
            return raised
        return raised.masked_fill((position < spec.prefix).unsqueeze(-1), 1.0)

    def _asked_for_gates_alone(self, spec: RouterSpec) -> bool:
        """Whether neither scores nor weights nor gradients of a router are wanted."""
        return self.decisions is None and spec.weight == "none" and not torch.is_grad_enabled()

    def _only_opens(self, router: Router) -> bool:
        """Whether all that is asked of a router is which tokens are open: in a causal model, where nobody else needs
        the scores. One call then decides it."""
        spec = router.spec
        by_token = spec.of_kind.over_tokens and spec.granularity == "token"
        decides = by_token and spec.network != "static" and spec.selection == "threshold"
        return decides and self.causal and self._on_device and self._asked_for_gates_alone(spec)

    def _raised_by(self, router: Router, x: Tensor) -> tuple[float | Tensor, Tensor | None]:
        """Return what raises the scores of tokens x: the dial's shift, and positions if the first ones are open."""
        return router.shift(self.dial_of(x)), self.call.position if router.spec.prefix else None

    def _open_ahead(self, router: Router, x: Tensor, substitute: Substitute | None) -> Gates:
        """Return the gates of a router that `_only_opens`, on a device that the host runs ahead of: layers that read x,
        those of a substitute among them, are one product there, and what follows is one launch."""
        if router.only_compares and (substitute is None or torch.compiler.is_compiling()):
            product, *added = router.linear.parts(x)
            open_, *listed = direct.list_open(product, added[0] if added else None, self.limit)  # as score + shift >= 0
            return Gates(x.dtype, listed=listed, open=open_)
        down = None if substitute is None else substitute.down
        weight, bias, up = router.joined(x.dtype, down, JOINT_OUTPUTS)
        rank = 0 if down is None else len(down)
        low, product = F.linear(x, weight, bias).tensor_split([rank], -1)
        open_ = direct.open_by_score(product, up, *self._raised_by(router, x), router.spec.prefix)
        return Gates(x.dtype, low=None if down is None else low.flatten(0, -2), open=open_.unsqueeze(-1))

    def _patches(self, router: Router, score: Tensor) -> tuple[Tensor, int | None]:
        """Return gates [B, T, 1] of an image's tokens, those of the prefix open, or [B, 1, 1], one for all tokens; and
        the number of open tokens of each image, None if it depends on the scores."""
        if score.shape[1] == 1:  # one decision for all tokens
            return selection.threshold(score + router.shift(self.dial_of(score))), None
        score = score[:, self.prefix :].squeeze(-1)
        count = self.patches_kept(router, score.shape[1])
        gate = F.pad(self.choose(router, score, count), (self.prefix, 0), value=1.0).unsqueeze(-1)
        settled = not (self.training and router.spec.selection == "quota")
        return gate, self.prefix + count if settled and isinstance(count, int) else None

    def choose(
        self, router: Router, score: Tensor, count: int | tuple[int, ...] | None, here: Tensor | None = None
    ) -> Tensor:
        """Return gates [B, n] of image patches with these scores [B, n].

        count: the result of `patches_kept`; unused while quotas are trained. here [B, n] bool: the patches that earlier
        blocks have kept; None: all.
        """
        if self.training and router.spec.selection == "quota":
            return selection.even(score, router.shift(self.dial_of(score)), here, self.pool)
        if count is None:
            return selection.threshold(score + router.shift(self.dial_of(score)))
        if here is not None:
            score = score.masked_fill(~here, -torch.inf)
        return selection.best(score, count, 1)

    def patches_kept(self, router: Router, patches: int, so_far: SoFar | None = None) -> int | tuple[int, ...] | None:
        """Return how many of `patches` patches an image keeps: one number, or one for each row if rows have offsets of
        their own; None if an image keeps the patches with a score of at least 0. so_far: as in `PatchCounts.after`."""
        spec = router.spec
        if spec.granularity == "sequence" or spec.selection == "threshold":
            return None
        counts = self.patch_counts(spec)
        if spec.selection == "topk":
            return counts.of(self.kept, patches)
        rows = self.call.rows
        offsets: list[float] = [self.one_offset] if rows is None else rows.tolist()
        kept = counts.after([router.quota(offset) for offset in offsets], patches, so_far)
        return kept[0] if rows is None else tuple(kept)

    def patch_counts(self, spec: RouterSpec) -> PatchCounts:
        """Return the rule by which a router's numbers of patches are rounded."""
        asked = spec.multiple or self.own_multiple
        multiple = asked if self.multiples is None else min(asked, self.multiples)
        return PatchCounts(self.prefix, multiple, spec.dropped == "merge")

    def _score_prompt(self, key: str, router: Router, x: Tensor) -> Tensor:
        """Return scores [B, 1, N] from the mean of the prompt's tokens, or those that the cache remembers."""
        memory, prompt = self.call.memory, self.call.prompt
        if memory is not None and key in memory.scores:
            return memory.scores[key]
        score: Tensor = router(x.mean(1, keepdim=True) if prompt is None else selection.prompt_mean(x, prompt))
        if memory is not None:
            memory.scores[key] = score
        return score

    def note(self, key: str, spec: RouterSpec | None, share: Tensor, score: Tensor | None = None) -> None:
        """Record the open share [B, T] of a router's gates and its scores [B, T, N], if it has any; spec: None where no
        router decided."""
        if self.decisions is not None:
            self.decisions.share[key] = share
            if spec is not None:
                self.decisions.spec[key] = spec
            if score is not None:
                self.decisions.score[key] = score


def _each(offsets: tuple[float, ...], batch: int, device: torch.device) -> Tensor:
    """Return the offset [B] of each row. ValueError if `batch` is no multiple of the number of offsets."""
    if batch % len(offsets):
        raise ValueError(
            f"this batch has {batch} rows, and budgets were set for {len(offsets)}: call set_compute with one "
            "budget for all rows, or one for each"
        )
    each = torch.tensor(offsets, dtype=torch.float32).to(device, non_blocking=True)
    return each.repeat_interleave(batch // len(offsets))


def _for_tokens(rows: Tensor, x: Tensor, owner: Tensor | None) -> Tensor:
    """Return offsets rows [B] in the shape that Runtime.dial_of returns for x."""
    if owner is None:
        return rows.view(-1, *[1] * (x.ndim - 1))
    return rows[owner].view(*x.shape[:-1], 1)


def overwritten(old: Tensor | None, new: Tensor) -> Tensor:
    """Copy `new` into `old` and return `old`; return `new` if `old` has another shape, dtype or device, or is None."""
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)
