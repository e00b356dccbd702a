"""A kernel that is launched again in the same way is neither compiled nor looked up again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from students.kernels import triton
from students.kernels.triton import launching
from students.kernels.triton.launching import Kernel

X, OUT = torch.zeros(64), torch.zeros(64)


class Jit:
    """Stands for a function of triton.jit: counts what it compiles and keeps what the compiled kernels get."""

    arg_names = ("x", "out", "count", "BLOCK", "KIND")

    def __init__(self, interprets: bool = False) -> None:
        self.compiled, self.interprets = 0, interprets
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **constants: Any) -> Any:
            self.compiled += 1
            run = SimpleNamespace(run=lambda *all: self.ran.append(all), function="f", packed_metadata="m")
            return None if self.interprets else run

        return launch


@pytest.fixture(autouse=True)
def on_stream_7(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))


def test_the_second_launch_gets_all_arguments_in_the_kernel_s_order() -> None:
    jit, other = Jit(), torch.ones(64)
    kernel = Kernel(jit)
    kernel[2,](X, OUT, 5, BLOCK=16, KIND=1, num_warps=4)
    kernel[3, 4](other, OUT, 5, BLOCK=16, KIND=1, num_warps=4)
    kernel[2,](X, OUT, 5, KIND=1, BLOCK=16, num_warps=4)  # other keywords are another way to launch
    kernel[5,](X, OUT, 5, KIND=1, BLOCK=16, num_warps=4)
    assert jit.compiled == 2
    fixed = 7, "f", "m", None, None, None
    assert jit.ran[0][:9] == (3, 4, 1, *fixed) and jit.ran[1][:9] == (5, 1, 1, *fixed)
    assert [x is y for x, y in zip(jit.ran[0][9:11], (other, OUT), strict=True)] == [True, True]
    assert jit.ran[0][11:] == jit.ran[1][11:] == (5, 16, 1)


def test_whatever_triton_compiles_for_is_told_apart() -> None:
    jit = Jit()
    kernel, options = Kernel(jit), {"BLOCK": 16, "KIND": 1}
    kinds = [
        ((X, OUT, 5), options),
        ((X[1:], OUT, 5), options),  # begins at no multiple of 16 bytes
        ((X, OUT[1:], 5), options),
        ((X.double(), OUT, 5), options),
        ((X, OUT.half(), 5), options),
        ((X, None, 5), options),
        ((X, OUT, 16), options),
        ((X, OUT, 1), options),
        ((X, OUT, 1.0), options),
        ((X, OUT, 5), {**options, "KIND": 2}),
        ((X, OUT, 5), {**options, "num_warps": 8}),
    ]
    for _ in range(2):
        for given, constants in kinds:
            kernel[1,](*given, **constants)
    assert jit.compiled == len(jit.ran) == len(kinds)


def test_the_interpreter_runs_every_launch() -> None:
    jit = Jit(interprets=True)
    kernel = Kernel(jit)
    for _ in range(3):
        kernel[1,](X, OUT, 5, BLOCK=16, KIND=1)
    assert jit.compiled == 3


def test_no_more_than_so_many_kinds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "KEPT", 2)
    jit = Jit()
    kernel = Kernel(jit)
    for count in (1, 2, 3, 3, 1):
        kernel[1,](X, OUT, count, BLOCK=16, KIND=1)
    assert jit.compiled == 4 and len(kernel._compiled) == 2


def test_kernels_are_kept_in_the_folder_unless_the_user_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    triton.keep_in(tmp_path)
    assert knobs.cache.dir == str(tmp_path)
    monkeypatch.setenv("TRITON_HOME", "~")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    triton.keep_in(tmp_path)
    assert knobs.cache.dir != str(tmp_path)
