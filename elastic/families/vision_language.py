"""The family of vision-language models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic import launch
from elastic.accounting.vision_language import measured_compute
from elastic.baselines import image as baselines
from elastic.config import RunConfig
from elastic.data_parallel import all_gather, scatter, split
from elastic.distillation.budgets import trained_budgets
from elastic.distillation.dial import Meter, exact_start
from elastic.distillation.teacher_cache import digest
from elastic.evaluation.session import Session
from elastic.evaluation.vision_language import MEASURED
from elastic.evaluation.vision_language import METRICS as METRICS
from elastic.evaluation.vision_language import evaluate as evaluate
from elastic.evaluation.vision_language import lines as lines
from elastic.evaluation.vision_language import routing as routing
from elastic.families import Generation, Timing
from elastic.generation import vision_language as generation_vision_language
from elastic.objectives.vision_language import Distillation as Distillation
from elastic.reporting.progress import Say, Watched
from elastic.timing import vision_language as timing_vision_language
from students.calibration.price import Start
from students.calibration.vision_language import CALIBRATED, calibrate_image_router, observe_image_tokens
from students.families.vision_language import VisionLanguageStudent
from teachers import Teacher
from teachers.data.left_out import LeftOut
from teachers.data.prompts import Prompts, PromptSet
from teachers.data.questions import QuestionData, QuestionSet, load_questions
from teachers.data.questions import load_all as load_all_questions
from teachers.data.synthetic import SyntheticData, random_questions
from teachers.families.language import most_positions, require_rows

generation: Generation | None = generation_vision_language
score_correlations = None
"""None: undefined for vision-language students, which have one router, whose scores may depend on the question."""
timing: Timing = timing_vision_language
UNIT = "questions"
DIAL_QUESTIONS = 128
"""Number of training questions on which the image router's quota and the dial are set."""
BASELINES = ("random", "uniform")
"""Names that `baseline` accepts; see elastic/baselines/image.py."""


@dataclass(frozen=True)
class Data:
    """Training prompts and held-out prompts of a run."""

    train: PromptSet
    held_out: PromptSet
    description: str
    left_out: tuple[LeftOut, ...]
    """Records and questions that were left out because they cannot be used."""


def load(config: RunConfig, teacher: Teacher) -> Data:
    """Load the run's training and held-out questions, the same at every call."""
    data = config.data
    read: QuestionData = load_questions(
        data.source, held_out=data.held_out, seed=config.train.seed, max_images=data.max_images
    )
    train, held_out = (_prompts(teacher, part) for part in (read.train, read.held_out))
    return Data(train, held_out, read.description, read.left_out)


def random_data(config: RunConfig, model: Any) -> SyntheticData:
    """Make random questions about random images, for a LLaVA model, with as many training questions as calibration
    reads."""
    vision, counts = model.config.vision_config, (max(1, config.calibration.windows), config.data.held_out)
    shape = vision.num_channels, vision.image_size, vision.image_size
    tokens = timing_vision_language.image_tokens(model)
    return random_questions(model.config.image_token_id, tokens, shape, counts, config.train.seed, model.dtype)


def load_all(source: str, config: RunConfig, teacher: Teacher) -> tuple[PromptSet, bool]:
    """Load the validation questions of a source, or all of its questions if it has no such part (True)."""
    questions = load_all_questions(source)
    return _prompts(teacher, questions), questions.whole


def _prompts(teacher: Teacher, questions: QuestionSet) -> PromptSet:
    model, tokenizer = teacher.model, teacher.processor.tokenizer
    marks = model.config.image_token_id, tokenizer.eos_token_id
    known = [number for number in marks if number in range(len(tokenizer))]
    require_rows(model, tokenizer, torch.tensor(known))
    rows = model.get_input_embeddings().weight.shape[0]
    most = most_positions(model.get_decoder())
    return PromptSet(questions, teacher.processor, model.config.image_token_id, rows, most)


def summary(data: Data, config: RunConfig) -> str:
    return f"{data.description} to train on, {data.held_out.questions.usable:,} held out"


