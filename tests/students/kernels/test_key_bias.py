"""Attention of images with merged patches, in a kernel that adds a bias to the scores of each key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from students.families.image import call
from students.kernels import devices, key_bias, ops
from tests.pico.image import BOTH, first
from tests.students.host_waits import Launches
from tests.students.test_image import routed


@torch.no_grad()
@pytest.mark.parametrize("spec", ["block merges", "odd blocks merge adaptively"])
@pytest.mark.parametrize("name", BOTH)
def test_libraries_hand_the_mask_on(name: str, spec: str, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and timm hand a `KeyBias` on to attention, so that its kernel runs, with the outputs of a mask."""
    student, pixels = routed(name, spec, pixels).bfloat16(), pixels.bfloat16()
    with Launches() as before:
        plain = first(call(student.model, pixels))
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    with Launches() as launches:
        out = first(call(student.model, pixels))
    assert launches.launched["elastic.biased_attention.default"] >= (3 if spec == "block merges" else 2)
    fewer = before.launched - launches.launched
    merged, summed = (launches.launched[f"elastic.{name}.default"] for name in ("merge_normed", "sum_norm"))
    assert fewer["aten.native_layer_norm.default"] == merged + summed and (merged > 0) == (spec == "block merges")
    assert fewer["aten.add.Tensor"] == summed > 0
    torch.testing.assert_close(out, plain, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_to_others_it_is_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations without a kernel for a `KeyBias` take it as the mask that it stands for."""
    size, (x, keys) = torch.randint(1, 4, (2, 7)).float(), torch.randn(2, 2, 4, 7, 8).bfloat16()
    plain_mask = key_bias.key_mask(size, x.dtype)
    assert type(plain_mask) is Tensor and torch.equal(plain_mask[:, 0, 3], size.log().bfloat16())
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    mask = key_bias.key_mask(size, x.dtype)
    assert type(mask) is key_bias.KeyBias and type(mask[..., :3]) is Tensor
    torch.testing.assert_close((mask + 1).bfloat16(), plain_mask + 1)
    plain = F.scaled_dot_product_attention(x, keys, keys, plain_mask)
    torch.testing.assert_close(F.scaled_dot_product_attention(x, keys, keys, mask), plain)
    few = F.scaled_dot_product_attention(x, keys[:, :2], keys[:, :2], mask, enable_gqa=True)
    expected = F.scaled_dot_product_attention(x, keys[:, :2], keys[:, :2], plain_mask, enable_gqa=True)
    torch.testing.assert_close(few, expected)
    with torch.enable_grad():
        assert type(key_bias.key_mask(size, x.dtype)) is Tensor
