"""The LM head with a vocab router: some logits are exact, the others come from a low-rank preview."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from students.execution.runtime import Runtime
from students.execution.wrapper import Named, Wrapper
from students.kernels import ops
from students.kernels.autograd import RoutedKL, RowGate
from students.kernels.cpu.pages import large_pages
from students.kernels.packing import PackedLinear, PackedProduct
from students.prepared import InPrecision, Stamp
from students.routers import VocabRouter
from students.shards import open_unit
from students.spec import RouterSpec


class RoutedHead(Wrapper):
    """The LM head, exact for the rows a token needs and previewed for the rest."""

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Module, runtime: Runtime, router: VocabRouter, spec: RouterSpec) -> None:
        super().__init__(base_layer, runtime)
        self.routers = Named[VocabRouter]({"vocab": router})
        self.spec = spec
        self._preview: Tensor | None = None
        self._stamp = Stamp()
        self._product = PackedProduct()
        self._down, self._down_product = InPrecision(), PackedProduct()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the router's arguments of `routed_logits`: spread, tail, preview weight [V, r] and log gain.

        The preview weight costs a product with the head, so that callers compute it once for many tokens.
        """
        router = self.routers["vocab"]
        gain = torch.zeros_like(router.spread) if router.log_gain is None else router.log_gain
        return router.spread, router.tail, self._preview_weight(), gain

    def lay_out(self) -> None:
        """Make the preview weight, and the weight of the features in the head's precision."""
        self._preview_weight()
        self._features_weight()

    def pack(self) -> bool:
        """Pack both weights of the preview; the head's own packed weight is still needed (False)."""
        if isinstance(self.base_layer, PackedLinear):
            self._product.prepare(self._preview_weight())
            self._down_product.prepare(self._features_weight())
        return False

    def forget(self) -> None:
        """Drop the preview weight."""
        self._preview = None
        self._stamp.reset()

    def _features_weight(self) -> Tensor:
        """Return the weight [r, D] of `VocabRouter.features` in the head's precision."""
        return self._down(self.base_layer.weight.dtype, self.routers["vocab"].down)[0]

    def _preview_weight(self) -> Tensor:
        """Return the preview weight [V, r], made again when router or head change; mask execution reads it too."""
        router, weight = self.routers["vocab"], self.base_layer.weight
        if torch.compiler.is_compiling() and self._preview is not None:
            return self._preview
        if self._stamp.renew([router.up, weight]) or self._preview is None:
            open_unit(self.base_layer)
            made = router.preview_weight(weight.detach())
            self._preview = large_pages.empty(made, *made.shape).copy_(made)
        return self._preview

    def forward(self, hidden: Tensor) -> Tensor:
        run = self.runtime
        if run.bypass:
            out: Tensor = self.base_layer(hidden)
            return out
        if run.call.skipping and hidden.shape[:-1].numel() <= ops.exact_together(hidden):
            dial = run.dial_of(hidden)
            if run.call.rows is not None and isinstance(dial, Tensor):
                dial = dial.expand(*hidden.shape[:-1], 1).flatten(0, -2)
            logits, share = self._some_rows(hidden.flatten(0, -2), dial)
            logits, share = logits.view(*hidden.shape[:-1], -1), share.view(hidden.shape[:-1])
        else:
            logits, share = self.routed_logits(hidden, *self.tensors())
        run.note(self.spec.kind, self.spec, share)
        return logits

    def _some_rows(self, hidden: Tensor, dial: float | Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, D] -> logits [n, V] and the share of exact rows [n]; only exact rows of the head are read. dial:
        one offset, or one for each token [n, 1]."""
        router, base, up = self.routers["vocab"], self.base_layer, self._preview_weight()
        weight, alone = self._features_weight(), len(hidden) == 1
        features = ops.dot_rows(hidden[0], weight, None, None)[None] if alone else self._down_product(hidden, weight)
        gain = 1.0 if router.log_gain is None else router.log_gain.exp()
        limit = router.limit(features, router.spread, gain, dial).squeeze(-1)
        preview = ops.dot_rows(features[0], up, None, None)[None] if alone else self._product(features, up)
        tail = router.tail.to(hidden.dtype)
        logits, count = ops.exact_rows(hidden, base.weight, base.bias, preview, limit.to(hidden.dtype), tail)
        return logits, count / len(base.weight)

    def routed_logits(self, hidden: Tensor, *tensors: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden [..., D] -> logits [..., V], exact where the preview reaches the limit and preview + tail elsewhere,
        and the share of exact rows [...]. tensors: the result of `tensors`; owner: as in Runtime.dial_of, where hidden
        [N, D] is flat."""
        out: tuple[Tensor, Tensor] = RowGate.apply(*self._parts(hidden, tensors, owner))
        return out

    def routed_kl(
        self, hidden: Tensor, teacher: Tensor, *tensors: Tensor, owner: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return KL(teacher || student) [N], in nats, and the share of exact rows [N], for hidden [N, D] and the
        teacher's logits [N, V]. The student's logits, those of `routed_logits`, are never stored. Backward can run only
        once."""
        out: tuple[Tensor, Tensor] = RoutedKL.apply(*self._parts(hidden, tensors, owner), teacher)
        return out

    def open_share(self, hidden: Tensor, *tensors: Tensor, owner: Tensor | None = None) -> Tensor:
        """Return the share of exact rows [...] that `routed_logits` returns, without any logit."""
        preview, limit = self._previewed(hidden, tensors, owner)
        return (preview >= limit).mean(-1, dtype=torch.float32)

    def _parts(self, hidden: Tensor, tensors: tuple[Tensor, ...], owner: Tensor | None) -> tuple[Tensor, ...]:
        """Return exact logits and previewed logits [..., V], the limit [..., 1] of the preview, and the tail."""
        return self.base_layer(hidden), *self._previewed(hidden, tensors, owner), tensors[1]

    def _previewed(self, hidden: Tensor, tensors: tuple[Tensor, ...], owner: Tensor | None) -> tuple[Tensor, Tensor]:
        router, (spread, _, preview, log_gain) = self.routers["vocab"], tensors
        features = router.features(hidden)
        limit = router.limit(features, spread, log_gain.exp(), self.runtime.dial_of(features, owner))
        return self._product(features, preview), limit
