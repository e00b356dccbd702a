"""Setting the dial: measure compute at several offsets of all gates, and find the offset of a budget."""

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
from teachers.wording import number_of

Meter = Callable[[float], float]
"""Measures the compute ratio at the current position of the dial, on this share of the samples on which the dial is set
(0.125: an eighth)."""

TOLERANCE = 0.001
"""Largest distance between measured compute and the target at which a search ends."""
AROUND = (-0.5, -0.25, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Offsets relative to the target's at which compute is measured as well, for `Student.set_compute` to interpolate;
upwards until nearly all gates are open."""
ROUGH = 0.125
"""Share of the samples that suffices to measure how compute grows with the offset."""
EXACT = 5
"""Maximum number of offsets near the target that are measured on all samples."""
COARSE = 0.01
"""Largest distance between a budget and the nearest compute reached with whole multiples of patches; if the distance is
larger, smaller multiples or any number of patches may be kept."""
REACH = 12
"""Maximum number of steps, per pass, in the search for the ends of a range."""
BETWEEN = 24
"""Maximum number of offsets that are measured between others to fill gaps in a range."""
STEPS = 256
"""Approximate number of offsets at which compute is measured if it grows in steps."""
APART = 0.1
"""Largest gap in compute between neighbouring measured points of a range, with a computed point in each gap."""
PAUSE = 20.0
"""Seconds between two messages about the progress of a search."""
CLOSED = -1e4
"""An offset at which every gate is closed, whatever its score."""


def capacity_for(student: Student, tokens: Any, compute: float, phase: Phase) -> float:
    """Return the share of open gates, the same for every router, at which the model spends this share of the teacher's
    compute on inputs of `tokens` tokens (see `Family.tokens`), by bisection."""
    return largest(0.0, 1.0, lambda share: student.uniform(share, tokens, phase) <= compute)


def lowest(student: Student, meter: Meter, *, trained: bool = True) -> float:
    """Return the lowest compute that the dial reaches, measured with every gate closed that can close (of an image at
    least one patch stays, or half of the patches where patches merge).

    trained: whether to keep the quotas; if False, they are set to those of scores that are all zero, because they are
    set again after training.
    """
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
    start: Start, student: Student, routers: Sequence[Router], targets: Sequence[float], meter: Meter, say: Say
) -> Start:
    """Return a calibrated start corrected by measured compute, for routers whose estimated compute is too inaccurate.

    Opens or closes the routers such that measured compute is the middle of the targets at offset 0, and replaces the
    start's compute and prices accordingly.
    """
    middle = (targets[0] + targets[-1]) / 2
    opened = _Curve(student, meter, say).offset_of(middle)
    for router in routers:
        router.open_by(opened)
    curve = _Curve(student, meter, say)
    offsets = [0.0 if target == middle else curve.offset_of(target) for target in targets]
    compute, student.runtime.offset = curve.roughly(0.0), 0.0
    return replace(start, compute=compute, prices=tuple(start.price * math.exp(-2 * offset) for offset in offsets))


def largest(low: float, high: float, fits: Callable[[float], bool]) -> float:
    """Return the largest number between low and high for which `fits` is True, by bisection; `fits` has to be True for
    all numbers below one for which it is True."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass
class _Curve:
    """Compute by offset, each measured once: roughly, on the share ROUGH of the samples, or exactly, on all samples."""

    student: Student
    meter: Meter
    say: Say
    rough: dict[float, float] = field(default_factory=dict)
    exact: dict[float, float] = field(default_factory=dict)
    last_said: float = field(default_factory=time.monotonic)

    def roughly(self, offset: float) -> float:
        """Return compute at an offset, measured on the share ROUGH of the samples."""
        return self._measured(self.rough, offset, ROUGH)

    def exactly(self, offset: float) -> float:
        """Return compute at an offset, measured on all samples."""
        return self._measured(self.exact, offset, 1.0)

    def _measured(self, points: dict[float, float], offset: float, share: float) -> float:
        if offset not in points:
            self.student.runtime.offset = offset
            points[offset] = self.meter(share)
            if time.monotonic() - self.last_said > PAUSE:
                self.last_said = time.monotonic()
                known = [*self.rough.values(), *self.exact.values()]
                so_far = number_of(len(known), "offsets")
                self.say(f"{so_far} measured, compute {min(known):.3f} to {max(known):.3f} ...")
        return points[offset]

    def offset_of(self, compute: float) -> float:
        """Return the offset at which compute is about this, by rough measurements; makes further ones as necessary."""
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
        """Return all points (compute, offset), ascending; rough measurements are corrected by the difference between
        exact and rough compute at offsets where both are known (see `_off_by`)."""
        known = sorted(offset for offset in self.exact if offset in self.rough)
        points = dict(self.exact)
        for offset, compute in self.rough.items():
            points.setdefault(offset, compute + self._off_by(known, offset))
        return tuple(sorted((compute, offset) for offset, compute in points.items()))

    def _off_by(self, known: Sequence[float], offset: float) -> float:
        """Return exact minus rough compute at an offset, interpolated linearly between the `known` offsets, at which
        both were measured."""
        apart = [self.exact[place] - self.rough[place] for place in known]
        if not known:
            return 0.0
        if offset <= known[0] or offset >= known[-1]:
            return apart[0 if offset <= known[0] else -1]
        after = bisect.bisect_left(known, offset)
        along = (offset - known[after - 1]) / (known[after] - known[after - 1])
        return apart[after - 1] + along * (apart[after] - apart[after - 1])


def _nearest(points: dict[float, float], target: float) -> float:
    """Return the offset of `points` (compute by offset) whose compute is nearest to the target."""
    return min(points, key=lambda offset: abs(points[offset] - target))


def set_dial(student: Student, target: float, meter: Meter, say: Say) -> None:
    """Measure compute at several offsets of all gates, and leave the dial at the offset whose compute is nearest to the
    target."""
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
        if _allow_smaller_multiples(student, curve, (target,), say):
            return set_dial(student, target, meter, say)
    student.runtime.offset = best
    student.dial = curve.dial()


def _measure_steps(curve: _Curve) -> None:
    """Measure exactly at many offsets between the known ones: counts of patches are whole multiples, so that compute
    changes in steps, and does not always grow with the offset."""
    places = sorted(curve.rough)
    each = -(-STEPS // (len(places) - 1))
    for low, high in pairwise(places):
        for step in range(each + 1):
            curve.exactly(low + (high - low) * step / each)


def _allow_smaller_multiples(student: Student, curve: _Curve, targets: Sequence[float], say: Say) -> bool:
    """If a budget is more than COARSE away from the nearest step, let the student keep smaller multiples of patches, in
    the end any number. Return whether it does so from now on: the dial then has to be set again."""
    run = student.runtime
    away = max(abs(curve.exact[_nearest(curve.exact, target)] - target) for target in targets)
    used = max((run.patch_counts(router).multiple for router in student.spec.routers), default=1)
    if away <= COARSE or used == 1:
        return False
    run.multiples = used // 2 if used > 8 else 1
    kept = "any number of them is" if run.multiples == 1 else f"multiples of {run.multiples} are"
    say(f"multiples of {used} patches miss the budget by {away:.3f}: {kept} kept")
    return True


def set_range(student: Student, span: tuple[float, float], offsets: Sequence[float], meter: Meter, say: Say) -> None:
    """Measure compute over a range of budgets, and leave the dial at the lowest budget; offsets: the first offsets to
    measure."""
    curve = _Curve(student, meter, say)
    low, high = span
    points = curve.rough
    for offset in offsets:
        curve.roughly(offset)
    step = (max(offsets) - min(offsets)) / len(offsets) or 0.25
    for measure in (curve.roughly, curve.exactly):  # the ends have to be reached on all samples, too
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
        if _allow_smaller_multiples(student, curve, (low, (low + high) / 2), say):
            return set_range(student, span, offsets, meter, say)
    for _ in range(BETWEEN):
        steps = [(points[b] - points[a], (a + b) / 2) for a, b in pairwise(sorted(points))]
        gap, middle = max((gap, middle) for gap, middle in steps)
        if gap <= APART:
            break
        curve.roughly(middle)
    curve.exactly(_nearest(points, (low + high) / 2))
    student.dial = curve.dial() if student.stepwise else _with_midpoints(curve.dial())
    student.span = span
    student.set_compute(low)


def _with_midpoints(dial: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Return a dial with a point in the middle of each gap, by cubic interpolation with the slopes of parabolas through
    three neighbours: half as many measured points then serve as well, because compute grows smoothly."""
    points = sorted((offset, compute) for compute, offset in dial)
    wide = [b - a for (a, _), (b, _) in pairwise(points)]
    rise = [(high - low) / width for ((_, low), (_, high)), width in zip(pairwise(points), wide, strict=True)]
    inner = [(b * r + a * s) / (a + b) for (a, b), (r, s) in zip(pairwise(wide), pairwise(rise), strict=True)]
    if not inner:
        return dial
    slopes = [2 * rise[0] - inner[0], *inner, 2 * rise[-1] - inner[-1]]
    middle = []
    for ((a, low), (b, high)), (first, last) in zip(pairwise(points), pairwise(slopes), strict=True):
        compute = (low + high) / 2 + (b - a) * (first - last) / 8
        middle.append((min(max(compute, min(low, high)), max(low, high)), (a + b) / 2))
    return tuple(sorted([*dial, *middle]))
