"""Samples that cannot be used: they are left out, counted, and reported once with the reason."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from typing import Any

from teachers.quiet import first_line

NAMED = 5
"""Number of samples of a source that are named on the user's screen; all are in `LeftOut.reasons`."""
PROBED = 256
"""Number of samples that are read as a trial before anything else is done with a source."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class LeftOut:
    """The samples of a source that cannot be used.

    A source of which more than half cannot be used is refused with a ValueError.
    """

    source: str
    unit: str = "samples"
    """Word for the samples in messages, in the plural."""
    total: int | None = None
    """Number of samples in the source; None if that is not known before all of them have been read."""
    used: int = 0
    """Number of usable samples read so far, counted while `total` is not known."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a sample was left out, by the sample's name (a path, a line of a file)."""
    keys: set[Hashable] = field(default_factory=set)
    """Identifiers of the samples left out, such as `Samples.key` returns."""
    said: int = 0
    """How many were left out when their number was logged."""
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.keys

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}"
        return f"{len(self):,}{of} {self.unit} of {self.source} are left out: broken, or of no use"

    def add(self, key: Hashable, name: str, reason: str | Exception) -> None:
        """Leave out a sample, and log its name unless another sample of this name was logged (such as for an image that
        several samples share). Raises ValueError if more than half of the samples are left out now."""
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
        """Note that the source has been read to its end: set `total`, check it, and log the number left out."""
        self.total = self.used + len(self)
        self.check(len(self), self.total)
        self.said = len(self)
        if self.keys:
            _log.warning("%s", self)

    def check(self, count: int, total: int) -> None:
        """Raise ValueError if `count` samples left out are more than half of `total`."""
        if 2 * count > total:
            raise ValueError(f"{count:,} of {total:,} {self.unit} of {self.source} cannot be used, {self.example}")

    @property
    def example(self) -> str:
        """Name of the first sample left out, and the reason, for messages."""
        name, reason = next(iter(self.reasons.items()))
        return f"such as {name}: {reason}"


def reason_of(error: str | Exception) -> str:
    """Return why a sample cannot be used, in one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image, or of a kind that cannot be read"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:  # without its number, and the name that messages begin with
        return error.strerror
    return error if isinstance(error, str) else first_line(error)


class Samples:
    """Base class of numbered samples that are read on access."""

    left_out: LeftOut

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, number: int) -> Hashable:
        """Return an identifier of a sample that is unique in its source and the same in every subset."""
        raise NotImplementedError

    def readable(self, chosen: Sequence[int]) -> list[tuple[int, Any]]:
        """Return (number, sample) for the chosen samples that can be read; the others are left out."""
        raise NotImplementedError

    @property
    def broken(self) -> int:
        """Number of these samples that are known to be unusable."""
        return sum(self.key(number) in self.left_out for number in range(len(self))) if len(self.left_out) else 0

    @property
    def usable(self) -> int:
        """Number of these samples that are not known to be unusable."""
        return len(self) - self.broken

    def shuffled(self, seed: int) -> list[int]:
        """Return the numbers of all samples in a random order that `seed` determines."""
        import torch  # here, because configurations are checked by this package before torch is imported

        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()

    def filled(self, chosen: Sequence[int]) -> list[tuple[int, Any]]:
        """Return as many samples as were chosen; samples behind the last chosen one replace those that cannot be read.

        The result depends on the numbers and the data alone. If too few samples can be read, samples repeat; if none
        can, ValueError is raised.
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
        """Read PROBED random samples (all if there are fewer), and raise ValueError if over three quarters of PROBED
        or over half of the source cannot be used."""
        chosen = sorted(self.shuffled(0)[:PROBED])
        bad = len(chosen) - len(self.readable(chosen))
        if len(self) > PROBED and 4 * bad > 3 * PROBED:
            self.left_out.check(bad, len(chosen))


def distinct(parts: Iterable[LeftOut]) -> list[LeftOut]:
    """Return each object in `parts` once, without those that left nothing out."""
    return list({id(part): part for part in parts if len(part)}.values())
