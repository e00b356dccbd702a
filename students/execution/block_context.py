"""State that the wrappers of one block pass to each other during a forward pass; empty outside of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.execution.room import Room
from students.execution.tokens import Chosen, Listed, Partition, scatter_rows
from students.kernels import devices, direct
from students.kernels.deferred import addend
from students.routers import Substitute
from students.spec import RouterSpec


class Gates:
    """Gates of one router, [B, T, N] or [B, 1, N]; each form is computed when it is first read."""

    open: Tensor
    """Whether each gate is open, bool."""
    gate: Tensor
    """Factor of the branch's output: 1, or the router's weight, where open; 0 where closed."""
    closed: Tensor
    """Factor of the substitute's output: 1 where closed, 0 where open."""

    def __init__(
        self,
        dtype: torch.dtype,
        count: int | None = None,
        listed: list[Tensor] | None = None,
        partition: Partition | None = None,
        low: Tensor | None = None,
        **forms: Tensor,
    ) -> None:
        """forms: either `open`, or `gate` and `closed` in this dtype; `gate` and `closed` made later have it too."""
        self._dtype = dtype
        self.count = count
        """Number of open tokens in each row, if it is known without reading the gates; otherwise None."""
        self.listed = listed
        """Places of the open tokens: the last three results of `ops.list_open`, if it has run; otherwise None."""
        self.partition = partition
        """The open and the closed tokens, if `ops.open_tokens` has run; otherwise None."""
        self.low = low
        """The products [N, r] of all tokens with the substitute's `down`, if they have been made with the scores."""
        for name, form in forms.items():
            setattr(self, name, form)

    def __getattr__(self, name: str) -> Tensor:
        """Make a form that is read for the first time (torch.compile cannot read `functools.cached_property`)."""
        if name == "open":
            made = self.closed == 0
        elif name == "gate":
            made = self.open.to(self._dtype)
        elif name == "closed":
            made = 1 - self.gate
        else:
            raise AttributeError(name)
        setattr(self, name, made)
        return made


