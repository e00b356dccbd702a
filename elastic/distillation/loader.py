"""Loading of training batches, with cached outputs of the teacher, in a thread while the previous batch is trained
on."""

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
    """A batch with those of the teacher's outputs that the cache holds; without a cache only `batch` is set."""

    batch: Any
    """The objective's input, on the device."""
    keys: Sequence[bytes] = ()
    """Digest of each sample."""
    lengths: Sequence[int] = ()
    """Number of rows of each sample in the teacher's outputs."""
    found: Sequence[TeacherSignals | None] = ()
    """Cached outputs of each sample, on the host; None for a sample that is not in the cache."""
    whole: TeacherSignals | None = None
    """Cached outputs of all samples, concatenated, on the device; None if any sample is missing."""


class DistillationLoader:
    """Loads batches of training samples by number onto a device.

    A thread reads the next batch ahead, for GPUs into pinned memory, from which it is copied while the GPU computes.
    samples: see `Family.Batches`; objective: computes the teacher's outputs of samples that the cache lacks.
    """

    def __init__(
        self, samples: Any, objective: Any, device: torch.device, cache: TeacherCache | None = None, say: Say = print
    ) -> None:
        self.samples, self.objective, self.device, self.cache = samples, objective, device, cache
        self.counts = [0, 0]
        """Numbers of samples [found in the cache, computed by the teacher]."""
        self._say, self._keeps = say, True
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[Sequence[int], Future[LoadedBatch]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, chosen: Sequence[int], following: Sequence[int]) -> LoadedBatch:
        """Return the batch of samples with these numbers, and start to read the next batch, of samples `following`."""
        numbers, ready = self._next or (None, None)
        loaded = ready.result() if ready is not None and numbers == chosen else self._read(chosen)
        self._next = following, self._pool.submit(self._read, following)
        return self._on_device(loaded)

    def _on_device(self, loaded: LoadedBatch) -> LoadedBatch:
        whole = loaded.whole and {name: self._moved(x) for name, x in loaded.whole.items()}
        return replace(loaded, batch=self._moved(loaded.batch), whole=whole)

    def _read(self, chosen: Sequence[int]) -> LoadedBatch:
        """Return the batch of samples with these numbers, and their cached outputs, on the host."""
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
        """Return the teacher's outputs for a batch, read from the cache or computed and added to it; None without a
        cache, in which case the objective runs the teacher.

        If one process has to run the teacher, all do, because its weights may be spread over the processes.
        """
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
        """Write new outputs of the teacher to disk; after an error of the disk nothing more is kept in the cache."""
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
        """Record in elastic.json, and print, how many samples were found in the cache, summed over all processes."""
        if self.cache is not None:
            found, asked = map(sum, zip(*launch.gather(self.counts), strict=True))
            about = {"folder": str(self.cache.folder.parent), "found": found, "asked": asked}
            launch.on_main(lambda: run.record(teacher_cache=about))
            self._say(
                f"teacher cache: had {found:,} of {found + asked:,} samples; it is {_sized(self.cache.size)} large now"
            )

    def announce(self, chosen: Sequence[int], visits: int | None) -> None:
        """Print the size of the cache and how much this run may add; ValueError if the disk has no room for that.

        chosen: the first training samples, from whose outputs the size per sample is measured; visits: number of
        samples that training will read, None if it depends on the time that steps take.
        """
        if self.cache is None:
            return
        samples, have = len(self.cache), self.cache.size
        loaded = self._on_device(launch.together(partial(self._read, chosen)))
        self.objective.train()
        sample = self.signals(loaded) or {}
        self.objective.eval()
        self.flush()
        self.counts = [-self.counts[1], self.counts[1]]  # training will find these samples in the cache again
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
    """Return the loader of a run's training samples, with the teacher cache named in elastic.json, if any."""
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
    """Return the numbers of the samples in the micro-batch at position `first` of the training stream, in which every
    epoch over `pieces` samples has its own random order.

    Depends on its arguments alone, so that a resumed run sees the same data.
    """
    samples = range(first, first + count)
    orders = {epoch: order(pieces, seed, epoch) for epoch in {s // pieces for s in samples}}
    return [int(orders[s // pieces][s % pieces]) for s in samples]


def _joined(samples: Sequence[TeacherSignals]) -> TeacherSignals:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def _sized(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
