"""Threads that share a student take turns: its modules hold the state of the call that they are in."""

from __future__ import annotations

import threading
from typing import Any

import torch


class Turn:
    """Context that one thread at a time is in, as often as it likes; a copy of it is one of its own.

    Nothing waits under torch.compile, which cannot trace locks.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Turn:
        return Turn()
