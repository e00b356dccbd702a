"""Linear layers of which only a part is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.architectures.lookup import Linear, shape_of, weight_of
from students.architectures.record import Architecture
from students.execution.activation import kind_of
from students.execution.block_context import BranchContext, Narrow
from students.execution.linear_group import LinearGroup
from students.execution.runtime import Runtime
from students.execution.tokens import Chosen, scatter_rows
from students.execution.wrapper import Named, Wrapper
from students.kernels import first_rows, ops
from students.kernels.packing import CorrectedProduct
from students.routers import ChannelRouter, Lora


class RoutedLinear(Wrapper):
    """A linear layer of which only a part is computed, with an optional low-rank correction.

    group: the layers that read the same input through one selection of channels, made by the first of them to run.
    branch: state of the branch, such as its open heads. part: where the branch's heads or groups are in this layer: its
    "inputs" (o, down), its "outputs" (q, gate, up), or nowhere. per_query: whether the output is needed for queries
    only (q, o).
    """

    base_layer: Linear

    def __init__(
        self,
        base_layer: Linear,
        runtime: Runtime,
        group: LinearGroup,
        branch: BranchContext,
        *,
        part: Literal["inputs", "outputs", ""],
        per_query: bool,
    ) -> None:
        super().__init__(base_layer, runtime)
        self.group = group
        self.branch = branch
        self.part = part
        self.per_query = per_query
        self.outputs, self.inputs = shape_of(base_layer)
        self.routers = Named[ChannelRouter]()
        self.lora: Lora | None = None
        self.place = len(group.layers)
        self.selects = False  # set by add_channels
        self.multiplies = False
        """Whether the output is a factor of a product whose gradient another layer computes (see join_product)."""
        self.activation: int | None = None
        """Number of the activation (see `ops.gated_grad`) in the product whose gradient this layer computes."""
        self._slice: tuple[Tensor | None, Any] = (None, None)
        self._low: tuple[Tensor, Tensor] | None = None
        self._together = CorrectedProduct()
        group.layers.append(self)

    def lay_out(self) -> None:
        """Lay the weights of the group side by side (the first layer does), and convert the correction's precision."""
        self._slice = None, None
        base = self.base_layer
        if self.place == 0:
            self.group.lay_out()
        if self.part == "outputs" and self.group.opens and not weight_of(base).is_contiguous():
            base.weight.data = base.weight.data.T.contiguous().T
        if self.lora is not None and not self.selects and not self.group.opaque:
            dtype = base.weight.dtype
            self._low = self.lora.down.detach().to(dtype), self.lora.up.detach().T.to(dtype).contiguous()

    def set_dial(self) -> None:
        """Set the group's limits, and slice its weights for a static choice of channels (the first layer does)."""
        if self.place == 0:
            self.group.set_dial()
            for layer in self.group.layers:
                layer._slice_static()

    def _slice_static(self) -> None:
        if "channel" in self.routers and self.routers["channel"].spec.network == "static":
            self._slice = None, None
            if self.group.limit is not None:
                channels = (self.group.limit == 0).nonzero().squeeze(1)
                self._slice = channels, weight_of(self.base_layer)[:, channels].contiguous()

    def pack(self) -> bool:
        """Pack the weight that the layers of the group read together, or add this layer's correction to its weight."""
        if self.selects and self.place == 0:
            self.group.pack()
        if self.lora is None or not self.packs_alone():
            return self.selects
        self._together.prepare(weight_of(self.base_layer), self.lora.down, self.lora.up)
        return True

    def packs_alone(self) -> bool:
        """As in Wrapper: the sum of weight and correction. In float32 these stay apart, so that whoever measures a
        student again gets the same numbers."""
        apart = self.group.opaque or "channel" in self.routers
        return self.lora is not None and not apart and weight_of(self.base_layer).dtype.itemsize == 2

    def forget(self) -> None:
        """Give the weight the memory layout that the model had, and drop slices, sums and converted corrections."""
        self._slice, self._low, self._together = (None, None), None, CorrectedProduct()
        if self.place == 0:
            self.group.forget()
        if not self.group.opaque:
            self.base_layer.weight.data = self.base_layer.weight.data.contiguous()

    def add_channels(self, router: ChannelRouter) -> None:
        """Let this router, which all layers of the group share, choose the channels that are read."""
        self.routers["channel"] = router
        apart = any(layer.part or layer.per_query for layer in self.group.layers)
        for layer in self.group.layers:  # one product for all, if all run whole and on the same tokens
            layer.selects = not (apart or self.group.opaque or router.spec.network == "static")

    def forward(self, x: Tensor) -> Tensor:
        run = self.runtime
        if x.ndim == 2 and not run.bypass:  # a block that runs the layer itself joins rows
            return self.forward(x.view(run.call.batch, -1, self.inputs)).flatten(0, 1)
        if run.bypass and not (run.recorded and self.selects and self.group.reads_all(x)):
            out: Tensor = self.base_layer(x)
            return out
        if run.bypass or (run.call.skipping and self.selects):
            return self.group.take(self, x)
        out = self._run(x)
        if self.multiplies and out.requires_grad:
            self.branch.factors[self.place], out = out, out.detach()
        return out

    def _run(self, x: Tensor) -> Tensor:
        queries = self.branch.queries
        if queries is None or not self.per_query:
            return self._compute(x, together=queries is None)
        if isinstance(queries, Chosen) and not queries.known and self._takes_number(x):
            some, (weight, corrected) = queries.filled(x), self._read()
            out = first_rows.linear(some[0], weight, self.base_layer.bias, queries.number).unsqueeze(0)
            out = out if corrected else self._correct(out, some)
        elif queries.every:
            return self._compute(x, together=False)
        else:
            some = x.flatten(0, 1).index_select(0, queries.rows).unsqueeze(0)
            out = self._compute(some, together=False)
        if self.group.ends:
            return out  # the last layer of its branch, whose output stays packed
        if isinstance(queries, Chosen):
            return queries.spread(out[0]).view(*x.shape[:-1], -1)
        return scatter_rows(out[0], queries.rows, x.shape[:-1].numel()).view(*x.shape[:-1], -1)

    def _takes_number(self, x: Tensor) -> bool:
        """Whether the layer can run without the host knowing the number of queries (see first_rows)."""
        call, plain = self.runtime.call, not (self.group.opaque or self.part or "channel" in self.routers)
        return plain and call.skipping and call.rows is None and first_rows.possible(x, self.outputs)

    def _compute(self, x: Tensor, together: bool) -> Tensor:
        narrow = self.branch.narrow if self.part else None
        if narrow is not None:
            return self._read_open(x, narrow) if self.part == "inputs" else self._write_open(x, narrow)
        if self.part == "inputs":
            gate, self.branch.gate = self.branch.gate, None
            x = x if gate is None else x * gate
        if "channel" not in self.routers:
            if self.part == "inputs" and self.branch.open_parts is not None and self.group.is_laid:
                return self._correct(self.group.nonzero_channels(x), x)
            is_open = self._is_open()
            if is_open is None or not has_rows(self.base_layer):
                return self._whole(x)
            weight, corrected = self._read()
            self.branch.zeroed = self.group.ends and corrected
            out = gated(weight, self.base_layer.bias, x, is_open)
            return out if corrected else self._correct(out, x)
        router = self.routers["channel"]
        if self._alone(x):
            return self.group.take(self, x) if together else self.group.one(self, x)
        call = self.runtime.call
        if call.skipping and not self.group.opaque and router.spec.network == "static" and call.rows is None:
            return self._read_static(x)
        return self._correct(self.base_layer(self._mask(router, x, together)), x)

    def _whole(self, x: Tensor) -> Tensor:
        """Return the output [..., O] for x [..., I], all of it."""
        call, base, lora, out = self.runtime.call, self.base_layer, self.lora, None
        if lora is not None and call.skipping and call.rows is None:
            out = self._together(x, base.bias, weight_of(base), lora.down, lora.up)
        return self._correct(base(x), x) if out is None else out

    def _read(self) -> tuple[Tensor, bool]:
        """Return the weight [O, I] that a product reads, and whether the low-rank correction, if any, is part of it."""
        call, weight, lora = self.runtime.call, weight_of(self.base_layer), self.lora
        if lora is None or not call.skipping or call.rows is not None:
            return weight, lora is None
        summed = self._together.plain(weight, lora.down, lora.up)
        return (weight, False) if summed is None else (summed, True)

    def _is_open(self) -> Tensor | None:
        """Return which outputs [O], or whether any [1], the only token of a step of fixed shape needs; None: all."""
        branch, parts = self.branch, self.branch.open_parts
        if self.part == "outputs" and parts is not None:
            copies = self.outputs // len(parts)  # 2 where a layer holds gate and up
            return parts if copies == 1 else parts.repeat(copies)
        return branch.open if self.per_query else branch.open_keys

    def _owner(self) -> Tensor | None:
        """Return the row of the batch that each token of the input belongs to; None unless tokens are packed."""
        rows = self.branch.rows
        if rows is None or rows.all:
            return None
        few = self.group.ends or (self.per_query and self.branch.queries is not None)
        index = rows.queries if few else rows.keys
        return None if index is None else index // rows.shape[1]

    def dial_of(self, x: Tensor) -> float | Tensor:
        """Return the dial's offset for x [..., I] (see Runtime.dial_of)."""
        return self.runtime.dial_of(x, None if self.runtime.call.rows is None else self._owner())

    def corrected(self, x: Tensor) -> Tensor | None:
        """Return which tokens of x [..., I] are corrected (see Runtime.corrected)."""
        return None if self.runtime.call.rows is None else self.runtime.corrected(x, self._owner())

    def _alone(self, x: Tensor) -> bool:
        """Return whether x is one token in a call of its own, where reading fewer weights is faster."""
        return self.runtime.call.alone and not self.group.opaque and x.shape[:-1].numel() == 1

    def note(self, share: Tensor) -> None:
        """Record the share of channels that is read; 0 for tokens that the layer does not run on."""
        run, rows, ends = self.runtime, self.branch.rows, self.group.ends
        asked = self.per_query and self.branch.queries is not None
        if run.decisions is None or (asked and not ends):  # q; k and v record more tokens
            return
        here = None if rows is None or rows.all else rows.queries if ends else rows.keys
        if here is not None and rows is not None:
            share = rows.whole(share, here)
        run.note(f"{self.group.name}.channel", self.routers["channel"].spec, share)

    def _correct(self, out: Tensor, x: Tensor) -> Tensor:
        """Add the low-rank correction of x [..., I] to out [..., O], which may be overwritten."""
        if self.lora is None:
            return out
        call = self.runtime.call
        if not call.skipping or call.rows is not None or self.group.opaque:
            return out + self._only_corrected(self.lora(x), x)
        assert self._low is not None, "Student.prepare comes first"
        flat, (down, up) = out.view(-1, self.outputs), self._low
        torch.addmm(flat, F.linear(x.reshape(-1, self.inputs), down), up, out=flat)
        return out

    def _only_corrected(self, low: Tensor, x: Tensor) -> Tensor:
        """Return the low-rank correction low [..., O] of x [..., I], set to 0 in rows at the teacher's compute."""
        corrected = self.corrected(x)
        return low if corrected is None else low * corrected

    def _mask(self, router: ChannelRouter, x: Tensor, together: bool) -> Tensor:
        """Return x with closed channels set to 0; the first layer of a group chooses for all of them."""
        passed = self.group.context
        if together and passed.masked is not None:
            masked, passed.left = passed.masked, passed.left - 1
            if not passed.left:
                passed.masked = None
            return masked
        found, factors = self.branch.factors, None
        if found and self.activation is not None:
            factors, self.branch.factors = (found[0], found[1], self.activation), {}
        masked, share = router.read(x, self.dial_of(x), factors)
        self.note(share)
        if together and len(self.group.layers) > 1:
            passed.masked, passed.left = masked, len(self.group.layers) - 1
        return masked

    def _read_static(self, x: Tensor) -> Tensor:
        """Read the channels of a static choice, the same for every token: a smaller matrix product."""
        channels, weight = self._slice
        assert channels is not None, "Student.prepare comes first"
        self.note(x.new_full(x.shape[:-1], len(channels) / self.inputs, dtype=torch.float32))
        return self._correct(F.linear(x[..., channels], weight, self.base_layer.bias), x)

    def _write_open(self, x: Tensor, narrow: Narrow) -> Tensor:
        """Compute outputs of open heads or groups only: [..., n], or [..., 2 n] where a layer holds gate and up."""
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
        """Compute the output from x [..., n], the channels of open heads or groups only."""
        channels = narrow.channels
        if narrow.weight is not None:
            x = x * narrow.weight
        if self._alone(x) and not narrow.keep:
            out = self.group.open_channels(x, channels)
        else:
            weight = self._sliced(channels, lambda: weight_of(self.base_layer)[:, channels].contiguous())
            out = F.linear(x, weight, self.base_layer.bias)
        if self.lora is None:
            return out
        low = F.linear(F.linear(x, self.lora.down[:, channels].to(x.dtype)), self.lora.up.to(x.dtype))
        return out + self._only_corrected(low, x)

    def _sliced(self, choice: Tensor, make: Callable[[], Any]) -> Any:
        """Return parts of the weight, made once and kept while `choice` is the same tensor."""
        if self._slice[0] is not choice:
            self._slice = choice, make()
        return self._slice[1]


