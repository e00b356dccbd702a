"""Records of the supported image models."""

from __future__ import annotations

from dataclasses import replace

from students.architectures.record import Architecture

_VIT = Architecture(attn="attention", mlp_in=("fc1",), mlp_out=("fc2",), causal=False, prefix=1)
_CLIP = replace(_VIT, blocks="encoder.layers", attn="self_attn", attn_out=("out_proj",))
_TIMM = replace(_VIT, blocks="blocks", attn="attn", attn_in=("qkv",), attn_out=("proj",), mask="attn_mask", prefix=None)

IMAGE_MODELS: dict[str, Architecture] = {
    "vit": _VIT,
    "deit": replace(_VIT, prefix=2),
    "dinov2": replace(_VIT, blocks="encoder.layer"),
    "dinov2_with_registers": replace(_VIT, blocks="encoder.layer", prefix=None),
    "dinov3_vit": replace(
        _VIT, blocks="layer", mlp_in=("up_proj",), mlp_out=("down_proj",), prefix=None, whole_heads=True
    ),
    "ijepa": replace(_VIT, prefix=0),
    "vit_mae": _VIT,
    "vit_msn": _VIT,
    "clip_vision_model": _CLIP,
    "siglip_vision_model": replace(_CLIP, prefix=0, whole_heads=True),
    "VisionTransformer": _TIMM,
    "VisionTransformerDistilled": _TIMM,
    "Eva": _TIMM,
}
"""Records by the config's `model_type`, or for models of timm by class name."""


def side_by_side(record: Architecture, count: int) -> Architecture:
    """Return a record for blocks with `count` attentions side by side, followed by `count` MLPs side by side (timm's
    parallel blocks, arXiv 2203.09795)."""

    def each(branch: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{number}.{branch}.{name}" for number in range(count) for name in names)

    return replace(
        record,
        attn="attns",
        mlp="ffns",
        attn_in=each("attn", record.attn_in),
        attn_out=each("attn", record.attn_out),
        mlp_in=each("mlp", record.mlp_in),
        mlp_out=each("mlp", record.mlp_out),
        whole_heads=True,
        side_by_side=True,
    )
