"""Triton kernels compile for GPUs on a machine without one, spill next to nothing, and fit a GPU's shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from students.kernels import triton

ROOT = Path(__file__).parents[3]
MORE = (
    *((80, dtype) for dtype in ("float32", "bfloat16", "float16")),
    *((90, dtype) for dtype in ("float16", "float32")),
    *((blackwell, "bfloat16") for blackwell in (100, 120)),
)
SHARED = 99 * 1024
"""Bytes of shared memory that a program may use on every GPU since Ampere, data centre GPU or not."""
SPILLED = 16
"""Bytes a thread may spill: what Triton 3.9 asks of the assembler (`--regAllocOptLevel=2`) spills 8 and 16 bytes of
`_gather`'s, before its loop over channels and behind it, where the assembler by itself spills nothing; on Blackwell it
is 8 bytes in one kernel, with Triton 3.6 too."""


Compilers = dict[tuple[int, str], subprocess.Popen[str]]


def start(capability: int, dtype: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "tests.students.kernels.ahead_of_time", str(capability), dtype]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def compilers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilers]:
    """Processes that compile, one for each selected test, by (capability, dtype); all run at the same time."""
    tests = [item.callspec.params for item in request.session.items if item.path == request.path]
    keys = [(test["capability"], test["dtype"]) for test in tests]
    started = {key: start(*key, tmp_path_factory.mktemp("triton")) for key in keys}
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.thorough
@pytest.mark.skipif(not triton.installed(), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, "bfloat16"), *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE)],
)
def test_kernels_compile_without_a_gpu_and_spill_next_to_nothing(capability: int, dtype: str, compilers: Compilers):
    process = compilers[capability, dtype]
    out, err = process.communicate()
    assert process.returncode == 0, err
    kernels = [json.loads(line) for line in out.splitlines()]
    assert len({kernel["kernel"].split()[0] for kernel in kernels}) == (27 if dtype == "float32" else 28)
    for kernel in kernels:
        assert kernel["stack"] <= SPILLED and kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["waits"] == ("'launch_pdl': True" in kernel["kernel"]), kernel
    assert any(kernel["waits"] for kernel in kernels) == (capability >= 90)
    reading = "_gather", "_exact", "_dot_rows", "_gated_rows"
    readers = [kernel for kernel in kernels if kernel["kernel"].startswith(reading)]
    ahead = [kernel for kernel in readers if kernel["copies"]]
    assert len(ahead) == len(readers) - 1, "weights are on their way before their use, but where rows are not aligned"
