"""Every operator on every backend that there is here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from students.kernels import triton
from students.kernels.cpu import toolchain
from tests.students.kernels import interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The C library, None where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "loaded", None)
        toolchain.build(tmp_path_factory.mktemp("library"))
        return toolchain.loaded


@pytest.fixture(params=["torch", "c", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, library: object) -> Iterator[torch.device]:
    """Where tensors have to be for the operators to run as torch's own, in C, in Triton's interpreter, or on a GPU."""
    monkeypatch.setattr(toolchain, "loaded", library if request.param == "c" else None)
    if request.param == "c" and library is None:
        pytest.skip("no C compiler")
    if request.param != "interpreter":
        if request.param == "cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield torch.device(request.param if request.param == "cuda" else "cpu")
    elif not triton.available() or torch.cuda.is_available():
        pytest.skip("Triton is not installed, or runs on a GPU")
    else:
        interpreter.mend(monkeypatch)
        with torch.library._scoped_library("elastic", "IMPL") as operators:
            for name in triton.OPERATORS:
                operators.impl(name, triton.implementation(name), "CPU", allow_override=True)
            yield torch.device("cpu")
