"""Evaluation of language students: perplexity, agreement with the teacher, and where compute goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic.accounting.language import BATCH_TOKENS, head_cost, prompt_mask
from elastic.accounting.routing import routing_profile
from elastic.config import LossConfig, RunConfig
from elastic.data_parallel import local_batches
from elastic.evaluation.rows import data_of
from elastic.evaluation.teacher import TeacherOutputs
from elastic.objectives.language import Distillation, Measured
from elastic.objectives.sums import of_all
from elastic.reporting.progress import Watched
from students.compute import PHASES
from students.families.language import LanguageStudent
from teachers import Teacher

EXAMPLE_TOKENS = 512
"""Number of held-out tokens on which `routing` profiles the student."""
SHOWN = 200
"""Number of these tokens that a report shows."""
METRICS = (
    ("perplexity_ratio", "perplexity over the teacher's", "lower"),
    ("kl", "KL to the teacher (nats per token)", "lower"),
    ("agreement", "top-1 agreement with the teacher", "higher"),
)


def evaluate(
    student: LanguageStudent, windows: Tensor, config: RunConfig, kept: TeacherOutputs | None = None
) -> dict[str, Any]:
    """Measure a student on token windows [N, T]; all processes share the work and return the same numbers.

    Keys: `compute` (decode phase) and `compute_prefill`, the student's FLOPs over the teacher's; `perplexity`,
    `teacher_perplexity` and `perplexity_ratio`; `kl`, the divergence of the student from the teacher in nats per token;
    `agreement`, the share of tokens with the same most likely next token; `tokens`, the number of tokens measured. If a
    router decides per sequence, quality is measured on the tokens after the prompt only.
    """
    total = _measure(student, windows, config, kept or TeacherOutputs())
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


@torch.no_grad()
def _measure(student: LanguageStudent, windows: Tensor, config: RunConfig, kept: TeacherOutputs) -> Measured:
    module = Distillation(student, LossConfig(), replace(config.budget, control="price"), config.data).eval()
    total = None
    device = next(student.parameters()).device
    batches = local_batches(len(windows), max(1, BATCH_TOKENS // windows.shape[1]))
    for number, local in enumerate(Watched("measuring", batches)):
        ids = windows[local.rows].to(device)
        signals = kept.of(number, partial(module.teacher_signals, ids), device)
        _, measured = module(ids, signals=signals)
        if local.counts:
            total = measured if total is None else total + measured
    return of_all(total)


@torch.no_grad()
def routing(student: LanguageStudent, windows: Tensor, teacher: Teacher, config: RunConfig) -> dict[str, Any]:
    """Return the routing profile (see accounting/routing.py) of the student on the first of the windows [N, T].

    Adds the key `examples`: one text as `pieces`, a list of [text of a token, share of the teacher's compute].
    """
    shown = windows[: max(1, EXAMPLE_TOKENS // windows.shape[1])].to(next(student.parameters()).device)
    valid, phase = torch.ones_like(shown, dtype=torch.bool), config.budget.phase
    out, decisions = student.features(shown, prompt=prompt_mask(shown, config.data.prompt))
    head = head_cost(student, out.last_hidden_state, phase)
    spent = student.compute.routed_blocks(decisions, valid, phase) + head
    shares = (spent / student.compute.dense(valid, phase)).flatten()
    ids, text = shown.flatten().tolist(), ""
    pieces = []
    for number, share in enumerate(shares[:SHOWN].tolist()):
        # the text that a token adds to the tokens before it: some tokenizers drop the space of a token decoded alone
        before, text = text, teacher.processor.decode(ids[: number + 1])
        pieces.append([text[len(before) :], round(share, 3)])
    found = routing_profile(student, decisions, shown, valid, phase)
    found["outside"] = {"LM head": round(float(head.mean()) / student.compute.head, 4)}
    return {**found, "examples": [{"pieces": pieces}]}


def lines() -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Return (label, function from a row of results to text) for each line of the printed table."""
    return [
        ("measured on", lambda r: f"{data_of(r)}, {r['tokens']:,} tokens"),
        ("compute asked", lambda r: f"{r['compute_target']:.3f} ({r['phase']})"),
        ("compute, decode", lambda r: f"{r['compute']:.3f}"),
        ("compute, prefill", lambda r: f"{r['compute_prefill']:.3f}"),
        ("perplexity, teacher", lambda r: f"{r['teacher_perplexity']:.3f}"),
        ("perplexity, student", lambda r: f"{r['perplexity']:.3f}"),
        ("perplexity ratio", lambda r: f"{r['perplexity_ratio']:.4f}"),
        ("KL to the teacher", lambda r: f"{r['kl']:.4f} nats"),
        ("top-1 agreement", lambda r: f"{r['agreement']:.2%}"),
    ]
