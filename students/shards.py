"""Frozen weights that are sharded over data-parallel ranks (ZeRO-3, arXiv 1910.02054; FSDP, arXiv 2304.11277).

Every rank keeps one part of the weights of each *unit* of a model, such as a block, and gathers the others before a
module of the unit runs forward or backward. The unit is then *open* until another is opened: one unit at a time.
Meanwhile the unit that has always followed is prefetched, so that memory is needed for two whole units. Frozen weights
have no gradients, so that nothing else is exchanged. Parameters stay the same objects, views of memory that is released
and allocated again: models that share parameters share the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 64
"""Alignment in bytes of each weight within a unit."""
UNIT = "unit"
"""Attribute of a weight that holds its unit."""


@dataclass
class Shards:
    """The settings and the state that all units of a model share."""

    rank: int
    """Index of the part that this process keeps."""
    size: int
    """Number of parts of a unit, one for each process."""
    gather: Callable[[Tensor], Callable[[], None]]
    """Starts an all-gather into a buffer [bytes] that holds this process's part in its place, and returns a function
    that waits until the buffer is full. All processes call both in the same order."""
    device: torch.device
    """Device of whole weights."""
    kept_on: torch.device
    """Device of the parts, possibly the host."""
    now: Unit | None = field(default=None, init=False)
    """The open unit."""
    before: Unit | None = field(default=None, init=False)
    """The unit that was open before `now`: the order of the two tells a forward pass from a backward pass."""
    ahead: tuple[Unit, Callable[[], None]] | None = field(default=None, init=False)
    """The unit that is being prefetched, and the function that waits for its weights."""
    after: dict[tuple[Unit | None, Unit | None], Unit | None] = field(default_factory=dict, init=False)
    """The unit that was opened after the pair (`before`, `now`); None if it was not always the same one."""

    def spread(self, modules: Sequence[nn.Module]) -> None:
        """Make the frozen weights of these modules, on any device, a unit, and keep this process's part of them."""
        Unit(self, modules)

    def open(self, unit: Unit) -> None:
        """Gather a unit's weights, release those of the open unit, and prefetch the unit that has always followed."""
        if self.now is unit:
            return
        last = self.before, self.now
        if self.after.setdefault(last, unit) is not unit:
            self.after[last] = None
        if self.now is not None:
            self.now.leave()
        if self.ahead is None or self.ahead[0] is not unit:
            self._give_up()
            self.ahead = unit, unit.enter()
        self.ahead[1]()
        self.before, self.now, self.ahead = self.now, unit, None
        following = self.after.get((self.before, unit))
        if following is not None:
            self.ahead = following, following.enter()

    def _give_up(self) -> None:
        """Abandon the prefetched unit, once its weights have arrived, and release it."""
        if self.ahead is not None:
            unit, wait = self.ahead
            wait()
            unit.leave()
            self.ahead = None

    def close(self) -> None:
        """Release the open and the prefetched unit."""
        self._give_up()
        if self.now is not None:
            self.now.leave()
            self.before = self.now = None


class Unit:
    """Weights that are gathered and released together."""

    def __init__(self, shards: Shards, modules: Sequence[nn.Module]) -> None:
        self._shards = shards
        weights = list(dict.fromkeys(weight for module in modules for weight in module.parameters()))
        starts = [0]
        for weight in weights:
            starts.append(_up(starts[-1] + weight.numel() * weight.element_size(), ALIGNED))
        self._part = _up(starts[-1], ALIGNED * shards.size) // shards.size
        """Size of a part in bytes."""
        self.parts: dict[Tensor, Tensor] = {}
        """The piece of each weight that is in this process's part, flat; empty if there is none."""
        self._kept = self._cut(weights, starts)
        self.whole = torch.empty(self._part * shards.size, dtype=torch.uint8, device=shards.device)
        for weight, start in zip(weights, starts, strict=False):
            place = self.whole[start : start + weight.numel() * weight.element_size()]
            weight.data = place.view(weight.dtype).view(weight.shape)
            setattr(weight, UNIT, self)
        self.whole.untyped_storage().resize_(0)
        for module in modules:
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._behind)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unit:
        return self  # copies of a model share its weights, and so its units

    def _cut(self, weights: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        """Copy this process's part [bytes] out of the weights; only this piece of each weight is read."""
        shards = self._shards
        kept = torch.zeros(self._part, dtype=torch.uint8, device=shards.kept_on)
        if shards.kept_on.type == "cpu" and shards.device.type != "cpu":
            kept = kept.pin_memory()
        first = shards.rank * self._part
        for weight, start in zip(weights, starts, strict=False):
            data = weight.detach().contiguous().view(-1).view(torch.uint8)
            begin = min(max(start, first), start + len(data))
            end = max(begin, min(start + len(data), first + self._part))
            here = kept[begin - first : end - first] if begin < end else kept[:0]
            self.parts[weight] = here.copy_(data[begin - start : end - start]).view(weight.dtype)
        return kept

    def open(self) -> None:
        """Gather this unit's weights and release those of the open unit."""
        self._shards.open(self)

    def enter(self) -> Callable[[], None]:
        """Allocate memory for all parts and start to gather them; return a function that waits for them.

        The memory may have been freed while kernels still read it: a GPU runs what is queued in order, so that they
        finish before the gather writes.
        """
        shards = self._shards
        self.whole.untyped_storage().resize_(self._part * shards.size)
        first = shards.rank * self._part
        self.whole[first : first + self._part].copy_(self._kept, non_blocking=True)
        return shards.gather(self.whole)

    def leave(self) -> None:
        """Release the whole weights; this process's part stays."""
        self.whole.untyped_storage().resize_(0)

    def _before(self, module: nn.Module, args: Any) -> None:
        self.open()

    def _behind(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook: open the unit again before gradients of the module's outputs go back through the module."""
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_open, self))


def _open(unit: Unit, gradient: Tensor) -> None:
    unit.open()


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def open_unit(module: nn.Module) -> None:
    """Gather a module's weights, if they are sharded, to read them outside of its forward pass. They stay whole until a
    module of another unit runs or is opened."""
    for weight in module.parameters():
        unit = unit_of(weight)
        if unit is not None:
            return unit.open()


def unit_of(weight: Tensor) -> Unit | None:
    """Return the unit that a weight belongs to; None if the weight is not sharded."""
    return getattr(weight, UNIT, None)


def part_of(weight: Tensor) -> Tensor:
    """Return the piece of a weight that this process keeps, flat; the weight itself if it is not sharded."""
    unit = unit_of(weight)
    return weight if unit is None else unit.parts[weight]


def are_spread(model: nn.Module) -> bool:
    """Return whether some weights of a model are sharded."""
    return any(unit_of(weight) is not None for weight in model.parameters())
