"""Runs commands on the stub of CUDA, in one process: `python -m tests.cuda_stub.run REPORT 'MODULE ARGUMENTS' ...`.

Writes a list to the file REPORT as JSON, with one record for each command: its exit code and output, its launches,
waits, replays and graphs (launches of each), its launches outside of a capture while their thread was capturing, calls
that a capture refused, how often each kernel was executed, operators whose kernels were replaced and why, and problems:
operators without numbers, and what ptx.c refuses. The environment is that of `tests.cuda_stub.build.environment`.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import runpy
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from students.kernels import ops, trial
from tests.cuda_stub.build import KERNELS
from tests.cuda_stub.computing import Computing
from tests.cuda_stub.executing import Executing

COUNTS = ("launches", "outside", "waits", "replays", "refused", "graphs")


def counted() -> dict[str, int]:
    """Return what the stub has counted in this process."""
    return {name: ctypes.c_long.in_dll(ctypes.CDLL(None), f"stub_{name}").value for name in COUNTS}


def graphs() -> list[int]:
    """Return the launches in each of this process's graphs, in the order in which they were made."""
    return list((ctypes.c_long * counted()["graphs"]).in_dll(ctypes.CDLL(None), "stub_graph_launches"))


def run(command: str, computing: Computing, executing: Executing) -> dict[str, Any]:
    """Run a command and return its record."""
    executing.kernels.clear()
    trial.replaced.clear()
    before, known, out, code = counted(), len(computing.problems), io.StringIO(), 0
    sys.argv = shlex.split(command)
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    record: dict[str, Any] = {name: count - before[name] for name, count in counted().items()}
    record["graphs"] = graphs()[before["graphs"] :]
    record["kernels"] = dict(executing.kernels)
    record["replaced"] = dict(trial.replaced)
    return {"code": code, "out": out.getvalue(), "problems": computing.problems[known:], **record}


def main() -> None:
    """Run the commands that sys.argv names."""
    file, *commands = sys.argv[1:]
    computing = Computing()
    torch.cuda.init()
    computing.install()
    executing = Executing(computing, Path(os.environ["TRITON_LIBCUDA_PATH"]) / KERNELS)
    executing.install()
    ops.is_in_torch_dispatch_mode = lambda: torch._C._len_torch_dispatch_stack() > 1  # but for the stub's own mode
    Path(file).write_text(json.dumps([run(command, computing, executing) for command in commands]))


if __name__ == "__main__":
    main()
