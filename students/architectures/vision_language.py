"""Vision-language models that are supported; their two towers are models of their own."""

from __future__ import annotations

VISION_TOWERS = {
    "llava": "vision_tower",
    "llava_next": "vision_tower",
    "paligemma": "vision_tower",
    "idefics3": "vision_model",
    "smolvlm": "vision_model",
    "qwen2_vl": "visual",
    "qwen2_5_vl": "visual",
}
"""Vision-language models by `model_type`, and where their base model keeps the vision tower."""
