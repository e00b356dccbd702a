"""Tiny vision-language models of every supported class, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.pico.language import TINY, TINY_HYBRIDS

IMAGE_TOKEN = 110
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v")
"""Models whose images come as patches of any number."""
POOLED = ("gemma3", "internvl", "mistral3", "cohere2_vision", "aya_vision")
"""Models that make one image token of four patches."""
ALIKE = (
    *("glm4v", "glm4v_moe", "glm46v", "internvl", "llava_onevision", "mistral3"),
    *("qwen3_5_moe", "qwen3_vl_moe", "aya_vision"),
)
"""Models that call their language model as Qwen2-VL, Qwen3-VL, LLaVA, Qwen3.5 or Cohere2 Vision do: they are not tried
in every test."""
HYBRID = ("qwen3_5", "qwen3_5_moe")
"""Models of which some blocks keep a state in place of keys and values."""
_TEXT = dict(TINY["llama"][1], max_position_embeddings=128)
_GEMMA = dict(_TEXT, head_dim=8, model_type="gemma")
_GEMMA2 = {**TINY["gemma2"][1], "max_position_embeddings": 128, "model_type": "gemma2"}
_VISION = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16)
_SIGLIP = dict(_VISION, patch_size=4, model_type="siglip_vision_model", vision_use_head=False)
_CLIP = dict(_VISION, patch_size=4, model_type="clip_vision_model")
_QWEN = dict(_TEXT, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0})
_PATCHES = dict(depth=2, hidden_size=24, num_heads=2, out_hidden_size=32, intermediate_size=32, patch_size=4)
_QWEN3 = dict(_PATCHES, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
_MARKS = dict(image_token_id=IMAGE_TOKEN, vision_start_token_id=111, vision_end_token_id=112, video_token_id=113)
_LLAMA, _MISTRAL = dict(_TEXT, model_type="llama"), dict(_TEXT, model_type="mistral", sliding_window=None)
_SMALL, _QWEN2 = dict(_VISION, patch_size=4), dict(_TEXT, model_type="qwen2")
_TILES = dict(image_grid_pinpoints=[[16, 16], [16, 32]])
_TOKEN, _INDEX = dict(image_token_id=IMAGE_TOKEN), dict(image_token_index=IMAGE_TOKEN)
_SMOL = dict(vision_config=_SMALL, text_config=_LLAMA, scale_factor=2, **_TOKEN)
_QWEN2_VISION = dict(depth=2, embed_dim=24, num_heads=2, hidden_size=32, patch_size=4, mlp_ratio=2)
_GEMMA3 = {**TINY["gemma3"][1], "num_hidden_layers": 4, "model_type": "gemma3_text"}
_COHERE2 = {**TINY["cohere2"][1], "max_position_embeddings": 128, "model_type": "cohere2"}
_PARTIAL = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 1, 1])
_QWEN3_5, _QWEN3_5_MOE = (
    {**TINY_HYBRIDS[name][1], "max_position_embeddings": 128, "rope_parameters": _PARTIAL}
    for name in ("qwen3_5", "qwen3_5_moe")
)
_EXPERTS = dict(num_experts_per_tok=3, moe_intermediate_size=24)
_GLM_MARKS = dict(image_start_token_id=111, image_end_token_id=112, video_token_id=113)

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": dict(vision_config=_CLIP, text_config=_LLAMA, vision_feature_layer=-2, **_INDEX),
    "llava_next": dict(
        **dict(vision_config=_SIGLIP, text_config=_MISTRAL, vision_feature_layer=-1, **_TILES, **_INDEX),
        vision_feature_select_strategy="full",
    ),
    "paligemma": dict(vision_config=_SIGLIP, text_config=_GEMMA, projection_dim=32, **_INDEX),
    "paligemma2": dict(vision_config=_SIGLIP, text_config=_GEMMA2, projection_dim=32, **_INDEX, model_type="paligemma"),
    "idefics3": _SMOL,
    "smolvlm": _SMOL,
    "qwen2_vl": dict(text_config=_QWEN, vision_config=_QWEN2_VISION, **_MARKS),
    "qwen2_5_vl": dict(
        text_config=_QWEN, vision_config=dict(_PATCHES, window_size=16, fullatt_block_indexes=[1]), **_MARKS
    ),
    "qwen3_vl": dict(text_config=dict(_QWEN, head_dim=8), vision_config=_QWEN3, **_MARKS),
    "qwen3_vl_moe": dict(
        text_config=dict(_QWEN, **_EXPERTS, head_dim=8, num_experts=8, decoder_sparse_step=2),
        vision_config=_QWEN3,
        **_MARKS,
    ),
    "qwen3_5": dict(text_config=_QWEN3_5, vision_config=dict(_PATCHES, num_position_embeddings=16), **_MARKS),
    "qwen3_5_moe": dict(text_config=_QWEN3_5_MOE, vision_config=dict(_PATCHES, num_position_embeddings=16), **_MARKS),
    "glm4v": dict(text_config=_QWEN, vision_config=dict(_QWEN3, image_size=16), **_TOKEN, **_GLM_MARKS),
    "glm4v_moe": dict(
        text_config=dict(_TEXT, **_EXPERTS, head_dim=16, n_routed_experts=8, rope_parameters=_PARTIAL),
        vision_config=dict(_QWEN3, image_size=16),
        **_TOKEN,
        **_GLM_MARKS,
    ),
    "glm46v": dict(text_config=_QWEN, vision_config=dict(_QWEN3, image_size=16), **_TOKEN, **_GLM_MARKS),
    "gemma3": dict(vision_config=_SIGLIP, text_config=_GEMMA3, mm_tokens_per_image=4, **_INDEX),
    "internvl": dict(vision_config=_SMALL, text_config=_QWEN2, **_TOKEN),
    "llava_onevision": dict(vision_config=_SIGLIP, text_config=_QWEN2, **_TILES, **_INDEX),
    "mistral3": dict(vision_config=dict(_SMALL, head_dim=12, model_type="pixtral"), text_config=_MISTRAL, **_INDEX),
    "cohere2_vision": dict(vision_config=_SIGLIP, text_config=_COHERE2, alignment_intermediate_size=32, **_TOKEN),
    "aya_vision": dict(vision_config=_SIGLIP, text_config=_COHERE2, **_INDEX),
}
"""Settings of configurations, by name of the model type if they do not say another."""


def make_vlm(name: str) -> PreTrainedModel:
    """Return a randomly initialised model whose weights are large enough for every branch to change the logits."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{"model_type": name, **CONFIGS[name]})
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4) if parameter.any() else parameter.normal_()  # Gemma 3 starts its projector at 0
    return model


