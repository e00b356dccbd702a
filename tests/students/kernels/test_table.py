"""Every operator of the table: its values are the reference's on every backend; its declared shapes and costs hold."""

from __future__ import annotations

import copy
import errno
import re
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from students.kernels import cpu, ops, reference, trial, triton
from students.kernels.cpu import toolchain
from students.kernels.ops import OPERATORS
from students.kernels.triton import tuning
from tests.backends import DTYPES, KERNELS
from tests.students.kernels.samples import SAMPLES, Draw

CLOSE = {
    torch.float64: dict(atol=1e-9, rtol=1e-6),
    torch.float32: dict(atol=1e-4, rtol=1e-4),
    torch.float16: dict(atol=0.05, rtol=0.02),
    torch.bfloat16: dict(atol=0.3, rtol=0.05),
}
IN_TORCH = {"fused_channels", "fused_gate", "sum_norm", "rotary_grad", "biased_attention", "merge_normed"}
IN_TORCH |= {"list_open", "put_open", "gated_rows", "open_by_score", "substitute_closed"}
"""Operators without a C function: they save launches or waits, or compute the gradient of rotary embeddings, which
matters on GPUs, or replace masks in attention, which torch's attention takes on CPUs."""


def test_every_operator_has_samples_and_every_implementation_an_operator():
    assert SAMPLES.keys() == OPERATORS.keys() == cpu.OPERATORS.keys() | IN_TORCH >= triton.OPERATORS.keys()


def test_every_c_function_is_called_by_an_operator():
    sources = "".join(source.read_text() for source in toolchain.SOURCES)
    defined = set(re.findall(r"^ *(?:void|int64_t) (\w+?)_(?:##S|bf16)\(", sources, re.MULTILINE))
    assert defined == OPERATORS.keys() - IN_TORCH


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_values_are_the_reference_s(name: str, dtype: torch.dtype, backend: torch.device):
    operator, other = getattr(torch.ops.elastic, name), getattr(reference, name)
    for arguments in SAMPLES[name](Draw(dtype, backend)):
        same = copy.deepcopy(arguments)
        found, expected = operator(*arguments), other(*same)
        pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found or (), expected or (), strict=True)
        given = [pair for pair in zip(arguments, same, strict=True) if isinstance(pair[0], Tensor)]
        for one, two in [*pairs, *given]:  # some operators write to their arguments
            torch.testing.assert_close(one, two, **(CLOSE[dtype] if two.is_floating_point() else {}))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_written_to_and_shapes_are_as_declared(name: str, dtype: torch.dtype, operators: None):
    operator = getattr(torch.ops.elastic, name).default
    for arguments in SAMPLES[name](Draw(dtype, torch.device("cpu"))):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLES)
def test_costs_are_counted(name: str, operators: None):
    row = OPERATORS[name]
    assert (row.flops is None) == (row.read is None)
    counted = expected = read = 0
    for arguments in SAMPLES[name](Draw(torch.float32, torch.device("cpu"))):
        with FlopCounterMode(display=False) as counter:
            out = getattr(torch.ops.elastic, name)(*arguments)
        counted += counter.get_total_flops()
        expected += 0 if row.flops is None else row.flops(*arguments, out_val=out)
        read += 0 if row.read is None else row.read(*arguments, out_val=out)
    assert counted == expected and (row.flops is None) == (expected == 0) == (read == 0)


@pytest.mark.skipif(not triton.installed(), reason="Triton is not installed")
def test_operators_are_references_where_triton_cannot_launch(monkeypatch: pytest.MonkeyPatch):
    from triton.runtime import driver

    broken = SimpleNamespace(get_current_target=Mock(side_effect=RuntimeError("Failed to find C compiler")))
    monkeypatch.setattr(driver, "_active", broken)
    monkeypatch.setattr(triton, "_launches", [])
    with pytest.warns(UserWarning, match=r"on this GPU \(Failed to find C compiler\): it needs"):
        assert not triton.available()
    assert not triton.available() and broken.get_current_target.call_count == 1
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert not ops.compiled(x) and not ops.reads_few(1, x, [6])
    monkeypatch.setattr(reference, "channel_gate", lambda *given: given)
    monkeypatch.setattr(trial, "replaced", {})
    assert trial.on_gpu.__wrapped__("channel_gate")(x, None) == (x, None)
    assert trial.replaced == {"channel_gate": "Triton cannot launch kernels here"}
    refused = PermissionError(errno.EACCES, "Permission denied", "/kept")
    said = triton._why(refused)
    assert said.startswith("([Errno 13] Permission denied: '/kept'): ") and "TRITON_CACHE_DIR" in said
    known = torch.compile(lambda x: x + triton.available(), backend="eager", fullgraph=True)
    assert float(known(torch.zeros(()))) == 0
    triton._launches.clear()
    with pytest.raises(UserWarning, match=r"it needs a C compiler"):  # on a GPU no test passes without kernels
        triton.available()


def test_nothing_is_saved_where_a_dense_product_is_launched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops.triton, "available", lambda: True)
    device = torch.device("cpu")  # its launches are those of an H100
    weight: Any = SimpleNamespace(is_cuda=True, device=device, shape=(8, 6), element_size=lambda: 2)
    arguments = torch.ones(8), torch.ones(8), weight, None, None, None, [6]
    row, out = OPERATORS["read_channels"], (torch.ones(6), torch.tensor(3))
    assert (row.flops(*arguments, out_val=out), row.read(*arguments, out_val=out)) == (2 * 3 * 6, 2 * 3 * 6)
    monkeypatch.setitem(tuning.GATHER[tuning.capability(device)], ("one", "narrow"), None)
    assert (row.flops(*arguments, out_val=out), row.read(*arguments, out_val=out)) == (2 * 8 * 6, 2 * 8 * 6)


@torch.no_grad()
def test_merging_counts_scores_and_pairs():
    """The counted FLOPs are of the scores of all tokens, and of comparing each image's patches that may leave with its
    other patches."""
    for *arguments, lengths, shift, multiple in SAMPLES["merge_below"](Draw(torch.float32, torch.device("cpu"))):
        out = torch.ops.elastic.merge_below(*arguments, lengths, shift, multiple)
        prefix, width = len(arguments[-1]), arguments[0].shape[2]
        patches = [length - prefix for length in lengths.tolist()]
        pairs = sum((k // 2) * (k - k // 2) for k in patches)
        expected = 2 * width * (int(lengths.sum()) + pairs)
        assert OPERATORS["merge_below"].flops(*arguments, lengths, shift, multiple, out_val=out) == expected
