"""Blocks of image models that run on the open tokens of their layer router."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from students.execution.call import Flow
from students.execution.runtime import Runtime
from students.execution.tokens import for_tokens, gather_open, rotary, rotary_of
from students.execution.wrapper import Named, Wrapper
from students.kernels import ops
from students.kernels.attention_gradient import learning, recomputing
from students.kernels.key_bias import key_mask
from students.kernels.merging import NOT_NOW, Matches, at, flat_index, match, merge
from students.kernels.residual import merge_for, residual_of
from students.routers import Router, selection

TOP = 1e30
"""Lowest score of a token of the prefix, which is never closed."""
LEAK = 1e-3
"""Weight in attention of a closed token's key while routers are trained."""
CALL = 2**26
"""Fixed cost of one call of a block, as the number of multiply-accumulates that take as long on two CPU cores."""


class RoutedBlock(Wrapper):
    """A block that runs on the open tokens of its router only; closed tokens are no keys in it either.

    key: name of its decisions. mask: name of the keyword argument that takes the attention mask. dropped: as in
    RouterSpec. last: whether this is the last block.
    """

    def __init__(self, base_layer: nn.Module, runtime: Runtime, key: str, mask: str, dropped: str, last: bool) -> None:
        super().__init__(base_layer, runtime)
        self.key = key
        self.prefix = runtime.prefix
        self.mask = mask
        self.shortens = dropped != "return"
        self.merges = dropped == "merge"
        self.last = last
        self.routers = Named[Router]()
        # scores of the prefix: above all others, and in its order
        self.register_buffer("top", torch.arange(self.prefix, 0, -1) * TOP, persistent=False)

    @property
    def router(self) -> Router | None:
        """The block's router; None where the block only lacks the tokens that earlier blocks dropped."""
        return next(iter(self.routers.values()), None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = self.runtime
        if run.bypass:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        if args:  # transformers' vision towers pass their mask, which is None, by position
            kwargs[self.mask], args = args[0], args[1:]
        flow = run.call.flow
        if flow is None:
            flow = Flow(x.shape[1])
            run.call.flow = flow if self.shortens and not self.last else None
        router = self.router
        if run.execution == "skip" and not torch.is_grad_enabled():
            x = self._skip(x, args, kwargs, flow, router)
            if self.last and self.shortens and run.restores:
                x = flow.back(x)
        else:
            x = self._mask(x, args, kwargs, flow, router)
        if self.last:
            run.call.flow = None
        return x

    def _scores(
        self, x: Tensor, flow: Flow, router: Router, choosing: Tensor | None = None, matches: Matches | None = None
    ) -> Tensor:
        """Return scores [B, n] of tokens x [B, n, D], highest for the prefix; if tokens stay away, the lowest so far.

        choosing [B] bool: rows that drop tokens in this block; None: all. Scores of other rows stay as they were, as do
        those of tokens that may not merge now.
        """
        if matches is None:
            score = router.of_stream(x)
        else:
            score = router.of_stream(x, matches.distance).masked_fill(~matches.may_go, NOT_NOW)
        if self.prefix:
            score[:, : self.prefix] = self.top
        if not self.shortens:
            return score
        before = torch.full_like(score, torch.inf) if flow.score is None else flow.score
        score = torch.minimum(score, before)
        return score if choosing is None else torch.where(choosing[:, None], score, before)

    def _skip(self, x: Tensor, args: Any, kwargs: dict[str, Any], flow: Flow, router: Router | None) -> Tensor:
        run = self.runtime
        some: Tensor | None = None
        index = rows = stand_in = weight = None
        valid = flow.valid
        count = self.count(flow)
        if router is not None and (not self.merges or router.spec.network != "linear" or isinstance(count, tuple)):
            x, index, valid, stand_in, weight = self._choose_some(x, flow, router, count)
        elif router is not None and count is None:
            some, index, valid, stand_in = self._merge_below(x, flow, router)
        elif router is not None and isinstance(count, int) and count + self.prefix < x.shape[1]:
            some, index, stand_in = self._merge_some(x, flow, router, count + self.prefix)
        if index is None:
            some = x
        else:
            if some is None:
                rows = flat_index(index, x.shape[1])
                some = x.flatten(0, 1).index_select(0, rows).view(*index.shape, x.shape[-1])
            elif run.restores:
                rows = flat_index(index, x.shape[1])
            if self.shortens:
                flow.valid = valid
                if run.restores and rows is not None:
                    flow.left.append((x, rows, stand_in))
        places = self._places(flow, index, kwargs)
        if places is not None:
            kwargs = for_tokens(kwargs, places, self.prefix)
        if valid is not None:
            out = self._by_length(some, valid, flow.size, args, kwargs)
        else:
            mask, some = flow.mask(x.dtype), residual_of(some)
            out = self.base_layer(some, *args, **(kwargs if mask is None else {**kwargs, self.mask: mask}))
        if weight is not None:
            out = some + weight * (out - some)
        if run.decisions is not None and (router is not None or self.shortens):
            self._note(x, flow, places, valid, router)
        if rows is None or self.shortens:
            return out
        return x.flatten(0, 1).index_copy(0, rows, out.flatten(0, 1)).view_as(x)

    def _by_length(self, x: Tensor, valid: Tensor, size: Tensor | None, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Run the block on groups of images of similar length; filling in x [B, n, D] stays as it was.

        valid [B, n]: which entries are tokens, first in each row. size [B, n]: patches that each token stands for.
        """
        out, call = x.clone(), self.runtime.call
        lengths, offsets = valid.sum(1).tolist(), call.rows  # waits for the device
        for members in similar_lengths(lengths, CALL / (12 * x.shape[-1] ** 2)):
            most = lengths[members[-1]]
            if most == 0:  # these images have no tokens left
                continue
            rows = torch.tensor(members, device=x.device)
            some, here = x[:, :most].index_select(0, rows), valid[rows, :most]
            count = None if size is None else size[rows, :most]
            if lengths[members[0]] < most:
                count = here.float() if count is None else count * here
            own = {} if count is None else {self.mask: key_mask(count, x.dtype)}
            call.rows = None if offsets is None else offsets[rows]
            done = self.base_layer(some, *args, **{**kwargs, **own, **rotary_of(kwargs, rows, most - self.prefix)})
            out[rows, :most] = torch.where(here.unsqueeze(-1), done, some)
        call.rows = offsets
        return out

    def _merge_below(
        self, x: Tensor, flow: Flow, router: Router
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As `_merge_some`, but each image keeps the tokens with scores of at least 0; tokens [B, k, D] are filled up.
        The third result says which are no filling (None: all). Old places are None if no token has left."""
        linear, tokens, device = router.linear, x.shape[1], x.device
        lengths = torch.full((len(x),), tokens, device=device) if flow.valid is None else flow.valid.sum(1)
        shift = torch.as_tensor(router.shift(self.runtime.dial_of(x[:, 0, 0])), device=device).float().expand(len(x))
        given = flow.size, flow.score, linear.weight[0], linear.bias, router.distance_weight, self.top
        multiple = self.runtime.patch_counts(router.spec).multiple
        some, size, score, index, into, left = ops.merge_below(x, *given, lengths, shift, multiple)
        counts, before = torch.stack([left, lengths]).tolist()  # waits for the device
        most = max(counts)
        flow.size = size[:, :most]
        flow.score = score[:, :most]
        if counts == before:
            return x, None, flow.valid, None
        valid = None if min(counts) == most else torch.arange(most, device=device) < left[:, None]
        return some[:, :most], index[:, :most], valid, into

    def _merge_some(self, x: Tensor, flow: Flow, router: Router, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Merge tokens of x [B, n, D] until `keep` of each image are left: returns the tokens left [B, keep, D], their
        old places [B, keep], and the new places [B, n] of all tokens."""
        linear = router.linear
        given = flow.size, flow.score, linear.weight[0], linear.bias, router.distance_weight, self.top
        some, flow.size, flow.score, index, into = merge_for(self.base_layer, x, *given, keep)
        return some, index, into

    def _choose_some(
        self, x: Tensor, flow: Flow, router: Router, count: int | tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Choose which tokens go on: returns x [B, n, D], with merged patches; places [B, k] of these tokens (None:
        all); which are no filling [B, k] (None: all); new places [B, n] of all (None: unchanged); weights [B, k, 1]."""
        run, prefix, valid = self.runtime, self.prefix, flow.valid
        index = choosing = stand_in = None
        if isinstance(count, tuple):
            left = torch.full((len(x),), x.shape[1], device=x.device) if valid is None else valid.sum(1)
            choosing = torch.tensor(count, device=x.device) + prefix < left
        if self._idle(router, count, x.shape[1] - prefix, choosing):
            return x, None, valid, None, None
        score, rank, matches = self._rank(x, flow, router, choosing, valid)
        if self.merges or not isinstance(count, int):
            if count is None:
                count = self._in_multiples(router, rank, valid)
            known = None
            if isinstance(count, int):
                known = min(prefix + count, x.shape[1])
                open_ = selection.best(rank, known, 1) != 0
            elif count is None:
                open_ = rank + router.shift(run.dial_of(score)) >= 0
            else:  # each row keeps as many as its budget says
                rank = rank if valid is None else rank.masked_fill(~valid, -torch.inf)
                open_ = selection.best(rank, [prefix + k for k in count], 1) != 0
            gone = ~open_ if valid is None else ~open_ & valid
            index, valid = gather_open(open_ if valid is None else open_ & valid, known)
            if matches is not None:
                x, stand_in = self._take_in(x, flow, matches, gone)
                if flow.size is not None:
                    flow.size = flow.size.gather(1, index)
        elif count + prefix < x.shape[1]:
            index = rank.topk(count + prefix, dim=1).indices
        flow.score = score if index is None else score.gather(1, index)
        weight = self._weight(flow.score[:, prefix:], x.dtype) if router.spec.weight == "score" else None
        if index is not None and index.shape[1] == x.shape[1] and valid is None:
            index = None
        return x, index, valid, stand_in, weight

    def _rank(
        self, x: Tensor, flow: Flow, router: Router, choosing: Tensor | None, here: Tensor | None
    ) -> tuple[Tensor, Tensor, Matches | None]:
        """Return (scores [B, n], ranks [B, n] to choose by, Matches or None); here [B, n]: remaining tokens, None: all.

        Where patches merge, patches that may not merge now rank above all that may.
        """
        if not self.merges:
            score = self._scores(x, flow, router, choosing)
            return score, score, None
        matches = match(x, self.prefix, here)
        score = self._scores(x, flow, router, choosing, matches)
        stuck = ~matches.may_go if here is None else ~matches.may_go & here
        return score, score.masked_fill(stuck, NOT_NOW), matches

    def _in_multiples(self, router: Router, rank: Tensor, here: Tensor | None) -> tuple[int, ...] | None:
        """Return how many patches of each image pass by their ranks [B, n], in multiples; here as in `_rank`. None if
        any number of patches may pass, as while routers are trained: those with a rank of at least 0."""
        run = self.runtime
        counts = run.patch_counts(router.spec)
        if counts.multiple == 1 or run.training:
            return None
        here = torch.ones_like(rank, dtype=torch.bool) if here is None else here
        open_ = (rank + router.shift(run.dial_of(rank)) >= 0) & here
        wanted, left = (part[:, self.prefix :].sum(1).tolist() for part in (open_, here))
        return counts.near(wanted, left)

    def _take_in(self, x: Tensor, flow: Flow, matches: Matches, leaving: Tensor) -> tuple[Tensor, Tensor | None]:
        """Merge a share `leaving` [B, n] of each token of x [B, n, D] into its match: returns the tokens, and the new
        places [B, n] of all tokens (None if tokens are not restored)."""
        places = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        x, size = merge(x, flow.size, leaving.float(), matches.target)
        flow.size = size
        return x, torch.where(leaving.detach() > 0.5, matches.target, places) if self.runtime.restores else None

    def count(self, flow: Flow) -> int | tuple[int, ...] | None:
        """Return how many patches pass (see Runtime.patches_kept)."""
        router = self.router
        if router is None:
            return None
        carries = router.spec.dropped == "merge" or (self.shortens and router.spec.multiple != 1)
        so_far = flow.so_far if carries else None
        return self.runtime.patches_kept(router, flow.tokens - self.prefix, so_far)

    def _idle(self, router: Router, count: int | tuple[int, ...] | None, patches: int, choosing: Tensor | None) -> bool:
        """Return whether there is nothing to choose, since the quota lets all remaining patches pass."""
        if count is None or router.spec.weight == "score":
            return False
        if choosing is not None:
            return not bool(choosing.any())
        return isinstance(count, int) and count >= patches

    def _places(self, flow: Flow, index: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the original places of this block's tokens, at index [B, k] before it; None: all, or not needed."""
        if self.runtime.decisions is None and not rotary(kwargs, lambda rope: rope):
            return None
        if not self.shortens:
            return index
        if index is not None:
            flow.places = index if flow.places is None else flow.places.gather(1, index)
        return flow.places

    def _note(self, x: Tensor, flow: Flow, places: Tensor | None, valid: Tensor | None, router: Router | None) -> None:
        share = torch.ones(len(x), flow.tokens, device=x.device)
        if places is not None:
            share = torch.zeros_like(share).scatter(1, places, 1.0 if valid is None else valid.float())
        self.runtime.note(self.key, None if router is None else router.spec, share)

    def _mask(self, x: Tensor, args: Any, kwargs: dict[str, Any], flow: Flow, router: Router | None) -> Tensor:
        run = self.runtime
        if run.probed is not None and router is not None:
            return self._probe(x, args, kwargs, flow, run.probed)
        here = None if flow.kept is None else flow.kept[:, self.prefix :].detach() != 0
        patches = flow.tokens - self.prefix
        count, choosing = None if run.training else self.count(flow), None
        if isinstance(count, tuple):
            left = torch.full((len(x),), patches, device=x.device) if here is None else here.sum(1)
            choosing = torch.tensor(count, device=x.device) < left
        if count is not None and here is not None:
            patches = int(here[0].sum())  # waits for the device
        if router is not None and self._idle(router, count, patches, choosing):
            router = None
        if router is None:
            gate = flow.kept
        else:
            there = None if here is None else F.pad(here, (self.prefix, 0), value=True)
            score, rank, matches = self._rank(x, flow, router, choosing, there)
            flow.score = score if self.shortens else None
            if count is None:
                count = self._in_multiples(router, rank, there)
            gate = F.pad(run.choose(router, rank[:, self.prefix :], count, here), (self.prefix, 0), value=1.0)
            flow.kept = gate if self.shortens else None
            if matches is not None:
                leaving = 1 - gate if there is None else (1 - gate) * there
                x, moved = self._take_in(x, flow, matches, leaving)
                flow.stand_in = moved if flow.stand_in is None or moved is None else moved.gather(1, flow.stand_in)
        if self.router is not None or self.shortens:
            share = x.new_ones(x.shape[:2], dtype=torch.float32) if gate is None else gate
            noted = None if router is None else score[:, self.prefix :].unsqueeze(-1)
            run.note(self.key, None if self.router is None else self.router.spec, share, noted)
        if gate is None or (not torch.is_grad_enabled() and bool((gate == 1).all())):
            weighs = router is not None and router.spec.weight == "score"
            out = self._run(x, args, kwargs)
            return x + self._weight(score[:, self.prefix :], x.dtype) * (out - x) if weighs else out
        if torch.is_grad_enabled():
            # a key counts in proportion to its gate; a closed one very little, so that it learns whether it is missed
            weight = torch.log(gate * (1 - LEAK) + LEAK)
            weight = weight if flow.size is None else weight + flow.size.log()
            mask = repeat(weight.to(x.dtype), "b k -> b 1 q k", q=x.shape[1])
        else:
            mask = selection.hide_closed_keys(None, gate != 0, x.dtype, causal=False)
            bias = flow.mask(x.dtype)
            mask = mask if bias is None else mask + bias
        out = self._run(learning(x, mask), args, {**kwargs, self.mask: mask})
        gate = gate.to(x.dtype).unsqueeze(-1)
        if router is not None and router.spec.weight == "score":
            return x + gate.detach() * self._weight(score[:, self.prefix :], x.dtype) * (out - x)
        out = out * gate + x * (1 - gate)
        return at(out, flow.stand_in) if self.last and flow.stand_in is not None else out

    def _run(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Run the block; backward recomputes its activations where `Runtime.recompute` says so."""
        run: Any = self.base_layer
        if self.runtime.recompute and torch.is_grad_enabled():
            again = partial(recomputing, x.device)
            run = partial(checkpoint, self.base_layer, use_reentrant=False, context_fn=again)
        out: Tensor = run(x, *args, **kwargs)
        return out

    def _probe(
        self, x: Tensor, args: Any, kwargs: dict[str, Any], flow: Flow, probed: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Run the block with all gates open and requiring gradients, for calibration. A gate scales the token's update
        and the token's weight as a key, in this block and in later blocks that would lack the token."""
        gate = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device, requires_grad=True)
        features = F.rms_norm(x.detach(), x.shape[-1:])
        kept = gate if flow.kept is None else flow.kept * gate
        if self.merges:
            matches = match(x, self.prefix, every=True)
            features = torch.cat([features, matches.distance.unsqueeze(-1).to(x.dtype)], -1)
            x, size = merge(x, flow.size, 1 - gate, matches.target)
            flow.size = size
        probed[self.key] = gate, features
        flow.kept = kept if self.shortens else None
        weight = kept.log() if flow.size is None else kept.log() + flow.size.log()
        mask = repeat(weight, "b k -> b 1 q k", q=x.shape[1])
        out: Tensor = self.base_layer(learning(x, mask), *args, **{**kwargs, self.mask: mask})
        return out * kept.unsqueeze(-1) + x * (1 - kept.unsqueeze(-1))

    def _weight(self, score: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the factor [B, T, 1] of each token's update, from the scores of the tokens behind the prefix."""
        weight = selection.score_weight(score, over_gates=False).to(dtype)
        corrected = self.runtime.corrected(weight)
        weight = weight if corrected is None else 1 + (weight - 1) * corrected
        return F.pad(weight, (self.prefix, 0), value=1.0).unsqueeze(-1)


def similar_lengths(lengths: list[int], price: float) -> list[list[int]]:
    """Split rows with these lengths into groups, each from short to long, at the least cost: every row costs the length
    of the longest row of its group, and every group `price` tokens more."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = {0: (0.0, 0)}  # by number of rows: their least cost, and where their last group then begins
    for end in range(1, len(rows) + 1):
        if end == len(rows) or lengths[rows[end]] > lengths[rows[end - 1]]:
            longest = lengths[rows[end - 1]]
            best[end] = min((cost + price + (end - begin) * longest, begin) for begin, (cost, _) in best.items())
    groups, end = [], len(rows)
    while end:
        begin = best[end][1]
        groups.append(rows[begin:end])
        end = begin
    return groups
