"""Timed passes of two or three models over the same input: prefill and decoding, the models taking turns."""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastic.accounting.counters import count
from elastic.reporting.progress import Watched
from students.execution.kv_cache import cache_bytes
from students.kernels.replay import RECORDED
from students.libraries import cache_of, with_cache

Work = Callable[[], object]
Row = dict[str, Any]
"""A row of timings, as `elastic bench --json` prints it."""
REPEATS = 5
"""Number of timed calls of a function, unless another is asked for."""
ENOUGH = 60.0
"""Seconds after which no further calls are timed, unless their number is asked for."""
COUNTED = 4
"""Number of decode steps, after the timed ones, on which FLOPs and bytes are counted."""
LAUNCHED = 9
"""Maximum number of tokens that the dense model as its library ships it decodes on a GPU. Few are enough: the time of a
decode step is that of some two thousand kernel launches, whatever the length of the cache."""


@dataclass(frozen=True)
class Contender:
    """A model with the function that runs it: like transformers' `generate`, or from pixels to the model's output."""

    model: Any
    run: Callable[..., Any]
    reader: Callable[..., Work] | None = None
    """Maps a prompt to a function that prefills it as `run` does, through recorded passes; None if there are none."""


Models = dict[str, Contender]
"""The contenders by name: "student"; "dense", the model as its library ships it; and, on GPUs and where weights can be
packed, "tuned", a dense model with the student's faster execution (CUDA graphs, packed weights, ...) but no routers;
where asked for, "lossless", the student whose drafts the dense model verifies."""


def medians(
    works: Mapping[Any, Work], repeats: int | None, device: torch.device
) -> tuple[dict[Any, float], dict[Any, int]]:
    """Return the median seconds and the peak memory in bytes of each function, called in turn `repeats` times after one
    warm-up; None: REPEATS times, or fewer, at least twice, once all calls together have taken ENOUGH.

    The peak is that of the last call; on a GPU it is the largest of all calls, the warm-up included, because replaying
    a CUDA graph allocates nothing: its memory was allocated while the graph was captured.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in works}
    peaks: dict[Any, int] = {}
    begun = time.perf_counter()
    for turn in Watched("timing", range((repeats or REPEATS) + 1)):
        if repeats is None and turn > 2 and time.perf_counter() - begun > ENOUGH:
            break
        for name, work in works.items():
            _forget_peak()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            peaks[name] = max(peaks.get(name, 0) if device.type == "cuda" else 0, _peak())
    return {name: statistics.median(times) for name, times in seconds.items()}, peaks


def row_of(
    phase: str,
    batch: int,
    tokens: int,
    counted: Sequence[tuple[int, int]],
    seconds: dict[str, float],
    peaks: dict[str, int],
) -> Row:
    """Return a row of timings; counted: (FLOPs, bytes read) of the student and of the dense model; seconds and peaks
    (bytes): by name of the model."""
    (flops, read), (dense_flops, dense_read) = counted
    predicted, measured = dense_flops / flops, seconds["dense"] / seconds["student"]
    return {
        "phase": phase,
        "batch": batch,
        "tokens": tokens,
        "compute": flops / dense_flops,
        "predicted_speedup": predicted,
        "predicted_speedup_bytes": dense_read / read,
        "measured_speedup": measured,
        "efficiency": measured / predicted,
        **({"tuned_speedup": seconds["tuned"] / seconds["student"]} if "tuned" in seconds else {}),
        "seconds": seconds["student"],
        "dense_seconds": seconds["dense"],
        **{f"{name}_seconds": seconds[name] for name in ("tuned", "lossless") if name in seconds},
        "flops": flops,
        "dense_flops": dense_flops,
        "bytes": read,
        "dense_bytes": dense_read,
        "peak_bytes": peaks["student"],
        "dense_peak_bytes": peaks["dense"],
    }


@torch.no_grad()
def prefill(models: Models, inputs: dict[str, Tensor], repeats: int | None) -> Row:
    """Time the prompt pass of `generate`, and return its row: all tokens run through the blocks, the last token through
    the LM head, and the key/value cache is filled."""
    device = models["dense"].model.device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    works: dict[str, Work] = {}
    for name, contender in models.items():
        works[name] = partial(contender.model, **inputs, use_cache=True, logits_to_keep=1)
    both: Any = works["student"], works["dense"]
    if device.type == "cuda" or "pixel_values" in inputs:
        readers = {name: m.reader(**inputs) for name, m in models.items() if m.reader is not None}
        works |= readers
        for work in readers.values():
            for _ in range(1 if device.type == "cuda" else RECORDED):  # until the pass is recorded
                work()
    timed = medians(works, repeats, device)
    batch, tokens = inputs["input_ids"].shape
    row = row_of("prefill", batch, tokens, [count(work) for work in both], *timed)
    sizes = [cache_bytes(cache_of(work())) for work in both]
    return {**row, "cache_bytes": sizes[0], "dense_cache_bytes": sizes[1]}


@torch.no_grad()
def decode(models: Models, inputs: dict[str, Tensor], new: int, repeats: int | None) -> Row:
    """Time greedy decoding, and return its row: the seconds per token are those of `generate` with `new` tokens less
    those with one, over new - 1 (at most LAUNCHED tokens for the dense model on a GPU)."""
    device = models["dense"].model.device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    # an end-of-text id outside the vocabulary never occurs; `min_new_tokens` would process all logits in every step
    nothing = models["dense"].model.config.get_text_config().vocab_size

    def generate(model: Contender, tokens: int, **options: Any) -> Any:
        options |= dict(max_new_tokens=tokens, eos_token_id=nothing, do_sample=False, pad_token_id=0)
        return model.run(**inputs, **options)

    lengths = dict.fromkeys(models, new)
    if device.type == "cuda":
        lengths["dense"] = min(new, LAUNCHED)
    works = {(name, count): partial(generate, m, count) for name, m in models.items() for count in (1, lengths[name])}
    seconds, peaks = medians(works, repeats, device)
    each = {name: (seconds[name, length] - seconds[name, 1]) / (length - 1) for name, length in lengths.items()}
    quick = {"student": "student", "dense": "tuned" if "tuned" in models else "dense"}
    outs = {name: generate(models[by], new, return_dict_in_generate=True) for name, by in quick.items()}
    counted = [_count_decoding(models[name].model, out) for name, out in outs.items()]
    sizes = {name: cache_bytes(cache_of(out)) for name, out in outs.items()}
    peaks = {name: peaks[name, length] for name, length in lengths.items()}
    row = row_of("decode", len(inputs["input_ids"]), new, counted, each, peaks)
    return {**row, "cache_bytes": sizes["student"], "dense_cache_bytes": sizes["dense"]}


def _count_decoding(model: PreTrainedModel, out: Any) -> tuple[int, int]:
    """Return (FLOPs, bytes read) of COUNTED further decode steps on the key/value cache that `generate` returned."""
    last, cache = out.sequences[:, -1:], cache_of(out)
    totals = [0, 0]

    def step(last: Tensor, cache: Any) -> Tensor:
        return model(last, **with_cache(model, {"use_cache": True}, cache)).logits[:, -1:].argmax(-1)

    for _ in range(COUNTED):
        for n, number in enumerate(count(partial(step, last, copy.deepcopy(cache)))):
            totals[n] += number
        last = step(last, cache)
    return totals[0], totals[1]


def _forget_peak() -> None:
    """Reset the peak that `_peak` returns; where the system cannot (macOS), it stays the peak of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # exists on Linux only
            Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the peak memory in bytes since `_forget_peak`: torch's allocations on the GPU, or the process's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
