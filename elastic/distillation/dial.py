"""One dial for compute: how far all gates open, and what that costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from students import Student
from students.calibration.price import Start
from students.compute import Phase
from students.routers import Router

Say = Callable[[str], None]

TOLERANCE = 0.001
"""How near to the target measured compute has to come before the search ends."""
AROUND = (-0.5, -0.25, 0.25, 0.5, 1.0)
"""Offsets around the target's at which compute is measured too, for `Student.set_compute` to interpolate."""
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


def capacity_for(student: Student, tokens: Any, compute: float, phase: Phase) -> float:
    """The share of open gates, the same for every router, at which the model spends this share of the teacher's compute
    on inputs of `tokens` tokens (see `tokens` of the family); by bisection."""
    return largest(0.0, 1.0, lambda share: student.uniform(share, tokens, phase) <= compute)


def exact_start(
    start: Start, student: Student, routers: Sequence[Router], targets: Sequence[float], meter: Callable[[], float]
) -> Start:
    """A calibrated start whose compute meets its targets as it is measured, where its own estimate is not good enough:
    these routers open so far that the middle of the targets is at offset 0."""

    def compute_at(offset: float) -> float:
        student.runtime.offset = offset
        return meter()

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


def _measured_points(
    student: Student, meter: Callable[[], float], say: Say
) -> tuple[dict[float, float], Callable[[float], float]]:
    """(compute by offset, what measures it at one, once, and says now and then how far it has come)."""
    points: dict[float, float] = {}
    said = time.monotonic()

    def measure(offset: float) -> float:
        nonlocal said
        if offset not in points:
            student.runtime.offset = offset
            points[offset] = meter()
            if time.monotonic() - said > PAUSE:
                said = time.monotonic()
                low, high = min(points.values()), max(points.values())
                say(f"setting the dial: {len(points)} points measured, compute {low:.3f} to {high:.3f} ...")
        return points[offset]

    return points, measure


def set_dial(student: Student, target: float, meter: Callable[[], float], say: Say) -> None:
    """Measure compute at several offsets of all gates, and leave the student where it is the target."""
    points, measure = _measured_points(student, meter, say)
    low = high = 0.0
    for _ in range(6):  # bracket the target
        if measure(high) < target:
            low, high = high, high + 0.25 * 2 ** len(points)
        elif measure(low) > target:
            low, high = low - 0.25 * 2 ** len(points), low
        else:
            break
    best = min(points, key=lambda offset: abs(points[offset] - target))
    for _ in range(8):
        if abs(points[best] - target) <= TOLERANCE or measure(high) <= measure(low):
            break
        along = (target - points[low]) / (points[high] - points[low])
        middle = low + (high - low) * min(0.9, max(0.1, along))
        low, high = (middle, high) if measure(middle) < target else (low, middle)
        best = min(points, key=lambda offset: abs(points[offset] - target))
    for step in AROUND:
        measure(best + step)
    if student.stepwise:
        best = _nearest(points, measure, target)
    student.runtime.offset = best
    student.dial = tuple(sorted((compute, offset) for offset, compute in points.items()))


def _nearest(points: dict[float, float], measure: Callable[[float], float], target: float) -> float:
    """Measure at many offsets between those in points, and return the one nearest to the target: counts of patches are
    whole numbers, in multiples, so that compute goes in steps, and not always upwards."""
    low, high = min(points), max(points)
    for step in range(1, STEPS):
        measure(low + (high - low) * step / STEPS)
    return min(points, key=lambda offset: abs(points[offset] - target))


def set_range(
    student: Student, span: tuple[float, float], offsets: Sequence[float], meter: Callable[[], float], say: Say
) -> None:
    """Measure compute over a range of budgets, and leave the student at the lowest. offsets: where to look first."""
    points, measure = _measured_points(student, meter, say)
    low, high = span
    for offset in offsets:
        measure(offset)
    step = (max(offsets) - min(offsets)) / len(offsets) or 0.25
    for _ in range(REACH):
        if min(points.values()) > low:
            measure(min(points) - step)
        elif max(points.values()) < high - TOLERANCE:
            measure(max(points) + step)
        else:
            break
        step *= 1.5
    if student.stepwise:
        _nearest(points, measure, low)
    for _ in range(BETWEEN):
        steps = [(points[b] - points[a], (a + b) / 2) for a, b in pairwise(sorted(points))]
        gap, middle = max((gap, middle) for gap, middle in steps)
        if gap <= APART:
            break
        measure(middle)
    student.dial = tuple(sorted((compute, offset) for offset, compute in points.items()))
    student.span = span
    student.set_compute(low)
