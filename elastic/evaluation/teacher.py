"""What a teacher makes of data that several students or budgets are measured on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class TeacherOutputs:
    """Outputs of a teacher, batch by batch: asked for once, kept for whatever else is measured on the same data."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.seconds = 0.0
        """What they took to compute."""

    def of(self, number: int, compute: Callable[[], Any]) -> Any:
        """Those of batch `number`, which is the next one or was there before."""
        if number == len(self.batches):
            started = time.perf_counter()
            self.batches.append(compute())
            self.seconds += time.perf_counter() - started
        return self.batches[number]
