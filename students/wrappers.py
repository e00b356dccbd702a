"""Modules that stand in front of a frozen model's own: they hold `base_layer` and never copy its forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students import gates
from students.routers import ChannelRouter, Lora, VocabRouter
from students.runtime import Runtime


class Wrapper(nn.Module):
    """A module in place of another; unknown attributes are the other's."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.runtime = runtime

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class RoutedBranch(Wrapper):
    """An attention or MLP branch whose routers read its input.

    block: the block's number. branch: "attn" or "mlp". prenorm: whether the input is normalised already.
    late_exit: gates are applied by a RoutedExit further on (post-norm architectures) instead of here.
    """

    def __init__(
        self, base_layer: nn.Module, runtime: Runtime, block: int, branch: str, prenorm: bool, late_exit: bool
    ) -> None:
        super().__init__(base_layer, runtime)
        self.block = block
        self.branch = branch
        self.prenorm = prenorm
        self.late_exit = late_exit
        self.routers = nn.ModuleDict()
        self.substitutes = nn.ModuleDict()
        self.routed_block = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.runtime
        if run.bypass:
            return self.base_layer(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        features = x if self.prenorm else F.rms_norm(x, x.shape[-1:])
        exits = []
        keys_kept: Tensor | None = None
        for kind in ("token", "layer"):
            decided = self._branch_gate(kind, features)
            if decided is None:
                continue
            gate, closed = decided
            exits.append((gate, closed * self.substitutes[kind](x) if kind in self.substitutes else None))
            if self.branch == "attn" and self.routers[kind].spec.kv == "drop":
                kept = closed.detach() == 0
                keys_kept = kept if keys_kept is None else keys_kept & kept
        for kind in ("head", "expert"):
            if kind in self.routers:
                key = f"{self.block}.{self.branch}.{kind}"
                gate, _ = run.decide(key, self.routers[kind], features)
                run.passed[key] = gate.index_select(-1, self.routers[kind].members)
        if keys_kept is not None:
            kwargs = self._without_closed_keys(x, keys_kept, kwargs)
        out = self.base_layer(*args, **kwargs)
        if self.late_exit:
            run.passed[f"{self.block}.{self.branch}.exit"] = exits
            return out
        if isinstance(out, tuple):
            return apply_exits(out[0], exits), *out[1:]
        return apply_exits(out, exits)

    def _branch_gate(self, kind: str, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """(gate, closed), each [B, T, 1]. A layer gate is decided in front of attention and handed on to the MLP."""
        if kind == "layer" and self.routed_block and self.branch == "mlp":
            return self.runtime.passed.pop(f"{self.block}.layer")
        if kind not in self.routers:
            return None
        key = f"{self.block}.layer" if kind == "layer" else f"{self.block}.{self.branch}.{kind}"
        decided = self.runtime.decide(key, self.routers[kind], features)
        if kind == "layer":
            self.runtime.passed[key] = decided
        return decided

    def _without_closed_keys(self, x: Tensor, kept: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("past_key_values") is not None or kwargs.get("layer_past") is not None:
            raise NotImplementedError("the K/V policy `drop` with a KV cache: pass use_cache=False")
        kept = kept.squeeze(-1).expand(x.shape[:2])
        return {**kwargs, "attention_mask": gates.hide_closed_keys(kwargs.get("attention_mask"), kept, x.dtype)}


class RoutedExit(Wrapper):
    """The last module of a branch (a post-norm): what the branch decided is applied to its output."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime, block: int, branch: str) -> None:
        super().__init__(base_layer, runtime)
        self.key = f"{block}.{branch}.exit"

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out if self.runtime.bypass else apply_exits(out, self.runtime.passed.pop(self.key))


def apply_exits(out: Tensor, exits: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """out * gate + substitute for each (gate [B, T, 1], gated substitute [B, T, D] or None) in turn."""
    for gate, substitute in exits:
        out = out * gate if substitute is None else torch.addcmul(substitute, out, gate)
    return out


class RoutedLinear(Wrapper):
    """A linear layer that reads only some of its input channels, with an optional low-rank correction.

    site: "attn_in", "attn_out", "mlp_in" or "mlp_out". layers: how many linear layers read the same input there; they
    share one selection, which the first to run makes. gated_by: under which name the branch hands over the gates
    [B, T, in] of heads or expert groups.
    """

    def __init__(
        self, base_layer: nn.Module, runtime: Runtime, block: int, site: str, layers: int, gated_by: str | None
    ) -> None:
        super().__init__(base_layer, runtime)
        self.site = f"{block}.{site}"
        self.layers = layers
        self.gated_by = gated_by
        self.routers = nn.ModuleDict()
        self.lora: Lora | None = None

    def forward(self, x: Tensor) -> Tensor:
        run = self.runtime
        if run.bypass:
            return self.base_layer(x)
        if self.gated_by is not None:
            x = x * run.passed.pop(self.gated_by)
        out = self.base_layer(self._read(x) if "channel" in self.routers else x)
        return out if self.lora is None else out + self.lora(x)

    def _read(self, x: Tensor) -> Tensor:
        """x without the channels that stay closed."""
        read, left = self.runtime.passed.pop(self.site, (None, self.layers))
        if read is None:
            read, share = read_channels(self.routers["channel"], x, self.runtime.offset)
            self.runtime.note(f"{self.site}.channel", share)
        if left > 1:
            self.runtime.passed[self.site] = read, left - 1
        return read


def read_channels(router: ChannelRouter, x: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """x [..., C] without the channels that stay closed, and the share that is read [...]."""
    if router.spec.network == "static":
        gate = gates.threshold(offset - router.log_limit)
        return x * gate.to(x.dtype), gate.mean().expand(x.shape[:-1])
    return gates.channel(x, router.log_limit - offset)


class RoutedHead(Wrapper):
    """The LM head, exact for the rows a token needs and previewed for the rest."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime, router: VocabRouter) -> None:
        super().__init__(base_layer, runtime)
        self.routers = nn.ModuleDict({"vocab": router})

    def tensors(self) -> tuple[Tensor, ...]:
        """What `routed_logits` needs of the router: its parameters, and what is worth computing once for many rows."""
        router = self.routers["vocab"]
        return router.spread, router.tail, router.preview_weight(self.base_layer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.runtime.bypass:
            return self.base_layer(hidden)
        logits, share = self.routed_logits(hidden, *self.tensors())
        self.runtime.note("vocab", share)
        return logits

    def routed_logits(
        self, hidden: Tensor, spread: Tensor, tail: Tensor, preview_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden [..., D] -> logits [..., V], exact where the preview reaches the limit and preview + tail elsewhere,
        and the share of exact rows [...]."""
        router = self.routers["vocab"]
        features = router.features(hidden)
        limit = router.limit(features, spread) - self.runtime.offset
        return gates.rows(self.base_layer(hidden), F.linear(features, preview_weight), limit, tail)
