"""The teacher's outputs on evaluation data, kept while several students or budgets are measured on the same data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

import psutil
import torch
from safetensors.torch import load, save
from torch import Tensor

from elastic import launch
from teachers.cache import cache_folder

ROOM = 0.25
"""Share of the free host memory that the outputs of all processes may take before further outputs go to files."""

Outputs = dict[str, Any]
"""Tensors and plain values by name."""


class TeacherOutputs:
    """Outputs of the teacher on this process's batches, each computed once and reused by later evaluations.

    Outputs are kept in host memory up to `room` bytes (None: this process's part of the share ROOM of the free memory)
    and beyond that in an unnamed temporary file in the cache folder, which the system removes when the process ends,
    even if it is killed.
    """

    def __init__(self, room: int | None = None) -> None:
        self.seconds = 0.0
        """Seconds that the teacher took to compute all outputs so far."""
        self._room = int(ROOM * psutil.virtual_memory().available) // launch.size() if room is None else room
        self._batches: list[Outputs] = []
        self._places: dict[int, tuple[int, int]] = {}
        """(offset, size) in bytes within the file of the tensors of each batch that is stored there."""
        self._file: IO[bytes] | None = None

    def of(self, number: int, compute: Callable[[], Outputs], device: torch.device | str = "cpu") -> Outputs:
        """Return the outputs of batch `number`, tensors on this device; `compute()` makes them if the batch is new.

        A new batch has to be the next number in order.
        """
        if number == len(self._batches):
            started = time.perf_counter()
            outputs = compute()
            self.seconds += time.perf_counter() - started
            self._keep(number, outputs)
            return outputs
        outputs = self._batches[number]
        if number in self._places:
            start, size = self._places[number]
            assert self._file is not None
            self._file.seek(start)
            outputs = outputs | load(self._file.read(size))
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in outputs.items()}

    def _keep(self, number: int, outputs: Outputs) -> None:
        tensors = {name: x.detach().cpu().contiguous() for name, x in outputs.items() if isinstance(x, Tensor)}
        size = sum(x.nbytes for x in tensors.values())
        if size <= self._room:
            self._room -= size
            self._batches.append(outputs | tensors)
            return
        if self._file is None:
            cache_folder().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115  open as long as this object lives
        blob, start = save(tensors), self._file.seek(0, 2)
        self._file.write(blob)
        self._batches.append({name: x for name, x in outputs.items() if name not in tensors})
        self._places[number] = start, len(blob)