class GatedLinear(Wrapper):
    """A linear layer that reads no weights if the only token of a step of fixed shape is closed.

    branch: state of the branch; ends: whether the layer is the branch's last.
    """

    base_layer: Linear

    def __init__(self, base_layer: Linear, runtime: Runtime, branch: BranchContext, *, ends: bool) -> None:
        super().__init__(base_layer, runtime)
        self.branch = branch
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        is_open = self.branch.open_keys
        if is_open is None or not has_rows(self.base_layer):
            out: Tensor = self.base_layer(x)
            return out
        self.branch.zeroed = self.ends
        return gated(self.base_layer.weight, self.base_layer.bias, x, is_open)


def has_rows(layer: nn.Module) -> bool:
    """Return whether the weights of each output of a linear layer lie together."""
    return isinstance(layer, nn.Linear) and layer.weight.is_contiguous()


def gated(weight: Tensor, bias: Tensor | None, x: Tensor, is_open: Tensor) -> Tensor:
    """Return the output [..., O] of a linear layer for the only token x [..., I], 0 where is_open [1 or O] is false,
    without reading the weights [O, I] of these outputs."""
    return ops.gated_rows(x.flatten(), weight, bias, is_open).view(*x.shape[:-1], -1)


def join_product(block: nn.Module, record: Architecture) -> None:
    """Let the MLP's last linear layer compute the gradients of gate and up, if it has a channel router.

    The model still multiplies activation(gate) by up, but without recording a gradient. Backward then needs only the
    outputs of gate and up; torch would also keep the activation and the product (see autograd.GatedChannelGate).
    """
    if len(record.mlp_in) != 2 or record.activation is None:
        return
    names = (name for site in ("mlp_in", "mlp_out") for name in record.linears(site))
    routed = [layer for layer in map(block.get_submodule, names) if isinstance(layer, RoutedLinear)]
    if len(routed) != 3 or "channel" not in routed[2].routers:
        return
    gate, up, behind = routed
    static = behind.routers["channel"].spec.network == "static"
    kind = kind_of(block.get_submodule(f"{record.mlp}.{record.activation}"))
    gate.group.gates = kind is not None and behind.selects
    if kind is not None and not (static or behind.part or behind.lora is not None):
        behind.activation = kind
        gate.multiplies = up.multiplies = True
