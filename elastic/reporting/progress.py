"""Progress of long loops, reported to a watcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

Say = Callable[[str], None]
"""Prints a line for the user."""
Watcher = Callable[[str, int, int], None]
"""Called with (what a loop does, its parts that are done, its parts in all), from (..., 0, n) to (..., n, n)."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within this context, loops over `Watched` sequences report their progress to this watcher."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Watched(Sequence[T]):
    """A sequence that, while it is looped over, reports its progress to the watcher set by `watched_by`, if any.

    what: what the loop does, in the user's words.
    """

    def __init__(self, what: str, parts: Sequence[T]) -> None:
        self._what = what
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place: Any) -> Any:
        return self._parts[place]

    def __iter__(self) -> Iterator[T]:
        watcher = _watcher.get() or (lambda what, done, total: None)
        try:
            for done, part in enumerate(self._parts):
                watcher(self._what, done, len(self._parts))
                yield part
        finally:  # where the loop ends early, too
            watcher(self._what, len(self._parts), len(self._parts))
