"""Timing vision-language models: prefill of questions, and decoding of answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elastic.config import RunConfig
from elastic.reporting.progress import Say
from elastic.timing.passes import Contender, Models, Row, decode, prefill
from elastic.timing.workload import InputSizes, TrainingBatch, Workload
from students.execution.decoding import Decoding
from students.families.vision_language import VisionLanguageStudent
from teachers.data.synthetic import ANSWER, QUESTION

OPTIONS: tuple[str, ...] = ("new_tokens",)
BATCHES: tuple[int, ...] = (1, 8)
RANDOM: Mapping[str, int] = {"calibration__windows": 4}


def samples(config: RunConfig, batch: Sequence[int], tokens: Sequence[int]) -> int:
    """Questions that the largest batch takes."""
    return max(batch)


def fitted(student: VisionLanguageStudent, workload: Workload) -> Workload:
    """The workload as it is: questions are as long as they are."""
    return workload


def contenders(student: VisionLanguageStudent, dense: Any) -> dict[str, Contender]:
    """Both as they generate."""
    routed = Contender(student.model, student.generate, student.reader)
    return {"student": routed, "dense": Contender(dense, dense.generate)}


def recorded(model: Any) -> Contender:
    """A dense model that reads prompts and decodes as students do."""
    decoding = Decoding(model, model.get_decoder())
    return Contender(model, decoding.generate, decoding.reader)


def inference(student: VisionLanguageStudent, models: Models, data: Any, workload: Workload, say: Say) -> Iterator[Row]:
    """Prefill and decoding of each batch of questions."""
    for size in workload.batch:
        inputs = data.held_out.ask([n % len(data.held_out) for n in range(size)])
        say(f"prefill of {size} questions ...")
        yield prefill(models, inputs, workload.repeats)
        say(f"decoding {size} x {workload.new_tokens} tokens after the question ...")
        yield decode(models, inputs, workload.new_tokens, workload.repeats)


def training_batch(student: VisionLanguageStudent, data: Any, config: RunConfig) -> TrainingBatch:
    """Training questions with their answers."""
    numbers = [n % len(data.train) for n in range(config.train.batch)]
    prompts = data.train.load(numbers).to(student.model.device)
    return TrainingBatch(prompts, prompts.inputs, prompts.image.shape[1])


def input_sizes(model: Any, config: RunConfig, workload: Workload) -> InputSizes:
    """Calibration reads all questions at once; for a LLaVA."""
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + QUESTION + ANSWER
    return InputSizes(model.get_decoder(), tokens, tokens, config.calibration.windows * tokens, 0)
