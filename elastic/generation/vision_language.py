"""Text generation with vision-language models: answers to questions about an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from students.families.vision_language import VisionLanguageStudent
from teachers.data.left_out import reason_of
from teachers.data.pictures import open_image
from teachers.data.prompts import call, prompt_text


def read_image(model: str, image: str | None) -> Any:
    """Return the image in a file, fully decoded, as RGB; ValueError if no file is given or it cannot be read."""
    if image is None:
        raise ValueError(f"{model} is asked about an image: add --image FILE")
    try:
        return open_image(image).convert("RGB")
    except Exception as error:  # image libraries raise errors of many classes for damaged files
        raise ValueError(f"--image {image} cannot be read: {reason_of(error)}") from None


def inputs(processor: Any, prompt: str, picture: Any) -> tuple[dict[str, Tensor], Any]:
    """Return the model's inputs for a prompt about an image, and the tokenizer."""
    return call(processor, [prompt_text(processor, prompt)], [picture], "left"), processor.tokenizer


@torch.no_grad()
def compute(student: VisionLanguageStudent, inputs: dict[str, Tensor], whole: Tensor) -> float:
    """Return the student's FLOPs over the teacher's for the prompt and one row of the LM head."""
    _, decisions = student.features(**inputs)
    image = inputs["input_ids"] == student.model.config.image_token_id
    macs, _, dense = student.spent(decisions, image, inputs["attention_mask"].bool(), 1)
    return float(macs / dense)
