"""Some of a batch's tokens, by their places."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from students.execution.capture import Fetched
from students.kernels import devices, ops


@dataclass
class Listed:
    """Tokens whose places are known."""

    rows: Tensor
    """[N], ascending."""
    every: bool = False
    """Whether they are all that there are."""


class Chosen:
    """The open tokens of a batch [B, T]: which they are the device knows; how many, the host is told when it first asks
    for that, and what is launched between `begin` and then can run meanwhile. What has no need to know, such as a table
    of them that is filled up with the last token, is launched before.

    of: how many tokens there are, padding aside. count: how many each row has, if that is known; then nothing waits.
    listed: where they are, as of Gates.
    """

    def __init__(self, open_: Tensor, of: int, count: int | None = None, listed: list[Tensor] | None = None) -> None:
        self._open = open_
        self._of = of
        self._ahead = devices.runs_ahead(open_.device)
        self._fetched: Fetched | None = None
        if count is not None:
            self.counts = [count] * len(open_)
        if self._ahead:
            self._table, self._before, self._upto = listed or ops.list_open(open_, None, None)[1:]

    @property
    def _ends(self) -> Tensor:
        """[B]: how many there are up to the end of each row."""
        return self._upto[self._open.shape[1] - 1 :: self._open.shape[1]]

    def begin(self) -> None:
        """Let the host be told how many there are."""
        if not self.known and self._fetched is None:
            self._fetched = Fetched(self._ends)

    @property
    def known(self) -> bool:
        """Whether asking how many there are would not wait."""
        return not self._ahead or "counts" in self.__dict__

    @cached_property
    def counts(self) -> list[int]:
        """How many each row of the batch has."""
        self.begin()
        if self._fetched is None:
            return self._open.sum(1).tolist()
        ends = self._fetched.wait().tolist()
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def rows(self) -> Tensor:
        """[N]: their flat indices, ascending."""
        return self._known(self._table) if self._ahead else self._open.flatten().nonzero().squeeze(1)

    @property
    def _listed(self) -> Tensor:
        """Their flat indices, filled up where the host runs ahead."""
        return self._table if self._ahead else self.rows

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        table, tokens = self._listed, self._open.shape[1]
        if len(self._open) == 1:
            return _zeros(table.shape, table.dtype, table.device), table
        return table // tokens, table % tokens

    @cached_property
    def _turns(self) -> Tensor:
        batch, begins = self._places[0], F.pad(self._ends[:-1], (1, 0))
        return torch.arange(len(batch), device=batch.device) - begins.index_select(0, batch)

    @property
    def batch(self) -> Tensor:
        """[N]: the row of the batch that each belongs to."""
        return self._known(self._places[0])

    @property
    def index(self) -> Tensor:
        """[N]: the place of each in its row."""
        return self._known(self._places[1])

    @property
    def turn(self) -> Tensor:
        """[N]: how many come before it in its row; on a device that the host runs ahead of."""
        return self._known(self._turns)

    @property
    def every(self) -> bool:
        """Whether they are all that there are."""
        return (sum(self.counts) if self._ahead else len(self.rows)) == self._of

    def filled(self, x: Tensor) -> Tensor:
        """These tokens [1, N or more, ...] of x [B or 1, T, ...], filled up where the host runs ahead (see `cut`)."""
        table = self._places[1] if len(x) < len(self._open) else self._listed
        return x.flatten(0, 1).index_select(0, table).unsqueeze(0)

    def cut(self, some: Tensor) -> Tensor:
        """Them alone."""
        return self._known(some[0]).unsqueeze(0)

    def prepare_packing(self) -> None:
        """Launch what a packing asks for (see `batch`, `index` and `turn`)."""
        if self._ahead:
            _ = self._places if len(self._open) == 1 else self._turns

    @property
    def number(self) -> Tensor:
        """[1] int32: how many there are, for what asks on the device."""
        return self._upto[-1:]

    def spread(self, some: Tensor) -> Tensor:
        """[B * T, D]: what some [N or more, D] holds of each, anything for others; where the host runs ahead."""
        return some.index_select(0, self._before)

    def scatter(self, some: Tensor) -> Tensor:
        """The same, with zeros for others."""
        zero = _zeros((), some.dtype, some.device)  # a number of Python's would be another launch
        return torch.where(self._open.flatten().unsqueeze(1), self.spread(some), zero)

    def _known(self, x: Tensor) -> Tensor:
        """Of what there is for each place of the table, that of the open tokens."""
        return x[: sum(self.counts)] if self._ahead else x


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class Rectangle:
    """The open tokens of a batch [N, ...] as [B, most, ...], each row from its start on and filled up behind with
    anything."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = chosen
        self.rows, self.most = len(chosen.counts), max(chosen.counts)
        self._full = self.rows * self.most == sum(chosen.counts)

    @cached_property
    def slots(self) -> Tensor | None:
        """[N]: a token's place in it, flat; None: nothing is filled up."""
        return None if self._full else self._chosen.batch * self.most + self._chosen.turn

    @cached_property
    def sources(self) -> Tensor | None:
        """[B * most]: the token that is in each place."""
        if self.slots is None:
            return None
        order = torch.arange(len(self.slots), device=self.slots.device)
        return order.new_zeros(self.rows * self.most).index_copy_(0, self.slots, order)

    def lay(self, x: Tensor, fill: int | None = None) -> Tensor:
        """x [N, ...] -> [B, most, ...]; fill: what it is filled up with."""
        if self.slots is not None and fill is not None:
            x = x.new_full((self.rows * self.most, *x.shape[1:]), fill).index_copy_(0, self.slots, x)
        elif self.sources is not None:
            x = x.index_select(0, self.sources)
        return x.view(self.rows, self.most, *x.shape[1:])

    def lay_heads(self, x: Tensor) -> Tensor:
        """x [1, H, N, d] -> [B, H, most, d]."""
        return x if self.rows == 1 else self.lay(x[0].transpose(0, 1)).transpose(1, 2)

    def pick(self, x: Tensor) -> Tensor:
        """The inverse."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


class Order:
    """Of padded rows, whose tokens count where valid [B, T] says so: those first, in turn, and padding behind them,
    where causal attention needs no mask to leave it out."""

    def __init__(self, valid: Tensor) -> None:
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        begins = torch.arange(0, valid.numel(), valid.shape[1], device=valid.device)[:, None]
        self._sources, self._places = (begins + order).flatten(), (begins + order.argsort(dim=1)).flatten()

    def lay(self, x: Tensor) -> Tensor:
        """x [B, T, ...] in this order."""
        return x.flatten(0, 1).index_select(0, self._sources).view_as(x)

    def pick(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.flatten(0, 1).index_select(0, self._places).view_as(x)


def take(values: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Values [B or 1, T or 1, N] of the tokens x [B, T, D], for the flat rows only: [1, n, N]."""
    return values.expand(*x.shape[:2], -1).flatten(0, 1).index_select(0, rows).unsqueeze(0)


