"""A run folder: what defines the run, what it learned, and how a student comes out of it.

config.yaml                the resolved configuration, written before anything else
elastic.json               what the run is: model, identity of its weights, versions, machine, results
metrics.jsonl              one line per logging step
checkpoint.safetensors     routers, optimizer and loop state, to resume from
routers.safetensors        the finished student: routers only, with its dial
"""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import nn

import teachers
from elastic import __version__, launch, sharding
from elastic.config import NAMED_DATA, RunConfig
from elastic.files import write_text
from elastic.settings import from_dict, read_yaml, to_dict
from students import Student, elasticize
from students.kernels import cpu
from teachers import Teacher
from teachers.cache import cache_folder
from teachers.load import LOCAL
from teachers.quantize import kept_bytes
from teachers.registry import models

FORMAT = 1
FILES = ("routers.safetensors", "checkpoint.safetensors", "metrics.jsonl", "elastic.json", "config.yaml")
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Run:
    """A run folder on disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    @classmethod
    def create(cls, folder: str | Path, config: RunConfig, teacher: Teacher, overwrite: bool, **entries: Any) -> Run:
        """Make the folder and write what defines the run. ValueError where it exists and is not to be overwritten.

        entries: what else elastic.json is to say.
        """
        run = cls(folder)
        run.refuse_existing(overwrite)
        run.folder.mkdir(parents=True, exist_ok=True)
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
            with suppress(OSError):
                run.folder.rmdir()
            raise
        return run

    def _clear(self) -> None:
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)

    def refuse_existing(self, overwrite: bool) -> None:
        """ValueError where the folder has something in it and is not to be overwritten, is not a run's, or cannot be
        written to."""
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file; name a folder with --output")
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            reason = "cannot be written to" if place.is_dir() else "is a file"
            raise ValueError(
                f"no run can be kept in {self.folder}: {place} {reason}; name another folder with --output"
            )
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not (self.folder / "config.yaml").exists():
            raise ValueError(f"{self.folder} exists and is not a run folder; name another with --output")
        if not overwrite:
            raise ValueError(
                f"{self.folder} exists: continue it with --resume {self.folder}, replace it with --overwrite, "
                "or name another folder with --output"
            )

    @classmethod
    def open(cls, folder: str | Path, *, finished: bool = False) -> Run:
        """An existing run folder; ValueError where it is none, or is to be finished and is not."""
        run = cls(folder)
        if not (run.folder / "config.yaml").is_file() or not (run.folder / "elastic.json").is_file():
            raise ValueError(
                f"{folder} is not a run folder (no config.yaml and elastic.json in it); elastic distill makes one"
            )
        if finished and not run.routers.exists():
            raise ValueError(f"{folder} is not finished: continue it with elastic distill --resume {folder}")
        return run

    @property
    def config(self) -> RunConfig:
        """The resolved configuration, with paths to where things are now: the run may have moved, or all of it."""
        config: RunConfig = from_dict(RunConfig, read_yaml(self.folder / "config.yaml"))
        data = replace(config.data, source=self._located("data", config.data.source))
        return replace(config, model=self._located("model", config.model), data=data)

    def _relative_paths(self, config: RunConfig) -> dict[str, str]:
        """The run's local model and data as seen from its folder."""
        paths = {"model": config.model, "data": config.data.source}
        local = {name: path for name, path in paths.items() if Path(path).is_absolute()}
        with suppress(ValueError):  # Windows: on another drive
            return {name: os.path.relpath(path, self.folder.absolute()) for name, path in local.items()}
        return {}

    def _located(self, what: str, name: str) -> str:
        """Where the run's "model" or "data" of this name is now: in its place, where it was in a run of an earlier
        version, beside the run as before, or below a folder that the run is in; the name itself where it is nowhere."""
        if name in models() or name in NAMED_DATA or not (self.folder / "elastic.json").exists():
            return name
        about, given = self.about, Path(name).expanduser()
        places = [given]
        if what == "model" and about["source"].startswith(LOCAL):
            places.append(Path(about["source"].removeprefix(LOCAL).partition("; ")[0]))
        if what in about.get("beside", {}):
            places.append(self.folder / about["beside"][what])
        if not given.is_absolute() and (what == "data" or about["source"].startswith(LOCAL)):
            here = self.folder.absolute()
            places += [parent / given for parent in (here, *here.parents)]
        return next((os.path.abspath(place) for place in places if place.exists()), name)

    @property
    def about(self) -> dict[str, Any]:
        """elastic.json."""
        file = self.folder / "elastic.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): restore it or distil again") from error

    def record(self, **entries: Any) -> None:
        """Add entries to elastic.json."""
        about = self.about if (self.folder / "elastic.json").exists() else {}
        write_text(self.folder / "elastic.json", json.dumps(about | entries, indent=2) + "\n")

    def teacher(self, load: Callable[[RunConfig], Teacher] | None = None) -> Teacher:
        """The run's teacher; ValueError where its weights are not those that the run was made with. load: where it
        comes from, if not from the disk."""
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
        """Where the finished student is."""
        return self.folder / "routers.safetensors"

    def load_student(self, teacher: Teacher, *, pack: bool | None = None, prepare: bool = True) -> Student:
        """The finished student; pack: as `load` has it; prepare: lay out its weights for inference now, instead of in
        the first call (see Student.prepare)."""
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
    """The teacher of a configuration."""
    if launch.spreads():
        sharding.require()
    place = sharding.spread if launch.spreads() else None
    dtype = DTYPES[config.train.precision]
    return teachers.load(config.model, dtype=dtype, place=place, quantization=config.quantization)


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model on the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def make_student(teacher: Teacher, config: RunConfig) -> Student:
    """A student of this teacher, as the configuration has it and not trained, on kernels where they can be compiled."""
    cpu.build(cache_folder())
    return elasticize(teacher.model, config.student)


def has_room_for_two(model: nn.Module) -> bool:
    """Whether a second copy of the weights takes at most half of the memory that is free."""
    return 2 * kept_bytes(model) <= psutil.virtual_memory().available


def surroundings() -> dict[str, Any]:
    """What results depend on besides the configuration: versions of libraries, and the machine."""
    names = ("transformers", "timm", "accelerate")
    machine = {"platform": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name()
    if launch.size() > 1:
        machine["processes"] = launch.size()
    # a checkout of Elastic needs no installation; torch's own word says which CUDA it was built for
    own = {"python": platform.python_version(), "elastic-distill": __version__, "torch": torch.__version__}
    return {"versions": {**own, **{name: version(name) for name in names}}, "machine": machine}


def _processor() -> str:
    """The processor's name; on Linux the kernel knows it, elsewhere the standard library."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load(folder: str | Path, *, pack: bool | None = None) -> Student:
    """The student of a finished run, on its teacher's weights, ready to run at the budget it was trained for.

    pack: keep a second copy of the weights in the layout of a CPU's bfloat16 products (students/kernels/packing.py):
    calls of up to some hundred tokens get faster, and every bit stays. None: where it fits into half of the free
    memory.
    """
    run = Run.open(folder, finished=True)
    return run.load_student(run.teacher(), pack=pack)
