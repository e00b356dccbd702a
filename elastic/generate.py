"""Generate text with a finished run and report the compute spent."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from elastic import families
from elastic.accounting.memory import cache_need, free_memory
from elastic.generation.vision_language import read_image
from elastic.run import Run
from teachers.families.language import most_positions, most_tokens, require_rows

NEW_TOKENS = 128
"""Number of new tokens after which generation stops if none is given."""
_open = partial(read_image, "a vision-language model")  # an earlier name of `read_image` in this module


class _Stream(TextStreamer):
    """Records the time of each new token, and passes finished words to `write` if it is given."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []
        """Times in seconds: the start of generation, then the arrival of each new token."""

    def put(self, value: Tensor) -> None:
        """Record the time; transformers calls this with the prompt first, then with each new token."""
        self.times.append(time.perf_counter())
        if self.write is not None:  # decoding text takes time, so only if it is read
            super().put(value)

    def end(self) -> None:
        """Flush the last words; transformers calls this once at the end."""
        if self.write is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        assert self.write is not None, "text is decoded for somebody"
        self.write(text)

    def tokens_per_second(self, bursts: bool) -> float:
        """The inverse of a token's median time: the first tokens also take the prefill and CUDA graph capture. Where
        tokens come in bursts, of the mean time in the second half."""
        times = self.times[(len(self.times) - 1) // 2 :] if bursts else self.times
        each = [b - a for a, b in pairwise(times)]
        return 1 / (statistics.mean(each) if bursts else statistics.median(each))


def generate_text(
    folder: str,
    prompt: str,
    *,
    image: str | None = None,
    compute: float | None = None,
    max_new_tokens: int | None = None,
    lossless: bool = False,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt greedily, as the answer to it if the model has a chat template.

    image: file of the image that a vision-language model is asked about. compute: budget to set first. max_new_tokens:
    stop after so many (None: 128), or where the model's positions end; ValueError if the prompt fills these, or if keys
    and values do not fit into memory. lossless: the student only drafts, and the text is the dense model's
    (students/recording/lossless.py). stream: called with each piece of text as soon as it is final.

    Returns a dictionary with the keys text; tokens, the number of new tokens; full, whether generation stopped at the
    model's maximum length; tokens_per_second, from the median time of a token; and compute, the student's FLOPs over
    the teacher's: of the new tokens, or for a question about an image, of its prompt; tokens_per_verification, if
    lossless, else None: new tokens per pass of the dense model, all of whose tokens count as compute, kept or not.
    """
    run = Run.open(folder, finished=True)
    generation = families.of(run.config.family).generation
    if generation is None:
        raise ValueError(f"{run.config.model} is an image model: it generates no text (elastic eval measures it)")
    if not prompt:
        raise ValueError("--prompt is empty: give some text")
    picture = generation.read_image(run.config.model, image)
    teacher = run.teacher()
    student: Any = run.load_student(teacher)
    if compute is not None:
        student.set_compute(compute)
    inputs, tokenizer = generation.inputs(teacher.processor, prompt, picture)
    inputs = {name: tensor.to(student.model.device) for name, tensor in inputs.items()}
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("--prompt is empty: give some text")
    require_rows(student.model, tokenizer, inputs["input_ids"])
    most = most_positions(student.trunk)
    if most is not None and length >= most:
        raise ValueError(
            f"--prompt has {length} tokens, but the model reads at most {most}, answer included "
            "(max_position_embeddings in its config.json)"
        )
    wanted = max_new_tokens or NEW_TOKENS
    room = wanted if most is None else min(wanted, most - length)
    if max_new_tokens is not None:
        _require_room(student, length, room if most_tokens(student.trunk) else wanted)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = _Stream(tokenizer, stream)
    with torch.no_grad():
        whole = student.generate(
            **inputs,
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
            streamer=streamer,
            lossless=lossless,
        )
    counts = student.lossless.counts
    drafting = lossless and not student.runtime.bypass and counts.rounds > 0  # the first token is of the dense model
    dense = student.runtime.bypass or (lossless and not drafting)
    spent = 1.0 if dense else generation.compute(student, inputs, whole)
    if drafting:
        spent = counts.compute(spent)
    new = whole.shape[1] - length
    return {
        "text": tokenizer.decode(whole[0, length:], skip_special_tokens=True),
        "tokens": new,
        "full": new == room < wanted,
        "tokens_per_second": streamer.tokens_per_second(drafting),
        "tokens_per_verification": counts.tokens / max(1, counts.rounds) if drafting else None,
        "compute": spent,
    }


def _require_room(student: Any, length: int, new: int) -> None:
    """Raise ValueError if `new` tokens behind a prompt of `length` are more than the model has positions for, or if the
    keys and values of all take more memory than is free."""
    most, free = most_positions(student.trunk), free_memory(student.model.device)
    if most is not None and new > most:
        raise ValueError(
            f"--max-new-tokens is {new}, but the model has positions for {most} tokens, prompt included: say "
            f"--max-new-tokens {max(1, most - length)}"
        )
    need = cache_need(student.trunk, length + new)
    if need > free:
        raise ValueError(
            f"--max-new-tokens is {new}, whose keys and values take {need / 1e9:,.1f} GB, but {free / 1e9:.1f} GB are "
            f"free: say --max-new-tokens {max(1, free * new // need // 2)}"
        )
