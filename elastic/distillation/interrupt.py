"""Deferred handling of Ctrl-C (SIGINT) and of SIGTERM, which launchers send when another process has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within this context the first SIGINT and the first SIGTERM are recorded instead of handled, so that no training
    step is interrupted. Yields a function that returns whether a signal was recorded; a second signal of the same kind
    has its usual effect."""
    seen = []

    def remember(number: int, _: Any) -> None:
        seen.append(1)
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, remember)
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
