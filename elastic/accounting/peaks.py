"""Peak memory of a process in each part of its work, beyond what libraries take at the start."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import psutil
import torch

EVERY = 0.02
"""Seconds between two samples of host memory; for GPUs torch keeps the peak itself."""
Peaks = dict[str, dict[str, int]]
"""Peak bytes for each part of the work: `host`, host memory including mapped files; `own`, without mapped files (equal
to `host` where the system does not report these); `device`, memory that torch has allocated on the GPU."""


class Watch:
    """Samples this process's memory in a thread, from `turn_to` until `stop`, or until the watch is deleted."""

    def __init__(self) -> None:
        self._peaks: Peaks = {}
        self._part: str | None = None
        self._over = threading.Event()
        libraries()

    def turn_to(self, part: str) -> None:
        """Attribute memory to this part of the work from now on."""
        self._end()
        self._part, self._over = part, threading.Event()
        self._peaks.setdefault(part, {})
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        threading.Thread(target=_look_often, args=(weakref.ref(self), self._over), daemon=True).start()

    def stop(self) -> Peaks:
        """Stop sampling, and return the peaks of all parts since the last call."""
        self._end()
        peaks, self._peaks, self._part = self._peaks, {}, None
        return peaks

    def _end(self) -> None:
        """Stop sampling for the current part, and note its final sample."""
        self._over.set()
        if self._part is not None:
            self.look()
            if torch.cuda.is_available():
                self._note("device", torch.cuda.max_memory_allocated())

    def look(self) -> None:
        """Take one sample for the current part."""
        own, mapped = _taken()
        base, files = libraries()  # pages of libraries' files may have been evicted since
        self._note("own", own - base)
        self._note("host", own - base + max(0, mapped - files))

    def _note(self, name: str, size: int) -> None:
        here = self._peaks.get(self._part or "")
        if here is not None:
            here[name] = max(here.get(name, 0), size)


def _look_often(watch: weakref.ref[Watch], over: threading.Event) -> None:
    while not over.wait(EVERY):
        it = watch()
        if it is None:
            return
        it.look()
        del it


def _taken() -> tuple[int, int]:
    """Return this process's host memory in bytes: (its own, mapped files)."""
    about: Any = psutil.Process().memory_info()
    mapped = getattr(about, "shared", 0)  # reported on Linux only
    return about.rss - mapped, mapped


@functools.cache
def libraries() -> tuple[int, int]:
    """Return what `_taken` returned at the first call, before any model was loaded."""
    return _taken()


def line_of(peaks: Peaks) -> str:
    """Return the peaks in GB as one line of text."""

    def sizes(of: dict[str, int]) -> str:
        device = f"{of['device'] / 1e9:.2f} on the GPU and " if "device" in of else ""
        return f"{device}{of['host'] / 1e9:.2f} ({of['own'] / 1e9:.2f})"

    return ", ".join(f"{part} {sizes(of)}" for part, of in peaks.items())
