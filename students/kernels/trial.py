"""Triton kernels on trial: one that fails on this GPU, or is wrong there, is replaced by its reference.

Kernels are compiled when they first run, so that a GPU, driver or compiler that nobody has tried may refuse one (say
for its shared memory) or get it wrong. A kernel that accesses memory that is not its own cannot be replaced: after
that, CUDA refuses every call of the process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from students.kernels import reference, triton

SMALL = 2**20
"""Maximum numbers in the first argument of a call that is compared with the reference, which takes memory."""
FAR = 0.1
"""Error of a result, relative to its norm, from which on a kernel is wrong: far more than rounding makes."""
SLIGHT = 1e-2
"""Error, relative to the largest number in the first argument, below which no result is wrong: differences of nearly
equal numbers are all rounding."""

CHOOSE = {"merge_lowest", "merge_normed", "merge_below"}
"""Operators whose results are not compared: rounding lets other patches merge where several are nearly alike."""

replaced: dict[str, str] = {}
"""The operators whose kernels have been replaced in this process, and why."""


class OnTrial:
    """An operator's kernel, for arguments (first, *rest), of which the first is a tensor.

    Outside of captures, the first call with few numbers, for each dtype and device, also runs the reference. If results
    differ by more than rounding, or any call raises an error, the reference replaces the kernel for that dtype and
    device, and one warning says so. Errors about arguments (ValueError), about memory, and in a capture are raised.
    """

    def __init__(self, name: str, kernel: Callable[..., Any], reference: Callable[..., Any]) -> None:
        self._name, self._kernel, self._reference = name, kernel, reference
        self._compares = name not in CHOOSE
        self._passed: dict[tuple[torch.dtype, torch.device], bool] = {}

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        key = first.dtype, first.device
        passed = self._passed.get(key)
        if passed is False:
            return self._reference(first, *rest)
        tried = passed is None and self._compares and first.numel() <= SMALL and not _capturing(first)
        expected: list[Tensor] = []
        try:
            if tried:
                with _may_wait(first):
                    expected = self._expected((first, *rest))
            found = self._kernel(first, *rest)
            if not tried:
                return found
            results = [*_tensors(found), *self._written((first, *rest))]
            with _may_wait(first):
                wrong = bool(expected) and not _agree(results, expected, first)
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if _capturing(first):
                raise
            self._replace(key, next(iter(str(error).strip().splitlines()), type(error).__name__))
            return self._reference(first, *rest)
        if wrong:
            self._replace(key, "its results are wrong")
            for one, other in zip(results, expected, strict=True):
                one.copy_(other)
        self._passed.setdefault(key, True)
        return found

    def _written(self, given: tuple[Any, ...]) -> list[Tensor]:
        """Return the arguments that the operator writes to."""
        return written(getattr(torch.ops.elastic, self._name).default, given, {})

    @torch.no_grad()
    def _expected(self, given: tuple[Any, ...]) -> list[Tensor]:
        """Return the reference's results and the arguments that it has written to; empty if it fails."""
        with suppress(Exception):
            own = {id(x): x.clone() for x in self._written(given)}
            found = self._reference(*(own.get(id(x), x) for x in given))
            return [*_tensors(found), *own.values()]
        return []

    def _replace(self, key: tuple[torch.dtype, torch.device], reason: str) -> None:
        dtype, device = key
        warnings.warn(
            f"no kernel for {self._name} in {str(dtype).removeprefix('torch.')} on {device} ({reason}): torch's "
            "operators run in its place, and are slower",
            stacklevel=4,
        )
        replaced[self._name] = reason
        self._passed[key] = False


def written(operator: Any, given: Sequence[Any], named: Mapping[str, Any]) -> list[Tensor]:
    """Return those of the arguments, given by place and by name, that an operator writes to."""
    known = operator._schema.arguments
    by_name = {**dict(zip((one.name for one in known), given, strict=False)), **named}
    names = [one.name for one in known if one.alias_info is not None and one.alias_info.is_write]
    return [x for name in names for x in tree_leaves(by_name.get(name)) if isinstance(x, Tensor)]


@cache
def on_gpu(name: str) -> Callable[..., Any]:
    """Return the function of an operator for GPUs: the Triton kernel, or the reference in float64, where Triton cannot
    launch, and where the kernel has failed."""
    kernel, other = triton.implementation(name), getattr(reference, name)
    tried = OnTrial(name, kernel, other)

    def run(first: Tensor, *rest: Any) -> Any:
        if first.dtype == torch.float64:
            return other(first, *rest)
        if first.is_cuda and not triton.available():
            replaced[name] = "Triton cannot launch kernels here"
            return other(first, *rest)
        if not first.is_cuda:  # Triton's interpreter
            return kernel(first, *rest)
        if _one_gpu():
            return tried(first, *rest)
        with torch.cuda.device_of(first):  # Triton launches where the current device is
            return tried(first, *rest)

    return run


@cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def _may_wait(x: Tensor) -> Iterator[None]:
    """A context in which the host may wait for a GPU whatever torch.cuda.set_sync_debug_mode has forbidden."""
    mode = torch.cuda.get_sync_debug_mode() if x.is_cuda else 0
    if mode:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found or ())


@torch.no_grad()
def _agree(found: list[Tensor], expected: list[Tensor], first: Tensor) -> bool:
    """Return whether results differ by no more than rounding can make, which may also change a few choices."""
    wide = first.double()
    slight = SLIGHT * float(torch.where(wide.isfinite(), wide, 0).abs().max()) if first.numel() else 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        finite = other.isfinite()
        if not torch.equal(one.isfinite(), finite):
            return False
        apart, size = (torch.where(finite, x, 0) for x in (one - other, other))
        if float(apart.norm()) > FAR * float(size.norm()) and float(apart.abs().max()) > slight:
            return False
    return True
