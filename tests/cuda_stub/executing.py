"""Executes Triton's kernels on the stub of CUDA: their PTX, by ptx.c, when they are launched or replayed."""

from __future__ import annotations

import ctypes
import sys
from functools import partial
from pathlib import Path
from typing import Any

import triton

from tests.cuda_stub.computing import Computing
from tests.cuda_stub.ptx import Program, Unsupported

LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_void_p))


class Executing:
    """Runs the kernels that the driver is asked to launch; what goes wrong is a problem of `computing`.

    library: ptx.c and arithmetic.c, compiled."""

    def __init__(self, computing: Computing, library: Path) -> None:
        self._computing = computing
        self._library = ctypes.CDLL(str(library))
        self._programs: dict[int, Program] = {}
        self._launched = LAUNCH(self._launch)  # C keeps no reference
        self.kernels: dict[str, int] = {}
        """How often each kernel has run, by name."""

    def install(self) -> None:
        """Begin, for the rest of the process."""
        stub = ctypes.CDLL(None)
        for library, name, function in (
            (self._library, "ptx_holds", stub.stub_holds),
            (stub, "stub_kernel", self._launched),
        ):
            ctypes.c_void_p.in_dll(library, name).value = ctypes.cast(function, ctypes.c_void_p).value
        triton.knobs.runtime.kernel_load_end_hook = self._load

    def _load(self, module: Any, function: int, name: str, files: dict[str, str], hash: str) -> None:
        text = next(Path(path).read_text() for file, path in files.items() if file.endswith(".ptx"))
        try:
            self._programs[function] = Program(text, self._library)
        except Unsupported as error:
            self._say(f"{name}: {error}")

    def _launch(self, function: int, sizes: Any, arguments: Any) -> None:
        if function not in self._programs:
            self._say("a kernel that was not loaded")
            return
        program = self._programs[function]
        given = program.packed([ctypes.string_at(arguments[k], size) for k, size in enumerate(program.sizes)])
        work = partial(self._run, program, sizes[:3], sizes[3:6], sizes[6], given)
        if self._computing.recording is None:
            work()
        else:
            self._computing.recording.append(work)

    def _run(self, program: Program, *given: Any) -> None:
        turn = self.kernels.get(program.name, 0)
        self.kernels[program.name] = turn + 1
        wrong = program.launch(*given, turn)
        if wrong:
            self._say(wrong)

    def _say(self, problem: str) -> None:
        if problem not in self._computing.problems:
            self._computing.problems.append(problem)
            print(f"[stub] {problem}", file=sys.stderr)
