"""The most memory that a process takes in each part of its work, beyond what libraries take before."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import psutil
import torch

EVERY = 0.02
"""Seconds between two samples of the host's memory; GPUs keep their own peak."""
Peaks = dict[str, dict[str, int]]
"""For each part of the work bytes: `host`, mapped files and all; `own`, without them (the same where nothing tells them
apart); `device`, what torch has had on the GPU."""


class Watch:
    """Samples how much memory this process has, from `turn_to` to `stop`, or until nobody refers to the watch."""

    def __init__(self) -> None:
        self._peaks: Peaks = {}
        self._part: str | None = None
        self._over = threading.Event()
        libraries()

    def turn_to(self, part: str) -> None:
        """From now on memory is counted for this part."""
        self._end()
        self._part, self._over = part, threading.Event()
        self._peaks.setdefault(part, {})
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        threading.Thread(target=_look_often, args=(weakref.ref(self), self._over), daemon=True).start()

    def stop(self) -> Peaks:
        """Stop sampling; returns the peaks of each part."""
        self._end()
        peaks, self._peaks, self._part = self._peaks, {}, None
        return peaks

    def _end(self) -> None:
        """Stop sampling for the part so far."""
        self._over.set()
        if self._part is not None:
            self.look()
            if torch.cuda.is_available():
                self._note("device", torch.cuda.max_memory_allocated())

    def look(self) -> None:
        """Take one sample."""
        own, mapped = _taken()
        base, files = libraries()  # whose own files the system may have let go since
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
    """The host's memory that this process has: its own, and files that are mapped into it."""
    about: Any = psutil.Process().memory_info()
    mapped = getattr(about, "shared", 0)  # Linux has it
    return about.rss - mapped, mapped


@functools.cache
def libraries() -> tuple[int, int]:
    """As `_taken`, at the first call: before there was any model."""
    return _taken()


def line_of(peaks: Peaks) -> str:
    """Peaks in GB, for the user to read."""

    def sizes(of: dict[str, int]) -> str:
        device = f"{of['device'] / 1e9:.2f} on the GPU and " if "device" in of else ""
        return f"{device}{of['host'] / 1e9:.2f} ({of['own'] / 1e9:.2f})"

    return ", ".join(f"{part} {sizes(of)}" for part, of in peaks.items())
