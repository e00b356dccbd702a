"""How long a run is, as asked for or as its time allows, and how fast each of its steps learns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from elastic import launch
from elastic.config import TrainConfig

TIMED_STEPS = 4
"""Steps that are timed to turn minutes into a number of steps (after one that is not)."""
LOOKS = 4
"""How often that number is made to fit the time that is left: whenever half of it, or of the steps, is gone."""


class Schedule:
    """How many steps there are. What the clock has decided is written into the run, so that a run that is resumed
    decides the same: `points` are (step, number of steps from there on)."""

    def __init__(self, train: TrainConfig, about: dict[str, Any], step: int) -> None:
        """about: what the run knows of itself (elastic.json); step: the one that it begins with."""
        self._steps, self._minutes, self._begun = train.steps, train.minutes, step
        self._warmup, self._start = train.warmup, max(train.warmup, 1 + TIMED_STEPS)
        if train.steps is not None:
            plan = [(0, train.steps)]
        else:  # runs of earlier versions know one number
            plan = about.get("plan", [(1 + TIMED_STEPS, about["steps"])] if "steps" in about else [])
        self.points: list[tuple[int, int]] = [(place, steps) for place, steps in plan]
        self._before, self._clock = about.get("trained", 0.0), time.monotonic()
        self._timed, self._timer = step, self._clock

    def steps(self, step: int) -> int | None:
        """The number of steps as it is at a step; None where minutes are not turned into one yet."""
        return next((steps for place, steps in reversed(self.points) if place <= step), None)

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: linear warm-up, then cosine decay to zero, wherever the end is moved to.

        The decay waits until minutes have become a number of steps.
        """
        points = [(place, steps) for place, steps in self.points if place <= step]
        if step < self._start or not points:
            return min(1.0, (step + 1) / max(1, self._warmup))
        angle, since, end = 0.0, self._start, points[0][1]
        for place, steps in points[1:]:
            if place > self._start:
                angle += (math.pi - angle) * (place - since) / max(1, end - since)
                since = place
            end = steps
        return 0.5 * (1 + math.cos(angle + (math.pi - angle) * (step - since) / max(1, end - since)))

    @property
    def decided(self) -> dict[str, Any]:
        """What the run has to know of a decision."""
        return {"steps": self.points[-1][1], "plan": self.points}

    @property
    def seconds(self) -> float:
        """How long the run has trained, in all processes that had a part in it: what goes with a checkpoint."""
        return self._before + time.monotonic() - self._clock

    def look(self, step: int, wait: Callable[[], object]) -> bool:
        """After a step: whether the number of steps is decided upon anew; wait: until the device has done it."""
        if self._minutes is None or self._steps is not None:
            return False
        if step == self._begun + 1:  # a process's first step is slower than the others
            wait()
            self._timed, self._timer = step, time.monotonic()
            return False
        if not launch.any_of(self._due(step)):
            return False
        wait()
        now = time.monotonic()
        per_step = (now - self._timer) / (step - self._timed)
        left = 60 * self._minutes - self.seconds
        steps = round(60 * self._minutes / per_step) if not self.points else step + math.floor(left / per_step)
        self.points.append((step, launch.gather(max(step, steps))[0]))
        self._timed, self._timer = step, now
        return True

    def _due(self, step: int) -> bool:
        if step <= TIMED_STEPS or any(place > step for place, _ in self.points):
            return False
        if not self.points:
            return True
        last, end = self.points[-1]
        over = self.seconds / (60 * self._minutes) if self._minutes else 0.0
        if len(self.points) > LOOKS:
            return over >= 1 and step < end
        return step < end and (2 * (step - last) >= end - last or over >= 1 - 0.5 ** len(self.points))
