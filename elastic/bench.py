"""Timing of a student against the dense model, in turn in one process: inference and a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic import families
from elastic.accounting.memory import cache_need, free_memory, need_of
from elastic.config import RunConfig
from elastic.objectives.sums import TeacherSignals
from elastic.reporting.progress import Say
from elastic.run import Run, has_room_for_two, load_teacher, share_weights
from elastic.timing.passes import Row, medians
from elastic.timing.workload import Workload
from students import Student
from students.kernels.norms import fuse_norms
from students.kernels.packing import pack_linears, prepare_linears
from teachers.quantize import kept_bytes


class Stopped(KeyboardInterrupt):
    """Raised after Ctrl-C, with the rows that were timed before."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__("stopped: these are the rows that were timed before")
        self.rows = rows


def bench_run(folder: str, *, say: Say = print, **asked: Any) -> list[Row]:
    """Time a finished run, and return rows of timings; asked: options of `workload_of`.

    Text: a row for prefill (each batch size and length), decoding (each batch size) and a training step. Images: a row
    for classification (each batch size) and a training step. Questions about images: rows as for text, with the
    prompts' own lengths, image tokens included.

    "dense" is a second copy of the model, as its library ships it. Keys of a row:

    - compute: FLOPs of the student over those of the dense model on the same input, as torch counts them.
    - predicted_speedup: the inverse of compute; predicted_speedup_bytes: the same ratio for the bytes that matrix
      products read, since decoding is limited by memory bandwidth; efficiency: measured_speedup over predicted_speedup.
    - seconds, dense_seconds, tuned_seconds: medians; in decoding of one new token.
    - tuned_speedup: the speed-up over a dense model with the student's faster execution: on CPUs packed weights, fused
      norms, attention from one token and recorded passes (packing.py, norms.py and replay.py in students/kernels,
      attention.py in students/execution), if a second copy of the weights fits into half of the free memory; on GPUs
      that attention, and CUDA graphs for decode steps, images and prompts (students/recording).
    - lossless_seconds, with `lossless` at batch 1: of lossless decoding (students/recording/lossless.py).
    - tome_speedup, for ViTs of timm: the speed-up over the dense model with ToMe's merging (arXiv 2210.09461) at the
      student's FLOPs, executed as the student is.
    - peak_bytes, dense_peak_bytes: the peak memory while that model ran, with all of these models loaded.
    """
    run = Run.open(folder, finished=True)
    config = run.config
    workload = workload_of(config, **asked)
    teacher = run.teacher()
    student = run.load_student(teacher, pack=False, prepare=False)  # done after the training step is timed
    for budget in workload.compute:
        if budget is not None:
            student.set_compute(budget)  # refused before anything is timed
    student.restore(run.routers)
    data = families.of(config.family).load(config, teacher)
    _require_memory(student, data, workload, families.of(config.family).timing)
    return measure(student, lambda: load_teacher(config).model, data, config, workload, True, say)


def workload_of(
    config: RunConfig,
    *,
    compute: Sequence[float] = (),
    batch: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    new_tokens: int | None = None,
    repeats: int | None = None,
    lossless: bool = False,
) -> Workload:
    """Return the workload to time; raise ValueError for an option that has no effect in the run's family.

    compute: budgets to set; none: the dial stays. batch: batch sizes (None: 1 for text; 1, 8 and 64 for images; 1 and 8
    for questions). tokens: lengths of text prompts (None: 512). new_tokens: tokens to decode (None: 128). repeats:
    calls that a median is taken over (None: as `medians` says). lossless: whether to time lossless decoding of text.
    For a model with fewer positions, lengths of text that are None are shortened.
    """
    timing = families.of(config.family).timing
    for name, given in (("tokens", tokens), ("new_tokens", new_tokens)):
        if given is not None and name not in timing.OPTIONS:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect on {config.model}, which takes no text of that length: "
                "leave it away"
            )
    default = frozenset(name for name, given in (("tokens", tokens), ("new_tokens", new_tokens)) if given is None)
    batch, tokens = batch or timing.BATCHES, tokens or (512,)
    if lossless and "tokens" not in timing.OPTIONS:
        raise ValueError(f"--lossless is for language models, and {config.model} is none: leave it away")
    if lossless and 1 not in batch:
        raise ValueError("--lossless is timed with one sequence: leave it away, or add --batch 1")
    samples = timing.samples(config, batch, tokens)
    work = compute or (None,), batch, tokens, new_tokens or 128, repeats, samples
    return Workload(*work, lossless=lossless, default=default)


