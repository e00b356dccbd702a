"""Text from a finished run, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from elastic.families.language import measured_compute, most_tokens, require_rows
from elastic.run import Run
from students import Student
from students.families.vision_language import VisionLanguageStudent
from teachers.data.left_out import reason_of
from teachers.data.pictures import open_image
from teachers.families.vision_language import call, prompt_text
from teachers.quiet import first_line


class _Stream(TextStreamer):
    """Hands over words as soon as they are certain."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def generate_text(
    folder: str,
    prompt: str,
    *,
    image: str | None = None,
    compute: float | None = None,
    max_new_tokens: int = 128,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt, greedily, as an answer where the model has a chat template.

    image: the file that a vision-language model is asked about. Keys: text; tokens, how many are new; full, whether
    there are no more because the model reads no more; tokens_per_second; compute, the share of the teacher's FLOPs
    that the new tokens took, or, of a question about an image, that its prompt took. stream: called with each piece of
    text as it comes.
    """
    run = Run.open(folder, finished=True)
    family = run.config.family
    if family == "vit":
        raise ValueError(f"{run.config.model} is an image model: it generates no text (elastic eval measures it)")
    if (image is not None) != (family == "vlm"):
        needs = "is asked about an image: add --image FILE" if image is None else "reads no images: leave --image away"
        raise ValueError(f"{run.config.model} {needs}")
    picture = None if image is None else _open(image)
    teacher = run.teacher()
    student = run.load_student(teacher)
    if compute is not None:
        student.set_compute(compute)
    if picture is not None:
        inputs = call(teacher.processor, [prompt_text(teacher.processor, prompt)], [picture], "left")
        tokenizer = teacher.processor.tokenizer
    else:
        inputs, tokenizer = _tokens(teacher.processor, prompt), teacher.processor
    inputs = {name: tensor.to(student.model.device) for name, tensor in inputs.items()}
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("--prompt is empty: give some text")
    require_rows(student.model, tokenizer, inputs["input_ids"])
    most = most_tokens(student)
    if most is not None and length >= most:
        raise ValueError(f"--prompt has {length} tokens, but the model reads at most {most}, answer included")
    room = max_new_tokens if most is None else min(max_new_tokens, most - length)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    started = time.perf_counter()
    with torch.no_grad():
        whole = student.generate(
            **inputs,
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=padding,
            streamer=_Stream(tokenizer, stream) if stream else None,
        )
    seconds = time.perf_counter() - started
    new = whole.shape[1] - length
    return {
        "text": tokenizer.decode(whole[0, length:], skip_special_tokens=True),
        "tokens": new,
        "full": new == room < max_new_tokens,
        "tokens_per_second": new / seconds,
        "compute": 1.0 if student.runtime.bypass else _spent(student, inputs, whole, length),
    }


def _open(file: str) -> Any:
    """An image file, read to its end; ValueError where it is none."""
    try:
        return open_image(file).convert("RGB")
    except Exception as error:  # image libraries raise whatever they like for a damaged file
        raise ValueError(f"--image {file} cannot be read: {reason_of(error)}") from None


def _tokens(tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        try:
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program of the model's
            raise ValueError(f"the model's chat template refuses the prompt: {first_line(error)}") from error
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def _spent(student: Student, inputs: dict[str, torch.Tensor], whole: torch.Tensor, length: int) -> float:
    """Compute of the new tokens of `whole` [1, T], or of the prompt where it holds an image."""
    if not isinstance(student, VisionLanguageStudent):
        return measured_compute(student, whole, "decode", length, after=length)
    _, decisions = student.features(**inputs)
    image = inputs["input_ids"] == student.model.config.image_token_id
    macs, _, dense = student.spent(decisions, image, inputs["attention_mask"].bool(), 1)
    return float(macs / dense)
