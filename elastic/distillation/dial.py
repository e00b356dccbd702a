"""One dial for compute: how far all gates open, and what that costs."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from elastic.reporting.progress import Say
from students import Student
from students.calibration.price import Start
from students.compute import Phase
from students.routers import Router

Meter = Callable[[float], float]
"""Measures the compute ratio where the dial is, on this share of what it is set on (0.125: an eighth)."""

TOLERANCE = 0.001
"""How near to the target measured compute has to come before the search ends."""
AROUND = (-0.5, -0.25, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Offsets around the target's at which compute is measured too, for `Student.set_compute` to interpolate: upwards until
nearly all gates are open."""
ROUGH = 0.125
"""The share of what the dial is set on that is enough to see how compute grows as it turns."""
EXACT = 5
"""How many points near the target are measured on all of it, at most."""
COARSE = 0.01
"""Where whole multiples of patches come no nearer to a budget, any number of them is kept."""
REACH = 12
"""How many steps the ends of a range are looked for."""
BETWEEN = 24
"""How many points are measured between others, at most."""
STEPS = 256
"""At how many offsets compute is measured where it goes in steps."""
SPREAD = 32.0
"""How far the dial is turned in search of an exact start, either way."""
APART = 0.06
"""How far apart in compute the measured points of a range may be."""
PAUSE = 20.0
"""Seconds between two words about how far a search has come."""
CLOSED = -1e4
"""An offset at which every gate is closed, whatever its score."""


def capacity_for(student: Student, tokens: Any, compute: float, phase: Phase) -> float:
    """The share of open gates, the same for every router, at which the model spends this share of the teacher's compute
    on inputs of `tokens` tokens (see `tokens` of the family); by bisection."""
    return largest(0.0, 1.0, lambda share: student.uniform(share, tokens, phase) <= compute)


def lowest(student: Student, meter: Meter, *, trained: bool = True) -> float:
    """The least compute that the dial reaches, as it is measured: that of closed gates, of which some kinds cannot all
    close (of an image one patch stays, or half of those that merge).

    trained: whether quotas are to stay as they are; if not, they are forgotten, as training will set them anew."""
    run = student.runtime
    before = run.offset, run.capacity
    for module in () if trained else student.modules():
        if isinstance(module, Router) and module.spec.selection == "quota":
            module.set_quota(torch.zeros(1))
    run.offset, run.capacity = CLOSED, 0.0
    try:
        return meter(1.0)
    finally:
        run.offset, run.capacity = before


def exact_start(
    start: Start, student: Student, routers: Sequence[Router], targets: Sequence[float], meter: Meter
) -> Start:
    """A calibrated start whose compute meets its targets as it is measured, where its own estimate is not good enough:
    these routers open so far that the middle of the targets is at offset 0."""

    def compute_at(offset: float) -> float:
        student.runtime.offset = offset
        return meter(1.0)

    def offset_of(target: float) -> float:
        return largest(-SPREAD, SPREAD, lambda offset: compute_at(offset) <= target)

    middle = offset_of((targets[0] + targets[-1]) / 2)
    for router in routers:
        router.open_by(middle)
    offsets = [offset_of(target) for target in targets]
    compute = compute_at(0.0)
    return replace(start, compute=compute, prices=tuple(start.price * math.exp(-2 * offset) for offset in offsets))


