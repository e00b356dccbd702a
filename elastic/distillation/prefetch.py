"""Training samples that are read while the batch before them is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class Prefetched:
    """Batches of samples by number, on a device; samples: what can be counted, and loaded by number."""

    def __init__(self, samples: Any, device: torch.device) -> None:
        self.samples = samples
        self.device = device
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[Sequence[int], Future[Any]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, chosen: Sequence[int], following: Sequence[int]) -> Any:
        """What the model reads of the samples with these numbers; following: those that come next."""
        numbers, ready = self._next or (None, None)
        batch = ready.result() if ready is not None and numbers == chosen else self._read(chosen)
        self._next = following, self._pool.submit(self._read, following)
        return batch.to(self.device)

    def _read(self, chosen: Sequence[int]) -> Any:
        return self.samples.load(chosen)