def make_prompts(model: PreTrainedModel, images: tuple[int, ...] = (1, 1), left: bool = False) -> dict[str, Tensor]:
    """Return a batch of inputs, padded at the right (or left); images: the number of images in each row."""
    kind = model.config.model_type
    draw = torch.Generator().manual_seed(3)
    count = sum(images)
    inputs: dict[str, Tensor] = {}
    if kind in GRIDS:
        each = 8  # a grid of 4 x 8 patches, merged 2 x 2
        patches = count * 32
        inputs["pixel_values"] = torch.randn(patches, 3 * 2 * 4 * 4, generator=draw)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 8]] * count)
    elif kind in ("llava_next", "llava_onevision"):
        inputs["pixel_values"] = torch.randn(count, 2, 3, 16, 16, generator=draw)
        inputs["image_sizes"] = torch.tensor([[16, 16]] * count)
        each = 16 + 16 + 4  # the whole image, and one tile with a newline token after each row
    elif kind in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = torch.randn(1, count, 3, 16, 16, generator=draw)
        each = 4
    else:
        inputs["pixel_values"] = torch.randn(count, 3, 16, 16, generator=draw)
        each = 4 if kind in POOLED else 16
        if kind == "mistral3":
            inputs["image_sizes"] = torch.tensor([[16, 16]] * count)
    rows = []
    for number, of_row in enumerate(images):
        words = [torch.randint(3, 100, (3 + number,), generator=draw).tolist() for _ in range(of_row + 1)]
        row = [1, *words[0]]
        for more in words[1:]:
            start, end = ([111], [112]) if kind in GRIDS else ([], [])
            row += start + [IMAGE_TOKEN] * each + end + more
        rows.append(row)
    longest = max(map(len, rows))
    fill = [longest - len(row) for row in rows]
    pad = (lambda row, n: [0] * n + row) if left else (lambda row, n: row + [0] * n)
    inputs["input_ids"] = torch.tensor([pad(row, n) for row, n in zip(rows, fill, strict=True)])
    ones = [[1] * len(row) for row in rows]
    inputs["attention_mask"] = torch.tensor([pad(row, n) for row, n in zip(ones, fill, strict=True)])
    if kind in GRIDS:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    if kind in ("paligemma", "gemma3"):
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long() * (kind == "gemma3")
    return inputs
