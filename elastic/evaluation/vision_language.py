"""What a vision-language student is worth: its answers, and agreement with its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torchvision.transforms.functional import pil_to_tensor

from elastic.accounting.routing import routing_profile
from elastic.accounting.vision_language import spent_on
from elastic.config import RunConfig
from elastic.evaluation.teacher import TeacherOutputs
from elastic.objectives.vision_language import measured_on, text_rows
from elastic.reporting.pictures import data_uri
from elastic.reporting.progress import Watched
from losses import DIVERGENCES
from students.families.vision_language import VisionLanguageStudent
from teachers import Teacher
from teachers.data.prompts import Prompts, PromptSet, answer_text, call, prompt_text, token_ids
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
"""What a report plots (see elastic/families)."""


@torch.no_grad()
def evaluate(
    student: VisionLanguageStudent, held_out: PromptSet, config: RunConfig, kept: TeacherOutputs | None = None
) -> dict[str, Any]:
    """Measure a student on questions.

    Keys: accuracy and teacher_accuracy, the share of answers that are exactly right: the likeliest of a closed set of
    answers (by the first token that they differ in), else what is generated, ignoring case and a full stop; agreement
    of the two's answers; kl, in nats per token of the answer, of the student to the teacher; compute, as a share of the
    teacher's, of prompt and answer in one pass; compute_vision, the part of that in vision tower and projector;
    image_tokens_kept, as a share; questions, and how many more were broken.
    """
    questions, processor, kept = held_out.questions, held_out.processor, kept or TeacherOutputs()
    first = _first_tokens(processor, questions)
    total, right, agreed, seen, number = None, {"": 0, "teacher_": 0}, 0, 0, 0
    for begin in Watched(range(0, len(questions), MEASURED)):
        read = held_out.read_readable(range(begin, min(begin + MEASURED, len(questions))))
        if read is None:
            continue
        prompts, samples = read[0].to(student.model.device), read[1]
        seen += len(samples)
        ask = partial(_teacher_outputs, student, prompts, None if first is not None else (processor, samples))
        target, number = kept.of(number, ask, student.model.device), number + 1
        found, hidden = {}, {"teacher_": target["logits"]}
        out, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        rows = out.last_hidden_state[text_rows(prompts.answers, decisions)]
        hidden[""] = student.logits(rows, *student.head_tensors())[0]
        kl = DIVERGENCES["forward_kl"](hidden[""], hidden["teacher_"])
        measured = measured_on(prompts, decisions, kl, *spent_on(student, prompts, decisions))
        total = measured if total is None else total + measured
        starts = prompts.answers.sum(1).cumsum(0) - prompts.answers.sum(1)
        for name, logits in hidden.items():
            if first is not None:
                best = logits[starts][:, torch.tensor(list(first.values()), device=logits.device)].argmax(-1)
                found[name] = [list(first)[number] for number in best.tolist()]
            else:
                found[name] = target["answers"] if name else answers(student, processor, samples)
            right[name] += sum(
                _same_answer(one, answer) for one, (_, _, answer) in zip(found[name], samples, strict=True)
            )
        agreed += sum(_same_answer(one, other) for one, other in zip(found[""], found["teacher_"], strict=True))
    if total is None:
        raise ValueError(
            f"none of {len(questions):,} questions to measure on can be used, {questions.left_out.example}"
        )
    dense = float(total.dense["prefill"])
    return {
        "compute": float(total.macs["prefill"]) / dense,
        "compute_vision": float(total.vision) / dense,
        "image_tokens_kept": float(total.kept / total.image),
        **{f"{name}accuracy": count / seen for name, count in right.items()},
        "agreement": agreed / seen,
        "kl": float(total.kl / total.tokens),
        "questions": seen,
        "broken": questions.broken,
    }


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
    texts = {
        choice: prompt + answer_text(prompt, choice) + end for choice in questions.choices
    }  # an answer may be empty
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
    """What the model says to (image, question, anything), greedily."""
    texts = [prompt_text(processor, question) for _, question, _ in samples]
    inputs = call(processor, texts, [image for image, _, _ in samples], "left")
    inputs = {name: tensor.to(student.model.device) for name, tensor in inputs.items()}
    padding = processor.tokenizer.pad_token_id
    out = student.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, pad_token_id=padding)
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
    """What a table of results says of a vision-language model, line by line."""
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