@dataclass
class Exits:
    """Token and layer gates of a branch, and how they are applied to the branch's output."""

    x: Tensor
    """The branch's input [B, T, D], which substitutes read."""
    gates: list[tuple[Gates, Substitute | None]] = field(default_factory=list)
    """Gates [B, T, 1] or [B, 1, 1] with their substitutes, applied in this order: out * gate + substitute * closed."""
    specs: list[RouterSpec] = field(default_factory=list)
    """Specifications of the routers that decided the gates."""
    rows: Tensor | Chosen | None = None
    """The tokens that the branch's output holds. Flat indices [N]: the output is [1, N, D]. A Chosen: arbitrary rows
    may follow. None: all tokens [B, T, D]."""
    valid: Tensor | None = None
    """Tokens [B, T] bool that are not padding, set where closed tokens are skipped: padding is skipped too."""
    room: Room | None = None
    """As in Runtime, set where closed tokens are skipped."""
    all_open: bool = False
    """Whether all tokens turned out to be open, so that only weights have an effect."""
    whole: bool = False
    """Whether the output has been spread over all tokens [B, T, D] in spite of `rows`: the others have zeros."""
    begun: dict[int, Tensor] = field(default_factory=dict)
    """Outputs [B, T, D] of substitutes that have already run on all tokens, by the index of their gates."""

    @property
    def weighted(self) -> bool:
        """Whether a router multiplies the output of open tokens by a weight (`weight: score`) instead of by 1."""
        return any(spec.weight == "score" for spec in self.specs)

    @property
    def drops(self) -> list[int]:
        """Indices of the gates whose closed tokens write no keys and values."""
        return [number for number, spec in enumerate(self.specs) if spec.kv == "drop"]

    @property
    def count(self) -> int | None:
        """Number of open tokens in each row, if it is known without reading the gates; otherwise None."""
        counts = [gates.count for gates, _ in self.gates if gates.count is not None]
        if self.valid is not None or not counts or len(counts) < len(self.gates):
            return None
        return min(counts) if len(counts) == 1 or {*counts} <= {0, self.x.shape[1]} else None

    def open(self, only: list[int] | None = None) -> Tensor:
        """Return which tokens [B, T] are not padding and open in the gates with indices `only` (default: all)."""
        kept = self.valid
        for number, (gates, _) in enumerate(self.gates):
            if only is None or number in only:
                this = gates.open.squeeze(-1).expand(self.x.shape[:2])
                kept = this if kept is None else kept & this
        return kept if kept is not None else self.x.new_ones(self.x.shape[:2], dtype=torch.bool)

    def chosen(self, valid_count: int, only: list[int] | None = None) -> Chosen:
        """Return the tokens of `open(only)`. valid_count: number of tokens in the batch that are not padding."""
        gates = self.gates[0][0] if len(self.gates) == 1 and self.valid is None else Gates(self.x.dtype)
        count = self.count if only is None else None
        return Chosen(self.open(only), valid_count, count, gates.listed, self.room, gates.partition)

    def apply(self, out: Tensor) -> Tensor:
        """Apply gates and substitutes to the branch's output; returns [B, T, D], all tokens."""
        if self.all_open:
            return self.of_open(out)
        if self.rows is not None:
            return self._scatter(out, self.rows)
        if self.substitutes_once:
            return self._substituted(out, None)
        for gates, substitute in self.gates:
            gate = gates.gate
            out = out * gate if substitute is None else torch.addcmul(substitute(self.x) * gates.closed, out, gate)
        return out

    def of_closed(self) -> Tensor:
        """Return what stands for the output [B, T, D] of tokens of which each is closed by one of the gates."""
        if len(self.gates) == 1 and (only := self.gates[0][1]) is not None:
            out: Tensor = only(self.x)
            return out
        return self.apply(torch.zeros_like(self.x))

    def spread(self, out: Tensor) -> Tensor:
        """Return the output of all tokens [B, T, D], with zeros for those that it does not hold."""
        assert self.rows is not None, "some tokens were left out"
        self.whole, flat = True, out.reshape(-1, self.x.shape[-1])
        if isinstance(self.rows, Chosen):
            return self.rows.scatter(flat).view_as(self.x)
        return scatter_rows(flat, self.rows, self.x.shape[:2].numel()).view_as(self.x)

    def begin(self) -> None:
        """Launch the substitutes on all tokens, to run while the host waits for the number of open tokens."""
        for number, (_, substitute) in enumerate(self.gates):
            if substitute is not None and not self.substitutes_once:
                self.begun[number] = substitute(self.x)

    @property
    def substitutes_once(self) -> bool:
        """Whether one launch puts a substitute, begun with the scores, in the places of all closed tokens."""
        begun = all(gates.low is not None and substitute is not None for gates, substitute in self.gates)
        return begun and len(self.gates) == 1

    def _substituted(self, out: Tensor, rows: Chosen | None) -> Tensor:
        """Return the output [B, T, D] of all tokens, from that of the open ones (rows), or of all (None), and the only
        gates' substitute. The residual stream is added in the same launch, where the block adds it next."""
        ((gates, substitute),) = self.gates
        assert gates.low is not None and substitute is not None, "the substitute has been begun"
        _, *parts = substitute.parts(out.dtype)
        some, given = out.reshape(-1, self.x.shape[-1]), (gates.low, *parts)

        def launch(residual: Tensor | None) -> Tensor:
            residual = None if residual is None else residual.flatten(0, -2)
            if rows is None:
                made: Tensor = direct.substitute_closed(some, None, gates.open, *given, residual)
            else:
                made = rows.substituted(some, *given, residual)
            return made.view(self.x.shape)

        return addend(self.x, launch)

    def of_open(self, out: Tensor) -> Tensor:
        """Return the output [B, T, D], of open tokens, multiplied by the weights of the gates, if routers weigh."""
        for gates, _ in self.gates if self.weighted else ():
            out = out * gates.gate
        return out

    def _scatter(self, out: Tensor, rows: Tensor | Chosen) -> Tensor:
        if isinstance(rows, Chosen) and self.substitutes_once and not self.whole:
            return self._substituted(out, rows)
        if isinstance(rows, Chosen) or devices.runs_ahead(out.device):
            return self._fill_all(out if self.whole else self.spread(out))
        out = out.reshape(-1, self.x.shape[-1])
        return self._fill_closed(out.index_select(0, rows) if self.whole else out, rows)

    def _fill_all(self, total: Tensor) -> Tensor:
        """Weight the output and add substitutes, computed for all tokens and multiplied by 0 where a token is open.

        Selecting the closed tokens would make the host wait for the device.
        """
        total = self.of_open(total.view_as(self.x))
        for number, (gates, substitute) in enumerate(self.gates):
            if substitute is not None:
                closed = gates.closed
                for later, _ in self.gates[number + 1 :]:
                    closed = closed * later.gate
                total.addcmul_(self.begun[number] if number in self.begun else substitute(self.x), closed)
        return total

    def _fill_closed(self, out: Tensor, rows: Tensor) -> Tensor:
        """Weight and scatter the output, and write the substitutes of closed tokens, computed for those tokens only."""
        x, (gates, only) = self.x.flatten(0, 1), self.gates[0]
        if gates.partition is not None and len(self.gates) == 1 and self.valid is None:
            rest = None if only is None else only.of(x, gates.partition.closed)
            return gates.partition.fill(out, rest).view_as(self.x)
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
                stand_in = substitute.of(x, chosen)
                stand_in = stand_in if later is None else stand_in * later.index_select(0, chosen)
                total.index_copy_(0, chosen, stand_in)
        return total.view_as(self.x)


