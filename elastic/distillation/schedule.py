"""Schedule of a run: its number of steps, given or derived from its time limit, and the learning rate of each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from elastic import launch
from elastic.config import TrainConfig

TIMED_STEPS = 4
"""Number of steps, after an untimed first step, that are timed to convert minutes into a number of steps."""
ADAPTATIONS = 4
"""How often the number of steps is adapted to the remaining time: whenever half of the remaining time or steps have
passed."""


class Schedule:
    """The number of steps of a run, and the learning rate of each.

    `points` is a list of (step, total number of steps as decided at that step). Decisions made by the clock are
    recorded in the run, so that a resumed run follows the same schedule.
    """

    def __init__(self, train: TrainConfig, about: dict[str, Any], step: int) -> None:
        """about: contents of the run's elastic.json; step: the first step of this process."""
        self._steps, self._minutes, self._begun = train.steps, train.minutes, step
        self._warmup, self._start = train.warmup, max(train.warmup, 1 + TIMED_STEPS)
        if train.steps is not None:
            plan = [(0, train.steps)]
        else:  # runs of earlier versions have one number
            plan = about.get("plan", [(1 + TIMED_STEPS, about["steps"])] if "steps" in about else [])
        self.points: list[tuple[int, int]] = [(place, steps) for place, steps in plan]
        self._before, self._clock = about.get("trained", 0.0), time.monotonic()
        self._timed, self._timer = step, self._clock

    def steps(self, step: int) -> int | None:
        """Return the run's number of steps as decided at or before this step; None while it is still undecided."""
        return next((steps for place, steps in reversed(self.points) if place <= step), None)

    def rate(self, step: int) -> float:
        """Return the learning rate at a step as a share of its peak: linear warm-up, then cosine decay to zero at the
        last step.

        If the number of steps changes, the decay continues from its current value to the new end. It starts once
        minutes are converted into a number of steps.
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
        """Entries for the run's elastic.json after a decision."""
        return {"steps": self.points[-1][1], "plan": self.points}

    @property
    def seconds(self) -> float:
        """Seconds that the run has trained, including before it was resumed; recorded with each checkpoint."""
        return self._before + time.monotonic() - self._clock

    def adapt(self, step: int, wait: Callable[[], object]) -> bool:
        """Decide on the number of steps anew if it is time to do so after this step, and return whether it was.

        wait: blocks until the device has finished the step, so that time is measured correctly.
        """
        if self._minutes is None or self._steps is not None:
            return False
        if step == self._begun + 1:  # a process's first step is slower than later ones
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
        """Whether this process would decide on the number of steps anew after this step (see ADAPTATIONS)."""
        if step <= TIMED_STEPS or any(place > step for place, _ in self.points):
            return False
        if not self.points:
            return True
        last, end = self.points[-1]
        over = self.seconds / (60 * self._minutes) if self._minutes else 0.0
        if len(self.points) > ADAPTATIONS:
            return over >= 1 and step < end
        return step < end and (2 * (step - last) >= end - last or over >= 1 - 0.5 ** len(self.points))
