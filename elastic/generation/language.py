"""Text generation with language models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from elastic.accounting.language import measured_compute
from students.families.language import LanguageStudent
from teachers.quiet import one_line


def read_image(model: str, image: str | None) -> None:
    """Raise ValueError if an image is given, because language models read none."""
    if image is not None:
        raise ValueError(f"{model} reads no images: leave --image away")


def inputs(tokenizer: Any, prompt: str, picture: None) -> tuple[dict[str, Tensor], Any]:
    """Return the model's inputs for a prompt, in the tokenizer's chat format if it has one, and the tokenizer."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        with one_line("the model's chat template refuses the prompt"):
            found = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
    else:
        with one_line("the model's tokenizer refuses the prompt"):
            found = tokenizer(prompt, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}, tokenizer


def compute(student: LanguageStudent, inputs: dict[str, Tensor], whole: Tensor) -> float:
    """Return the student's FLOPs over the teacher's for the tokens of `whole` [1, T] after the prompt."""
    length = inputs["input_ids"].shape[1]
    return measured_compute(student, whole, "decode", length, after=length)
