"""How fast a student is: inference and a training step against the dense model, in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic import families
from elastic.config import RunConfig
from elastic.objectives.sums import TeacherSignals
from elastic.reporting.progress import Say
from elastic.run import Run, has_room_for_two, load_teacher, share_weights
from elastic.timing.passes import Row, medians
from elastic.timing.workload import Workload
from students import Student
from students.kernels.cpu import toolchain
from students.kernels.norms import fuse_norms
from students.kernels.packing import pack_linears, prepare_linears
from teachers.quantize import kept_bytes


def bench_run(folder: str, *, say: Say = print, **asked: Any) -> list[Row]:
    """Rows of timings of a finished run; asked: as of `workload_of`.

    Text: prefill (each batch and length), decoding (each batch) and a training step. Images: classifying (each batch)
    and a training step. Questions about images: as text, the prompts being as long as they are, images and all.

    The opponent is the model as its library ships it, a second copy. `compute` is what torch counts: the student's
    FLOPs over the dense model's on the same input; predicted_speedup is its inverse, predicted_speedup_bytes compares
    the bytes that matrix products read instead (decoding waits for memory). efficiency is measured over predicted.
    Seconds are medians; for decoding, of one new token. tuned_speedup is against a dense model that got the same care:
    on CPUs packed weights, fused norms and the student's attention from one token (packing.py and norms.py of
    students/kernels, attention.py of students/execution), where a second copy of the weights fits into half of the free
    memory; on GPUs that attention, and tokens, images and prompts with images through CUDA graphs (decoding.py,
    capture.py and prompt.py of students/execution).
    tome_speedup, of timm's ViTs, is against the dense model with ToMe's merging (arXiv 2210.09461) at the student's
    FLOPs, run as the student is.
    peak_bytes and dense_peak_bytes: the most memory that was in use while the one or the other ran, with all of these
    models loaded.
    """
    run = Run.open(folder, finished=True)
    config = run.config
    workload = workload_of(config, **asked)
    teacher = run.teacher()
    student = run.load_student(teacher, pack=False, prepare=False)  # training comes first
    data = families.of(config.family).load(config, teacher)

    return measure(student, lambda: load_teacher(config).model, data, config, workload, True, say)


def workload_of(
    config: RunConfig,
    *,
    compute: Sequence[float] = (),
    batch: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    new_tokens: int | None = None,
    repeats: int = 5,
) -> Workload:
    """What is to be timed; ValueError for what the run's family has no use for.

    compute: budgets to turn the dial to. batch: None is 1 for text, 1, 8 and 64 for images, 1 and 8 for questions.
    tokens: lengths of prompts of text (None: 512); new_tokens: how many are decoded (None: 128).
    """
    timing = families.of(config.family).timing
    for name, given in (("tokens", tokens), ("new_tokens", new_tokens)):
        if given is not None and name not in timing.OPTIONS:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect on {config.model}, which takes no text of that length: "
                "leave it away"
            )
    batch, tokens = batch or timing.BATCHES, tokens or (512,)
    samples = timing.samples(config, batch, tokens)
    return Workload(compute or (None,), batch, tokens, new_tokens or 128, repeats, samples)


def measure(
    student: Student,
    dense: Callable[[], nn.Module],
    data: Any,
    config: RunConfig,
    workload: Workload,
    trains: bool,
    say: Say,
) -> list[Row]:
    """Time a student against the model that `dense` makes; trains: whether to time a training step. ValueError where
    the model reads less at once."""
    timing = families.of(config.family).timing
    workload = timing.fitted(student, workload)
    trained = []
    if trains:
        say("training steps ...")
        trained = [_train(student, data, config, workload.repeats)]
        student.train(False)
    model = dense()
    on_gpu = next(model.parameters()).is_cuda
    if not on_gpu and toolchain.loaded is None:
        say(
            "no C compiler (cc, gcc or clang, with a cache folder to write to): the student selects with torch's "
            "operators, which is slower"
        )
    packed = not on_gpu and has_room_for_two(student) and student.pack()
    student.prepare()
    models = timing.contenders(student, model)
    if on_gpu or packed:
        models["tuned"] = timing.recorded(_tuned(model))
    rows = []
    for target in workload.compute:
        if target is not None:
            student.set_compute(target)
        asked = config.budget.span[0] if target is None else target
        rows += [{**row, "compute_target": asked} for row in timing.inference(student, models, data, workload, say)]
    rows += [{**row, "compute_target": config.budget.span[0]} for row in trained]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if config.quantization != "none":
        dtype += f", {config.quantization}"
    machine = {"threads": torch.get_num_threads(), "dtype": dtype}
    return [{"phase": row.pop("phase"), "preset": config.preset, **row, **machine} for row in rows]


def _tuned(dense: nn.Module) -> nn.Module:
    """A dense model on the same weights, with the student's linear layers and norms."""
    model = share_weights(dense)
    pack_linears(model)
    prepare_linears(model)
    fuse_norms(model)
    return model


def _train(student: Student, data: Any, config: RunConfig, repeats: int) -> Row:
    """A training step in forward passes of the teacher.

    Ideal is 1 + 2 c of them: the teacher's, and the student's forward and backward at the compute c of the phase that a
    step runs in (prefill); frozen weights need no gradients of their own. Routers of tokens, layers and images learn by
    masks, from what their gates close as well (all but weighted top-k): their steps cost 3 or more, whatever c is, and
    cannot reach their ideal. Speed-ups are over one teacher forward. Cached: a step that has been told what the teacher
    says.
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
