"""What all wrappers of one student share while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from students.decisions import Decisions
from students.execution.block_context import BlockContext
from students.execution.call import Call
from students.execution.gates import Gates
from students.kernels import devices, ops
from students.routers import Router, selection
from students.spec import RouterSpec


@dataclass
class Runtime:
    """Settings of a student, the facts of its last call, and where its blocks hand on what they decide.

    The settings stay as they are until somebody changes them, and the facts until the next call, so that a
    recomputation during backward (gradient checkpointing) sees the same ones.
    """

    bypass: bool = False
    """The student is the teacher."""
    recorded: int = 0
    """For how many tokens a step of fixed shape (execution/fixed.py) runs with `bypass`; 0: none does. Its masks cost a
    model its bits anyway, and what can read some channels reads all with fewer launches than the model's own layers."""
    execution: Literal["skip", "mask"] = "skip"
    """skip: what is closed is not computed. mask: it is computed and multiplied by zero, the reference for skip. With
    gradients on, closed gates are masked anyway, because they learn from what they leave out (see `skips`)."""
    offset: float | tuple[float, ...] = 0.0
    """The dial: added to every threshold router's scores and to the log odds of `capacity`; higher opens more gates.
    Several: one for each row of the batch (or each group of as many rows), infinity where the row is the teacher's."""
    capacity: float = 1.0
    """The share of gates that top-k routers keep."""
    multiples: bool = True
    """Whether images keep multiples of patches where routers ask for them; else any number of them."""
    training: bool = False
    """Whether routers are being trained. Over the tokens of a sequence, language models choose a top-k only then."""
    pool: selection.Pool = selection.alone
    """Finds what other processes have of a batch, where training shares it with them."""
    causal: bool = True
    """Whether a token sees only what is before it."""
    prefix: int = 0
    """Tokens in front of an image's patches; they are never closed."""
    restores: bool = True
    """Image models: whether tokens that stayed away are put back in their places behind the last block."""
    recompute: bool = False
    """Image models: compute a block's activations again in backward instead of keeping them."""
    probed: dict[str, tuple[Tensor, Tensor]] | None = None
    """Calibration of image models: (gates, what the router reads) by key. All gates are open then, and have a gradient
    of their own."""
    decisions: Decisions | None = None
    """Where this forward pass records what it decides, if anybody asked."""
    dial: Tensor | None = None
    """[]: the offset, on the device of calls that skip. Like each row's it is written in place: recorded steps read it
    (execution/fixed.py)."""
    limit: Tensor | None = None
    """[1]: the scores from which on gates are then open, where they have no gains of their own."""
    call: Call = field(default_factory=Call)
    """The call that runs, or ran last."""
    contexts: list[BlockContext] = field(default_factory=list)
    """Of all blocks; empty outside of a forward pass."""
    _dial_at: float | None = None
    _rows: Tensor | None = None
    _rows_at: tuple[Any, ...] = ()

    def skips(self, specs: Iterable[RouterSpec]) -> bool:
        """Whether what these routers close is left out: always without gradients; with them, where the gradient takes
        the way of what is open (top-k weighted by the score), so that training gets cheaper and stays the same."""
        if self.execution == "mask":
            return False
        return not torch.is_grad_enabled() or all(s.selection == "topk" and s.weight == "score" for s in specs)

    @property
    def kept(self) -> float:
        """The share of gates that top-k head and expert routers keep: the capacity, turned by the dial."""
        if self.offset == 0.0 or not 0 < self.capacity < 1:
            return self.capacity
        return 1 / (1 + (1 / self.capacity - 1) * math.exp(-self.one_offset))

    @property
    def one_offset(self) -> float:
        """The offset, where all rows share it."""
        assert not isinstance(self.offset, tuple), "rows have offsets of their own"
        return self.offset

    def begin(self, batch: int, device: torch.device, tokens: int = 0) -> Call:
        """A new call, for so many rows and tokens (0: it does not matter). ValueError as in `offsets`."""
        self.drop()
        skipping = self.execution == "skip" and not torch.is_grad_enabled()
        self.call = Call(tokens, self._offsets(batch, device, skipping), skipping, alone=skipping and tokens == 1)
        return self.call

    def set_dial(self, device: torch.device) -> None:
        """Write the offset that all rows share, where they do, to where calls that skip read it."""
        if not isinstance(self.offset, tuple):
            offset = torch.full((), self.offset, dtype=torch.float32, device=device)
            self.dial, self._dial_at = overwritten(self.dial, offset), self.offset
            self.limit = overwritten(self.limit, -offset.view(1))

    def drop(self) -> None:
        """Leave nothing that was on its way between wrappers: a pass that failed, or was recomputed in part."""
        self.call.flow = None
        for context in self.contexts:
            context.clear()

    def offsets(self, batch: int, device: torch.device) -> Tensor | None:
        """[B]: the offset of each row, where they have their own. ValueError where there are not as many."""
        return _each(self.offset, batch, device) if isinstance(self.offset, tuple) else None

    def _offsets(self, batch: int, device: torch.device, skipping: bool) -> Tensor | None:
        """As `offsets`, in place of the last ones where no gradient asks for those."""
        at = self.offset, batch, device
        if not skipping or not isinstance(self.offset, tuple):
            return self.offsets(batch, device)
        if self._rows_at != at:
            with torch.inference_mode(False):
                rows = _each(self.offset, batch, device)
            self._rows, self._rows_at = overwritten(self._rows, rows), at
        return self._rows

    def dial_of(self, x: Tensor, owner: Tensor | None = None) -> float | Tensor:
        """The dial for x [B, ..., C]: one number, which calls that skip find on their device, or one for each row
        [B, ..., 1].

        owner: the row of the batch that each token of x [..., C] belongs to, flat, where x is packed.
        """
        rows = self.call.rows
        if rows is not None:
            return _for_tokens(rows, x, owner)
        return self.dial if self.dial is not None and self._on_device else self.one_offset

    @property
    def _on_device(self) -> bool:
        """Whether this call finds the offset that all rows share on its device."""
        return self.call.skipping and self._dial_at == self.offset and self.call.rows is None

    def corrected(self, x: Tensor, owner: Tensor | None = None) -> Tensor | None:
        """1 for tokens of x that low-rank corrections and weights of open gates are for, 0 where the row is the
        teacher's: shapes as in `dial_of`, in x's dtype; None: all are."""
        rows = self.call.rows
        return None if rows is None else (_for_tokens(rows, x, owner) < math.inf).to(x.dtype)

    @property
    def rounds(self) -> bool:
        """Whether this call need not be the teacher's bit for bit where all is open: routers skip, or they learn."""
        return self.recorded > 0 if self.bypass else self.call.skipping or self.training

    def counted(self, x: Tensor) -> int:
        """How many tokens of x [B, T, D] are not padding."""
        return x.shape[:2].numel() - self.call.padded

    def decide(self, key: str, router: Router, x: Tensor) -> Gates:
        """Gates of one router for the branch input x [B, T, D]: [B, T, N], or [B, 1, N], in x's dtype."""
        dtype = x.dtype
        spec = router.spec
        if self.probed is not None:
            tokens = x.shape[1] if spec.granularity == "token" and spec.network != "static" else 1
            gate = torch.ones(len(x), tokens, router.gates, dtype=dtype, device=x.device, requires_grad=True)
            self.probed[key] = gate, x.detach()
            return Gates(dtype, gate=gate, closed=1 - gate)
        if self._only_lists(router, x):
            product, *bias = router.linear.parts(x)
            open_, *listed = ops.list_open(product, bias[0] if bias else None, self.limit)  # as `raised` would be
            return Gates(dtype, listed=listed, open=open_)
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
            raised = score + router.shift(self.dial_of(score))
            if over_tokens and spec.network == "static" and self.call.skipping and self.call.rows is None:
                count = x.shape[1] if router.stands(raised, self.one_offset) else 0
            if self._asked_for_gates_alone(spec):
                return Gates(dtype, count, open=raised >= 0)
            gate = selection.threshold(raised)
        if self.decisions is not None or torch.is_grad_enabled():  # what is computed again is computed as it was
            self.note(key, router.spec, router.share(gate), score)
        closed = 1 - gate
        if spec.weight == "score":
            weight = selection.score_weight(score, over_gates=not over_tokens)
            corrected = self.corrected(score)
            if corrected is not None:
                weight = 1 + (weight - 1) * corrected
            gate, closed = gate.detach() * weight, closed.detach()
        return Gates(dtype, count, gate=gate.to(dtype), closed=closed.to(dtype))

    def _asked_for_gates_alone(self, spec: RouterSpec) -> bool:
        """Whether neither scores nor weights nor gradients of a router are wanted."""
        return self.decisions is None and spec.weight == "none" and not torch.is_grad_enabled()

    def _only_lists(self, router: Router, x: Tensor) -> bool:
        """Whether all that a router's scores are for is to list the tokens that are open, on a device that the host
        runs ahead of."""
        spec = router.spec
        by_token = spec.selection == "threshold" and spec.granularity == "token" and spec.network == "linear"
        alone = spec.of_kind.over_tokens and self.causal and router.log_gain is None and devices.runs_ahead(x.device)
        return by_token and alone and self._on_device and self._asked_for_gates_alone(spec)

    def _patches(self, router: Router, score: Tensor) -> tuple[Tensor, int | None]:
        """Gates [B, T, 1] of an image's tokens, those of the prefix open; or [B, 1, 1], one for all of them. Also how
        many tokens of each image are open, where that is settled beforehand."""
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
        """Gates [B, n] of an image's patches with these scores; here [B, n] bool: those that are still there. count: as
        `patches_kept` says, which is not asked for while quotas are trained."""
        if self.training and router.spec.selection == "quota":
            return selection.even(score, router.shift(self.dial_of(score)), here, self.pool)
        if count is None:
            return selection.threshold(score + router.shift(self.dial_of(score)))
        if here is not None:
            score = score.masked_fill(~here, -torch.inf)
        return selection.best(score, count, 1)

    def patches_kept(
        self, router: Router, patches: int, so_far: list[tuple[float, int]] | None = None
    ) -> int | tuple[int, ...] | None:
        """How many of an image's `patches` patches pass, or of each row's; None: as many as have a score of at least 0.

        so_far: where patches merge, or stay away and come in multiples, what rounding has taken from earlier blocks and
        how many they left, for all rows or each; brought up to date. What one block rounds away the next ones get, so
        that compute follows the quotas more closely than by a `multiple` in every block.
        """
        spec = router.spec
        if spec.granularity == "sequence" or spec.selection == "threshold":
            return None
        if spec.selection == "topk":
            return self._whole(spec, self.kept, patches)
        rows = self.call.rows
        offsets: list[float] = [self.one_offset] if rows is None else rows.tolist()
        shares = [router.quota(offset) for offset in offsets]
        before = so_far or [(0.0, patches)] * len(shares)
        counts = [
            min(left, max(self._least(spec, left), self._whole(spec, share + owed / patches, patches)))
            for share, (owed, left) in zip(shares, before, strict=True)
        ]
        if so_far is not None:
            so_far[:] = [
                (owed + min(share * patches, left) - count, count)
                for share, count, (owed, left) in zip(shares, counts, before, strict=True)
            ]
        return counts[0] if rows is None else tuple(counts)

    def multiple(self, spec: RouterSpec) -> int:
        """Of how many tokens an image keeps a multiple."""
        return spec.multiple if self.multiples else 1

    def in_multiples(self, spec: RouterSpec, wanted: list[int], left: list[int]) -> tuple[int, ...]:
        """How many patches pass of images of which so many are `left`, where so many have a score of at least 0."""
        return tuple(
            max(self._least(spec, here), self._whole(spec, count / max(here, 1), here))
            for count, here in zip(wanted, left, strict=True)
        )

    def _least(self, spec: RouterSpec, left: int) -> int:
        """How many of `left` patches stay at least: where they merge in pairs, half of them; with the prefix a multiple
        where that is not too far up."""
        if spec.dropped != "merge":
            return 0
        tokens, multiple = self.prefix + math.ceil(left / 2), self.multiple(spec)
        if tokens >= 3 * multiple:
            tokens = multiple * math.ceil(tokens / multiple)
        return tokens - self.prefix

    def _whole(self, spec: RouterSpec, share: float, patches: int) -> int:
        """A share of the patches in whole ones, or all: with the prefix a multiple where the router asks for one."""
        if share >= 1:
            return patches
        tokens, multiple = self.prefix + max(0, round(share * patches)), self.multiple(spec)
        if tokens >= multiple:
            tokens = multiple * round(tokens / multiple)
        return min(patches, max(0 if self.prefix else 1, tokens - self.prefix))

    def _score_prompt(self, key: str, router: Router, x: Tensor) -> Tensor:
        """Scores [B, 1, N] from the prompt's tokens; those that the cache remembers where it does."""
        memory, prompt = self.call.memory, self.call.prompt
        if memory is not None and key in memory.scores:
            return memory.scores[key]
        score: Tensor = router(x.mean(1, keepdim=True) if prompt is None else selection.prompt_mean(x, prompt))
        if memory is not None:
            memory.scores[key] = score
        return score

    def note(self, key: str, spec: RouterSpec | None, share: Tensor, score: Tensor | None = None) -> None:
        """Record the open share [B, T] that a router of this specification decided, if one did, and its scores
        [B, T, N] where it has them."""
        if self.decisions is not None:
            self.decisions.share[key] = share
            if spec is not None:
                self.decisions.spec[key] = spec
            if score is not None:
                self.decisions.score[key] = score


def _each(offsets: tuple[float, ...], batch: int, device: torch.device) -> Tensor:
    """[B]: the offset of each row. ValueError where there are not as many."""
    if batch % len(offsets):
        raise ValueError(
            f"this batch has {batch} rows, and budgets were set for {len(offsets)}: call set_compute with one "
            "budget for all rows, or one for each"
        )
    return torch.tensor(offsets).to(device, non_blocking=True).repeat_interleave(batch // len(offsets))


def _for_tokens(rows: Tensor, x: Tensor, owner: Tensor | None) -> Tensor:
    """Offsets rows [B] as Runtime.dial_of has them for x."""
    if owner is None:
        return rows.view(-1, *[1] * (x.ndim - 1))
    return rows[owner].view(*x.shape[:-1], 1)


def overwritten(old: Tensor | None, new: Tensor) -> Tensor:
    """The old tensor with the new one's values, or the new one where there is none of its kind."""
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)
