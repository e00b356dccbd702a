"""Linear layers of which only a part is computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from students.architectures import Linear, weight_of
from students.execution.handover import BlockHandover, BranchHandover, Narrow, SiteHandover
from students.execution.runtime import Runtime
from students.execution.tokens import scatter_rows
from students.execution.wrapper import Named, Wrapper
from students.kernels import direct, ops
from students.kernels.packing import PackedProduct
from students.prepared import Stamp
from students.routers import ChannelRouter, Lora, selection

JOINT_ROWS = 2048
"""Up to so many tokens, layers that read the same channels are one product; for more its output would be too large."""


@dataclass
class SideBySide:
    """What the layers of a site hold, put together."""

    whole: Tensor
    """[I, outputs side by side]: weights, of which the layers' own are views."""
    product: PackedProduct
    """With them."""
    bias: Tensor | None = None
    down: Tensor | None = None
    """[ranks, I]: low-rank corrections; up: [rank, outputs]."""
    up: Tensor | None = None


class Site:
    """The linear layers of a block that read one input through one selection of channels, without gradients.

    Their weights are put together (see Student.prepare): [inputs, outputs side by side], of which the layers' own
    become views, so that there is one copy.

    name: as in the key of what is decided, such as "3.mlp_in". ends: whether the branch ends here. opens: whether a
    token on its own chooses heads or groups, which are then left out of this side of them. handover: the block's.
    """

    def __init__(self, name: str, ends: bool, opens: bool, handover: BlockHandover) -> None:
        self.name = name
        self.ends = ends
        self.opens = opens
        self.layers: list[RoutedLinear] = []
        self.handover = SiteHandover()
        handover.sites.append(self.handover)
        self._stamp = Stamp()
        self._drop()

    def _drop(self) -> None:
        """Hold nothing that is prepared."""
        self._laid: SideBySide | None = None
        self.limit: Tensor | None = None
        """[I]: what a channel has to reach (see ChannelRouter.limit); None: it differs between rows."""
        self._limit: Tensor | None = None
        """The limit that was made last, written in place: recorded steps read it (execution/fixed.py)."""
        self._mask: Callable[[Tensor], Tensor] | None = None
        self._reader: Callable[[Tensor], tuple[Tensor, int | Tensor]] | None = None
        self._stamp.reset()

    @property
    def laid(self) -> SideBySide:
        """What `lay_out` has put together."""
        assert self._laid is not None, "Student.prepare comes first"
        return self._laid

    def take(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """The layer's output [..., O] for x [..., I]; the layer that comes first has all of them computed."""
        waiting = self.handover.outputs
        out = waiting[layer.place] if waiting else None
        if out is None:
            made = self.outputs(x)
            out, waiting = made[layer.place], [*made]
            self.handover.outputs = waiting
        waiting[layer.place] = None
        return out

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Outputs of all layers for x [..., I]."""
        call, limit = self.layers[0].runtime.call, self.limit
        if call.alone and self._reader is not None:  # read only what the token selects
            out, count = self._reader(x)
            self._note(lambda: torch.as_tensor(count / x.shape[-1]).expand(x.shape[:-1]))
        elif limit is not None and call.rows is None and ops.reads_few(call.tokens, self.laid.whole, self._ends):
            self._note(lambda: (x.abs() >= limit).float().mean(-1))
            laid, flat = self.laid, x.flatten(0, -2)
            out, _ = ops.few_channels(flat, limit, laid.whole, laid.bias, laid.down, laid.up, self._ends)
        else:
            return self._many(x)
        out = out.view(*x.shape[:-1], -1)
        return [out] if len(self.layers) == 1 else list(out.split(self._sizes, -1))

    def _many(self, x: Tensor) -> list[Tensor]:
        """Many tokens: nothing is saved by leaving channels out, so they are masked."""
        first, run, laid = self.layers[0], self.layers[0].runtime, self.laid
        if run.call.rows is None and run.decisions is None and self._mask is not None:
            masked = self._mask(x)
        else:
            limit = self.limit if run.call.rows is None else None
            if limit is None:
                limit = first.routers["channel"].limit(first.dial_of(x), x.dtype)
            masked, share = ops.channel_gate(x, limit)
            self._note(lambda: share)
        masked = masked.flatten(0, -2)
        if len(masked) <= JOINT_ROWS:
            outs = laid.product(masked, laid.whole.T, laid.bias, like=first.base_layer).split(self._sizes, 1)
        else:
            outs = [layer.base_layer(masked) for layer in self.layers]
        if laid.down is not None and laid.up is not None:
            low = F.linear(x.flatten(0, -2), laid.down)
            corrected = first.corrected(x)
            if corrected is not None:
                low = (low.view(*x.shape[:-1], -1) * corrected).flatten(0, -2)
            parts = zip(outs, low.chunk(len(outs), 1), laid.up.split(self._sizes, 1), strict=True)
            for out, part, up in parts:
                torch.addmm(out, part, up, out=out)
        return [out.view(*x.shape[:-1], -1) for out in outs]

    def one(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """The output of one layer only, for a token x [1, 1, I] on its own."""
        part = slice(self._ends[layer.place] - layer.outputs, self._ends[layer.place])
        laid, limit = self.laid, self.limit
        assert limit is not None, "a token on its own has one budget"
        down = None if laid.down is None else laid.down.chunk(len(self.layers))[layer.place]
        up = None if laid.up is None else laid.up[:, part].contiguous()
        bias = None if laid.bias is None else laid.bias[part]
        out, count = ops.read_channels(x.flatten(), limit, laid.whole[:, part], bias, down, up, [layer.outputs])
        layer.note(torch.as_tensor(count / layer.inputs).expand(x.shape[:-1]))
        return out.view(*x.shape[:-1], -1)

    def open_channels(self, x: Tensor, channels: Tensor) -> Tensor:
        """From x [1, 1, n], the open channels of a token on its own, the only layer's output without corrections."""
        layer = self.layers[0]
        full = x.new_zeros(layer.inputs).index_copy_(0, channels, x.flatten())
        limit = torch.full_like(full, torch.inf, dtype=torch.float32).index_fill(0, channels, 0.0)
        out, _ = ops.read_channels(full, limit, self.laid.whole, layer.base_layer.bias, None, None, self._ends)
        return out.view(*x.shape[:-1], -1)

    def _note(self, share: Callable[[], Tensor]) -> None:
        if self.layers[0].runtime.decisions is not None:
            self.layers[0].note(share())

    def lay_out(self) -> None:
        """Put weights, biases and corrections of all layers side by side, where a token reads only some inputs."""
        if not (self.ends and self.opens) and "channel" not in self.layers[0].routers:
            return
        self._sizes = [layer.outputs for layer in self.layers]
        self._ends = list(itertools.accumulate(self._sizes))
        lora = [layer.lora for layer in self.layers if layer.lora is not None]
        bases = [layer.base_layer for layer in self.layers]
        weights = [base.weight for base in bases]
        if self._stamp.renew(weights) or self._laid is None:
            columns = [base.weight if isinstance(base, Conv1D) else base.weight.T for base in bases]
            whole = torch.cat([part.detach() for part in columns], 1)
            for base, part in zip(bases, whole.split(self._sizes, 1), strict=True):
                base.weight.data = part if isinstance(base, Conv1D) else part.T
            self._laid = SideBySide(whole, PackedProduct())
            self._stamp.renew(weights)
        laid = self._laid
        laid.bias = laid.down = laid.up = self._limit = None
        if any(base.bias is not None for base in bases):
            biases = [base.bias for base in bases]
            zeros = [laid.whole.new_zeros(size) for size in self._sizes]
            laid.bias = torch.cat([z if b is None else b.detach() for b, z in zip(biases, zeros, strict=True)])
        if lora:
            dtype = laid.whole.dtype
            laid.down = torch.cat([part.down.detach() for part in lora]).to(dtype)
            laid.up = torch.cat([part.up.detach() for part in lora]).T.to(dtype).contiguous()

    def set_dial(self) -> None:
        """Limits, where all rows of a batch share them."""
        first, self.limit = self.layers[0], None
        if "channel" in first.routers and not isinstance(first.runtime.offset, tuple):
            laid = self.laid
            limit = first.routers["channel"].limit(first.runtime.offset, laid.whole.dtype)
            if self._limit is None:
                self._limit = limit
                self._mask = direct.channel_gate(limit, laid.whole.dtype)
                self._reader = direct.read_channels(limit, laid.whole, laid.bias, laid.down, laid.up, self._ends)
            self.limit = self._limit.copy_(limit)

    def forget(self) -> None:
        """Give every layer a weight of its own again, as the model had it."""
        if self._laid is None:
            return
        for layer in self.layers:
            layer.base_layer.weight.data = layer.base_layer.weight.data.contiguous()
        self._drop()


class RoutedLinear(Wrapper):
    """A linear layer of which only a part is computed, with an optional low-rank correction.

    site: the layers that share its input and one selection of channels, which the first of them to run makes. branch:
    where its branch hands over what is open. part: which of a branch's heads or groups this
    layer touches: the "inputs" it reads (o, down), the "outputs" it writes (q, gate, up), or none. per_query: its
    output is wanted only for tokens that attend (q, o).
    """

    base_layer: Linear

    def __init__(
        self,
        base_layer: Linear,
        runtime: Runtime,
        site: Site,
        branch: BranchHandover,
        *,
        part: Literal["inputs", "outputs", ""],
        per_query: bool,
    ) -> None:
        super().__init__(base_layer, runtime)
        self.site = site
        self.branch = branch
        self.part = part
        self.per_query = per_query
        self.outputs, self.inputs = weight_of(base_layer).shape
        self.routers = Named[ChannelRouter]()
        self.lora: Lora | None = None
        self.place = len(site.layers)
        self.selects = False  # set by add_channels
        self._slice: tuple[Tensor | None, Any] = (None, None)
        self._low: tuple[Tensor, Tensor] | None = None
        site.layers.append(self)

    def lay_out(self) -> None:
        """Put the layers of the site side by side, once for all of them, and corrections into the model's precision."""
        self._slice = None, None
        base = self.base_layer
        if self.place == 0:
            self.site.lay_out()
        if self.part == "outputs" and self.site.opens and not weight_of(base).is_contiguous():
            base.weight.data = base.weight.data.T.contiguous().T
        if self.lora is not None and not self.selects:
            dtype = base.weight.dtype
            self._low = self.lora.down.detach().to(dtype), self.lora.up.detach().T.to(dtype).contiguous()

    def set_dial(self) -> None:
        """The site's limits, and what a static choice leaves of the weight."""
        if self.place == 0:
            self.site.set_dial()
        if "channel" in self.routers and self.routers["channel"].spec.network == "static":
            self._slice = None, None
            if self.site.limit is not None:
                channels = (self.site.limit == 0).nonzero().squeeze(1)
                self._slice = channels, weight_of(self.base_layer)[:, channels].contiguous()

    def forget(self) -> None:
        """As the model had it."""
        self._slice, self._low = (None, None), None
        if self.place == 0:
            self.site.forget()
        self.base_layer.weight.data = self.base_layer.weight.data.contiguous()

    def add_channels(self, router: ChannelRouter) -> None:
        """Choose the channels that are read with this router, which all layers of the site share."""
        self.routers["channel"] = router
        for layer in self.site.layers:  # one runs for all where all run on the same tokens, and whole
            layer.selects = router.spec.network != "static" and not any(x.part or x.per_query for x in self.site.layers)

    def forward(self, x: Tensor) -> Tensor:
        run = self.runtime
        if run.bypass:
            out: Tensor = self.base_layer(x)
            return out
        if run.call.skipping and self.selects:
            return self.site.take(self, x)
        queries = self.branch.queries
        if queries is None or not self.per_query:
            early = self.site.handover.early
            return early.pop(0) if early else self._compute(x, together=queries is None)
        if queries.pending and not self.site.ends:  # keys and values run while the host waits
            self.site.handover.early = [layer._compute(x, together=False) for layer in self.site.layers[1:]]
        if queries.every:
            return self._compute(x, together=False)
        out = self._compute(x.flatten(0, 1).index_select(0, queries.rows).unsqueeze(0), together=False)
        if self.site.ends:
            return out  # the branch ends here and goes on with these tokens
        return scatter_rows(out.squeeze(0), queries.rows, x.shape[:-1].numel()).view(*x.shape[:-1], -1)

    def _compute(self, x: Tensor, together: bool) -> Tensor:
        narrow = self.branch.narrow if self.part else None
        if narrow is not None:
            return self._read_open(x, narrow) if self.part == "inputs" else self._write_open(x, narrow)
        if self.part == "inputs":
            gate, self.branch.gate = self.branch.gate, None
            x = x if gate is None else x * gate
        if "channel" not in self.routers:
            return self._correct(self.base_layer(x), x)
        router = self.routers["channel"]
        if self._alone(x):
            return self.site.take(self, x) if together else self.site.one(self, x)
        call = self.runtime.call
        if call.skipping and router.spec.network == "static" and call.rows is None:
            return self._read_static(x)
        return self._correct(self.base_layer(self._mask(router, x, together)), x)

    def _owner(self) -> Tensor | None:
        """The row of the batch that each of this call's tokens belongs to, where they are packed."""
        rows = self.branch.rows
        if rows is None or rows.all:
            return None
        few = self.site.ends or (self.per_query and self.branch.queries is not None)
        index = rows.queries if few else rows.keys
        return None if index is None else index // rows.shape[1]

    def dial_of(self, x: Tensor) -> float | Tensor:
        """The dial for x [..., I] (see Runtime.dial_of)."""
        return self.runtime.dial_of(x, None if self.runtime.call.rows is None else self._owner())

    def corrected(self, x: Tensor) -> Tensor | None:
        """Which tokens of x [..., I] are corrected (see Runtime.corrected)."""
        return None if self.runtime.call.rows is None else self.runtime.corrected(x, self._owner())

    def _alone(self, x: Tensor) -> bool:
        """Whether this is one token, decoded on its own: then reading less is faster."""
        return self.runtime.call.alone and x.shape[:-1].numel() == 1

    def note(self, share: Tensor) -> None:
        """Record the share of channels that was read; 0 for tokens that are not here."""
        run, rows, ends = self.runtime, self.branch.rows, self.site.ends
        asked = self.per_query and self.branch.queries is not None
        if run.decisions is None or (asked and not ends):  # keys and values read for more tokens
            return
        here = None if rows is None or rows.all else rows.queries if ends else rows.keys
        if here is not None and rows is not None:
            full = share.new_zeros(rows.shape.numel())
            share = full.index_copy_(0, here, share.flatten()).view(rows.shape)
        run.note(f"{self.site.name}.channel", self.routers["channel"].spec, share)

    def _correct(self, out: Tensor, x: Tensor) -> Tensor:
        """out [..., O] of our own making plus the low-rank correction from x [..., I]."""
        if self.lora is None:
            return out
        call = self.runtime.call
        if not call.skipping or call.rows is not None:
            return out + self._only_corrected(self.lora(x), x)
        assert self._low is not None, "Student.prepare comes first"
        flat, (down, up) = out.view(-1, self.outputs), self._low
        torch.addmm(flat, F.linear(x.reshape(-1, self.inputs), down), up, out=flat)
        return out

    def _only_corrected(self, low: Tensor, x: Tensor) -> Tensor:
        """The low-rank correction [..., O] from x [..., I], but for rows that are the teacher's."""
        corrected = self.corrected(x)
        return low if corrected is None else low * corrected

    def _mask(self, router: ChannelRouter, x: Tensor, together: bool) -> Tensor:
        """x without the channels that stay closed; the first layer of a site chooses for all."""
        passed = self.site.handover
        if together and passed.masked is not None:
            masked, passed.left = passed.masked, passed.left - 1
            if not passed.left:
                passed.masked = None
            return masked
        masked, share = read_channels(router, x, self.dial_of(x))
        self.note(share)
        if together and len(self.site.layers) > 1:
            passed.masked, passed.left = masked, len(self.site.layers) - 1
        return masked

    def _read_static(self, x: Tensor) -> Tensor:
        """The same channels for every token: a smaller matrix product."""
        channels, weight = self._slice
        assert channels is not None, "Student.prepare comes first"
        self.note(x.new_full(x.shape[:-1], len(channels) / self.inputs, dtype=torch.float32))
        return self._correct(F.linear(x[..., channels], weight, self.base_layer.bias), x)

    def _write_open(self, x: Tensor, narrow: Narrow) -> Tensor:
        """Outputs of open heads or groups only: [..., n], or [..., 2 n] where a layer holds gate and up."""
        copies = self.outputs // narrow.size
        rows = torch.cat([narrow.channels + copy * narrow.size for copy in range(copies)])
        base = self.base_layer
        if self._alone(x) and not narrow.keep:
            out = ops.dot_rows(x.flatten(), weight_of(base), base.bias, rows).view(*x.shape[:-1], -1)
        else:
            weight, bias = self._sliced(
                narrow.channels, lambda: (weight_of(base)[rows], None if base.bias is None else base.bias[rows])
            )
            out = F.linear(x, weight, bias)
        if self.lora is None:
            return out
        low = F.linear(F.linear(x, self.lora.down.to(x.dtype)), self.lora.up[rows].to(x.dtype))
        return out + self._only_corrected(low, x)

    def _read_open(self, x: Tensor, narrow: Narrow) -> Tensor:
        """From x [..., n], the channels of open heads or groups only."""
        channels = narrow.channels
        if narrow.weight is not None:
            x = x * narrow.weight
        if self._alone(x) and not narrow.keep:
            out = self.site.open_channels(x, channels)
        else:
            weight = self._sliced(channels, lambda: weight_of(self.base_layer)[:, channels].contiguous())
            out = F.linear(x, weight, self.base_layer.bias)
        if self.lora is None:
            return out
        low = F.linear(F.linear(x, self.lora.down[:, channels].to(x.dtype)), self.lora.up.to(x.dtype))
        return out + self._only_corrected(low, x)

    def _sliced(self, choice: Tensor, make: Callable[[], Any]) -> Any:
        """Parts of the weight for a choice that stands, made once while the same tensor says so."""
        if self._slice[0] is not choice:
            self._slice = choice, make()
        return self._slice[1]


def read_channels(router: ChannelRouter, x: Tensor, dial: float | Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] without the channels that stay closed, and the share that is read [...]; dial: its offset for x."""
    log_limit = router.log_limit_at(dial)
    if router.spec.network == "static":
        gate = selection.threshold(-log_limit)
        return x * gate.to(x.dtype), gate.mean(-1).expand(x.shape[:-1])
    return selection.channel(x, log_limit)
