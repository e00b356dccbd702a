"""The supported vision-language models; their vision tower and language model have records of their own."""

from __future__ import annotations

VISION_TOWERS = {
    "llava": "vision_tower",
    "llava_next": "vision_tower",
    "paligemma": "vision_tower",
    "idefics3": "vision_model",
    "smolvlm": "vision_model",
    "qwen2_vl": "visual",
    "qwen2_5_vl": "visual",
    "qwen3_vl": "visual",
    "qwen3_vl_moe": "visual",
    "qwen3_5": "visual",
    "qwen3_5_moe": "visual",
    "glm4v": "visual",
    "glm4v_moe": "visual",
    "glm46v": "visual",
    "gemma3": "vision_tower",
    "internvl": "vision_tower",
    "llava_onevision": "vision_tower",
    "mistral3": "vision_tower",
    "cohere2_vision": "vision_tower",
    "aya_vision": "vision_tower",
}
"""Attribute of the base model that holds the vision tower, by `model_type` of the vision-language model."""
BOTH_WAYS = {"paligemma", "gemma3"}
"""Values of `model_type` of models whose prompt tokens also attend to later tokens of the prompt."""
