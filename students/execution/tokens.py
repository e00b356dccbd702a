"""Subsets of a batch's tokens: their indices, and how they are gathered, laid out and scattered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from students.execution.room import Room
from students.kernels import devices, direct, ops, reference
from students.kernels.capture import Fetched


@dataclass
class Listed:
    """Tokens whose indices are known."""

    rows: Tensor
    """Flat indices [N] of the tokens, ascending."""
    every: bool = False
    """Whether these are all tokens."""

    @property
    def target(self) -> Tensor:
        """As of Chosen."""
        return self.rows


class Partition:
    """The tokens of a batch in another order, open ones first: order, place and count as of `ops.open_tokens`."""

    def __init__(self, order: Tensor, place: Tensor, count: int) -> None:
        self.open, self.closed = order[:count], order[count:]
        """Flat indices, ascending."""
        self._place, self._count = place, count

    def fill(self, some: Tensor, rest: Tensor | None) -> Tensor:
        """Return [N, D] with the rows some [n, D] at open tokens, and those of rest [N - n, D] (None: zeros) at closed
        ones. (On CPUs this is faster than writing rows to their places.)"""
        if rest is not None:
            return torch.cat([some, rest]).index_select(0, self._place)
        return torch.cat([some, some.new_zeros(1, *some.shape[1:])]).index_select(0, self._place.clamp(max=self._count))

    def spread(self, some: Tensor) -> Tensor:
        """As `fill`, but with arbitrary rows at closed tokens."""
        return some.index_select(0, self._clamped) if self._count else self.fill(some, None)

    @cached_property
    def _clamped(self) -> Tensor:
        return self._place.clamp(max=self._count - 1)


class Chosen:
    """The open tokens of a batch, open_ [B, T] bool. Only the device knows which tokens are open, and how many.

    The host waits when it first asks how many; what is launched between `begin` and that question runs meanwhile. Work
    that does not need the number is launched earlier, on a table of the open tokens, filled up with the last token.

    valid_count: number of tokens that are not padding. count: number of open tokens of each row, if known; nothing then
    waits. listed, partition: as in Gates. room: for how many tokens there is room, in a pass of fixed shape: as many
    then count as open, and the table behind the open tokens, which is filled up, is cut there.
    """

    def __init__(
        self,
        open_: Tensor,
        valid_count: int,
        count: int | None = None,
        listed: list[Tensor] | None = None,
        room: Room | None = None,
        partition: Partition | None = None,
    ) -> None:
        self._open, self._partition = open_, partition
        self._valid_count = valid_count
        self._ahead = devices.runs_ahead(open_.device)
        self._room = room if count is None and self._ahead else None
        self._fetched: Fetched | None = None
        self._counts = None if count is None else [count] * open_.shape[0]
        if self._ahead:
            self._table, self._before, self._upto = listed or ops.list_open(open_, None, None)[1:]
        self.limit = None if self._room is None else self._room.limit(self.number)
        """How many tokens there is room for; None: as many as are open."""

    @cached_property
    def most(self) -> int:
        """Largest number of open tokens of a row, or how many there is room for in each row; asked for once a pass."""
        rows = self._open.shape[0]
        if self._room is not None and rows > 1:
            limit = self._room.limit(rows * self.each.amax(0, keepdim=True))
            if limit is not None:
                return limit // rows
        return max(self.counts)

    @property
    def each(self) -> Tensor:
        """Number [B] of open tokens of each row, int32, on the device; only on those that the host runs ahead of."""
        return self._ends if self._open.shape[0] == 1 else self._ends - self.begins

    @cached_property
    def begins(self) -> Tensor:
        """Number [B] of open tokens in front of each row, int32, on the device; only where there is `each`."""
        return F.pad(self._ends[:-1], (1, 0))

    @property
    def _ends(self) -> Tensor:
        """Number [B] of open tokens from the first row to the end of each row."""
        return self._upto[self._open.shape[1] - 1 :: self._open.shape[1]]

    def begin(self) -> None:
        """Start to copy the number of open tokens to the host."""
        if not self.known and self._fetched is None:
            self._fetched = Fetched(self._ends)

    @property
    def known(self) -> bool:
        """Whether the number of open tokens can be asked for without waiting."""
        return not self._ahead or self._counts is not None or self.limit is not None

    @property
    def counts(self) -> list[int]:
        """Number of open tokens of each row; the most that it can be, if there is a limit."""
        if self.limit is not None:
            return [min(self.limit, self._open.shape[1])] * self._open.shape[0]
        if self._counts is None:
            self.begin()
            self._counts = self._asked()
        return self._counts

    def _asked(self) -> list[int]:
        if self._fetched is None:
            return self._open.sum(1).tolist()
        ends = self._fetched.wait().tolist()
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def rows(self) -> Tensor:
        """Flat indices [N] of the open tokens, ascending."""
        if self._partition is not None:
            return self._partition.open
        return self._known(self._table) if self._ahead else self._open.flatten().nonzero().squeeze(1)

    @property
    def _listed(self) -> Tensor:
        """Flat indices of the open tokens, filled up to [B * T] where the host runs ahead."""
        return self._table if self._ahead else self.rows

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        table, tokens = self._listed, self._open.shape[1]
        if self._open.shape[0] == 1:
            return _zeros(table.shape, table.dtype, table.device), table
        return table // tokens, table % tokens

    @cached_property
    def _turns(self) -> Tensor:
        batch = self._places[0]
        return torch.arange(len(batch), device=batch.device) - self.begins.index_select(0, batch)

    @property
    def batch(self) -> Tensor:
        """Row [N] of the batch that each open token belongs to."""
        return self._known(self._places[0])

    @property
    def index(self) -> Tensor:
        """Index [N] of each open token in its row."""
        return self._known(self._places[1])

    @property
    def turn(self) -> Tensor:
        """Number [N] of open tokens before each one in its row; only on devices that the host runs ahead of."""
        return self._known(self._turns)

    @property
    def total(self) -> int:
        """Number N of open tokens of all rows together, or of those that there is room for."""
        return sum(self.counts) if self.limit is None else self.limit

    @property
    def every(self) -> bool:
        """Whether all tokens but padding are known to be open."""
        if self.limit is not None:
            return False
        return (self.total if self._ahead else len(self.rows)) == self._valid_count

    def filled(self, x: Tensor) -> Tensor:
        """Gather the open tokens of x [B or 1, T, ...]: [1, N, ...], longer where the host runs ahead (see `cut`)."""
        table = self._places[1] if x.shape[0] < self._open.shape[0] else self._listed
        return x.flatten(0, 1).index_select(0, table).unsqueeze(0)

    def cut(self, some: Tensor) -> Tensor:
        """Cut the result of `filled`, or of work on it, to the open tokens: [1, N, ...]."""
        return self._known(some[0]).unsqueeze(0)

    def prepare_packing(self) -> None:
        """Launch the work behind `batch`, `index` and `turn`, which a Packing needs."""
        if self._ahead:
            _ = self._places if self._open.shape[0] == 1 else self._turns

    @property
    def target(self) -> Tensor | Chosen:
        """Where the result of work on `rows` belongs: this where `scatter` is one launch, else these."""
        return self if self._ahead and not torch.is_grad_enabled() else self.rows

    @property
    def number(self) -> Tensor:
        """Number of open tokens, an int32 tensor [1] that kernels read on the device."""
        return self._upto[-1:]

    def scatter(self, some: Tensor, other: Tensor | None = None) -> Tensor:
        """Return [B * T, D] with the rows some [N, D] at open tokens, and at closed ones zeros or the rows of other
        [B * T, D]. Where the host runs ahead, arbitrary rows may follow in some."""
        if self._partition is not None:
            return self._partition.fill(some, None if other is None else other.index_select(0, self._partition.closed))
        learns = torch.is_grad_enabled()
        if self._ahead and not (learns and self.known):
            put = reference.put_open if learns else direct.put_open
            out: Tensor = put(some, self._before, self._open, other)
            return out
        if other is not None:
            return other.index_copy(0, self.rows, some)
        return scatter_rows(some, self.rows, self._open.numel())

    def substituted(self, some: Tensor, *given: Tensor | None) -> Tensor:
        """As `scatter`, but with substitutes at closed tokens; given: the last arguments of `ops.substitute_closed`.
        Only on devices that the host runs ahead of."""
        out: Tensor = direct.substitute_closed(some, self._before, self._open, *given)
        return out

    def spread(self, some: Tensor) -> Tensor:
        """As `scatter`, but with arbitrary rows at closed tokens where that is faster."""
        return self.scatter(some) if self._partition is None else self._partition.spread(some)

    def _known(self, x: Tensor) -> Tensor:
        """Cut a tensor with one entry for each place of the table to those of the open tokens."""
        return x[: self.total] if self._ahead else x


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class Rectangle:
    """A layout of the open tokens [N, ...] as [B, most, ...]: each row begins with its tokens, and arbitrary entries
    fill the rest. In a pass of fixed shape `most` is what there is room for in each row."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = chosen
        self.rows, self.most = len(chosen.counts), chosen.most
        self._full = self.rows * self.most == chosen.total and (self.rows == 1 or chosen.limit is None)

    @cached_property
    def slots(self) -> Tensor | None:
        """Flat place [N] of each token in the rectangle; None: there is nothing to fill."""
        if self._full:
            return None
        slots = self._chosen.batch * self.most + self._chosen.turn
        return slots if self._chosen.limit is None else slots.clamp(max=self.rows * self.most - 1)

    @cached_property
    def _turns(self) -> Tensor:
        """Number [most] of places in front of each one in its row."""
        return torch.arange(self.most, dtype=torch.int32, device=self._chosen.begins.device)

    @cached_property
    def sources(self) -> Tensor | None:
        """Token [B * most] in each place, any where filled; None: there is nothing to fill."""
        if self._full:
            return None
        return (self._chosen.begins[:, None] + self._turns).clamp(max=self._chosen.total - 1).flatten()

    def lay(self, x: Tensor, fill: int | None = None) -> Tensor:
        """x [N] or [N, ...] -> [B, most, ...]; fill: value of the filling of numbers x [N], None: arbitrary."""
        if self.sources is not None:
            x = x.index_select(0, self.sources)
        x = x.view(self.rows, self.most, *x.shape[1:])
        if fill is None or (self._full and self._chosen.limit is None):
            return x
        return x.masked_fill(self._turns >= self._chosen.each[:, None], fill)

    def lay_heads(self, x: Tensor) -> Tensor:
        """x [1, H, N, d] -> [B, H, most, d]."""
        return x if self.rows == 1 else self.lay(x[0].transpose(0, 1)).transpose(1, 2)

    def pick(self, x: Tensor) -> Tensor:
        """x [B, most, ...] -> [N, ...], the inverse of `lay`."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


class Order:
    """An order of padded rows: first the tokens at valid [B, T], in their order, then padding, which causal attention
    then leaves out without a mask."""

    def __init__(self, valid: Tensor) -> None:
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        begins = torch.arange(0, valid.numel(), valid.shape[1], device=valid.device)[:, None]
        self._sources, self._places = (begins + order).flatten(), (begins + order.argsort(dim=1)).flatten()

    def lay(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] in this order."""
        return x.flatten(0, 1).index_select(0, self._sources).view_as(x)

    def pick(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] in the original order, the inverse of `lay`."""
        return x.flatten(0, 1).index_select(0, self._places).view_as(x)


def take(values: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Return values [B or 1, T or 1, N] at flat indices rows [n] of the tokens x [B, T, D]: [1, n, N]."""
    return values.expand(*x.shape[:2], -1).flatten(0, 1).index_select(0, rows).unsqueeze(0)


