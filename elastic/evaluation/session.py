"""State shared by the runs of one process: weights, data, the teacher's outputs and calibration, each made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from elastic import launch
from elastic.accounting.memory import free_memory
from elastic.accounting.peaks import Watch
from elastic.config import RunConfig
from elastic.evaluation.teacher import ROOM, TeacherOutputs
from elastic.run import Run, load_teacher, share_weights
from students import Student
from teachers import Teacher

T = TypeVar("T")


class Session:
    """One model with its data, the teacher's outputs and calibration results; all are freed when the model changes.

    Every student has its own modules, but all share one copy of the weights, whose memory layout is the one that the
    last student to run has prepared (see `Student.prepare`). Call `turn_to` before another student runs.
    """

    def __init__(self, *, several: bool = False) -> None:
        """several: whether more than one run is trained, so that keeping calibration statistics is worth its memory."""
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
        """Return `make()`, called only the first time that this key is asked for."""
        if key not in self._found:
            self._found[key] = make()
        found: T = self._found[key]
        return found

    def observed(self, of: Hashable, needed: frozenset[Any], make: Callable[[], T], *, keep: bool | None = None) -> T:
        """Return the calibration statistics of the teacher on the data `of`.

        Statistics kept for the same data are reused if they cover everything in `needed`; otherwise `make()` collects
        them. keep: whether to keep them for later calls (None: only if the session has several runs); they are not
        kept if they take more than the share ROOM of the free memory in any process.
        """
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
        """Return the run's teacher with modules of its own, on the shared weights."""
        teacher = self.loaded(config)
        self.turn_to(None)
        return replace(teacher, model=share_weights(teacher.model))

    def loaded(self, config: RunConfig) -> Teacher:
        """Return the original teacher, loaded if the session holds none or one of another model, precision or
        quantization. The original never runs: `teacher` returns copies of its modules on the same weights."""
        model = config.model, config.train.precision, config.quantization
        if model != self._model:
            self._forget(model)
        return self.once("teacher", lambda: load_teacher(config))

    def kept(self, data: Any) -> TeacherOutputs:
        """Return the store of the teacher's outputs for this data object."""
        for known, kept in self._kept:
            if known is data:
                return kept
        self._kept.append((data, TeacherOutputs()))
        return self._kept[-1][1]

    def student(self, run: Run) -> Student:
        """Return the student of a finished run, with the dial where training left it."""
        run.teacher(self.loaded)  # raises if the model is gone or its weights are not those of the run
        folder = str(run.folder.absolute())
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None  # frees the previous student's packed weights before the next student is loaded
            self._loaded = folder, run.load_student(run.teacher(self.teacher), prepare=False)
        student = self._loaded[1]
        student.restore(run.routers)
        self.turn_to(student)
        return student

    def turn_to(self, student: Student | None) -> None:
        """Undo the weight layout of the student that ran before, unless it is this one, and record this one as running
        (None: a teacher)."""
        if self._running is not None and self._running is not student:
            self._running.forget_layouts()
        self._running = student


def _tensors(x: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dictionaries, lists, tuples and dataclasses."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple) or is_dataclass(x):
        for part in x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else vars(x).values():
            yield from _tensors(part)