def measure(
    student: Student,
    dense: Callable[[], nn.Module],
    data: Any,
    config: RunConfig,
    workload: Workload,
    trains: bool,
    say: Say,
) -> list[Row]:
    """Time a student against the model that `dense` returns, and return rows as `bench_run` does.

    trains: whether to time a training step. Raises ValueError if the workload is longer than the model can read, and
    Stopped after Ctrl-C.
    """
    timing = families.of(config.family).timing
    full, workload = workload, timing.fitted(student, data, workload)
    if (*full.tokens, full.new_tokens) != (*workload.tokens, workload.new_tokens):
        prompts = f"prompts of {max(workload.tokens)}, " if "tokens" in timing.OPTIONS else ""
        say(f"timed within the model's positions: {prompts}{workload.new_tokens} new tokens")
    trained = []
    if trains:
        say("training steps ...")
        trained = [_train(student, data, config, workload.repeats)]
        student.train(False)
    model = dense()
    on_gpu = next(model.parameters()).is_cuda
    besides = max(workload.batch) * _sequence_memory(student)(timing.longest(student, data, workload))
    packed = has_room_for_two(student, besides) and student.pack()
    student.prepare()
    models = timing.contenders(student, model)
    if on_gpu or packed:
        models["tuned"] = timing.recorded(_tuned(model))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if config.quantization != "none":
        dtype += f", {config.quantization}"
    machine = {"threads": torch.get_num_threads(), "dtype": dtype}

    def described(row: Row, target: float) -> Row:
        return {"phase": row.pop("phase"), "preset": config.preset, **row, "compute_target": target, **machine}

    rows: list[Row] = []
    last = [described(row, config.budget.span[0]) for row in trained]
    try:
        for target in workload.compute:
            if target is not None:
                student.set_compute(target)
            asked = config.budget.span[0] if target is None else target
            for row in timing.inference(student, models, data, workload, say):
                rows.append(described(row, asked))
    except KeyboardInterrupt:
        if not rows + last:
            raise
        raise Stopped(rows + last) from None
    return rows + last


def _require_memory(student: Any, data: Any, workload: Workload, timing: families.Timing) -> None:
    """Raise ValueError if the largest timed pass cannot fit into the free memory."""
    need, free = _sequence_memory(student), free_memory(next(student.parameters()).device)
    batch, longest = max(workload.batch), timing.longest(student, data, workload)
    if batch * need(longest) <= free:
        return
    rows = max(1, free // 2 // need(longest))
    fits = next(2**n for n in range(60, -1, -1) if n == 0 or 2 * need(2**n) <= free)
    given = {"tokens": max(workload.tokens), "new_tokens": workload.new_tokens}
    long = [name for name in timing.OPTIONS if given[name] > fits]
    smaller = [f"--batch {rows}"] * (rows < batch) + [f"--{name.replace('_', '-')} {fits}" for name in long]
    raise ValueError(
        f"{batch} x {longest} tokens at once take at least {batch * need(longest) / 1e9:,.1f} GB, but "
        f"{free / 1e9:.1f} GB are free: say {' '.join(smaller)}"
    )


def _sequence_memory(student: Any) -> Callable[[int], int]:
    """Return a function from the number of a sequence's tokens to the bytes that reading it takes at least: its keys
    and values, and what the linear layers of a block read and write."""
    trunk = getattr(student, "trunk", student.model)
    passing = need_of(student.model, trunk).passing
    return lambda tokens: cache_need(trunk, tokens) + tokens * passing


def _tuned(dense: nn.Module) -> nn.Module:
    """Return a dense model on the same weights, with packed linear layers and fused norms like the student's."""
    model = share_weights(dense)
    pack_linears(model)
    prepare_linears(model)
    fuse_norms(model)
    return model


def _train(student: Student, data: Any, config: RunConfig, repeats: int | None) -> Row:
    """Time a training step, and return its row, in which speed-ups are relative to one teacher forward pass.

    The ideal cost of a step is 1 + 2 c teacher forward passes: the teacher's own, and the student's forward and
    backward pass at its prefill compute c, in which frozen weights need no gradients. Token, layer and image routers
    (all but weighted top-k) also learn from what their closed gates would have computed, so their steps run dense with
    masks, cost 3 forward passes or more whatever c is, and cannot reach the ideal. The "cached" step gets the teacher's
    outputs as input.
    """
    family = families.of(config.family)
    module: Any = family.Distillation(student, config.loss, config.budget, config.data).train()
    sample, inputs, tokens = family.timing.training_batch(student, data, config)
    spent: list[Tensor] = []

    @torch.no_grad()
    def forward() -> None:
        with student.teacher():
            student(**inputs)

    def step(signals: TeacherSignals | None) -> None:
        loss, measured = module(sample, 1.0, signals)
        loss.backward()
        student.zero_grad()
        spent.append(measured.macs["prefill"] / measured.dense["prefill"])

    works: dict[str, Callable[[], object]] = {
        "forward": forward,
        "step": partial(step, None),
        "cached": partial(step, module.teacher_signals(sample)),
    }
    seconds, peaks = medians(works, repeats, next(student.parameters()).device)
    compute = float(spent[-1])
    ideal, cost = 1 + 2 * compute, seconds["step"] / seconds["forward"]
    return {
        "phase": "train",
        "batch": config.train.batch,
        "tokens": tokens,
        "compute": compute,
        "predicted_speedup": 1 / ideal,
        "measured_speedup": 1 / cost,
        "efficiency": ideal / cost,
        "seconds": seconds["step"],
        "dense_seconds": seconds["forward"],
        "teacher_forwards": cost,
        "cached_teacher_forwards": seconds["cached"] / seconds["forward"],
        "ideal_teacher_forwards": ideal,
        "weight_bytes": kept_bytes(student),
        "peak_bytes": peaks["step"],
        "dense_peak_bytes": peaks["forward"],
    }
