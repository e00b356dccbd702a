"""What a vision-language student is worth: its answers, and agreement with its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from elastic import launch
from elastic.accounting.routing import routing_profile
from elastic.accounting.vision_language import spent_on
from elastic.config import RunConfig
from elastic.data_parallel import LocalBatch, exchange_left_out, local_batches, sum_over_processes
from elastic.evaluation.teacher import TeacherOutputs
from elastic.objectives.sums import of_all
from elastic.objectives.vision_language import Measured, measured_on, text_rows
from elastic.reporting.pictures import data_uri
from elastic.reporting.progress import Watched
from losses import DIVERGENCES
from students.families.vision_language import VisionLanguageStudent
from teachers import Teacher
from teachers.data.prompts import Example, Prompts, PromptSet, answer_text, call, prompt_text, token_ids
from teachers.data.questions import QuestionSet

MEASURED = 16
"""Questions that are measured together."""
LONGEST_ANSWER = 16
"""Tokens of an answer that is generated."""
EXAMPLES = 6
"""Questions that a report shows."""
METRICS = (
    ("accuracy", "accuracy", "higher"),
    ("agreement", "agreement of answers", "higher"),
    ("kl", "KL to the teacher, nats per token", "lower"),
)


@torch.no_grad()
def evaluate(
    student: VisionLanguageStudent, held_out: PromptSet, config: RunConfig, kept: TeacherOutputs | None = None
) -> dict[str, Any]:
    """Measure a student on questions, all processes together.

    Keys: accuracy and teacher_accuracy, the share of answers that are exactly right: the likeliest of a closed set of
    answers (by the first token that they differ in), else what is generated, ignoring case and a full stop; agreement
    of the two's answers; kl, in nats per token of the answer, of the student to the teacher; compute, as a share of the
    teacher's, of prompt and answer in one pass; compute_vision, the part of that in vision tower and projector;
    image_tokens_kept, as a share; questions, and how many more were broken.
    """
    questions, processor, kept = held_out.questions, held_out.processor, kept or TeacherOutputs()
    first = _first_tokens(processor, questions)
    device, total = student.model.device, None
    counts = [0, 0, 0, 0]  # right answers, the teacher's, those that are the same, questions
    for number, local in enumerate(Watched(local_batches(len(questions), MEASURED))):
        prompts, samples, counted = launch.together(partial(_read, held_out, local))
        prompts = prompts.to(device)
        ask = partial(_teacher_outputs, student, prompts, None if first is not None else (processor, samples))
        target = kept.of(number, ask, device)
        logits, measured = _measure(student, prompts, target["logits"])
        if first is None:
            said, known = answers(student, processor, samples), target["answers"]
        else:
            said, known = (_likeliest(part, prompts, first) for part in (logits, target["logits"]))
        if counted:
            total = measured if total is None else total + measured
            right = [answer for _, _, answer in samples]
            same = (sum(map(_same_answer, *both)) for both in ((said, right), (known, right), (said, known)))
            counts = [a + b for a, b in zip(counts, (*same, len(samples)), strict=True)]
    own, teachers_own, agreed, seen = sum_over_processes(*counts)
    exchange_left_out([questions.left_out])
    if not seen:
        raise ValueError(
            f"none of {len(questions):,} questions to measure on can be used, {questions.left_out.example}"
        )
    whole = of_all(total)
    dense = float(whole.dense["prefill"])
    return {
        "compute": float(whole.macs["prefill"]) / dense,
        "compute_vision": float(whole.vision) / dense,
        "image_tokens_kept": float(whole.kept / whole.image),
        "accuracy": own / seen,
        "teacher_accuracy": teachers_own / seen,
        "agreement": agreed / seen,
        "kl": float(whole.kl / whole.tokens),
        "questions": seen,
        "broken": questions.broken,
    }


def _read(held_out: PromptSet, local: LocalBatch) -> tuple[Prompts, list[Example], bool]:
    """Prompts of a batch's questions, what they consist of, and whether they count."""
    found = held_out.read_readable(local.samples) if local.counts else None
    return (*(found or held_out.read(local.samples[:1])), found is not None)


def _measure(student: VisionLanguageStudent, prompts: Prompts, target: Tensor) -> tuple[Tensor, Measured]:
    """Logits of the answers' tokens, and what was measured against the teacher's."""
    out, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
    rows = out.last_hidden_state[text_rows(prompts.answers, decisions)]
    logits = student.logits(rows, *student.head_tensors())[0]
    kl = DIVERGENCES["forward_kl"](logits, target)
    return logits, measured_on(prompts, decisions, kl, *spent_on(student, prompts, decisions))


