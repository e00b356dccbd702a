"""What the wrappers of one block hand on to each other during a forward pass; empty outside of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.execution.gates import Gates
from students.execution.tokens import Chosen, Listed, scatter_rows
from students.kernels import devices
from students.routers import Substitute
from students.spec import RouterSpec


@dataclass
class Exits:
    """What token and layer gates do to the output of their branch."""

    x: Tensor
    """The branch's input [B, T, D], which substitutes read."""
    gates: list[tuple[Gates, Substitute | None]] = field(default_factory=list)
    """[B, T, 1] or [B, 1, 1], with substitutes, in turn: out * gate + substitute * closed."""
    specs: list[RouterSpec] = field(default_factory=list)
    """Of the routers that decided them."""
    rows: Tensor | Chosen | None = None
    """Flat indices of the tokens that the output [1, N, D] holds, or those tokens, in front of anything; None: all
    [B, T, D]."""
    valid: Tensor | None = None
    """[B, T] bool; padding is left out when rows are."""
    begun: dict[int, Tensor] = field(default_factory=dict)
    """What substitutes make of all tokens, by the number of their gates, where they have run already."""

    @property
    def weighted(self) -> bool:
        """Whether some gate multiplies what it lets through by something other than 1."""
        return any(spec.weight == "score" for spec in self.specs)

    @property
    def drops(self) -> list[int]:
        """The numbers of the gates whose closed tokens write no key."""
        return [number for number, spec in enumerate(self.specs) if spec.kv == "drop"]

    @property
    def count(self) -> int | None:
        """How many tokens of each row are open, where that is settled beforehand."""
        counts = [gates.count for gates, _ in self.gates if gates.count is not None]
        if self.valid is not None or not counts or len(counts) < len(self.gates):
            return None
        return min(counts) if len(counts) == 1 or {*counts} <= {0, self.x.shape[1]} else None

    def open(self, only: list[int] | None = None) -> Tensor:
        """[B, T] bool: tokens that are not padding and that these gates (all, by default) let through."""
        kept = self.valid
        for number, (gates, _) in enumerate(self.gates):
            if only is None or number in only:
                this = gates.open.squeeze(-1).expand(self.x.shape[:2])
                kept = this if kept is None else kept & this
        return kept if kept is not None else self.x.new_ones(self.x.shape[:2], dtype=torch.bool)

    def chosen(self, of: int, only: list[int] | None = None) -> Chosen:
        """These tokens; of: how many there are, padding aside."""
        listed = self.gates[0][0].listed if len(self.gates) == 1 and self.valid is None else None
        return Chosen(self.open(only), of, self.count if only is None else None, listed)

    def apply(self, out: Tensor) -> Tensor:
        """The branch's output as the block gets it, [B, T, D]."""
        if self.rows is not None:
            return self._scatter(out, self.rows)
        for gates, substitute in self.gates:
            gate = gates.gate
            out = out * gate if substitute is None else torch.addcmul(substitute(self.x) * gates.closed, out, gate)
        return out

    def begin(self) -> None:
        """Let substitutes of all tokens run while the host waits to hear which are closed."""
        for number, (_, substitute) in enumerate(self.gates):
            if substitute is not None:
                self.begun[number] = substitute(self.x)

    def pass_all(self, out: Tensor) -> Tensor:
        """As `apply`, where all gates turned out to be open."""
        for gates, _ in self.gates if self.weighted else ():
            out = out * gates.gate
        return out

    def _scatter(self, out: Tensor, rows: Tensor | Chosen) -> Tensor:
        out = out.reshape(-1, self.x.shape[-1])
        if isinstance(rows, Chosen):
            return self._fill_all(rows.scatter(out))
        if devices.runs_ahead(out.device):
            return self._fill_all(scatter_rows(out, rows, self.x.shape[:2].numel()))
        return self._fill_closed(out, rows)

    def _fill_all(self, total: Tensor) -> Tensor:
        """Substitutes of all tokens, since nobody waits to hear which are closed, times 0 where they are open."""
        total = total.view_as(self.x)
        for gates, _ in self.gates if self.weighted else ():
            total = total * gates.gate
        for number, (gates, substitute) in enumerate(self.gates):
            if substitute is not None:
                closed = gates.closed
                for later, _ in self.gates[number + 1 :]:
                    closed = closed * later.gate
                total.addcmul_(self.begun[number] if number in self.begun else substitute(self.x), closed)
        return total

    def _fill_closed(self, out: Tensor, rows: Tensor) -> Tensor:
        """Substitutes of the tokens that are closed."""
        x = self.x.flatten(0, 1)
        passing = self.valid
        weight: Tensor | None = None
        substitutes: list[tuple[Tensor, Substitute, Tensor | None]] = []
        for gates, substitute in reversed(self.gates):
            open_ = gates.open.squeeze(-1).expand(self.x.shape[:2])
            closed = ~open_
            if substitute is not None:
                chosen = (closed if passing is None else closed & passing).flatten().nonzero().squeeze(1)
                substitutes.append((chosen, substitute, weight))
            passing = open_ if passing is None else passing & open_
            if self.weighted:
                gate = gates.gate.expand(*self.x.shape[:2], 1).flatten(0, 1)
                weight = gate if weight is None else weight * gate
        out = out if weight is None else out * weight.index_select(0, rows)
        total = scatter_rows(out, rows, len(x))
        for chosen, substitute, later in substitutes:
            if len(chosen):
                stand_in = substitute(x.index_select(0, chosen))
                stand_in = stand_in if later is None else stand_in * later.index_select(0, chosen)
                total.index_copy_(0, chosen, stand_in)
        return total.view_as(self.x)


