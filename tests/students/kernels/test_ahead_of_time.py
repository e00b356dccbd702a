"""Kernels for GPUs compile where there is none, and fit into what a GPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from students.kernels import triton

ROOT = Path(__file__).parents[3]
MORE = ((80, "bfloat16"), (80, "float16"), (90, "float16"), (90, "float32"))
SHARED = 99 * 1024
"""Bytes of shared memory that a program may have on every GPU from Ampere on, data centres' or not."""


@pytest.mark.skipif(not triton.installed(), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, "float32"), (90, "bfloat16"), *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE)],
)
def test_kernels_compile_without_a_gpu_and_spill_nothing(capability: int, dtype: str, tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.students.kernels.ahead_of_time", str(capability), dtype]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({kernel["kernel"].split()[0] for kernel in kernels}) == 20
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel
    readers = [kernel for kernel in kernels if kernel["kernel"].startswith(("_gather", "_exact", "_dot_rows"))]
    ahead = [kernel for kernel in readers if kernel["copies"]]
    assert len(ahead) == len(readers) - 1, "weights are on their way before their use, but where rows are not aligned"
