"""Counters by which the programs of a launch find out which of them finishes last; zero before and after each launch.

Launches on one stream run one after another and share counters. A captured launch can be replayed on any stream, so
that a recording has counters of its own (see `lent`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

SIZE = 8192
"""Counters of a stream or a recording."""
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_lent: ContextVar[Tensor | None] = ContextVar("lent", default=None)


def zeros(device: torch.device, count: int) -> Tensor:
    """Return at least `count` int32 zeros: counters for a launch, whose programs must reset them to zero."""
    if device.type != "cuda" or count > SIZE:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        lent = _lent.get()
        return torch.zeros(count, dtype=torch.int32, device=device) if lent is None else lent
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _of_stream:
        _of_stream[key] = torch.zeros(SIZE, dtype=torch.int32, device=device)
    return _of_stream[key]


@contextmanager
def lent(device: torch.device) -> Iterator[Tensor]:
    """Yield new counters for launches captured within this context; the caller has to keep them as long as the
    recording."""
    own = torch.zeros(SIZE, dtype=torch.int32, device=device)
    before = _lent.set(own)
    try:
        yield own
    finally:
        _lent.reset(before)
