"""Frozen weights of which each of several processes keeps one part (ZeRO-3, arXiv 1910.02054; FSDP, 2304.11277).

A *unit* of a model, such as a block, is open, its weights whole, from when one of its modules runs, forward or back,
until another unit is opened: one at a time. While it is, the one that has always come next is gathered, so that there
is memory for two. Frozen weights have no gradients, so that nothing else is exchanged. The model keeps its parameters,
which are views of memory that comes and goes: models that share them share the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 64
"""Bytes that a weight's place in a unit is a multiple of."""
UNIT = "unit"
"""Under which name a weight knows its unit."""


@dataclass
class Shards:
    """What all units of a model share."""

    rank: int
    """Which part this process keeps."""
    size: int
    """Into how many parts a unit is cut."""
    gather: Callable[[Tensor], Callable[[], None]]
    """Begins to fill a buffer [bytes] of which this process's part is there with those of the others, and returns what
    waits until it is full; all processes call both, in the same order."""
    device: torch.device
    """Where weights are whole."""
    kept_on: torch.device
    """Where the parts are."""
    now: Unit | None = field(default=None, init=False)
    """The unit that is open."""
    before: Unit | None = field(default=None, init=False)
    """The one that was open before, which tells a way forward from one back."""
    ahead: tuple[Unit, Callable[[], None]] | None = field(default=None, init=False)
    """The unit that is being gathered, and what waits for it."""
    after: dict[tuple[Unit | None, Unit | None], Unit | None] = field(default_factory=dict, init=False)
    """What was opened after these two; None where it was not always the same."""

    def spread(self, modules: Sequence[nn.Module]) -> None:
        """Make the weights of these modules, which learn nothing, a unit; they may be anywhere."""
        Unit(self, modules)

    def open(self, unit: Unit) -> None:
        """Have all weights of a unit whole, no other's, and the next one's on their way."""
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
        """Gather nothing ahead."""
        if self.ahead is not None:
            unit, wait = self.ahead
            wait()
            unit.leave()
            self.ahead = None

    def close(self) -> None:
        """Leave no unit open."""
        self._give_up()
        if self.now is not None:
            self.now.leave()
            self.before = self.now = None


class Unit:
    """Weights that are whole at the same time."""

    def __init__(self, shards: Shards, modules: Sequence[nn.Module]) -> None:
        self._shards = shards
        weights = list(dict.fromkeys(weight for module in modules for weight in module.parameters()))
        starts = [0]
        for weight in weights:
            starts.append(_up(starts[-1] + weight.numel() * weight.element_size(), ALIGNED))
        self._part = _up(starts[-1], ALIGNED * shards.size) // shards.size
        """Bytes of a part."""
        self.parts: dict[Tensor, Tensor] = {}
        """What of each weight is in this process's part, flat."""
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
        return self  # copies of a model on the same weights have the same units

    def _cut(self, weights: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        """This process's part [bytes]; of each weight no more is read than what is in it."""
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
        """Have all weights whole, and no other unit's."""
        self._shards.open(self)

    def enter(self) -> Callable[[], None]:
        """Begin to gather all parts; returns what waits for them. (What a GPU does with a buffer is queued in the order
        of these calls, so that its memory can come from what was freed while it was still being read.)"""
        shards = self._shards
        self.whole.untyped_storage().resize_(self._part * shards.size)
        first = shards.rank * self._part
        self.whole[first : first + self._part].copy_(self._kept, non_blocking=True)
        return shards.gather(self.whole)

    def leave(self) -> None:
        """Keep this process's part alone."""
        self.whole.untyped_storage().resize_(0)

    def _before(self, module: nn.Module, args: Any) -> None:
        self.open()

    def _behind(self, module: nn.Module, args: Any, out: Any) -> None:
        """Open again before the gradient of what the module puts out goes back through it."""
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_open, self))


def _open(unit: Unit, gradient: Tensor) -> None:
    unit.open()


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def open_unit(module: nn.Module) -> None:
    """Before weights of a module are read while it does not run: have them whole, if they are spread, until another
    module runs or is opened."""
    for weight in module.parameters():
        unit = unit_of(weight)
        if unit is not None:
            return unit.open()


def unit_of(weight: Tensor) -> Unit | None:
    """The unit that a weight belongs to; None where it is not spread."""
    return getattr(weight, UNIT, None)


def part_of(weight: Tensor) -> Tensor:
    """What this process keeps of a weight, flat; all of it where it is not spread."""
    unit = unit_of(weight)
    return weight if unit is None else unit.parts[weight]


def are_spread(model: nn.Module) -> bool:
    """Whether a process has only a part of some of these weights."""
    return any(unit_of(weight) is not None for weight in model.parameters())
