"""Run folders: creating, checking and opening them, and loading the student of a finished run.

config.yaml                the resolved configuration, written before anything else
elastic.json               model, identity of its weights, versions, machine and results
metrics.jsonl              one line per logging step
checkpoint.safetensors     routers, optimizer and loop state, to resume from
routers.safetensors        the finished student: routers only, with its dial
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import teachers
from elastic import launch, sharding
from elastic.accounting.memory import free_memory
from elastic.config import RunConfig
from elastic.files import require_place, require_run, write_text
from elastic.settings import from_dict, read_yaml, to_dict
from elastic.sources import NAMED_DATA
from elastic.surroundings import surroundings
from students import Student, elasticize
from students.checkpoint import read_tensors
from students.kernels import cpu, triton
from teachers import Teacher
from teachers.cache import cache_folder
from teachers.load import LOCAL
from teachers.quantize import kept_bytes
from teachers.registry import models

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
FORMAT = 1
"""Version of the run folder's format, recorded in elastic.json."""
FILES = ("routers.safetensors", "checkpoint.safetensors", "metrics.jsonl", "elastic.json", "config.yaml")
"""All files of a run folder."""
KINDS: dict[str, Any] = {"model": str, "identity": str, "source": str}
"""Entries that every elastic.json has, and the kind of their values."""
OPTIONAL_KINDS: dict[str, Any] = {
    **dict.fromkeys(("beside", "versions", "machine", "result", "teacher_cache"), dict),
    **dict.fromkeys(("results", "plan", "peak_memory", "samples"), list),
    **dict.fromkeys(("steps", "seconds", "trained"), int | float),
    "format": int,
}
"""Entries that an elastic.json may have, and the kind of their values."""
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types by their name in train.precision; None: chosen for the device when the teacher is loaded."""


class Run:
    """A run folder on disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._lock: int | None = None
        """Descriptor of the folder while `lock` holds it."""

    @classmethod
    def create(cls, folder: str | Path, config: RunConfig, teacher: Teacher, overwrite: bool, **entries: Any) -> Run:
        """Create the folder with config.yaml and elastic.json; `entries` are further entries of elastic.json.

        Raises ValueError for a folder that `refuse_existing` or `lock` refuses. The run is locked.
        """
        run = cls(folder)
        run.refuse_existing(overwrite)
        run.folder.mkdir(parents=True, exist_ok=True)
        run.lock()
        run._clear()
        try:
            write_text(run.folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
            run.record(
                format=FORMAT,
                model=config.model,
                identity=teacher.identity,
                source=teacher.source,
                beside=run._relative_paths(config),
                **surroundings(),
                **entries,
            )
        except OSError:
            run._clear()
            run.unlock()
            with suppress(OSError):
                run.folder.rmdir()
            raise
        return run

    def _clear(self) -> None:
        """Delete the run's files, but not the folder or other files in it."""
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)

    def lock(self) -> None:
        """Let no other process train into this folder until `unlock` or the end of this process; raise ValueError if
        one does already. Where the system or disk has no locks nothing happens."""
        if fcntl is None:
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise ValueError(
                f"another process is training into {self.folder}: wait for its end, or name another folder"
            ) from None
        except OSError:
            self.unlock()

    def unlock(self) -> None:
        """End what `lock` began."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def refuse_existing(self, overwrite: bool) -> None:
        """Raise ValueError if the folder cannot be written to, has files that are no run's, or has a run that is not to
        be overwritten or that another process trains."""
        require_place(self.folder)
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not (self.folder / "config.yaml").exists():
            raise ValueError(f"{self.folder} exists and is not a run folder; name another with --output")
        if not overwrite:
            self.lock()  # what another process trains cannot be continued
            self.unlock()
            raise ValueError(
                f"{self.folder} exists: continue it with --resume {shlex.quote(str(self.folder))}, replace it with "
                "--overwrite, or name another folder with --output"
            )

    @classmethod
    def open(cls, folder: str | Path, *, finished: bool = False) -> Run:
        """Return an existing run; raise ValueError if the folder has none, one of a later version of Elastic or, with
        `finished`, an unfinished one."""
        require_run(folder, finished=finished)
        run = cls(folder)
        if (made := run.about.get("format", FORMAT)) > FORMAT:
            raise ValueError(f"{folder} is of format {made}, and this Elastic reads {FORMAT}: install a newer one")
        return run

    @cached_property
    def config(self) -> RunConfig:
        """The resolved configuration, with local model and data where they are now, in case they or the run moved."""
        file = self.folder / "config.yaml"
        settings = read_yaml(file)
        if "student" not in settings:  # the last section: what is missing would silently be what it is by default
            raise ValueError(f"{file} is damaged (it has no section student): restore it or distil again")
        try:
            config: RunConfig = from_dict(RunConfig, settings)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        data = replace(config.data, source=self._located("data", config.data.source))
        return replace(config, model=self._located("model", config.model), data=data)

    def _relative_paths(self, config: RunConfig) -> dict[str, str]:
        """Return the paths of a local model and local data, relative to the run folder."""
        paths = {"model": config.model, "data": config.data.source}
        local = {name: path for name, path in paths.items() if Path(path).is_absolute()}
        with suppress(ValueError):  # Windows has no relative path to another drive
            return {name: os.path.relpath(path, self.folder.resolve()) for name, path in local.items()}
        return {}

    def _located(self, what: str, name: str) -> str:
        """Return where the run's "model" or "data" of this name is now: the first existing of these paths, or the name.

        The paths: the name itself; a model's path in elastic.json's `source` (runs of earlier versions); the recorded
        path relative to the run folder; and a relative name below the run folder or any of its parents.
        """
        if name in models() or name in NAMED_DATA or not (self.folder / "elastic.json").exists():
            return name
        about, given = self.about, Path(name).expanduser()
        places = [given]
        if what == "model" and about["source"].startswith(LOCAL):
            places.append(Path(about["source"].removeprefix(LOCAL).partition("; ")[0]))
        if what in about.get("beside", {}):
            places.append(self.folder.resolve() / about["beside"][what])  # the folder may be named by a link
        if not given.is_absolute() and (what == "data" or about["source"].startswith(LOCAL)):
            here = self.folder.absolute()
            places += [parent / given for parent in (here, *here.parents)]
        return next((os.path.abspath(place) for place in places if place.exists()), name)

    @property
    def about(self) -> dict[str, Any]:
        """The contents of elastic.json; reading them raises ValueError if the file is damaged."""
        file = self.folder / "elastic.json"
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            found = about if isinstance(about, dict) else {}
            needed = {**KINDS, **{name: kind for name, kind in OPTIONAL_KINDS.items() if name in found}}
            if wrong := [name for name, kind in needed.items() if not isinstance(found.get(name), kind)]:
                raise ValueError(f"it lacks {', '.join(wrong)}, or has another kind of value there")
            paths = [*found.get("beside", {}).values(), found.get("teacher_cache", {"folder": ""}).get("folder")]
            if not all(isinstance(path, str) for path in paths):
                raise ValueError("beside or teacher_cache has no path where it should")
            pairs = [*found.get("plan", []), found.get("samples", [0, 0])]
            if not all(isinstance(pair, list) and [type(number) for number in pair] == [int, int] for pair in pairs):
                raise ValueError("plan or samples has something else than pairs of whole numbers")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}): restore it or distil again") from error
        return found

    def record(self, **entries: Any) -> None:
        """Add entries to elastic.json."""
        about = self.about if (self.folder / "elastic.json").exists() else {}
        write_text(self.folder / "elastic.json", json.dumps(about | entries, indent=2) + "\n")

    def teacher(self, load: Callable[[RunConfig], Teacher] | None = None) -> Teacher:
        """Return the run's teacher, from `load` or else from disk; raise ValueError if its weights are missing or not
        those that the run was made with."""
        config, about = self.config, self.about
        if about["source"].startswith(LOCAL) and not Path(config.model).is_dir():
            raise ValueError(
                f"{self.folder} was made for the model in {config.model}, which is not there any more: put it back, or "
                f"write where it is behind `model:` in {self.folder / 'config.yaml'}"
            )
        teacher = (load or load_teacher)(config)
        if teacher.identity != about["identity"]:
            raise ValueError(
                f"{self.folder} was made for other weights: {config.model} was {about['identity']} "
                f"({about['source']}), and is {teacher.identity} now ({teacher.source})"
            )
        return teacher

    @property
    def routers(self) -> Path:
        """Path of the file with the finished student's routers."""
        return self.folder / "routers.safetensors"

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows of results of a finished run; none if it is not finished, or of a version that stored none. Raises
        ValueError if its routers are damaged."""
        if not self.routers.exists():
            return []
        read_tensors(self.routers)
        return self.about.get("results", [])

    def load_student(self, teacher: Teacher, *, pack: bool | None = None, prepare: bool = True) -> Student:
        """Return the finished student on its teacher's weights.

        pack: see `load`. prepare: lay out weights for inference now instead of in the first call (Student.prepare).
        Weights that are spread over processes are neither packed nor prepared.
        """
        student = make_student(teacher, self.config)
        student.restore(self.routers)
        if launch.spreads():
            return student
        if has_room_for_two(student) if pack is None else pack:
            student.pack()
        if prepare:
            student.prepare()
        return student


def load_teacher(config: RunConfig) -> Teacher:
    """Load the teacher of a configuration, spread over the processes if accelerate's configuration asks for that."""
    if launch.spreads():
        sharding.require()
    place = sharding.spread if launch.spreads() else None
    dtype, family = DTYPES[config.train.precision], config.family
    return teachers.load(config.model, dtype=dtype, place=place, quantization=config.quantization, family=family)


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the model's modules that shares its parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def make_student(teacher: Teacher, config: RunConfig) -> Student:
    """Return an untrained student of this teacher, after compiling the CPU kernels; where that fails, say so once.
    Triton compiles those for GPUs when they first run, into the cache folder too."""
    triton.keep_in(cache_folder() / "triton")
    reason = cpu.build(cache_folder())
    if reason is not None and launch.is_main() and next(teacher.model.parameters()).device.type == "cpu":
        _warn(reason)
    return elasticize(teacher.model, config.student)


@cache
def _warn(reason: str) -> None:
    """Say, once for each reason, that CPU kernels are missing."""
    _log.warning(
        "the student selects with torch's operators, which is slower: %s; C kernels need a compiler (gcc or clang) and "
        "a folder to keep them in (ELASTIC_CACHE=FOLDER)",
        reason,
    )


def has_room_for_two(model: nn.Module, besides: int = 0) -> bool:
    """Return whether a second copy of the weights takes at most half of the free memory of the device they are on,
    without the bytes that are needed `besides`."""
    return 2 * kept_bytes(model) <= free_memory(next(model.parameters()).device) - besides


def load(folder: str | Path, *, pack: bool | None = None) -> Student:
    """Load the student of a finished run and its teacher, set to the budget it was trained for (lowest of a range).

    pack: whether to keep a second copy of weights where it makes calls faster (see students/kernels/packing.py): in the
    layout of a CPU's bfloat16 products, which changes no bit, and with low-rank corrections added; None: if that copy
    fits into half of the free memory. Raises ValueError if the run is not finished or its weights differ.
    """
    run = Run.open(folder, finished=True)
    with torch.inference_mode(False):  # whose tensors a student cannot be made of
        return run.load_student(run.teacher(), pack=pack)