@torch.no_grad()
def tokens(student: VisionLanguageStudent, data: Data, config: RunConfig) -> tuple[int, int]:
    """Return (text tokens, image tokens) of a prompt, the mean over a few training prompts."""
    prompts = data.train.load(range(min(4, len(data.train)))).to(student.model.device)
    with student.teacher():
        student.features(**prompts.inputs)
    image = prompts.image.sum().item() / len(prompts.image)
    whole = prompts.inputs["attention_mask"].sum().item() / len(prompts.image)
    return round(whole - image), round(image)


class Batches:
    """Training prompts by number."""

    def __init__(self, data: Data, config: RunConfig) -> None:
        self.prompts = data.train

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, chosen: Sequence[int]) -> Prompts:
        """Return the prompts with these numbers."""
        return self.prompts.load(chosen)

    def keyed(self, chosen: Sequence[int]) -> tuple[Prompts, list[bytes]]:
        """Like `read`, with a digest of each prompt's tokens, answer, image and image-processor settings."""
        prompts, samples = self.prompts.read(chosen)
        inputs, how = prompts.inputs, self.prompts.processor.image_processor.to_json_string()
        texts = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        pairs = zip(texts, samples, strict=True)
        return prompts, [
            digest(ids, answer, how, str(image.size), image.tobytes()) for ids, (image, _, answer) in pairs
        ]


def start(
    student: VisionLanguageStudent, data: Data, order: Tensor, config: RunConfig, session: Session, say: Say
) -> Start:
    """Calibrate the image router; order: shuffled numbers of the training questions; session: holds the calibration
    statistics of runs with the same routers."""
    assert student.image_router is not None, "configurations that calibrate others are refused"
    own, shard = scatter([part.tolist() for part in order[: config.calibration.windows].split(CALIBRATED)])
    batches = [
        ({**prompts.inputs, "prompt": prompts.prompt}, prompts.answers, prompts.image)
        for prompts in _batches(student, data.train, own)
    ]
    targets, seed = trained_budgets(config.budget), config.train.seed
    observe = partial(observe_image_tokens, student, Watched("calibrating", batches), seed, shard)
    of, routers = (config.data, seed, config.calibration.windows), frozenset([config.student.routers])
    read = tokens(student, data, config)
    start = calibrate_image_router(student, session.observed(of, routers, observe), read, targets)
    if not student.by_count:
        return start
    meter = compute_meter(student, data, order, config)
    return exact_start(start, student, [student.image_router], targets, meter, say)


@torch.no_grad()
def compute_meter(student: VisionLanguageStudent, data: Data, order: Tensor, config: RunConfig) -> Meter:
    """Set the image router's quota, and return the function that measures compute while the dial is set; order:
    shuffled numbers of the training questions."""
    parts = [part.tolist() for part in order[:DIAL_QUESTIONS].split(MEASURED)]
    own, shard = split(parts)
    batches, scores = list(_batches(student, data.train, own)), []
    for prompts, info in shard.enumerate(batches):
        _, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        if "image" in decisions.score:
            scores.append(info.counted(decisions.score["image"].squeeze(-1)[prompts.image]))
    student.set_quotas([all_gather(scores)] if scores else [])

    def meter(share: float) -> float:
        some = math.ceil(share * len(batches))
        return measured_compute(student, batches[:some], shard.first(some))

    return meter


def _batches(
    student: VisionLanguageStudent, questions: PromptSet, chosen: Sequence[Sequence[int]]
) -> Iterator[Prompts]:
    """Yield the prompts of each batch of chosen question numbers, on the student's device; unusable questions are
    replaced by others."""
    for part in chosen:
        yield launch.together(partial(questions.load, part)).to(student.model.device)


def baselines_of(config: RunConfig) -> tuple[str, ...]:
    """Return those of BASELINES that can stand beside a run's routers."""
    return BASELINES if any(r.kind == "image" and r.selection == "quota" for r in config.student.routers) else ()


def baseline(
    name: str, student: VisionLanguageStudent, questions: PromptSet, config: RunConfig, compute: float, session: Session
) -> dict[str, Any]:
    """Like `evaluate`, with as many image tokens as the student keeps, but drawn at random or evenly spaced."""
    with baselines.keeping_image_tokens(student, name, config.train.seed):
        return evaluate(student, questions, config, session.kept(questions))
