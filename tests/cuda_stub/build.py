"""Builds the stub of CUDA for this installation of torch, and says what a process has to be started with to use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent
ASKING = ("torch_cuda", "torch_cuda_linalg", "c10_cuda", "torch_python", "caffe2_nvrtc")
"""Libraries of torch whose undefined symbols the stub has to define."""
CUDA = re.compile(r"\b(?:__cuda|cuda[A-Z]|cublas|cu(?!File)[A-Z])\w+")
PRODUCT = re.compile("gemm|gemv|dot|trsm|Batched|Gemm|Dot")
"""Those of cuBLAS's functions that launch work on the stream of their handle."""
PTXAS = """#!/bin/sh
[ "$1" = --version ] && echo "release 12.8" && exit
while [ "$1" != -o ]; do shift; done
: >"$2"
"""
"""A stub of the assembler that Triton calls, which writes an empty file: nothing would run the machine code of kernels,
and making it takes half of the time of a command."""
KERNELS = "libptx.so"
"""The library that executes kernels (ptx.c)."""


class Unavailable(Exception):
    """The stub cannot be built here; the reason is one line."""


def asked(site: Path) -> set[str]:
    """Return the names of CUDA's functions that torch, in the folder `site`, and Triton ask for."""
    libraries = [str(site / "lib" / f"lib{name}.so") for name in ASKING]
    found = set(CUDA.findall(_output("nm", "-D", "--undefined-only", *libraries)))
    found |= set(CUDA.findall((site / "include" / "c10" / "cuda" / "driver_api.h").read_text()))  # by name, at run time
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        driver = Path(triton.origin).parent / "backends" / "nvidia" / "driver.c"
        found |= set(CUDA.findall(driver.read_text()))
    return found


def build(folder: Path) -> Path:
    """Compile the stub into a folder and return the library; raises Unavailable."""
    if torch.version.cuda is None or os.name != "posix":
        raise Unavailable("torch is built without CUDA")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or shutil.which("nm") is None:
        raise Unavailable("no C compiler")
    site = Path(torch.__file__).parent
    headers = [
        f"-I{one}" for one in (site.parent / "nvidia").glob("*/include") if (one / "cuda_runtime_api.h").exists()
    ]
    if not headers:
        raise Unavailable("torch's installation has no headers of CUDA")
    objects = []
    for name in ("stub", "device"):
        objects.append(folder / f"{name}.o")
        _compile(compiler, "-c", f"-I{HERE}", *headers, "-o", str(objects[-1]), str(HERE / f"{name}.c"))
    missing = sorted(asked(site) - set(CUDA.findall(_output("nm", "--defined-only", *map(str, objects)))))
    generated = folder / "generated.c"
    generated.write_text("\n".join(["int stub_missing(const char *);", "int stub_product(void *, const char *);"]))
    with generated.open("a") as file:
        for name in missing:
            file.write(f"\n{_definition(name)}")
    library = folder / "libcuda.so.1"  # by this name torch and Triton find the driver
    _compile(compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), *map(str, objects), str(generated))
    (folder / "libcuda.so").symlink_to(library.name)
    assembler = folder / "ptxas"
    assembler.write_text(PTXAS)
    assembler.chmod(0o755)
    sources = [str(HERE / f"{name}.c") for name in ("ptx", "arithmetic")]
    _compile(compiler, "-ffp-contract=off", "-shared", "-o", str(folder / KERNELS), *sources, "-lm")
    return library


def _definition(name: str) -> str:
    """Return in C a function that the stub does not have: cuBLAS says that all is well, CUDA itself that it cannot."""
    if not name.startswith("cublas"):
        return f'int {name}(void) {{ return stub_missing("{name}"); }}'
    if PRODUCT.search(name):
        return f'int {name}(void *handle) {{ return stub_product(handle, "{name}"); }}'
    return f"int {name}(void) {{ return 0; }}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile(compiler: str, *arguments: str) -> None:
    made = subprocess.run([compiler, "-O2", "-fPIC", *arguments, "-ldl", "-lpthread"], capture_output=True, text=True)
    if made.returncode:
        raise Unavailable(f"the stub does not compile: {made.stderr.strip().splitlines()[0]}")


def environment(library: Path) -> dict[str, str]:
    """Return the environment in which a process takes the stub for a GPU."""
    folder = str(library.parent)
    own = {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_PTXAS_PATH": str(library.parent / "ptxas"),
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "OMP_NUM_THREADS": "1",
    }
    return {**{name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}, **own}
