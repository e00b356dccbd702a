"""Linear layers that share an input and one selection of its channels, computed together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from students.execution.block_context import BlockContext, LinearGroupContext
from students.kernels import devices, direct, ops
from students.kernels.cpu.pages import large_pages
from students.kernels.deferred import entering, gate, gated, output, settled, summand
from students.kernels.packing import PackedLinear, PackedProduct
from students.prepared import Stamp

if TYPE_CHECKING:
    from students.execution.linear import RoutedLinear

JOINT_ROWS = 2048
"""Up to so many tokens, layers that read the same channels run as one product; for more, its output is too large."""


@dataclass
class SideBySide:
    """Weights, biases and corrections of a group's layers, side by side."""

    whole: Tensor
    """Weights [I, outputs of all layers]; the layers' own weights are views of this tensor."""
    product: PackedProduct
    """The product with `whole`, which may be packed."""
    none: Tensor
    """Zeros [I]: a limit that all channels reach."""
    least: Tensor
    """The least positive numbers [I]: a limit that all channels reach but those that are 0."""
    bias: Tensor | None = None
    down: Tensor | None = None
    """Low-rank corrections: down [layers * rank, I], up [rank, outputs of all layers]."""
    up: Tensor | None = None


class LinearGroup:
    """The linear layers of a block that read one input through one selection of channels, without gradients.

    Their weights are laid side by side in one tensor [inputs, outputs of all layers] (see Student.prepare), of which
    the layers' own weights become views, so that there is one copy.

    name: the start of decision keys, such as "3.mlp_in". ends: whether these layers are the last of their branch.
    opens: whether a token on its own chooses heads or groups, of which the layers leave out the closed ones. opaque:
    whether weights can only be read whole, so that inputs are masked. context: state of the block.
    """

    def __init__(self, name: str, context: BlockContext, *, ends: bool, opens: bool, opaque: bool) -> None:
        self.name = name
        self.ends = ends
        self.opens = opens
        self.opaque = opaque
        self.gates = False  # set by join_product
        """Whether these layers are an MLP's gate and up, whose product the layer that reads it can compute itself."""
        self.layers: list[RoutedLinear] = []
        self.context = LinearGroupContext()
        context.linear_groups.append(self.context)
        self._stamp = Stamp()
        self._drop()

    def _drop(self) -> None:
        """Drop everything that is prepared."""
        self._laid: SideBySide | None = None
        self.limit: Tensor | None = None
        """Limit [I] that channel magnitudes have to reach (see ChannelRouter.limit); None: it differs between rows."""
        self._limit: Tensor | None = None
        """The tensor of the last limit, overwritten in place because recorded steps read it (recording/step.py)."""
        self._reader: Callable[[Tensor], tuple[Tensor, int | Tensor]] | None = None
        self._stamp.reset()

    @property
    def laid(self) -> SideBySide:
        """The tensors that `lay_out` has laid side by side."""
        assert self._laid is not None, "Student.prepare comes first"
        return self._laid

    def take(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """Return one layer's output [..., O] for x [..., I]; the first layer to ask has all outputs computed."""
        waiting = self.context.outputs
        out = waiting[layer.place] if waiting else None
        if out is None:
            made = self.outputs(x)
            out, waiting = made[layer.place], [*made]
            self.context.outputs = waiting
        waiting[layer.place] = None
        return out

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the outputs [..., O] of all layers for x [..., I]."""
        run, limit = self.layers[0].runtime, self.limit
        call = run.call
        if run.bypass:
            return self._joined(x)
        if limit is not None and call.rows is None and run.decisions is None and self._defers(x):
            if ops.reads_few(call.tokens, self.laid.whole, self._ends):
                return self._joined(x)
            if self.laid.down is None and ops.compiled(x):
                return self._gated(x, limit)
        x = settled(x)
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

    def reads_all(self, x: Tensor) -> bool:
        """Return whether the teacher's layers may run like routed layers that read all channels (see Runtime.recorded):
        only while their weights are views of `whole`."""
        laid, first = self._laid, self.layers[0]
        if laid is None or not (self._defers(x) and ops.reads_few(first.runtime.recorded, laid.whole, self._ends)):
            return False
        return laid.whole.data_ptr() == first.base_layer.weight.data_ptr()

    def _defers(self, x: Tensor) -> bool:
        """Whether launches are saved by including what stands in front of the layers and behind them."""
        return devices.runs_ahead(x.device) and not torch.compiler.is_compiling()

    def _joined(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of all layers from one launch. That of a branch's last layer is deferred, so that the
        launch can add the residual stream; that of an MLP's gate can be multiplied by up in the next launch."""
        laid, shape = self.laid, torch.Size([*x.shape[:-1], self._ends[-1]])
        limit, down, up = self.limit, laid.down, laid.up
        if self.layers[0].runtime.bypass:
            limit, down, up = laid.none, None, None

        def launch(residual: Tensor | None) -> tuple[Tensor, Tensor]:
            added = None if residual is None else residual.flatten(0, -2)
            out, _, squares = ops.fused_channels(
                *entering(x), added, limit, laid.whole, laid.bias, down, up, self._ends
            )
            return out.view(shape), squares

        if self.ends and len(self.layers) == 1:
            return [output(shape, x, launch)]
        outs = [*launch(None)[0].split(self._sizes, -1)]
        if self.gates:
            outs[0] = gate(outs[0])
        return outs

    def _gated(self, x: Tensor, limit: Tensor) -> list[Tensor]:
        """As `_many`, without corrections: the launch that masks closed channels also computes what stands in front of
        the layers, and adds an earlier output to the residual stream."""
        outs = [out.view(*x.shape[:-1], -1) for out in self._products(gated(x, limit))]
        if self.ends and len(outs) == 1:
            return [summand(outs[0])]
        if self.gates:
            outs[0] = gate(outs[0])
        return outs

    def _products(self, masked: Tensor) -> list[Tensor]:
        """Return the outputs of all layers for masked inputs [N, I], without corrections."""
        if len(masked) > JOINT_ROWS:
            return [layer.base_layer(masked) for layer in self.layers]
        out: Tensor = self.laid.product(masked, self.laid.whole.T, self.laid.bias)
        return list(out.split(self._sizes, 1))

    def _many(self, x: Tensor) -> list[Tensor]:
        """Compute outputs for many tokens: leaving out channels would save nothing, so closed channels are masked."""
        first, run, laid = self.layers[0], self.layers[0].runtime, self.laid
        limit = self.limit if run.call.rows is None else None
        if limit is None:
            limit = first.routers["channel"].limit(first.dial_of(x), x.dtype)
        masked, share = ops.channel_gate(x, limit)
        self._note(lambda: share)
        outs = self._products(masked.flatten(0, -2))
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
        """Return the output of one layer only, for a token x [1, 1, I] on its own."""
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
        """Return the only layer's output, without corrections, from the open channels x [1, 1, n] of a single token."""
        full = x.new_zeros(*x.shape[:-1], self.layers[0].inputs)
        return self.nonzero_channels(full.index_copy_(-1, channels, x))

    @property
    def is_laid(self) -> bool:
        """Whether there is `laid`."""
        return self._laid is not None

    def nonzero_channels(self, x: Tensor) -> Tensor:
        """Return the only layer's output, without corrections, for a single token x [1, 1, I], of which it reads no
        channel that is 0."""
        laid = self.laid
        out, _ = ops.read_channels(x.flatten(), laid.least, laid.whole, laid.bias, None, None, self._ends)
        return out.view(*x.shape[:-1], -1)

    def _note(self, share: Callable[[], Tensor]) -> None:
        if self.layers[0].runtime.decisions is not None:
            self.layers[0].note(share())

    def lay_out(self) -> None:
        """Lay weights, biases and corrections of all layers side by side, if a token may read some inputs only."""
        if self.opaque or not ((self.ends and self.opens) or "channel" in self.layers[0].routers):
            return
        self._sizes = [layer.outputs for layer in self.layers]
        self._ends = list(itertools.accumulate(self._sizes))
        lora = [layer.lora for layer in self.layers if layer.lora is not None]
        bases = [layer.base_layer for layer in self.layers]
        weights = [base.weight for base in bases]
        if self._stamp.renew(weights) or self._laid is None:
            columns = [base.weight if isinstance(base, Conv1D) else base.weight.T for base in bases]
            whole = large_pages.empty(columns[0], self.layers[0].inputs, sum(self._sizes))
            torch.cat([part.detach() for part in columns], 1, out=whole)
            for base, part in zip(bases, whole.split(self._sizes, 1), strict=True):
                base.weight.data = part if isinstance(base, Conv1D) else part.T
            none = whole.new_zeros(len(whole), dtype=torch.float32)
            least = torch.full_like(none, torch.finfo(torch.float32).tiny)
            self._laid = SideBySide(whole, PackedProduct(), none, least)
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

    def pack(self) -> None:
        """Pack the weights that lie side by side, if the layers' own weights may be packed."""
        if isinstance(self.layers[0].base_layer, PackedLinear):
            self.laid.product.prepare(self.laid.whole.T)

    def set_dial(self) -> None:
        """Set the limits of channels, if all rows of a batch share one offset."""
        first, self.limit = self.layers[0], None
        if not self.opaque and "channel" in first.routers and not isinstance(first.runtime.offset, tuple):
            laid = self.laid
            limit = first.routers["channel"].limit(first.runtime.offset, laid.whole.dtype)
            if self._limit is None:
                self._limit = limit
                self._reader = direct.read_channels(limit, laid.whole, laid.bias, laid.down, laid.up, self._ends)
            self.limit = self._limit.copy_(limit)

    def forget(self) -> None:
        """Give every layer a weight of its own again, as the model had it."""
        if self._laid is None:
            return
        for layer in self.layers:
            layer.base_layer.weight.data = layer.base_layer.weight.data.contiguous()
        self._drop()