def largest(low: float, high: float, fits: Callable[[float], bool]) -> float:
    """The largest number between low and high that fits, where all below one that fits do too; by bisection."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass
class _Curve:
    """Compute by offset, each measured once: roughly, on a part of what the dial is set on, and exactly, on all."""

    student: Student
    meter: Meter
    say: Say
    rough: dict[float, float] = field(default_factory=dict)
    exact: dict[float, float] = field(default_factory=dict)
    last_said: float = field(default_factory=time.monotonic)

    def roughly(self, offset: float) -> float:
        """Compute at an offset, on a part."""
        return self._measured(self.rough, offset, ROUGH)

    def exactly(self, offset: float) -> float:
        """Compute at an offset, on all."""
        return self._measured(self.exact, offset, 1.0)

    def _measured(self, points: dict[float, float], offset: float, share: float) -> float:
        if offset not in points:
            self.student.runtime.offset = offset
            points[offset] = self.meter(share)
            if time.monotonic() - self.last_said > PAUSE:
                self.last_said = time.monotonic()
                known = [*self.rough.values(), *self.exact.values()]
                self.say(
                    f"setting the dial: {len(known)} points measured, compute {min(known):.3f} to {max(known):.3f} ..."
                )
        return points[offset]

    def offset_of(self, compute: float) -> float:
        """The offset at which about so much is spent, going by the rough points, to which it adds some."""
        points, step = self.rough, 0.5
        self.roughly(0.0)
        for _ in range(6):
            if min(points.values()) >= compute:
                self.roughly(min(points) - step)
            elif max(points.values()) < compute:
                self.roughly(max(points) + step)
            else:
                break
            step *= 2
        nearest = _nearest(points, compute)
        low = max((offset for offset in points if points[offset] < compute), default=nearest)
        high = min((offset for offset in points if points[offset] >= compute and offset > low), default=nearest)
        for _ in range(8):
            if abs(points[nearest] - compute) <= TOLERANCE or points[high] <= points[low]:
                break
            along = (compute - points[low]) / (points[high] - points[low])
            middle = low + (high - low) * min(0.9, max(0.1, along))
            low, high = (middle, high) if self.roughly(middle) < compute else (low, middle)
            nearest = _nearest(points, compute)
        return nearest

    def dial(self) -> tuple[tuple[float, float], ...]:
        """(compute, offset), ascending: what was measured exactly, and what was measured roughly, put right by how far
        off the latter is where both are known."""
        known = sorted(offset for offset in self.exact if offset in self.rough)
        points = dict(self.exact)
        for offset, compute in self.rough.items():
            points.setdefault(offset, compute + self._off_by(known, offset))
        return tuple(sorted((compute, offset) for offset, compute in points.items()))

    def _off_by(self, known: Sequence[float], offset: float) -> float:
        """By how much less the rough measure finds at an offset, in a line between those at which it is known."""
        apart = [self.exact[place] - self.rough[place] for place in known]
        if not known:
            return 0.0
        if offset <= known[0] or offset >= known[-1]:
            return apart[0 if offset <= known[0] else -1]
        after = bisect.bisect_left(known, offset)
        along = (offset - known[after - 1]) / (known[after] - known[after - 1])
        return apart[after - 1] + along * (apart[after] - apart[after - 1])


def _nearest(points: dict[float, float], target: float) -> float:
    """The offset at which compute is nearest to the target."""
    return min(points, key=lambda offset: abs(points[offset] - target))


def set_dial(student: Student, target: float, meter: Meter, say: Say) -> None:
    """Measure compute at several offsets of all gates, and leave the student where it is the target."""
    curve = _Curve(student, meter, say)
    aim, offset = target, curve.offset_of(target)
    for _ in range(EXACT):
        missing = target - curve.exactly(offset)
        if abs(missing) <= TOLERANCE:
            break
        aim += missing
        offset = curve.offset_of(aim)
    best = _nearest(curve.exact, target)
    for step in AROUND:
        curve.roughly(best + step)
    if student.stepwise:
        _measure_steps(curve)
        best = _nearest(curve.exact, target)
        if _too_coarse(student, curve, (target,), say):
            return set_dial(student, target, meter, say)
    student.runtime.offset = best
    student.dial = curve.dial()


def _measure_steps(curve: _Curve) -> None:
    """Measure exactly at many offsets between those known: counts of patches are whole numbers, in multiples, so that
    compute goes in steps, and not always upwards."""
    places = sorted(curve.rough)
    each = -(-STEPS // (len(places) - 1))
    for low, high in pairwise(places):
        for step in range(each + 1):
            curve.exactly(low + (high - low) * step / each)


def _too_coarse(student: Student, curve: _Curve, targets: Sequence[float], say: Say) -> bool:
    """Whether a budget lies too far between the steps; from then on the student keeps any number of patches."""
    run = student.runtime
    away = max(abs(curve.exact[_nearest(curve.exact, target)] - target) for target in targets)
    if away <= COARSE or not run.multiples or all(router.multiple == 1 for router in student.spec.routers):
        return False
    say(f"whole multiples of patches miss the budget by {away:.3f}: any number of them is kept")
    run.multiples = False
    return True


def set_range(student: Student, span: tuple[float, float], offsets: Sequence[float], meter: Meter, say: Say) -> None:
    """Measure compute over a range of budgets, and leave the student at the lowest. offsets: where to look first."""
    curve = _Curve(student, meter, say)
    low, high = span
    points = curve.rough
    for offset in offsets:
        curve.roughly(offset)
    step = (max(offsets) - min(offsets)) / len(offsets) or 0.25
    for measure in (curve.roughly, curve.exactly):  # the ends have to be there on all of it, too
        for _ in range(REACH):
            ends = min(points), max(points)
            if measure(ends[0]) > low:
                curve.roughly(ends[0] - step)
            elif measure(ends[1]) < high - TOLERANCE:
                curve.roughly(ends[1] + step)
            else:
                break
            step *= 1.5
    if student.stepwise:
        _measure_steps(curve)
        if _too_coarse(student, curve, (low, (low + high) / 2), say):
            return set_range(student, span, offsets, meter, say)
    for _ in range(BETWEEN):
        steps = [(points[b] - points[a], (a + b) / 2) for a, b in pairwise(sorted(points))]
        gap, middle = max((gap, middle) for gap, middle in steps)
        if gap <= APART:
            break
        curve.roughly(middle)
    for part in (0.25, 0.5, 0.75):
        curve.exactly(_nearest(points, low + (high - low) * part))
    student.dial = curve.dial()
    student.span = span
    student.set_compute(low)
