"""What a student is worth: quality against its teacher, and the compute it spends, on text it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from elastic.config import LossConfig, RunConfig
from elastic.objective import Distillation, Measured, prompt_mask
from elastic.run import Run, load_data
from students import Student
from students.compute import PHASES, Phase
from teachers.text import load_windows

BATCH_TOKENS = 1024


def evaluate(student: Student, windows: Tensor, config: RunConfig) -> dict[str, Any]:
    """Measure a student on token windows [N, T].

    Keys: compute (decode phase) and compute_prefill, both as shares of the teacher's; perplexity, teacher_perplexity
    and their ratio; kl, in nats per token, of the student to the teacher; agreement of the most likely next token;
    tokens. Where a router decides per sequence, quality is that of the tokens after the prompt.
    """
    total = _measure(student, windows, config)
    nll, teacher_nll = (float(x / total.predicted) for x in (total.nll, total.teacher_nll))
    compute = {p: float(total.macs[p] / total.dense[p]) for p in PHASES}
    return {
        "compute": compute["decode"],
        "compute_prefill": compute["prefill"],
        "perplexity": math.exp(nll),
        "teacher_perplexity": math.exp(teacher_nll),
        "perplexity_ratio": math.exp(nll - teacher_nll),
        "kl": float(total.kl / total.tokens),
        "agreement": float(total.agreement / total.tokens),
        "tokens": int(total.tokens),
    }


def describe(run: Run, student: Student, data: str, measured: dict[str, Any]) -> dict[str, Any]:
    """A row of results: what was run, on what it was measured, what it costs, how good it is."""
    config = run.config
    trainable = sum(p.numel() for p in student.added_parameters().values())
    frozen = sum(p.numel() for p in student.model.parameters()) - trainable
    return {
        "model": config.model,
        "preset": config.preset,
        "phase": config.budget.phase,
        "compute_target": config.budget.target,
        "data": data,
        **measured,
        "trainable_parameters": trainable,
        "trainable_share": trainable / frozen,
        "checkpoint_bytes": run.routers.stat().st_size,
    }


def measure_run(
    folder: str, *, data: str | None = None, compute: float | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Load a finished run and measure it: on all of `data`, or on the windows that its training never saw."""
    run = Run.open(folder, finished=True)
    config = run.config
    if compute is not None and not 0 < compute <= 1:
        raise ValueError(f"--compute is {compute}; it must be above 0 and at most 1")
    teacher = run.teacher()
    student = run.load_student(teacher)
    if compute is not None:
        student.set_compute(compute)
    if data is None:
        windows, name = load_data(config, teacher).held_out, "held-out windows"
    else:
        windows, name = load_windows(data, teacher.processor, window=config.data.window), data
    say(f"measuring {len(windows)} windows of {config.data.window} tokens ...")
    row = describe(run, student, name, evaluate(student, windows, config))
    return row if compute is None else {**row, "compute_target": compute}


@torch.no_grad()
def _measure(student: Student, windows: Tensor, config: RunConfig) -> Measured:
    module = Distillation(student, LossConfig(), replace(config.budget, control="price"), config.data).eval()
    total = None
    device = next(student.parameters()).device
    for batch in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        _, measured = module(batch.to(device))
        total = measured if total is None else total + measured
    return total


@torch.no_grad()
def measured_compute(student: Student, windows: Tensor, phase: Phase, prompt: int, after: int = 0) -> float:
    """The compute ratio on token windows [N, T] with prompts of `prompt` tokens, without measuring quality; after: of
    the tokens after so many only."""
    spent = whole = 0.0
    for batch in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        valid = torch.ones_like(batch, dtype=torch.bool)
        out, decisions = student.features(batch, prompt=prompt_mask(batch, prompt))
        rows = out.last_hidden_state.flatten(0, 1)
        tensors = student.head_tensors()
        shares = [student.logits(part, *tensors)[1] for part in rows.split(128)] if tensors else [None]
        share = None if shares[0] is None else torch.cat(shares).view(batch.shape)
        head = torch.as_tensor(student.compute.routed_head(share, phase)) * valid
        spent += float((student.compute.routed_blocks(decisions, valid, phase) + head)[:, after:].sum())
        whole += float(student.compute.dense(valid, phase)[:, after:].sum())
    return spent / whole
