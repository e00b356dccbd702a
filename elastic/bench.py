"""How fast a student is: inference and a training step against the dense model, in turn, in one process."""

from __future__ import annotations

import copy
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import teachers
from elastic import families
from elastic.accounting.counters import count
from elastic.config import RunConfig
from elastic.families.language import most_tokens
from elastic.run import DTYPES, Run, has_room_for_two
from students import Student
from students.architectures import VISION_TOWERS, kind_of
from students.execution.attention import route_attention
from students.execution.capture import Forward
from students.execution.decoding import Decoding
from students.execution.kv_cache import cache_bytes
from students.families.image import ImageStudent, call
from students.families.language import LanguageStudent
from students.families.vision_language import VisionLanguageStudent
from students.kernels.norms import fuse_norms
from students.kernels.packing import pack_linears
from students.libraries import cache_of, with_cache
from teachers.data.image_set import ImageSet

Say = Callable[[str], None]
Work = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """A model, and how it is run: as transformers' `generate`, or images to the model's output."""

    model: nn.Module
    run: Callable[..., Any]


Models = dict[str, Contender]
"""The "student"; the "dense" model as its library ships it; and a "tuned" dense one, on GPUs and where weights can be
packed: what the student does to run fast, without routers."""

COUNTED = 4
"""Steps of decoding that FLOPs and bytes are counted of, after those that are timed."""
PROMPT = 128
"""Tokens in front of those that decoding is timed on."""
IMAGES = 64
"""So many are timed, in batches, or one larger batch."""


def bench_run(
    folder: str,
    *,
    compute: Sequence[float] = (),
    batch: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    new_tokens: int | None = None,
    repeats: int = 5,
    say: Say = print,
) -> list[dict[str, Any]]:
    """Rows of timings of a finished run.

    batch: None is 1 for text, 1, 8 and 64 for images, 1 and 8 for questions. tokens: lengths of prompts of text (None:
    512); new_tokens: how many are decoded (None: 128); ValueError where the run's model has no use for them.

    Text: prefill (each batch and length), decoding (each batch) and a training step. Images: classifying (each batch)
    and a training step. Questions about images: as text, the prompts being as long as they are, images and all.

    The opponent is the model as its library ships it, a second copy. `compute` is what torch counts: the student's
    FLOPs over the dense model's on the same input; predicted_speedup is its inverse, predicted_speedup_bytes compares
    the bytes that matrix products read instead (decoding waits for memory). efficiency is measured over predicted.
    Seconds are medians; for decoding, of one new token. tuned_speedup is against a dense model that got the same care:
    on CPUs packed weights, fused norms and the student's attention from one token (packing.py and norms.py of
    students/kernels, attention.py of students/execution), where a second copy of the weights fits into half of the free
    memory; on GPUs that attention, and tokens and images through CUDA graphs (execution/decoding.py and capture.py).
    peak_bytes and dense_peak_bytes: the most memory that was in use while the one or the other ran, with all of these
    models loaded.
    """
    run = Run.open(folder, finished=True)
    config = run.config
    wanted = Wanted.of(config, compute, batch, tokens, new_tokens, repeats)
    teacher = run.teacher()
    student = run.load_student(teacher, pack=False)
    data = families.of(config.family).load(config, teacher)

    def dense() -> nn.Module:
        return teachers.load(config.model, dtype=DTYPES[config.train.precision]).model

    return measure(student, dense, data, config, wanted, True, say)


