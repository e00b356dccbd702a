"""Operators without torch's dispatcher, for calls so short that its microseconds matter. The operator itself is called
where operations are counted or compiled, and where there is no function of ours.

C functions get all arguments but the input in advance: they are put together once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from students.kernels import devices, ops, reference
from students.kernels.cpu import toolchain
from students.kernels.cpu.operators import layers
from students.kernels.trial import on_gpu


def launched(operator: Any) -> Callable[..., Any]:
    """Return an operator that has a Triton kernel as a function of plain tensors: on GPUs without the dispatcher."""
    kernel = on_gpu(operator.__name__.partition(".")[0])

    def call(first: Tensor, *rest: Any) -> Any:
        return operator(first, *rest) if not first.is_cuda or ops.observed() else kernel(first, *rest)

    return call


def on_host(operator: Any) -> Callable[..., Any]:
    """Return an operator that has a C function, but no kernel for GPUs, as a function of plain tensors: without the
    dispatcher, and with gradients where these are recorded."""
    function, plain = ops.on_cpu(operator), getattr(reference, operator.__name__.partition(".")[0])

    def call(first: Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled() or devices.runs_ahead(first.device):
            return plain(first, *rest)
        return (operator if ops.observed() else function)(first, *rest)

    return call


open_tokens, thin_product = map(on_host, (ops.open_tokens, ops.thin_product))
list_open = launched(ops.list_open)
put_open = launched(ops.put_open)
open_by_score = launched(ops.open_by_score)
substitute_closed = launched(ops.substitute_closed)
_rms_norm = launched(ops.rms_norm)


def read_channels(limit: Tensor, weight: Tensor, *rest: Any) -> Callable[[Tensor], tuple[Tensor, int | Tensor]]:
    """Return `ops.read_channels` for one set of weights as a function of the input x [I]."""
    outputs, dtype, function = weight.shape[1], weight.dtype, None
    if toolchain.native(weight) is not None:
        given = layers(limit, weight, *rest)
        function = toolchain.function("read_channels", weight, *given, weight)
        given = tuple(toolchain.addresses(*given))

    def read(x: Tensor) -> tuple[Tensor, int | Tensor]:
        if function is None or x.dtype != dtype or ops.observed():
            return ops.read_channels(x.flatten(), limit, weight, *rest)
        x, out = x.contiguous(), torch.empty(outputs, dtype=dtype)
        return out, toolchain.run(function, x.data_ptr(), *given, out.data_ptr())

    return read


def rms_norm(dtype: torch.dtype, device: torch.device, epsilon: float, kind: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `ops.rms_norm` as a function of the input and the weight, both of this dtype and on this device."""
    probe = torch.empty(0, dtype=dtype, device=device)
    if toolchain.native(probe) is None:
        return lambda x, weight: _rms_norm(x, weight, epsilon, kind)
    function = toolchain.function("rms_norm", probe, 0, 0, probe, epsilon, kind, probe)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        given = x.data_ptr(), x.numel() // width, width, weight.data_ptr(), epsilon, kind, out.data_ptr()
        toolchain.run(function, *given)
        return out

    return norm
