"""On-disk cache of the teacher's outputs for training samples, shared by runs.

A cache is a folder with a subfolder for each teacher and each kind of output that losses need. Samples are keyed by a
digest of the model's input, so that a run finds the samples it has in common with earlier runs, whatever their data,
windows, order, seed or number of processes. Files are safetensors, each written under a temporary name and then
renamed: a killed process leaves no incomplete files, and several processes and runs may fill a cache at the same time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic.files import write_text
from elastic.objectives.sums import TeacherSignals
from students.checkpoint import write_tensors
from teachers.snapshot import listed

MARK = "teacher-cache.json"
"""Name of the file that marks a folder as a cache."""
SHARD = 128 * 2**20
"""Bytes of new outputs in memory at which they are written to a file."""
RESERVE = 2**30
"""Bytes of disk space that the cache leaves free."""
ABANDONED = 3600
"""Age in seconds at which a temporary file is considered abandoned and deleted."""


def digest(*parts: Any) -> bytes:
    """Return a 16-byte BLAKE2 digest of tensors on the host, bytes and texts."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            part = part.contiguous().reshape(-1).view(torch.uint8).numpy()
        elif isinstance(part, str):
            part = part.encode()
        found.update(f"{len(part)} ".encode())
        found.update(part)
    return found.digest()


def require_cache(folder: str | Path) -> Path:
    """Return the absolute path of a cache folder, created if missing; ValueError if it is a file or another folder, or
    cannot be made."""
    path = Path(folder).expanduser().absolute()
    if path.is_file():
        raise ValueError(f"{folder} is a file: name a folder with --teacher-cache")
    if not (path / MARK).exists():
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{folder} exists and is not a teacher cache: name another folder with --teacher-cache")
        with _possible(folder):
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / MARK, json.dumps({"format": 1}) + "\n")
    return path


@contextmanager
def _possible(folder: str | Path) -> Iterator[None]:
    """Context in which an error of the system is raised as a ValueError that says what --teacher-cache can be."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--teacher-cache: nothing can be kept in {folder} ({error.strerror or error}): name another folder, or "
            "leave it away"
        ) from None


class TeacherCache:
    """Outputs of one teacher by the digest of a sample. `find` may be called from another thread than the rest."""

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        """about: identifies the teacher and the kind of outputs. ValueError if a file is damaged or of another
        cache."""
        self.about = about
        self.folder = require_cache(folder) / "-".join(str(value) for value in about.values())
        with _possible(folder):
            self.folder.mkdir(exist_ok=True)
        self.size = 0
        """Bytes on disk of the files that this object knows."""
        self._shards: list[Any] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        """(number of the file, first row, row after the last) of each sample, by its digest."""
        self._waiting: dict[bytes, TeacherSignals] = {}
        self._bytes = 0
        for part in self.folder.glob(".*.part"):
            with suppress(OSError):  # another process has deleted the file
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
        for file in sorted(self.folder.glob("*.safetensors")):
            self._open(file)

    def __len__(self) -> int:
        """Number of samples on disk."""
        return len(self._places)

    @property
    def free(self) -> int:
        """Bytes of disk space that the cache may still use."""
        return max(0, shutil.disk_usage(self.folder).free - RESERVE)

    def _open(self, file: Path) -> None:
        try:
            shard = safe_open(file, "pt")
            about = json.loads((shard.metadata() or {})["elastic"])
            keys, lengths = shard.get_tensor("keys"), shard.get_tensor("lengths")
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and the teacher is asked again") from None
        if about != self.about:
            raise ValueError(f"{file} is of {listed(about)}, this is {listed(self.about)}: delete it")
        number, ends = len(self._shards), lengths.cumsum(0).tolist()
        self._shards.append(shard)
        for key, start, end in zip(keys.numpy(), [0, *ends], ends, strict=False):
            self._places[key.tobytes()] = number, start, end
        self.size += file.stat().st_size

    def find(self, key: bytes) -> TeacherSignals | None:
        """Return the outputs for a sample, on the host; None if they are not in the cache."""
        if key not in self._places:
            return None
        number, start, end = self._places[key]
        shard = self._shards[number]
        names = set(shard.keys()) - {"keys", "lengths"}
        return {name: shard.get_slice(name)[start:end] for name in names}

    def add(self, keys: Sequence[bytes], signals: TeacherSignals, lengths: Sequence[int]) -> None:
        """Add the outputs for these samples to those in memory; `flush`, called once these reach SHARD bytes, waits for
        the copies from a GPU and writes them. lengths: number of rows of each sample."""
        host = {name: x.detach().to("cpu", non_blocking=True) for name, x in signals.items()}
        parts = {name: x.split(list(lengths)) for name, x in host.items()}
        for number, key in enumerate(keys):
            if key not in self._places:
                self._waiting[key] = {name: part[number] for name, part in parts.items()}
        self._bytes = sum(x.nbytes for sample in self._waiting.values() for x in sample.values())
        if self._bytes >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Write all outputs in memory to a file; OSError if the disk is full, in which case they are dropped."""
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        if not waiting:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples = list(waiting.values())
        tensors = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        if sum(x.nbytes for x in tensors.values()) > self.free:
            raise OSError(f"the disk of {self.folder} is full")
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(waiting)), dtype=torch.uint8).view(-1, 16)
        tensors["lengths"] = torch.tensor([len(next(iter(sample.values()))) for sample in samples])
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_tensors(file, tensors, self.about)
        self._open(file)
