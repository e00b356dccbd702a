"""Attention of images with merged patches, in a kernel that adds a bias to the scores of each key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from students.families.image import ImageStudent, call
from students.kernels import devices, key_bias, ops, triton
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
    assert torch.equal(mask + plain_mask, 2 * plain_mask)
    plain = F.scaled_dot_product_attention(x, keys, keys, plain_mask)
    torch.testing.assert_close(F.scaled_dot_product_attention(x, keys, keys, mask), plain)
    few = F.scaled_dot_product_attention(x, keys[:, :2], keys[:, :2], mask, enable_gqa=True)
    expected = F.scaled_dot_product_attention(x, keys[:, :2], keys[:, :2], plain_mask, enable_gqa=True)
    torch.testing.assert_close(few, expected)
    with torch.enable_grad():
        assert type(key_bias.key_mask(size, x.dtype)) is Tensor


@torch.no_grad()
def test_masks_of_a_gpu_have_the_dtype_of_queries(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, too, where gates are masks, as while quotas are set: GPUs take no mask of another dtype."""
    student, seen, attend = routed("timm_fused", "block merges", pixels).bfloat16(), [], F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
        if type(attn_mask) is Tensor:
            seen.append(attn_mask.dtype == query.dtype)
        return attend(query, key, value, attn_mask, **options)

    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert isinstance(student, ImageStudent)
    student.set_quotas([pixels.bfloat16()])
    assert len(seen) >= 2 and all(seen)


@pytest.mark.skipif(not triton.installed(), reason="Triton is not installed")
def test_any_number_of_images_has_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 2^31 - 1 programs in the first dimension of a launch, and 65,535 in the others."""
    from students.kernels.triton import biased_attention, launching

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(launching.Kernel, "__getitem__", lambda kernel, grid: lambda *_, **__: grids.append(grid))
    images = torch.empty(6000, 12, 197, 64, dtype=torch.bfloat16, device="meta")
    biased_attention.biased_attention(images, images, images, images[:, 0, :, 0], 0.125)
    assert grids == [(6000 * 12 * 4,)]