@dataclass
class Gathered:
    """The tokens that a block runs on, where a layer router lets only some through."""

    x: Tensor
    """The block's input [B, T, D]."""
    chosen: Chosen
    """The tokens that are let through."""
    exits: Exits
    """What is left to do to the output [1, N, D] of a branch: weights."""
    placed: bool
    """Whether the block was called with rotary embeddings of these tokens."""


@dataclass
class Narrow:
    """The channels in front of a branch's last linear layer that are open, for all tokens of this call alike."""

    channels: Tensor
    """[n], ascending."""
    size: int
    """How many there are, open or not."""
    weight: Tensor | None
    """[n]: what they are multiplied by; None: 1."""
    keep: bool
    """The choice stands for more calls (sequence-level, static): weights may be sliced and kept."""


@dataclass
class Rows:
    """Which tokens of a batch the linear layers of a branch run on, where not all, as flat indices."""

    keys: Tensor | None
    """Those that have keys, which is what the branch is called with; None: all."""
    wanted: Chosen | Listed
    """Those whose output is wanted."""
    shape: torch.Size
    """[B, T]: of the batch."""

    @property
    def queries(self) -> Tensor:
        """Those whose output is wanted."""
        return self.wanted.rows

    @property
    def all(self) -> bool:
        """Whether all of the batch have keys and are wanted."""
        return self.keys is None and self.wanted.every


@dataclass
class LinearGroupContext:
    """Between linear layers that read one input through one selection of channels."""

    masked: Tensor | None = None
    """The input without closed channels, which the first of them chose for all."""
    left: int = 0
    """How many of them have yet to take it."""
    outputs: list[Tensor | None] = field(default_factory=list)
    """Of all of them, where one computed them all; None where taken."""

    def clear(self) -> None:
        """Leave nothing."""
        self.masked, self.left, self.outputs = None, 0, []


@dataclass
class BranchContext:
    """From a branch to its linear layers, and to the module that its output leaves by."""

    gate: Tensor | None = None
    """[..., C]: gates of heads or expert groups, for each channel in front of the last linear layer, which takes it."""
    narrow: Narrow | None = None
    """Which of those channels are open instead, where the linear layers leave the others out."""
    rows: Rows | None = None
    """Which tokens there are; None: all of the batch."""
    queries: Chosen | Listed | None = None
    """Of those, the ones that attend; None: all."""
    factors: dict[int, Tensor] = field(default_factory=dict)
    """Outputs of the MLP's gate (0) and up (1), with the gradients that their product was made without."""
    exit: Exit | None = None
    """What a RoutedExit does to the output."""

    def clear(self) -> None:
        """Leave nothing."""
        self.release()
        self.factors, self.exit = {}, None

    def release(self) -> None:
        """Leave nothing for linear layers, which have run."""
        self.gate = self.narrow = self.rows = self.queries = None


@dataclass
class Exit:
    """What token and layer gates do to a branch's output further on."""

    exits: Exits
    all_open: bool


@dataclass
class BlockContext:
    """Between the branches of a block."""

    attn: BranchContext = field(default_factory=BranchContext)
    mlp: BranchContext = field(default_factory=BranchContext)
    linear_groups: list[LinearGroupContext] = field(default_factory=list)
    """Of the block's linear layers."""
    gates: Gates | None = None
    """Of a router of the whole block, from attention, in front of which it stands, to the MLP."""
    gathered: Gathered | None = None
    """The tokens that the block runs on, where it was called with more."""

    def clear(self) -> None:
        """Leave nothing."""
        self.gates = self.gathered = None
        for branch in (self.attn, self.mlp):
            branch.clear()
        for group in self.linear_groups:
            group.clear()
