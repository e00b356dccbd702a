"""Rotary embeddings: the kernel replaces a model's own function only where both give the same bits."""

from __future__ import annotations

import sys

import pytest
import torch

from students.kernels import devices, ops
from students.kernels.rotary import NAME, Rotary, Rotations, _at_once
from tests.backends import DTYPES
from tests.pico.language import make_tiny


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "width", "same"),
    [("llama", 16, True), ("phi3", 12, True), ("glm4", 16, False)],
)
def test_bits_are_the_model_s(
    name: str, width: int, same: bool, dtype: torch.dtype, backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = vars(sys.modules[type(make_tiny(name).base_model).__module__])[NAME]
    query, key = (torch.randn(2, 3, heads, 16).to(backend, dtype).transpose(1, 2) for heads in (6, 2))
    angles = torch.randn(2, 3, width // 2).to(backend).repeat(1, 1, 2)
    given = query, key, angles.cos().to(dtype), angles.sin().to(dtype)
    found, expected = ops.rotary(*given), plain(*given)
    assert all(map(torch.equal, found, expected)) == same
    assert all(x.transpose(1, 2).is_contiguous() for x in found), "else attention's output would be copied"
    at_once = Rotary(plain)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    assert at_once._fits(*given) == same
    assert all(map(torch.equal, at_once(*given), expected))
    assert not at_once._fits(query, key, *(x[:, :2] for x in given[2:])), "a kernel would read beyond the last position"
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)  # then the gradient is one operator, too
    slopes = []
    for rotate in (at_once, plain):
        query, key = (x.detach().requires_grad_() for x in given[:2])
        slopes.append(torch.autograd.grad(rotate(query, key, *given[2:]), (query, key), found))
    assert all(map(torch.equal, *slopes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_function_of_one_tensor(dtype: torch.dtype, backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = vars(sys.modules[type(make_tiny("gemma4").base_model).__module__])[NAME]
    x, angles = torch.randn(2, 3, 6, 16).to(backend, dtype), torch.randn(2, 3, 8).to(backend).repeat(1, 1, 2)
    given, ran, rotate = (x, angles.cos().to(dtype), angles.sin().to(dtype)), [], ops.rotary
    monkeypatch.setattr(ops, "rotary", lambda *given: ran.append(1) or rotate(*given))
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    at_once, slopes = Rotary(plain), []
    assert torch.equal(at_once(*given, unsqueeze_dim=2), plain(*given, unsqueeze_dim=2))
    assert len(ran) == 2, "a trial, and the call"
    for turn in (at_once, plain):
        x = given[0].detach().requires_grad_()
        slopes.append(torch.autograd.grad(turn(x, *given[1:], unsqueeze_dim=2), x, given[0]))
    assert torch.equal(*(slope for (slope,) in slopes))


def test_the_function_is_exchanged_while_a_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = make_tiny("llama"), []
    trunk = model.base_model
    namespace = vars(sys.modules[type(trunk).__module__])
    plain, rotate = namespace[NAME], ops.rotary
    monkeypatch.setattr(ops, "rotary", lambda *given: ran.append(1) or rotate(*given))
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    tokens, rotations = torch.arange(3, 9)[None], Rotations(trunk)
    _at_once.cache_clear()
    before = model(tokens).logits
    rotations.begin()
    rotations.begin()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    rotations.end()
    assert isinstance(namespace[NAME], Rotary)
    rotations.end()
    assert namespace[NAME] is plain
    assert len(ran) == len(trunk.layers) + 1, "a trial, and each block"
