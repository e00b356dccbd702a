"""Samples that cannot be used: they are left out, counted, and named with the reason once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from typing import Any

import torch

from teachers.quiet import first_line

NAMED = 20
"""So many samples of a source are named on the user's screen; all are in `LeftOut.reasons`."""
PROBED = 256
"""Samples that are read before anything else is done with a source."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class LeftOut:
    """The samples of a source that cannot be used.

    A source of which more than half cannot be used is refused with a ValueError.
    """

    source: str
    unit: str = "samples"
    """What a sample is, in the plural."""
    total: int | None = None
    """Samples in the source; None until all of them have been read."""
    used: int = 0
    """Samples that were read and can be used, while `total` is not known."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why, by the sample's name (a path, a line of a file)."""
    keys: set[Hashable] = field(default_factory=set)
    """Which samples, in whatever way whoever reads them tells them apart."""
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.keys

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}"
        return f"{len(self):,}{of} {self.unit} of {self.source} are left out: broken, or of no use"

    def add(self, key: Hashable, name: str, reason: str | Exception) -> None:
        """Leave a sample out; several samples may share a name, such as that of their image."""
        with self._lock:
            self.keys.add(key)
            if name not in self.reasons:
                self.reasons[name] = reason_of(reason)
                if len(self.reasons) <= NAMED:
                    _log.warning("left out: %s: %s", name, self.reasons[name])
                elif len(self.reasons) == NAMED + 1:
                    _log.warning("left out: more of %s, which are only counted from here on", self.source)
        if self.total is not None:
            self.check(len(self), self.total)

    def finish(self) -> None:
        """All that is read of the source has been read."""
        self.total = self.used + len(self)
        self.check(len(self), self.total)
        if self.keys:
            _log.warning("%s", self)

    def check(self, count: int, total: int) -> None:
        """ValueError where `count` samples that are left out are more than half of `total`."""
        if 2 * count > total:
            raise ValueError(f"{count:,} of {total:,} {self.unit} of {self.source} cannot be used, {self.example}")

    @property
    def example(self) -> str:
        """The first sample that was left out, and why."""
        name, reason = next(iter(self.reasons.items()))
        return f"such as {name}: {reason}"


def reason_of(error: str | Exception) -> str:
    """What went wrong with a sample, in one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image, or of a kind that cannot be read"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return error if isinstance(error, str) else first_line(error)


class Samples:
    """Samples by number, which are read when they are asked for."""

    left_out: LeftOut

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, number: int) -> Hashable:
        """What tells a sample from all others of its source, whatever subset it is in."""
        raise NotImplementedError

    def readable(self, chosen: Sequence[int]) -> list[tuple[int, Any]]:
        """(number, sample) of those of the chosen ones that can be read; the others are left out."""
        raise NotImplementedError

    @property
    def broken(self) -> int:
        """How many of these samples are known to be unusable."""
        return sum(self.key(number) in self.left_out for number in range(len(self))) if len(self.left_out) else 0

    @property
    def usable(self) -> int:
        """How many of these samples are not known to be unusable."""
        return len(self) - self.broken

    def shuffled(self, seed: int) -> list[int]:
        """The numbers of these samples, in an order that the seed chooses."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()

    def filled(self, chosen: Sequence[int]) -> list[tuple[int, Any]]:
        """As many samples as were chosen: the next ones stand in for those that cannot be read.

        A function of the numbers and of the data alone. Raises ValueError where no sample at all can be read.
        """
        found = self.readable(chosen)
        if len(found) < len(chosen):
            taken = set(chosen)
            after = chain(range(chosen[-1] + 1, len(self)), range(chosen[-1] + 1))
            spare = (number for number in after if number not in taken)
            while len(found) < len(chosen) and (more := list(islice(spare, len(chosen) - len(found)))):
                found += self.readable(more)
            if not found:
                raise ValueError(f"none of {len(self):,} {self.left_out.unit} can be read, {self.left_out.example}")
        return list(islice(cycle(found), len(chosen)))

    def probe(self) -> None:
        """Read a few samples, or all of few, and refuse a source of which too many cannot be used."""
        chosen = sorted(self.shuffled(0)[:PROBED])
        bad = len(chosen) - len(self.readable(chosen))
        if len(self) > PROBED and 4 * bad > 3 * PROBED:
            self.left_out.check(bad, len(chosen))


def distinct(parts: Iterable[LeftOut]) -> list[LeftOut]:
    """Each of them once, without those that left nothing out."""
    return list({id(part): part for part in parts if len(part)}.values())
