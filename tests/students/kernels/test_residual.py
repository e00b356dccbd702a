"""Residual streams of image models: sums wait for the layer norm that reads them, and for nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.families.image import call
from students.kernels import devices, ops, residual
from tests.students.host_waits import Launches
from tests.students.test_image import routed


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    with torch.no_grad():
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


def test_a_sum_and_its_norm_are_one_launch(x: Tensor) -> None:
    norm, other = nn.LayerNorm(24, eps=1e-3), nn.LayerNorm(24)
    nn.init.normal_(norm.weight)
    with Launches() as launches:
        total = x.flip(0) + residual.residual_of(x)
        normed = norm(total)
        again = norm(total + x)
    assert launches.launched == {"aten.flip.default": 1, "elastic.sum_norm.default": 2}
    assert torch.equal(normed, norm(x + x.flip(0))) and torch.equal(total.settle(), x + x.flip(0))
    assert torch.equal(again, norm(x + x.flip(0) + x))
    assert torch.equal(other(total), other(x + x.flip(0))), "a second norm of one sum"


def test_what_a_sum_was_made_of_is_not_kept(x: Tensor) -> None:
    """Nor is the sum, once nobody needs it: without a collector of cycles, activations would pile up."""
    for use in (nn.LayerNorm(24), torch.clone):
        term = torch.ones_like(x)
        total = residual.residual_of(x) + term
        use(total)
        kept = [weakref.ref(part) for part in (term, total, total.settle())]
        del term
        assert kept[0]() is None
        del total
        assert kept[1]() is kept[2]() is None


def test_any_other_use_adds_at_once(x: Tensor) -> None:
    stream, plain = residual.residual_of(x), x + x.flip(0)
    uses = [lambda y: y[:, 0], lambda y: y.transpose(1, 2) @ y, lambda y: F.layer_norm(y, (24,)), lambda y: y + 1]
    for use in uses:
        assert torch.equal(use(stream + x.flip(0)), use(plain))
    assert torch.equal(torch.add(stream, x, alpha=2), torch.add(x, x, alpha=2))
    assert torch.equal(torch.add(1, stream), 1 + x)
    assert torch.equal(stream + x[:1], x + x[:1]), "a sum that broadcasts"
    wide = nn.LayerNorm(24).double()
    assert torch.equal(F.layer_norm(stream + x, (5, 24)), F.layer_norm(x + x, (5, 24)))
    with pytest.raises(RuntimeError):
        wide(stream + x)  # as from plain tensors


def test_with_gradients_nothing_waits(x: Tensor) -> None:
    total = residual.residual_of(x) + x
    with torch.enable_grad():
        norm = nn.LayerNorm(24)
        norm(total).sum().backward()
        assert norm.bias.grad is not None and type(residual.residual_of(x)) is Tensor


def test_norms_and_sums_of_a_model_are_launched_together(pixels: Tensor) -> None:
    """No layer norm is a launch of its own."""
    student = routed("timm_fused", "block merges", pixels)
    with Launches() as launches:
        call(student.model, pixels)
    launched, blocks = launches.launched, len(student.blocks)
    together = launched["elastic.sum_norm.default"]
    assert together + launched["elastic.merge_normed.default"] == 2 * blocks + 1
    assert not launched["aten.native_layer_norm.default"]
