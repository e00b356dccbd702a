"""The C library of the operators' functions on CPUs, compiled for this machine where a compiler is present."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = "numbers.h", "kernels.c", "attention.c", "fused.c", "merging.c", "norms.c"
SOURCES = [Path(__file__).with_name(name) for name in _NAMES]
_FLAGS = ("-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
# sums keep their order in what has to have torch's bits
_EXACT = {"norms.c": ("-fno-associative-math", "-ffp-contract=off")}
_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_COUNT = {"read_channels", "few_channels"}
loaded: ctypes.CDLL | None = None


class Recording(threading.local):
    """Where calls of C functions by this thread are noted, while somebody records them (see execution/replay.py)."""

    calls: list[Callable[[int], Any]] | None = None
    """Each takes the number of threads."""


recording = Recording()


def build(folder: Path) -> bool:
    """Compile the C library into this folder, unless it is there already, and use it from now on.

    False, and torch's operators stay in use, where there is no C compiler or it fails.
    """
    global loaded
    if loaded is not None:
        return True
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        return False
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    sources = b"".join(source.read_bytes() for source in SOURCES)
    identity = hashlib.sha256(sources + version + " ".join((*_FLAGS, str(_EXACT), _machine())).encode())
    final = folder / f"kernels-{identity.hexdigest()[:16]}.so"
    try:
        if not final.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as workshop:
                objects, library = [], Path(workshop, final.name)
                for source in SOURCES[1:]:
                    objects.append(str(Path(workshop, f"{source.stem}.o")))
                    flags = (*_FLAGS, *_EXACT.get(source.name, ()), "-fopenmp", "-fPIC")
                    _run(compiler, *flags, "-c", str(source), "-o", objects[-1])
                # left without OpenMP's library on purpose: torch has loaded one, and two would fight for the cores
                _run(compiler, "-shared", *objects, "-o", str(library), "-lm")
                library.replace(final)
        found = ctypes.CDLL(str(final))
    except (OSError, subprocess.CalledProcessError):
        return False
    loaded = found
    return True


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _machine() -> str:
    """What `-march=native` depends on, so that a cache folder can be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.platform() + platform.processor()


def native(x: Tensor) -> str | None:
    """The suffix of the C functions that take this tensor, or None."""
    return _KINDS.get(x.dtype) if loaded is not None and x.device.type == "cpu" else None


def function(name: str, *arguments: Any) -> Any:
    """The C function for the type of the first argument, which takes such arguments and the number of threads."""
    found = getattr(loaded, f"{name}_{native(arguments[0])}")
    if found.argtypes is None:
        kinds = {int: ctypes.c_int64, float: ctypes.c_float}
        found.restype = ctypes.c_int64 if name in _COUNT else None
        found.argtypes = [*(kinds.get(type(x), ctypes.c_void_p) for x in arguments), ctypes.c_int]
    return found


def addresses(*arguments: Any) -> list[Any]:
    """What C sees of arguments: tensors, which are contiguous, by where they are."""
    return [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]


def call(name: str, *arguments: Any) -> Any:
    """Call a C function; those that count return a number."""
    return run(function(name, *arguments), *addresses(*arguments))


def run(function: Any, *given: Any) -> Any:
    """Call a C function with all that it takes but the number of threads."""
    if recording.calls is not None:
        recording.calls.append(partial(function, *given))
    return function(*given, torch.get_num_threads())
