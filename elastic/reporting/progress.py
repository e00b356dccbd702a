"""How far long loops are, for whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

Say = Callable[[str], None]
"""Says a line to the user."""
Watcher = Callable[[int, int], None]
"""Called with how many parts of a loop are done, and of how many: 0 at first, all at the end."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within it, loops over `Watched` parts report to this watcher."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Watched(Sequence[T]):
    """The parts of a piece of work. Looping over them tells the watcher how far it is."""

    def __init__(self, parts: Sequence[T]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place: Any) -> Any:
        return self._parts[place]

    def __iter__(self) -> Iterator[T]:
        watcher = _watcher.get() or (lambda done, total: None)
        for done, part in enumerate(self._parts):
            watcher(done, len(self._parts))
            yield part
        watcher(len(self._parts), len(self._parts))