def scatter_rows(some: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count, ...]: what some [N, ...] holds at rows [N], zeros elsewhere."""
    if devices.runs_ahead(some.device):
        return some.new_zeros(count, *some.shape[1:]).index_copy_(0, rows, some)
    # on CPUs faster than copying into zeros
    place = rows.new_full((count,), len(some)).index_copy_(0, rows, torch.arange(len(some), device=rows.device))
    return torch.cat([some, some.new_zeros(1, *some.shape[1:])]).index_select(0, place)


def gather_open(open_: Tensor, count: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Where the open tokens of open_ [B, T] are: index [B, k], k the most that any row has (at least 1), the open ones
    first; and which of them are open [B, k], None where all are. count: how many each row has, if that is known; then
    nothing waits."""
    if count is not None:
        table = torch.empty(len(open_), count + 1, dtype=torch.long, device=open_.device)
        places = torch.arange(open_.shape[1], device=open_.device).expand(open_.shape)
        return table.scatter_(1, open_.cumsum(1) * open_, places)[:, 1:], None  # the closed ones meet in the first
    counts = open_.sum(1)
    most = max(1, int(counts.max()))  # waits for the device
    index = open_.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    valid = torch.arange(most, device=open_.device) < counts[:, None]
    return index, None if bool(valid.all()) else valid


def place_tokens(chosen: Chosen, kwargs: dict[str, Any]) -> bool:
    """Leave in rotary embeddings of language models ([1 or B, T, r] each) those of the chosen tokens, [1, N, r], and
    launch what can be before the host asks how many there are; returns whether there are such embeddings."""
    embeddings = kwargs.get("position_embeddings")
    chosen.prepare_packing()
    if embeddings is None:
        return False
    filled = [chosen.filled(e) for e in embeddings]
    kwargs["position_embeddings"] = tuple(map(chosen.cut, filled))
    return True


def for_tokens(kwargs: dict[str, Any], index: Tensor, prefix: int) -> dict[str, Any]:
    """What a block of an image model is called with, for the tokens at index [B, k] only, which begins with the prefix.

    Rotary embeddings (timm's `rope`) hold patches alone, [..., N, C]; they become [B, 1 or heads, k - prefix, C].
    """
    rope = kwargs.get("rope")
    if rope is None:
        return kwargs
    rope = rope if rope.ndim > 2 else rope.unsqueeze(0)
    return {**kwargs, "rope": rope[:, index[:, prefix:] - prefix].transpose(0, 1)}
