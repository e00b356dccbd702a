"""Tiny image models of every supported architecture: three blocks, 16 patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
IMAGE = dict(image_size=16, patch_size=4, num_channels=3)
TIMM = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=7)


def _transformers(kind: str, **settings: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, kind.partition(":")[0])(**SIZES, **IMAGE, **settings)
        return getattr(transformers, kind.partition(":")[2])(config)

    return make


def _timm(name: str, fused: bool = True, **settings: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = timm.create_model(name, **{**TIMM, **settings})
        for block in model.blocks:
            for attention in [part.attn for part in getattr(block, "attns", [block])]:
                attention.fused_attn = fused
        return model

    return make


MODELS = {
    "vit": _transformers("ViTConfig:ViTForImageClassification", num_labels=7),
    "deit": _transformers("DeiTConfig:DeiTForImageClassificationWithTeacher", num_labels=7),
    "dinov2": _transformers("Dinov2Config:Dinov2ForImageClassification", num_labels=7),
    "dinov2_registers": _transformers(
        "Dinov2WithRegistersConfig:Dinov2WithRegistersForImageClassification", num_labels=7, num_register_tokens=3
    ),
    "dinov3": _transformers("DINOv3ViTConfig:DINOv3ViTModel", num_register_tokens=2, use_gated_mlp=True),
    "ijepa": _transformers("IJepaConfig:IJepaForImageClassification", num_labels=7),
    "clip": _transformers("CLIPVisionConfig:CLIPVisionModel"),
    "siglip": _transformers("SiglipVisionConfig:SiglipVisionModel"),
    "vit_mae": _transformers("ViTMAEConfig:ViTMAEModel", mask_ratio=0.0),
    "vit_msn": _transformers("ViTMSNConfig:ViTMSNForImageClassification", num_labels=7),
    "timm_fused": _timm("vit_tiny_patch16_224"),
    "timm_plain": _timm("vit_tiny_patch16_224", fused=False),
    "timm_registers": _timm("vit_small_patch14_reg4_dinov2", mlp_ratio=2),
    "timm_siglip": _timm("vit_base_patch16_siglip_224", num_classes=0),
    "timm_distilled": _timm("deit_tiny_distilled_patch16_224", mlp_ratio=2),
    "timm_eva02": _timm("eva02_tiny_patch14_224", mlp_ratio=2),
    "timm_dinov3": _timm("vit_small_patch16_dinov3", mlp_ratio=2, num_classes=0),
}
BOTH = ["vit", "siglip", "timm_fused", "timm_eva02"]
"""Models of both libraries with different parts, which are tested with every specification of routers."""
PARALLEL = _timm("vit_small_patch16_18x2_224", mlp_ratio=2, init_values=0.5)


def make_tiny(name: str) -> nn.Module:
    """Return a tiny model whose weights are large enough for every branch to change its outputs."""
    torch.manual_seed(0)
    model = MODELS[name]().eval() if name in MODELS else PARALLEL().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
            elif parameter.ndim == 1 and float(parameter.abs().max()) < 1e-3:  # scales that start near 0
                parameter.fill_(0.5)
    return model


def first(out: Any) -> Tensor:
    """Return the first output of a model: the logits or features of timm's models and of transformers'."""
    return out if isinstance(out, Tensor) else out[0]