def scatter_rows(some: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return [count, ...] with some [N, ...] at indices rows [N] and zeros elsewhere."""
    if devices.runs_ahead(some.device):
        return some.new_zeros(count, *some.shape[1:]).index_copy_(0, rows, some)
    if len(some) == 0:
        return some.new_zeros(count, *some.shape[1:])
    # on CPUs faster than copying into zeros
    place = rows.new_full((count,), len(some)).index_copy_(0, rows, torch.arange(len(some), device=rows.device))
    return torch.cat([some, some.new_zeros(1, *some.shape[1:])]).index_select(0, place)


def gather_open(open_: Tensor, count: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the indices [B, k] of the open tokens of open_ [B, T], and which of them are open [B, k] (None: all).

    k is the largest number of open tokens of any row, or 1 if none is open; rows with fewer end in closed tokens.
    count: number of open tokens of each row, if known; k is then `count`, and nothing waits.
    """
    if count is not None:
        table = torch.empty(len(open_), count + 1, dtype=torch.long, device=open_.device)
        places = torch.arange(open_.shape[1], device=open_.device).expand(open_.shape)
        return table.scatter_(1, open_.cumsum(1) * open_, places)[:, 1:], None  # column 0 takes the closed ones
    counts = open_.sum(1)
    most = max(1, int(counts.max()))  # waits for the device
    index = open_.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    valid = torch.arange(most, device=open_.device) < counts[:, None]
    return index, None if bool(valid.all()) else valid


def place_tokens(chosen: Chosen, kwargs: dict[str, Any], positions: bool) -> bool:
    """Cut a language model's rotary embeddings in kwargs (two tensors [1 or B, T, r], or one of complex numbers) to the
    chosen tokens, [1, N, r], and with `positions` its `position_ids` [1 or B, T] too; return whether there are any
    embeddings. Work that needs no number of tokens is launched before the host asks for it."""
    embeddings, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids") if positions else None
    chosen.prepare_packing()
    filled = [chosen.filled(e) for e in ([embeddings] if isinstance(embeddings, Tensor) else embeddings or ())]
    if ids is not None:
        kwargs["position_ids"] = chosen.cut(chosen.filled(ids))
    if embeddings is not None:
        cut = tuple(map(chosen.cut, filled))
        kwargs["position_embeddings"] = cut[0] if isinstance(embeddings, Tensor) else cut
    return embeddings is not None


def for_tokens(kwargs: dict[str, Any], index: Tensor, prefix: int) -> dict[str, Any]:
    """Return kwargs of an image model's block for the tokens at index [B, k] only, which begins with the prefix.

    Rotary embeddings hold patches alone, [..., N, C]; they become [B, 1 or heads, k - prefix, C].
    """

    def chosen(rope: Tensor) -> Tensor:
        rope = rope if rope.ndim > 2 else rope.unsqueeze(0)
        return rope[:, index[:, prefix:] - prefix].transpose(0, 1)

    return {**kwargs, **rotary(kwargs, chosen)}


def rotary(kwargs: dict[str, Any], of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return a function's results for the rotary embeddings among the arguments of an image model's block: timm's
    `rope`, or transformers' cosines and sines."""
    rope, pair = kwargs.get("rope"), kwargs.get("position_embeddings")
    made = {} if rope is None else {"rope": of(rope)}
    return made if pair is None else {**made, "position_embeddings": tuple(map(of, pair))}


def rotary_of(kwargs: dict[str, Any], rows: Tensor, patches: int) -> dict[str, Any]:
    """Return the rotary embeddings, made by `for_tokens`, of these rows of a batch and of their first patches."""
    return rotary(kwargs, lambda rope: rope[rows][..., :patches, :])
