"""Text from a finished run, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from elastic.run import Run
from elastic.text import measured_compute


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
    compute: float | None = None,
    max_new_tokens: int = 128,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt, greedily, as an answer where the model has a chat template.

    Keys: text; tokens, how many are new; tokens_per_second; compute, the share of the teacher's FLOPs that the new
    tokens took. stream: called with each piece of text as it comes.
    """
    run = Run.open(folder, finished=True)
    if run.config.family != "llm":
        raise ValueError(f"{run.config.model} is an image model: it generates no text (elastic eval measures it)")
    teacher = run.teacher()
    student = run.load_student(teacher)
    if compute is not None:
        student.set_compute(compute)
    tokenizer = teacher.processor
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(student.model.device) for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("--prompt is empty: give some text")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    started = time.perf_counter()
    with torch.no_grad():
        whole = student.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
            streamer=_Stream(tokenizer, stream) if stream else None,
        )
    seconds = time.perf_counter() - started
    new = whole.shape[1] - length
    spent = 1.0 if student.runtime.bypass else measured_compute(student, whole, "decode", length, after=length)
    return {
        "text": tokenizer.decode(whole[0, length:], skip_special_tokens=True),
        "tokens": new,
        "tokens_per_second": new / seconds,
        "compute": spent,
    }