def _likeliest(logits: Tensor, prompts: Prompts, first: dict[str, int]) -> list[str]:
    """Of a closed set of answers, with the first token of each, the likeliest by logits of the answers' tokens."""
    starts = prompts.answers.sum(1).cumsum(0) - prompts.answers.sum(1)
    best = logits[starts][:, torch.tensor(list(first.values()), device=logits.device)].argmax(-1)
    return [list(first)[number] for number in best.tolist()]


def _teacher_outputs(
    student: VisionLanguageStudent, prompts: Prompts, asked: tuple[Any, Sequence[tuple[Any, str, str]]] | None
) -> dict[str, Any]:
    """Logits of the answers' tokens and, where asked with (processor, samples), the answers that it would give."""
    with student.teacher():
        out, _ = student.features(**prompts.inputs)
        logits = student.logits(out.last_hidden_state[prompts.answers])[0]
        return {"logits": logits, "answers": None if asked is None else answers(student, *asked)}


def _first_tokens(processor: Any, questions: QuestionSet) -> dict[str, int] | None:
    """The first token of each answer of a closed set; None where there is no such set or two have the same."""
    if not questions.choices:
        return None
    tokenizer, prompt = processor.tokenizer, prompt_text(processor, questions.samples[0].question)
    before, end = len(token_ids(tokenizer, prompt)), tokenizer.eos_token or ""
    # with the end, as an answer may be empty
    texts = {choice: prompt + answer_text(prompt, choice) + end for choice in questions.choices}
    tokens = {choice: token_ids(tokenizer, text)[before:] for choice, text in texts.items()}
    first = {choice: ids[0] for choice, ids in tokens.items() if ids}
    return first if len(set(first.values())) == len(tokens) else None


def _same_answer(one: str, other: str) -> bool:
    return one.strip().rstrip(".").lower() == other.strip().rstrip(".").lower()


@torch.no_grad()
def answers(
    student: VisionLanguageStudent,
    processor: Any,
    samples: Sequence[tuple[Any, str, str]],
) -> list[str]:
    """What the model says to (image, question, anything), greedily; every process takes as many steps as the others."""
    texts = [prompt_text(processor, question) for _, question, _ in samples]
    inputs = call(processor, texts, [image for image, _, _ in samples], "left")
    inputs = {name: tensor.to(student.model.device) for name, tensor in inputs.items()}
    padding = processor.tokenizer.pad_token_id
    settings = {"max_new_tokens": LONGEST_ANSWER, "do_sample": False, "pad_token_id": padding}
    out = student.generate(**inputs, **settings, synced_gpus=launch.size() > 1)
    return processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def routing(
    student: VisionLanguageStudent, questions: PromptSet, teacher: Teacher, config: RunConfig
) -> dict[str, Any]:
    """Where compute goes in a few of the questions (see elastic/accounting/routing.py), and which image tokens pass.

    Adds the key examples: for each, original and image, a data URI each, the second without the patches that stay
    outside, caption, question and answer, and compute, the prompt's share of the teacher's. None where patches are no
    square.
    """
    chosen = [len(questions) * n // EXAMPLES for n in range(min(EXAMPLES, len(questions)))]
    prompts, samples = questions.read(chosen)
    prompts = prompts.to(student.model.device)
    before, student.runtime.execution = student.runtime.execution, "mask"  # where all tokens have a place
    try:
        _, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
    finally:
        student.runtime.execution = before
    valid = prompts.inputs["attention_mask"].bool()
    kept = valid if decisions.valid is None else decisions.valid
    found = routing_profile(student, decisions, prompts.inputs["input_ids"], valid, "prefill", kept)
    examples = []
    for row, (picture, question, answer) in enumerate(samples):
        side = math.isqrt(int(prompts.image[row].sum()))
        if side * side != prompts.image[row].sum():
            continue
        shown = kept[row][prompts.image[row]].float().view(side, side)
        pixels = pil_to_tensor(picture).float()
        share = float(kept[row].sum() / valid[row].sum())
        examples.append(
            {
                "original": data_uri(pixels),
                "image": data_uri(pixels, shown.cpu()),
                "caption": f"{question} {answer}",
                "compute": round(share, 3),
            }
        )
    return {**found, "examples": examples}


def lines() -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    return [
        (
            "measured on",
            lambda r: f"{r['data']}, {r['questions']:,} questions" + f", {r['broken']} broken" * (r["broken"] > 0),
        ),
        ("compute asked", lambda r: f"{r['compute_target']:.3f}"),
        ("compute", lambda r: f"{r['compute']:.3f} (vision {r['compute_vision']:.3f})"),
        ("image tokens kept", lambda r: f"{r['image_tokens_kept']:.1%}"),
        ("accuracy", lambda r: f"{r['accuracy']:.2%} (teacher {r['teacher_accuracy']:.2%})"),
        ("agreement of answers", lambda r: f"{r['agreement']:.2%}"),
        ("KL to the teacher", lambda r: f"{r['kl']:.4f} nats"),
    ]
