"""Timing of language models: prefill and decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic.config import RunConfig
from elastic.reporting.progress import Say
from elastic.timing.passes import COUNTED, Contender, Models, Row, decode, prefill
from elastic.timing.workload import PROMPT, InputSizes, StepSizes, TrainingBatch, Workload
from students.calibration.language import ROWS_PER_BATCH
from students.execution.attention import route_trunk
from students.families.language import LanguageStudent
from students.recording.decoding import Decoding
from teachers.data.text import TextData
from teachers.families.language import most_positions, most_tokens

OPTIONS: tuple[str, ...] = ("tokens", "new_tokens")
BATCHES: tuple[int, ...] = (1,)
RANDOM: Mapping[str, int] = {"calibration__windows": 2, "data__window": 256}


def samples(config: RunConfig, batch: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many windows the longest input takes."""
    longest = max(batch) * max(*tokens, PROMPT), config.train.batch * config.train.window
    return -(-max(longest) // config.data.window)


def fitted(student: LanguageStudent, data: TextData, workload: Workload) -> Workload:
    """Return the workload with its prompt, and the lengths that nobody asked for, shortened to the positions that the
    model has; ValueError if the model cannot read the lengths that were asked for."""
    most = most_positions(student.trunk)
    if most is None:
        return workload
    half = max(2, most // 2)
    tokens = [min(n, most) for n in workload.tokens] if "tokens" in workload.default else workload.tokens
    new = min(workload.new_tokens, half) if "new_tokens" in workload.default else workload.new_tokens
    room = most - new - COUNTED
    if (max(tokens) > most or room < 1) and most_tokens(student.trunk) is not None:
        raise ValueError(f"the model reads at most {most} tokens at once: say --tokens {most} --new-tokens {half}")
    return replace(workload, tokens=tokens, new_tokens=new, prompt=min(PROMPT, room) if room > 0 else PROMPT)


def longest(student: LanguageStudent, data: TextData, workload: Workload) -> int:
    """Return the length of the longest prompt, or of a prompt with what is decoded behind it."""
    workload = fitted(student, data, workload)
    return max(*workload.tokens, workload.prompt + workload.new_tokens)


def contenders(student: LanguageStudent, dense: Any) -> dict[str, Contender]:
    """Return the student and the dense model, each run by its `generate`."""
    routed = Contender(student.model, student.generate, student.reader)
    return {"student": routed, "dense": Contender(dense, dense.generate)}


def recorded(model: Any) -> Contender:
    """Return a dense model that prefills and decodes as students do: through CUDA graphs on GPUs, with the student's
    attention."""
    decoding = Decoding(model, model.get_decoder())
    route_trunk(decoding.trunk)
    return Contender(model, decoding.generate, decoding.reader)


def inference(student: LanguageStudent, models: Models, data: TextData, workload: Workload, say: Say) -> Iterator[Row]:
    """Yield a row for the prefill of each batch size and length, then a row for decoding at each batch size."""
    text, new_tokens, repeats = data.held_out.flatten(), workload.new_tokens, workload.repeats
    for size, length in itertools.product(workload.batch, workload.tokens):
        say(f"prefill of {size} x {length} tokens ...")
        yield prefill(models, _unpadded(_cut(text, size, length)), repeats)
    for size in workload.batch:
        say(f"decoding {size} x {new_tokens} tokens after {workload.prompt} ...")
        timed = dict(models)
        if workload.lossless and size == 1:
            timed["lossless"] = Contender(student.model, partial(student.generate, lossless=True))
        yield decode(timed, _unpadded(_cut(text, size, workload.prompt)), new_tokens, repeats)


def training_batch(student: LanguageStudent, data: TextData, config: RunConfig) -> TrainingBatch:
    """Return a micro-batch of windows of the training length, cut from held-out text, on the student's device."""
    ids = _cut(data.held_out.flatten(), config.train.batch, config.train.window)
    ids = ids.to(next(student.parameters()).device)
    return TrainingBatch(ids, {"input_ids": ids}, config.train.window)


def input_sizes(model: Any, config: RunConfig, workload: Workload) -> InputSizes:
    """Return how many tokens the model reads at once; calibration reads two windows at a time. ValueError if it has
    fewer positions than a window has tokens."""
    require_positions(config, model)
    windows, decoded = config.calibration.windows, workload.prompt + workload.new_tokens
    calibrated, sampled = min(2, windows) * config.data.window, -(-windows // 2) * ROWS_PER_BATCH
    longest = max(*workload.tokens, decoded)
    return InputSizes(model, longest, decoded, config.train.window, calibrated, sampled)


def require_positions(config: RunConfig, model: Any) -> None:
    """Raise ValueError if `data.window` is longer than the texts that the model was trained for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.data.window > longest:
        raise ValueError(
            f"data.window is {config.data.window}, but {config.model} reads at most {longest} tokens: say "
            f"--set data.window={longest} --set train.window={longest}"
        )


def step_sizes(student: LanguageStudent, config: RunConfig) -> StepSizes:
    """Return the work of a training step for a window."""
    window = config.train.window
    macs = student.compute.dense(torch.ones(1, window, dtype=torch.bool), "prefill").double().sum()
    return StepSizes(window, float(macs), logits=window)


def _unpadded(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _cut(text: Tensor, batch: int, length: int) -> Tensor:
    """Return the first tokens of text [N] as [batch, length], starting again with the first if the text is too
    short."""
    need = batch * length
    return text.repeat(-(-need // len(text)))[:need].view(batch, length)