@dataclass(frozen=True)
class Wanted:
    """What is to be timed."""

    compute: Sequence[float | None]
    batch: Sequence[int]
    tokens: Sequence[int]
    new_tokens: int
    repeats: int
    samples: int
    """Windows, images or questions that the largest of it takes."""
    prompt: int = PROMPT
    """Tokens in front of those that decoding is timed on."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        compute: Sequence[float],
        batch: Sequence[int] | None,
        tokens: Sequence[int] | None,
        new_tokens: int | None,
        repeats: int,
    ) -> Wanted:
        """With defaults; ValueError for what a family has no use for."""
        for name, given, taking in (("--tokens", tokens, ("llm",)), ("--new-tokens", new_tokens, ("llm", "vlm"))):
            if given is not None and config.family not in taking:
                raise ValueError(
                    f"{name} has no effect on {config.model}, which takes no text of that length: leave it away"
                )
        batch = batch or {"llm": (1,), "vit": (1, 8, 64), "vlm": (1, 8)}[config.family]
        tokens = tokens or (512,)
        samples = max(*batch, IMAGES) if config.family == "vit" else max(batch)
        if config.family == "llm":
            longest = max(batch) * max(*tokens, PROMPT), config.train.batch * config.train.window
            samples = -(-max(longest) // config.data.window)
        return cls(compute or (None,), batch, tokens, new_tokens or 128, repeats, samples)


def measure(
    student: Student,
    dense: Callable[[], nn.Module],
    data: Any,
    config: RunConfig,
    wanted: Wanted,
    trains: bool,
    say: Say,
) -> list[dict[str, Any]]:
    """Time a student against the model that `dense` makes; trains: whether to time a training step. ValueError where
    the model reads less at once."""
    most = most_tokens(student) if isinstance(student, LanguageStudent) else None
    if most is not None:
        room = most - wanted.new_tokens - COUNTED
        if max(wanted.tokens) > most or room < 1:
            raise ValueError(
                f"the model reads at most {most} tokens at once: say --tokens {most} --new-tokens {max(2, most // 2)}"
            )
        wanted = replace(wanted, prompt=min(PROMPT, room))
    trained = []
    if trains:
        say("training steps ...")
        trained = [_train(student, data, config, wanted.repeats)]
        student.train(False)
    model = dense()
    images = isinstance(student, ImageStudent)
    models = {
        "student": Contender(student.model, student.predict if images else student.generate),
        "dense": Contender(model, partial(call, model) if images else model.generate),
    }
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu or (has_room_for_two(student) and pack_linears(student.model)):
        models["tuned"] = _tuned(model)
    rows = []
    for target in wanted.compute:
        if target is not None:
            student.set_compute(target)
        asked = config.budget.span[0] if target is None else target
        rows += [{**row, "compute_target": asked} for row in _inference(student, models, data, wanted, say)]
    rows += [{**row, "compute_target": config.budget.span[0]} for row in trained]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    machine = {"threads": torch.get_num_threads(), "dtype": dtype}
    return [{"phase": row.pop("phase"), "preset": config.preset, **row, **machine} for row in rows]


def _inference(student: Student, models: Models, data: Any, wanted: Wanted, say: Say) -> Iterator[dict[str, Any]]:
    """Rows for where the dial is."""
    new_tokens, repeats = wanted.new_tokens, wanted.repeats
    if isinstance(student, ImageStudent):
        for size in wanted.batch:
            say(f"{size} images at once ...")
            pixels = _images(data.held_out, size * max(1, IMAGES // size))
            yield _classify(models, student.at(pixels.shape[-2:])[0], pixels, size, repeats)
        return
    if isinstance(student, VisionLanguageStudent):
        for size in wanted.batch:
            inputs = data.held_out.ask([n % len(data.held_out) for n in range(size)])
            say(f"prefill of {size} questions ...")
            yield _prefill(models, inputs, repeats)
            say(f"decoding {size} x {new_tokens} tokens after the question ...")
            yield _decode(models, inputs, new_tokens, repeats)
        return
    text = data.held_out.flatten()
    for size, length in itertools.product(wanted.batch, wanted.tokens):
        say(f"prefill of {size} x {length} tokens ...")
        yield _prefill(models, _unpadded(_cut(text, size, length)), repeats)
    for size in wanted.batch:
        say(f"decoding {size} x {new_tokens} tokens after {wanted.prompt} ...")
        yield _decode(models, _unpadded(_cut(text, size, wanted.prompt)), new_tokens, repeats)


def _images(images: ImageSet, count: int) -> Tensor:
    """Pixels of `count` images, from the first again where there are too few."""
    return images.load([n % len(images) for n in range(count)])[0]


def _unpadded(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _classify(models: Models, tokens: int, pixels: Tensor, batch: int, repeats: int) -> dict[str, Any]:
    """A forward pass of images [N, C, H, W], so many at a time: they may differ in what they cost, and the time of one
    is too short to be taken."""
    parts = pixels.to(next(models["dense"].model.parameters()).device).split(batch)

    def forward(run: Callable[[Tensor], Any]) -> list[Any]:
        return [run(part) for part in parts]

    seconds, peaks = _medians({n: partial(forward, m.run) for n, m in models.items()}, repeats, parts[0].device)
    seconds = {name: value / len(parts) for name, value in seconds.items()}
    counted = [count(partial(forward, partial(call, models[name].model))) for name in ("student", "dense")]
    row = _row("classify", batch, tokens, counted, seconds, peaks)
    rates = {name: batch / value for name, value in seconds.items()}
    return {**row, "images_per_second": rates["student"], "dense_images_per_second": rates["dense"]}


def _cut(text: Tensor, batch: int, length: int) -> Tensor:
    """[batch, length] tokens of text, from its start again where it is too short."""
    need = batch * length
    return text.repeat(-(-need // len(text)))[:need].view(batch, length)


def _medians(works: dict[Any, Work], repeats: int, device: torch.device) -> tuple[dict[Any, float], dict[Any, int]]:
    """Median seconds of each piece of work, all in turn, after one turn to warm up; the most memory, in bytes, that was
    in use in the last turn of each."""
    seconds: dict[Any, list[float]] = {name: [] for name in works}
    peaks = {}
    for turn in range(repeats + 1):
        for name, work in works.items():
            _forget_peak()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            peaks[name] = _peak()
    return {name: statistics.median(times) for name, times in seconds.items()}, peaks


def _row(
    phase: str,
    batch: int,
    tokens: int,
    counted: Sequence[tuple[int, int]],
    seconds: dict[str, float],
    peaks: dict[str, int],
) -> dict[str, Any]:
    """A row from the (FLOPs, bytes) of the student and the dense model, and the seconds and peaks of all models."""
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
        **({"tuned_seconds": seconds["tuned"]} if "tuned" in seconds else {}),
        "flops": flops,
        "dense_flops": dense_flops,
        "bytes": read,
        "dense_bytes": dense_read,
        "peak_bytes": peaks["student"],
        "dense_peak_bytes": peaks["dense"],
    }


@torch.no_grad()
def _prefill(models: Models, inputs: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    """The prompt pass of `generate`: all tokens through the blocks, the last through the head, the cache filled."""
    device = models["dense"].model.device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    works = {n: partial(m.model, **inputs, use_cache=True, logits_to_keep=1) for n, m in models.items()}
    if device.type == "cuda":
        works.pop("tuned")  # which differs from the dense one in decoding only
    timed = _medians(works, repeats, device)
    both = works["student"], works["dense"]
    row = _row("prefill", *inputs["input_ids"].shape, [count(work) for work in both], *timed)
    sizes = [cache_bytes(cache_of(work())) for work in both]
    return {**row, "cache_bytes": sizes[0], "dense_cache_bytes": sizes[1]}


@torch.no_grad()
def _decode(models: Models, inputs: dict[str, Tensor], new: int, repeats: int) -> dict[str, Any]:
    """Greedy `generate`, less the time for its first token."""
    device = models["dense"].model.device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

    def generate(model: Contender, tokens: int, **options: Any) -> Any:
        options |= dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return model.run(**inputs, **options)

    works = {(name, count): partial(generate, m, count) for name, m in models.items() for count in (1, new)}
    seconds, peaks = _medians(works, repeats, device)
    each = {name: (seconds[name, new] - seconds[name, 1]) / (new - 1) for name in models}
    outs = {name: generate(models[name], new, return_dict_in_generate=True) for name in ("student", "dense")}
    counted = [_count_decoding(models[name].model, out) for name, out in outs.items()]
    sizes = {name: cache_bytes(cache_of(out)) for name, out in outs.items()}
    row = _row("decode", len(inputs["input_ids"]), new, counted, each, {name: peaks[name, new] for name in models})
    return {**row, "cache_bytes": sizes["student"], "dense_cache_bytes": sizes["dense"]}


def _count_decoding(model: PreTrainedModel, out: Any) -> tuple[int, int]:
    """(FLOPs, bytes) of a few more decoding steps on the cache that `generate` left."""
    last, cache = out.sequences[:, -1:], cache_of(out)
    totals = [0, 0]

    def step(last: Tensor, cache: Any) -> Tensor:
        return model(last, **with_cache(model, {"use_cache": True}, cache)).logits[:, -1:].argmax(-1)

    for _ in range(COUNTED):
        for n, number in enumerate(count(lambda x=last: step(x, copy.deepcopy(cache)))):
            totals[n] += number
        last = step(last, cache)
    return totals[0], totals[1]


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model on the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _tuned(dense: nn.Module) -> Contender:
    """The dense model, sharing its weights, with the student's linear layers, norms, attention and recordings."""
    model = share_weights(dense)
    pack_linears(model)
    fuse_norms(model)
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            route_attention(module)
    if not hasattr(model, "generate"):
        return Contender(model, Forward(partial(call, model)))
    trunk = model.get_decoder() if kind_of(model) in VISION_TOWERS else model.base_model
    return Contender(model, Decoding(model, trunk).generate)


