"""What a teacher makes of data that several students or budgets are measured on."""

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
"""The share of the free memory that outputs of all processes may take before they go to files."""

Outputs = dict[str, Any]
"""Tensors and plain values by name."""


class TeacherOutputs:
    """Outputs of a teacher, batch by batch: asked for once, kept for whatever else is measured on the same data, of
    which each process has its own share.

    They wait in the host's memory, and where there is no more room for them in a file of the cache folder, which has no
    name and goes with the process, however that ends. room: bytes; None: a process's part of ROOM of the free memory.
    """

    def __init__(self, room: int | None = None) -> None:
        self.seconds = 0.0
        """What they took to compute."""
        self._room = int(ROOM * psutil.virtual_memory().available) // launch.size() if room is None else room
        self._batches: list[Outputs] = []
        self._places: dict[int, tuple[int, int]] = {}
        """Of each batch whose tensors are in the file: where they begin, and how many bytes they are."""
        self._file: IO[bytes] | None = None

    def of(self, number: int, compute: Callable[[], Outputs], device: torch.device | str = "cpu") -> Outputs:
        """Those of batch `number`, which is the next one or was there before; tensors on this device."""
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
