"""What runs that are measured in one process have in common: it is loaded, asked and calibrated once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from elastic import families, launch
from elastic.accounting.memory import free_memory
from elastic.accounting.peaks import Watch
from elastic.config import RunConfig
from elastic.evaluation.teacher import ROOM, TeacherOutputs
from elastic.run import Run, load_teacher, share_weights
from students import Student
from teachers import Teacher

T = TypeVar("T")


class Session:
    """A model, what was read for it, and what was found out about it; all of it is let go when another model comes.

    Students have modules of their own on one copy of the weights, which lie as the one that ran last has laid them out
    (see `Student.prepare`): `turn_to` is called before another one runs.
    """

    def __init__(self, *, several: bool = False) -> None:
        """several: whether more than one run is trained, so that what calibration sees is worth its memory."""
        self.several = several
        self.memory = Watch()
        self._forget(None)

    def _forget(self, model: tuple[str, ...] | None) -> None:
        self._model = model
        self._found: dict[Hashable, Any] = {}
        self._kept: list[tuple[Any, TeacherOutputs]] = []
        self._loaded: tuple[str, Student] | None = None
        self._running: Student | None = None

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes, which it does for this key the first time only."""
        if key not in self._found:
            self._found[key] = make()
        found: T = self._found[key]
        return found

    def observed(self, of: Hashable, needed: frozenset[Any], make: Callable[[], T], *, keep: bool | None = None) -> T:
        """What calibration sees of the teacher in the data `of`: what `make` makes, unless it was seen before on behalf
        of routers that need as much or more. keep: whether others may ask for it (None: where runs are several)."""
        known: list[tuple[frozenset[Any], T]] = self.once(("observed", of), list)
        for had, seen in known:
            if needed <= had:
                return seen
        seen = make()
        if self.several if keep is None else keep:
            tensors = list(_tensors(seen))
            if not launch.any_of(sum(x.nbytes for x in tensors) > ROOM * free_memory(tensors[0].device)):
                known.append((needed, seen))
        return seen

    def teacher(self, config: RunConfig) -> Teacher:
        """The run's teacher; its modules are nobody else's."""
        teacher = self.loaded(config)
        self.turn_to(None)
        return replace(teacher, model=share_weights(teacher.model))

    def loaded(self, config: RunConfig) -> Teacher:
        """The one that the others are copies of, which never runs."""
        model = config.model, config.train.precision, config.quantization
        if model != self._model:
            self._forget(model)
        return self.once("teacher", lambda: load_teacher(config))

    def data(self, config: RunConfig) -> Any:
        """The run's data (see `Family.load`)."""
        teacher = self.loaded(config)
        key = "data", config.data, config.train.seed
        return self.once(key, lambda: families.of(config.family).load(config, teacher))

    def all_of(self, source: str, config: RunConfig) -> Any:
        """Data to measure on (see `Family.load_all`)."""
        teacher = self.loaded(config)
        key = "all", source, config.data.window
        return self.once(key, lambda: families.of(config.family).load_all(source, config, teacher))

    def kept(self, data: Any) -> TeacherOutputs:
        """What the teacher made of this data, which `data` or `all_of` gave."""
        for known, kept in self._kept:
            if known is data:
                return kept
        self._kept.append((data, TeacherOutputs()))
        return self._kept[-1][1]

    def student(self, run: Run) -> Student:
        """The student of a finished run, its dial where training left it."""
        run.teacher(self.loaded)  # which says where it is gone, or another
        folder = str(run.folder.absolute())
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None  # its packed weights go before those of the next one come
            self._loaded = folder, run.load_student(run.teacher(self.teacher), prepare=False)
        student = self._loaded[1]
        student.restore(run.routers)
        self.turn_to(student)
        return student

    def turn_to(self, student: Student | None) -> None:
        """Let this student run next."""
        if self._running is not None and self._running is not student:
            self._running.forget_layouts()
        self._running = student


def _tensors(x: Any) -> Iterator[Tensor]:
    """All that are somewhere in dictionaries, sequences and dataclasses."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple) or is_dataclass(x):
        for part in x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else vars(x).values():
            yield from _tensors(part)
