"""Evaluation of vision-language students: accuracy of answers, agreement with the teacher, where compute goes."""

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
from elastic.evaluation.rows import samples_of
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
"""Questions per evaluation batch."""
LONGEST_ANSWER = 16
"""Maximum number of tokens of a generated answer."""
EXAMPLES = 6
"""Number of questions on which `routing` profiles the student, and which a report shows."""
METRICS = (
    ("accuracy", "accuracy", "higher"),
    ("agreement", "agreement of answers", "higher"),
    ("kl", "KL to the teacher, nats per token", "lower"),
)


@torch.no_grad()
def evaluate(
    student: VisionLanguageStudent, held_out: PromptSet, config: RunConfig, kept: TeacherOutputs | None = None
) -> dict[str, Any]:
    """Measure a student on questions; all processes share the work and return the same numbers.

    Keys: `accuracy` and `teacher_accuracy`, the share of exactly right answers, ignoring case and a full stop (an
    answer is the most likely one of a closed set, by its first token, if the data has such a set with distinct first
    tokens; otherwise it is generated); `agreement`, the share of questions that both answer alike; `kl`, the divergence
    of the student from the teacher in nats per answer token; `compute`, the student's FLOPs over the teacher's for
    prompt and answer in one pass; `compute_vision`, the part of `compute` in the vision tower and projector;
    `image_tokens_kept`, a share; `questions`, the number measured; `broken`, the number left out.
    """
    questions, processor, kept = held_out.questions, held_out.processor, kept or TeacherOutputs()
    first = _first_tokens(processor, questions)
    device, total = student.model.device, None
    counts = [0, 0, 0, 0]  # right answers of the student, right answers of the teacher, equal answers, questions
    for number, local in enumerate(Watched("measuring", local_batches(len(questions), MEASURED))):
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
    """Return (prompts, the (image, question, answer) samples in them, whether the results count) of a batch.

    Results do not count for padding, or if none of the batch's questions can be read.
    """
    found = held_out.read_readable(local.samples) if local.counts else None
    return (*(found or held_out.read(local.samples[:1])), found is not None)


def _measure(student: VisionLanguageStudent, prompts: Prompts, target: Tensor) -> tuple[Tensor, Measured]:
    """Return the student's logits [answer tokens, vocabulary] and the sums measured against the teacher's logits
    `target`."""
    out, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
    rows = out.last_hidden_state[text_rows(prompts.answers, decisions)]
    logits = student.logits(rows, *student.head_tensors())[0]
    kl = DIVERGENCES["forward_kl"](logits, target)
    return logits, measured_on(prompts, decisions, kl, *spent_on(student, prompts, decisions))


def _likeliest(logits: Tensor, prompts: Prompts, first: dict[str, int]) -> list[str]:
    """Return, for each prompt, the most likely answer of a closed set; first: the first token of each answer; logits
    [answer tokens, vocabulary]: of all prompts, of which each prompt's first row decides."""
    starts = prompts.answers.sum(1).cumsum(0) - prompts.answers.sum(1)
    best = logits[starts][:, torch.tensor(list(first.values()), device=logits.device)].argmax(-1)
    return [list(first)[number] for number in best.tolist()]


def _teacher_outputs(
    student: VisionLanguageStudent, prompts: Prompts, asked: tuple[Any, Sequence[tuple[Any, str, str]]] | None
) -> dict[str, Any]:
    """Return the teacher's logits of the answer tokens and, if `asked` is (processor, samples), its generated
    answers."""
    with student.teacher():
        out, _ = student.features(**prompts.inputs)
        logits = student.logits(out.last_hidden_state[prompts.answers])[0]
        return {"logits": logits, "answers": None if asked is None else answers(student, *asked)}


def _first_tokens(processor: Any, questions: QuestionSet) -> dict[str, int] | None:
    """Return the first token of each answer of the data's closed set; None if there is no such set, or if two answers
    begin with the same token."""
    if not questions.choices:
        return None
    tokenizer, prompt = processor.tokenizer, prompt_text(processor, questions.samples[0].question)
    before, end = len(token_ids(tokenizer, prompt)), tokenizer.eos_token or ""
    # with the end-of-text token, because an answer may be empty
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
    """Return the model's greedy answers to samples (image, question, ignored answer).

    All processes take the same number of decode steps, because the weights may be spread over the processes.
    """
    texts = [prompt_text(processor, question) for _, question, _ in samples]
    read = call(processor, texts, [image for image, _, _ in samples], "left")
    inputs: dict[str, Any] = {name: tensor.to(student.model.device) for name, tensor in read.items()}
    padding = processor.tokenizer.pad_token_id
    settings = {"max_new_tokens": LONGEST_ANSWER, "do_sample": False, "pad_token_id": padding}
    out = student.generate(**inputs, **settings, synced_gpus=launch.size() > 1)
    return processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def routing(
    student: VisionLanguageStudent, questions: PromptSet, teacher: Teacher, config: RunConfig
) -> dict[str, Any]:
    """Return the routing profile (see elastic/accounting/routing.py) of the student on EXAMPLES questions.

    Adds the key `examples`, a dictionary per question: `original` and `image`, data URIs of the picture, where `image`
    lacks the patches whose tokens the image router drops; `caption`, the question and answer; and `compute`, the share
    of the prompt's tokens that are kept. Questions whose image tokens do not form a square are left out.
    """
    chosen = [len(questions) * n // EXAMPLES for n in range(min(EXAMPLES, len(questions)))]
    prompts, samples = questions.read(chosen)
    prompts = prompts.to(student.model.device)
    before, student.runtime.execution = student.runtime.execution, "mask"  # in which every token keeps its position
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
    """Return (label, function from a row of results to text) for each line of the printed table."""
    return [
        ("measured on", partial(samples_of, what="questions")),
        ("compute asked", lambda r: f"{r['compute_target']:.3f}"),
        ("compute", lambda r: f"{r['compute']:.3f} (vision {r['compute_vision']:.3f})"),
        ("image tokens kept", lambda r: f"{r['image_tokens_kept']:.1%}"),
        ("accuracy", lambda r: f"{r['accuracy']:.2%} (teacher {r['teacher_accuracy']:.2%})"),
        ("agreement of answers", lambda r: f"{r['agreement']:.2%}"),
        ("KL to the teacher", lambda r: f"{r['kl']:.4f} nats"),
    ]
