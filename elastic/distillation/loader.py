"""Training samples with what the teacher makes of them, read while the batch before them is worked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic import families, launch
from elastic.config import RunConfig
from elastic.distillation.start import order
from elastic.distillation.teacher_cache import TeacherCache, require_cache
from elastic.objectives.sums import TeacherSignals
from elastic.reporting.progress import Say
from elastic.run import Run


@dataclass(frozen=True)
class LoadedBatch:
    """A batch, and the teacher's outputs for it that the cache has."""

    batch: Any
    """What the objective reads, on the device."""
    keys: Sequence[bytes] = ()
    """Digests of its samples; this and all below are empty where there is no cache."""
    lengths: Sequence[int] = ()
    """How many rows of teacher's outputs each sample has."""
    found: Sequence[TeacherSignals | None] = ()
    """The cached outputs of each sample, or None."""
    whole: TeacherSignals | None = None
    """`found`, concatenated, where no sample is missing."""


class DistillationLoader:
    """Batches of training samples by number, on a device.

    A thread reads the next ones into memory that a GPU copies from while it works. samples: see `Family.Batches`.
    """

    def __init__(
        self, samples: Any, objective: Any, device: torch.device, cache: TeacherCache | None = None, say: Say = print
    ) -> None:
        self.samples, self.objective, self.device, self.cache = samples, objective, device, cache
        self.counts = [0, 0]
        """Samples that were in the cache, and samples that the teacher was run on."""
        self._say, self._keeps = say, True
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[Sequence[int], Future[LoadedBatch]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, chosen: Sequence[int], following: Sequence[int]) -> LoadedBatch:
        """The samples with these numbers; following: those that come next."""
        numbers, ready = self._next or (None, None)
        loaded = ready.result() if ready is not None and numbers == chosen else self._read(chosen)
        self._next = following, self._pool.submit(self._read, following)
        return self._on_device(loaded)

    def _on_device(self, loaded: LoadedBatch) -> LoadedBatch:
        whole = loaded.whole and {name: self._moved(x) for name, x in loaded.whole.items()}
        return replace(loaded, batch=self._moved(loaded.batch), whole=whole)

    def _read(self, chosen: Sequence[int]) -> LoadedBatch:
        if self.cache is None:
            return LoadedBatch(self._pinned(self.samples.read(chosen)))
        batch, keys = self.samples.keyed(chosen)
        found = [self.cache.find(key) for key in keys]
        known = [one for one in found if one is not None]
        whole = {n: self._pinned(x) for n, x in _joined(known).items()} if len(known) == len(found) else None
        return LoadedBatch(self._pinned(batch), keys, self.objective.lengths(batch), found, whole)

    def _pinned(self, batch: Any) -> Any:
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _moved(self, batch: Any) -> Any:
        return batch.to(self.device, non_blocking=True)

    def signals(self, loaded: LoadedBatch) -> TeacherSignals | None:
        """The teacher's outputs for a batch, from the cache or else from the teacher; None where there is no cache, and
        the objective runs the teacher. Where one process runs it all do, as its weights may be spread over them."""
        if self.cache is None:
            return None
        missing = [number for number, one in enumerate(loaded.found) if one is None]
        self.counts = [self.counts[0] + len(loaded.found) - len(missing), self.counts[1] + len(missing)]
        if not launch.any_of(bool(missing)):
            return loaded.whole
        some = isinstance(loaded.batch, Tensor) and len(missing) < len(loaded.found)
        asked = (missing or [0]) if some else range(len(loaded.found))
        made = self.objective.teacher_signals(loaded.batch[torch.tensor(asked)] if some else loaded.batch)
        lengths = [loaded.lengths[number] for number in asked]
        self._keep(partial(self.cache.add, [loaded.keys[number] for number in asked], made, lengths))
        if not some:
            return made
        answers = dict(zip(asked, zip(*(x.split(lengths) for x in made.values()), strict=True), strict=True))
        of_all = [
            {name: self._moved(x) for name, x in known.items()}
            if known
            else dict(zip(made, answers[number], strict=True))
            for number, known in enumerate(loaded.found)
        ]
        return _joined(of_all)

    def flush(self) -> None:
        """Write new outputs of the teacher to the disk."""
        if self.cache is not None:
            self._keep(self.cache.flush)

    def _keep(self, work: Callable[[], None]) -> None:
        if self._keeps:
            try:
                work()
            except OSError as error:
                self._keeps = False
                self._say(f"teacher cache: {error}; what comes from here on is not kept")

    def record(self, run: Run) -> None:
        """Let elastic.json say how much of the data was in the cache, in all processes."""
        if self.cache is not None:
            found, asked = map(sum, zip(*launch.gather(self.counts), strict=True))
            about = {"folder": str(self.cache.folder.parent), "found": found, "asked": asked}
            launch.on_main(lambda: run.record(teacher_cache=about))
            self._say(
                f"teacher cache: had {found:,} of {found + asked:,} samples; it is {_sized(self.cache.size)} large now"
            )

    def announce(self, chosen: Sequence[int], visits: int | None) -> None:
        """Say what the cache has and how much may come; ValueError where the disk has no room for it.

        chosen: the samples that training begins with, to learn the size from; visits: samples that will be looked at,
        None where only time will tell.
        """
        if self.cache is None:
            return
        samples, have = len(self.cache), self.cache.size
        loaded = self._on_device(launch.together(partial(self._read, chosen)))
        self.objective.train()
        sample = self.signals(loaded) or {}
        self.objective.eval()
        self.flush()
        self.counts = [-self.counts[1], self.counts[1]]  # they will be found when training begins with them
        each = sum(x.nbytes for x in sample.values()) / max(1, len(loaded.keys))
        most = each * min(len(self), len(self) if visits is None else visits)
        room = self.cache.free
        self._say(
            f"teacher cache: {self.cache.folder} holds {samples:,} samples ({_sized(have)}); this run's "
            f"take up to {_sized(most)}, and the disk has room for {_sized(room)}"
        )
        if visits is not None and launch.any_of(most - have > room):
            raise launch.everyones(
                ValueError(
                    f"this run's samples take up to {_sized(most)} of a teacher cache, and the disk of "
                    f"{self.cache.folder.parent} has room for {_sized(room)}: name a folder elsewhere with "
                    "--teacher-cache, or train for fewer steps"
                )
            )


def loader_of(
    run: Run, config: RunConfig, data: Any, objective: Any, device: torch.device, say: Say
) -> DistillationLoader:
    """The run's training samples, with the cache of teachers' outputs that elastic.json names, if it does."""
    samples = families.of(config.family).Batches(data, config)
    about = launch.on_main(lambda: run.about)
    if "teacher_cache" not in about:
        return DistillationLoader(samples, objective, device)
    folder = about["teacher_cache"]["folder"]
    launch.on_main(partial(require_cache, folder))
    dtype = str(next(objective.student.model.parameters()).dtype).removeprefix("torch.")
    of = {"model": about["identity"], "precision": dtype, "keeps": objective.keeps}
    return DistillationLoader(samples, objective, device, launch.together(partial(TeacherCache, folder, of)), say)


def picked(first: int, count: int, pieces: int, seed: int) -> list[int]:
    """Which samples the micro-batch that starts at sample `first` consists of: every epoch in an order of its own.

    A function of the step alone, so that a resumed run sees the same data.
    """
    samples = range(first, first + count)
    orders = {epoch: order(pieces, seed, epoch) for epoch in {s // pieces for s in samples}}
    return [int(orders[s // pieces][s % pieces]) for s in samples]


def _joined(samples: Sequence[TeacherSignals]) -> TeacherSignals:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def _sized(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