def _train(student: Student, data: Any, config: RunConfig, repeats: int) -> dict[str, Any]:
    """A training step in forward passes of the teacher.

    Ideal is 1 + 2 c of them: the teacher's, and the student's forward and backward at the compute c of the phase that a
    step runs in (prefill); frozen weights need no gradients of their own. Speed-ups are over one teacher forward.
    """
    module = families.of(config.family).Distillation(student, config.loss, config.budget, config.data).train()
    batch = config.train.batch
    if isinstance(student, VisionLanguageStudent):
        sample = data.train.load([n % len(data.train) for n in range(batch)]).to(student.model.device)
        inputs, tokens = sample.inputs, sample.image.shape[1]
    else:
        if isinstance(student, ImageStudent):
            sample, name = _images(data.train, batch), "pixel_values"
            tokens = student.at(sample.shape[-2:])[0]
        else:
            tokens = config.train.window
            sample, name = _cut(data.held_out.flatten(), batch, tokens), "input_ids"
        sample = sample.to(next(student.parameters()).device)
        inputs = {name: sample}
    spent: list[Tensor] = []

    @torch.no_grad()
    def forward() -> None:
        with student.teacher():
            student(**inputs)

    def step() -> None:
        loss, measured = module(sample, 1.0)
        loss.backward()
        student.zero_grad()
        spent.append(measured.macs["prefill"] / measured.dense["prefill"])

    seconds, peaks = _medians({"forward": forward, "step": step}, repeats, next(student.parameters()).device)
    compute = float(spent[-1])
    ideal, cost = 1 + 2 * compute, seconds["step"] / seconds["forward"]
    return {
        "phase": "train",
        "batch": batch,
        "tokens": tokens,
        "compute": compute,
        "predicted_speedup": 1 / ideal,
        "measured_speedup": 1 / cost,
        "efficiency": ideal / cost,
        "seconds": seconds["step"],
        "dense_seconds": seconds["forward"],
        "teacher_forwards": cost,
        "ideal_teacher_forwards": ideal,
        "weight_bytes": sum(p.numel() * p.element_size() for p in student.parameters()),
        "peak_bytes": peaks["step"],
        "dense_peak_bytes": peaks["forward"],
    }


def _forget_peak() -> None:
    """Let `_peak` begin again; where it cannot, as on macOS, it is that of the process so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # Linux has it
            Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory that was in use since `_forget_peak`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
