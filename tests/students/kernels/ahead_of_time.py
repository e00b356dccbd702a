"""Compile the operators' kernels on a machine without a GPU, and print the resources of each as a line of JSON.

`TRITON_INTERPRET=0 python -m tests.students.kernels.ahead_of_time 90 bfloat16`: operators run on fake tensors of an 8 B
model's shapes, as on a GPU of compute capability 9.0; kernels that would be launched are compiled instead. An operator
that would wait for the device fails, because fake tensors hold no values to read.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

import students.kernels.ops  # noqa: F401
from students.kernels.triton import counters, implementation, tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoDevice:
    """A stub of Triton's driver that answers queries before a launch as for a GPU of the given compute capability."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def work(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Yield calls of every operator that has a Triton kernel, to be made on fake tensors.

    Each call asserts that the operator's fake implementation gives the kernel's shapes, types and device."""

    def make(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="cuda")

    def call(name: str, *arguments: object) -> Callable[[], object]:
        def run() -> None:
            found, expected = implementation(name)(*arguments), getattr(torch.ops.elastic, name)(*arguments)
            if found is None and expected is None:  # an operator that writes to its arguments
                return
            for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True):
                assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), (name, x, y)

        return run

    single = torch.float32
    wide, narrow, vocabulary, rank = 14336, 4096, 128256, 16
    scalar, limit, long_limit = make(kind=single), make(narrow, kind=single), make(wide, kind=single)
    up_and_gate = make(narrow, 2 * wide), make(2 * wide), make(2 * rank, narrow), make(rank, 2 * wide), [wide, 2 * wide]
    plain = None, None, None
    yield call("read_channels", make(narrow), limit, *up_and_gate)
    yield call("few_channels", make(8, narrow), limit, *up_and_gate)
    yield call("read_channels", make(wide), long_limit, make(wide, narrow), *plain, [narrow])
    yield call("few_channels", make(16, wide), long_limit, make(wide, narrow), *plain, [narrow])
    yield call("read_channels", make(narrow), limit, make(narrow, vocabulary), *plain, [vocabulary])
    yield call("few_channels", make(16, narrow), limit, make(narrow, vocabulary), *plain, [vocabulary])
    yield call("read_channels", make(77), make(77, kind=single), make(77, 301), make(301), None, None, [301])
    for rows in (1, 8):
        sums, stream = make(rows, 64, kind=single), make(rows, narrow)
        gates = make(rows, 2 * wide).chunk(2, 1)
        yield call("fused_channels", stream, make(narrow), sums, 1e-6, 0, None, limit, *up_and_gate)
        shut = long_limit, make(wide, narrow), None, make(rank, wide), make(rank, narrow), [narrow]
        yield call("fused_channels", *gates, None, 0.0, 3, stream, *shut)
    head = make(vocabulary, narrow)
    for rows in (1, 16):
        yield call("exact_rows", make(rows, narrow), head, None, make(rows, vocabulary), make(rows), make())
    yield call("dot_rows", make(narrow), head, make(vocabulary), make(1000, kind=torch.int64))
    for gates in (1, wide):
        yield call("gated_rows", make(narrow), make(wide, narrow), None, make(gates, kind=torch.bool))
    x, tokens = make(4, 1024, narrow), make(4, 1024, kind=single)
    yield call("channel_gate", x, limit)
    yield call("fused_gate", make(64, narrow), make(narrow), make(64, narrow), 1e-6, 0, limit)
    yield call("fused_gate", *make(64, 2 * wide).chunk(2, 1), None, 0.0, 3, long_limit)
    for hidden in (768, 1024):
        yield call("sum_norm", make(64, 197, hidden), make(64, 197, hidden), make(hidden), make(hidden), 1e-6)
    yield call("channel_gate_grad", x, tokens, x, limit)
    for kind in (0, 1):
        y = make(4, 1024, wide)
        yield call("gated_grad", y, tokens, y, y, long_limit, kind)
    logits, each, limits = make(512, vocabulary), make(512, kind=single), make(512, 1, kind=single)
    yield call("row_gate", logits, logits, limits, scalar)
    yield call("row_gate_grad", logits, each, logits, logits, limits, scalar)
    yield call("forward_kl", logits, logits)
    yield call("forward_kl_grad", logits, logits, make(2, 512, kind=single), each)
    routed = logits, logits, logits, limits, scalar
    yield call("routed_kl", *routed)
    yield call("routed_kl_grad", *routed, make(2, 512, kind=single), each, each)
    for tall in (make(8, 197, 768), make(8, 577, 1024)):
        router = make(tall.shape[2], kind=single), make(1, kind=single), scalar, make(1, kind=single)
        yield call("merge_lowest", tall, make(8, tall.shape[1], kind=single), None, *router, tall.shape[1] - 40)
        norm = make(tall.shape[2]), make(tall.shape[2]), 1e-6
        yield call("merge_normed", tall, make(8, tall.shape[1], kind=single), None, *router, tall.shape[1] - 40, *norm)
        lengths, shift = make(8, kind=torch.int64), make(8, kind=single)
        yield call("merge_below", tall, make(8, tall.shape[1], kind=single), None, *router, lengths, shift, 4)
    for count in (1, 4, 4096):
        yield call("rms_norm", make(count, narrow), make(narrow), 1e-6, 0)
    for size in (64, 72):
        parts = make(8, 150, 3, 12, size).permute(2, 0, 3, 1, 4)
        yield call("biased_attention", *parts, make(8, 150, kind=single), 0.1)
    yield call("list_open", make(4, 2048, 1), make(1), make(1, kind=single))
    yield call("list_open", make(4, 2048, kind=torch.bool), None, None)
    places = make(2048, kind=torch.int32), make(1, 2048, kind=torch.bool)
    yield call("put_open", make(1408, 4096), *places, None)
    yield call("put_open", make(1408, 4096), *places, make(2048, 4096))
    for rows, before in ((2048, places[0]), (1, None)):
        product, open_ = make(1, rows, 112), make(1, rows, kind=torch.bool)
        yield call("open_by_score", product[..., 64:], make(32), scalar, make(1, rows, kind=torch.int64), 16)
        added = product[0, :, :64], make(narrow, 64), make(narrow)
        for residual in (make(rows, narrow), None):
            yield call("substitute_closed", make(min(rows, 1408), narrow), before, open_, *added, residual)
    yield call("fused_gate", make(1408, wide), make(1408, wide), None, 0.0, 3, None)
    kept, one = make(2, 8, 1024, 128), make(2, 8, 1, 128)
    yield call("write_slot", kept, kept, one, one, make(1, kind=torch.int64))
    for rows, heads, groups, size in ((1, 32, 8, 128), (64, 40, 8, 128), (1, 28, 4, 128), (1, 8, 4, 256)):
        cache, query = make(rows, groups, 1024, size), make(rows, heads, 1, size)
        mask, slot = None if rows == 64 else make(rows, 1, 1, 1024), make(1, kind=torch.int64)
        limits = (0, 0.0) if size < 256 else (512, 50.0)
        yield call("decode_attention", query, cache, cache, mask, slot, 0.1, *limits)
    for tokens in (1, 1024):
        query, key = (make(2, tokens, heads, 128).transpose(1, 2) for heads in (32, 8))
        yield call("rotary", query, key, make(1, tokens, 128), make(1, tokens, 128))
    yield call("rotary_grad", query, key, make(1, tokens, 128), make(1, tokens, 128))
    yield call("rms_norm_grad", make(8, narrow), make(8, narrow), make(narrow), 1e-6, 0)


def compiled(capability: int, dtype: torch.dtype) -> dict[str, object]:
    """Return the kernels that the calls of `work` compile, by kernel name, type and compile-time arguments."""
    found: dict[str, object] = {}

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        args = [MockTensor(x.dtype) if isinstance(x, Tensor) else x for x in args]
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        shown = {k: v for k, v in kwargs.items() if isinstance(v, (int, bool, tuple))}
        kinds = [str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, MockTensor)][:1]
        found[f"{self.__name__} {' '.join(kinds)} {shown}"] = kernel

    run = JITFunction.run
    driver.set_active(NoDevice(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: divmod(capability, 10)),
        mock.patch.object(tuning, "multiprocessors", lambda device: 132),
        mock.patch.object(
            counters, "zeros", lambda device, count: torch.zeros(count, dtype=torch.int32, device=device)
        ),
        FakeTensorMode(),
    ):
        for call in work(dtype):
            call()
    return found


def needs(kernel: object) -> dict[str, int]:
    """Return a kernel's resources: registers, bytes of stack and of local memory per thread; bytes of shared memory and
    warps per program; the number of asynchronous 16-byte copies from global to shared memory in its code; and whether
    it waits for the launch before it (1) or reads or writes memory first (0)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    first = re.search(r"griddepcontrol\.wait|\b(ld|st|atom|cp\.async)\S*\.global", kernel.asm["ptx"])
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "copies": kernel.asm["ptx"].count("cp.async.cg.shared.global"),
        "waits": int(first is not None and first.group() == "griddepcontrol.wait"),
    }


if __name__ == "__main__":
    for name, kernel in compiled(int(sys.argv[1]), getattr(torch, sys.argv[2])).items():
        print(json.dumps({"kernel": name, **needs(kernel)}), flush=True)