@dataclass
class Gathered:
    """The tokens that a block runs on, where a layer router lets only some through."""

    x: Tensor
    """The block's input [B, T, D]."""
    chosen: Chosen
    """The open tokens."""
    exits: Exits
    """Weights of the gates, still to be applied to the output [1, N, D] of each branch."""
    placed: bool
    """Whether the block was called with rotary embeddings, which then hold the open tokens only."""


@dataclass
class Narrow:
    """Open channels in front of a branch's last linear layer, the same for all tokens of a call."""

    channels: Tensor
    """Indices [n] of the open channels, ascending."""
    size: int
    """Number of channels, open or closed."""
    weight: Tensor | None
    """Factors [n] of the open channels; None: 1."""
    keep: bool
    """Whether later calls use the same choice (sequence-level and static routers), so that sliced weights are kept."""


@dataclass
class Rows:
    """The tokens of a batch, as flat indices, that the linear layers of a branch run on if not on all."""

    keys: Tensor | None
    """The tokens that the branch is called with (in attention: those with keys); None: all."""
    wanted: Chosen | Listed
    """The tokens whose output is wanted."""
    shape: torch.Size
    """Shape [B, T] of the batch."""

    @property
    def queries(self) -> Tensor:
        """Flat indices of the tokens whose output is wanted."""
        return self.wanted.rows

    @property
    def all(self) -> bool:
        """Whether the branch is called with all tokens and the output of all is wanted."""
        return self.keys is None and self.wanted.every

    def whole(self, share: Tensor, index: Tensor) -> Tensor:
        """Return [B, T] with the shares of the tokens at flat indices `index`, and 0 for all others."""
        full = share.new_zeros(self.shape.numel())
        return full.index_copy_(0, index, share.flatten()).view(self.shape)


@dataclass
class LinearGroupContext:
    """State shared by linear layers that read the same input through one selection of channels."""

    masked: Tensor | None = None
    """The input with closed channels set to 0, made by the first layer that runs, for all layers of the group."""
    left: int = 0
    """Number of layers that have yet to read `masked`."""
    outputs: list[Tensor | None] = field(default_factory=list)
    """Outputs of all layers, if the first one computed them together; None for a layer that has taken its output."""

    def clear(self) -> None:
        """Drop all state."""
        self.masked, self.left, self.outputs = None, 0, []


@dataclass
class BranchContext:
    """State that a branch passes to its linear layers and to its last module (RoutedExit)."""

    gate: Tensor | None = None
    """Gates [..., C] of heads or groups, for each channel in front of the last linear layer, which applies them."""
    narrow: Narrow | None = None
    """The open ones of these channels, set instead of `gate` where the linear layers leave closed channels out."""
    rows: Rows | None = None
    """The tokens that the branch runs on; None: all of the batch."""
    queries: Chosen | Listed | None = None
    """The tokens that are queries, as flat indices into the tokens that the branch is called with; None: all."""
    open: Tensor | None = None
    """Set for a token that is alone in a step of fixed shape: whether it is open, [1] bool, so that no weights are read
    if it is not."""
    open_keys: Tensor | None = None
    """The same for layers that other tokens need, too: those of keys and values; None: they run for closed tokens."""
    open_parts: Tensor | None = None
    """Which channels in front of the last linear layer are open, [C] bool, set where `open` may be."""
    zeroed: bool = False
    """Whether the branch's output is 0 if the token is closed that `open` is about."""
    factors: dict[int, Tensor] = field(default_factory=dict)
    """Outputs of the MLP's gate (0) and up (1), which carry gradients; their product carries none (see linear.py)."""
    exit: Exits | None = None
    """The token and layer gates that the branch's RoutedExit has to apply."""

    def clear(self) -> None:
        """Drop all state."""
        self.release()
        self.factors, self.exit = {}, None

    def release(self) -> None:
        """Drop what was passed to linear layers, once they have run."""
        self.gate = self.narrow = self.rows = self.queries = None
        self.open = self.open_keys = self.open_parts = None
        self.zeroed = False


@dataclass
class BlockContext:
    """State that the branches of one block pass to each other."""

    attn: BranchContext = field(default_factory=BranchContext)
    mlp: BranchContext = field(default_factory=BranchContext)
    linear_groups: list[LinearGroupContext] = field(default_factory=list)
    """State of each group of linear layers in the block."""
    gates: Gates | None = None
    """Gates of a router of the whole block, passed from attention, where they are decided, to the MLP."""
    gathered: Gathered | None = None
    """The tokens that the block runs on, if a BlockGather has left some out."""

    def clear(self) -> None:
        """Drop all state."""
        self.gates = self.gathered = None
        for branch in (self.attn, self.mlp):
            branch.clear()
        for group in self.linear_groups:
            group.clear()
