"""The C library with the operators' CPU functions, compiled for this machine where a compiler is present."""

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

_NAMES = "numbers.h", "kernels.c", "attention.c", "fused.c", "merging.c", "norms.c", "routers.c"
SOURCES = [Path(__file__).with_name(name) for name in _NAMES]
_FLAGS = ("-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
# functions that have to give torch's bits keep the order of sums
_EXACT = {"norms.c": ("-fno-associative-math", "-ffp-contract=off")}
_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_COUNT = {"read_channels", "few_channels", "open_tokens"}
loaded: ctypes.CDLL | None = None


class Recording(threading.local):
    """The C calls of this thread, while they are recorded for a replay (see ../replay.py)."""

    calls: list[Callable[[int], Any]] | None = None
    """The recorded calls, as functions of the number of threads; None while nothing is recorded."""


recording = Recording()


def build(folder: Path) -> str | None:
    """Compile the C library into this folder, unless it is there already, and use it from now on.

    Return why that is not possible, in words that complete a message, else None; torch's operators then stay in use.
    """
    global loaded
    if loaded is not None:
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        return "no C compiler (cc, gcc or clang) is found"
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
                # not linked with OpenMP's library on purpose: torch has loaded one, and two would compete for the cores
                _run(compiler, "-shared", *objects, "-o", str(library), "-lm")
                library.replace(final)
        found = ctypes.CDLL(str(final))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return f"{compiler} fails ({lines[0] if lines else error})"
    except OSError as error:
        return f"{folder} cannot keep what is compiled ({error.strerror or error})"
    loaded = found
    return None


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _machine() -> str:
    """Return the CPU's features, on which `-march=native` depends, so that unlike machines can share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.platform() + platform.processor()


def native(x: Tensor) -> str | None:
    """Return the suffix of the C functions for the dtype of x; None if there are none, or x is not on a CPU."""
    return _KINDS.get(x.dtype) if loaded is not None and x.device.type == "cpu" else None


def function(name: str, *arguments: Any) -> Any:
    """Return the C function for the first argument's dtype, which takes arguments like these, then the number of
    threads."""
    found = getattr(loaded, f"{name}_{native(arguments[0])}")
    if found.argtypes is None:
        kinds = {int: ctypes.c_int64, float: ctypes.c_float}
        found.restype = ctypes.c_int64 if name in _COUNT else None
        found.argtypes = [*(kinds.get(type(x), ctypes.c_void_p) for x in arguments), ctypes.c_int]
    return found


def addresses(*arguments: Any) -> list[Any]:
    """Return the arguments as C takes them: tensors as the address of their data."""
    return [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]


def call(name: str, *arguments: Any) -> Any:
    """Call the C function `name` with contiguous tensors; return its result if it returns a count, else None."""
    given = [x.contiguous() if isinstance(x, Tensor) else x for x in arguments]
    return run(function(name, *given), *addresses(*given))


def run(function: Any, *given: Any) -> Any:
    """Call a C function with these arguments and torch's number of threads; note the call while recording."""
    if recording.calls is not None:
        recording.calls.append(partial(function, *given))
    return function(*given, torch.get_num_threads())
