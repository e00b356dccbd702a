"""Timing of vision-language models: prefill of questions and decoding of answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from elastic.config import RunConfig
from elastic.reporting.progress import Say
from elastic.timing.language import contenders as contenders
from elastic.timing.language import recorded as recorded
from elastic.timing.passes import COUNTED, Models, Row, decode, prefill
from elastic.timing.workload import InputSizes, StepSizes, TrainingBatch, Workload
from students.architectures.lookup import architecture_of
from students.architectures.vision_language import VISION_TOWERS
from students.calibration.vision_language import CALIBRATED
from students.decisions import Decisions
from students.families.image import image_shape, tokens_of
from students.families.vision_language import VisionLanguageStudent
from teachers.data.synthetic import ANSWER, QUESTION
from teachers.families.language import most_positions
from teachers.wording import number_of

OPTIONS: tuple[str, ...] = ("new_tokens",)
BATCHES: tuple[int, ...] = (1, 8)
RANDOM: Mapping[str, int] = {"calibration__windows": 4}


def samples(config: RunConfig, batch: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many questions the largest timed pass takes."""
    return max(batch)


def fitted(student: VisionLanguageStudent, data: Any, workload: Workload) -> Workload:
    """Return the workload with its new tokens, if nobody asked for a number, shortened to the positions that the model
    has behind the longest question; the length of questions is given by the data."""
    most = most_positions(student.trunk)
    if most is None or "new_tokens" not in workload.default:
        return workload
    room = most - _asked(data, max(workload.batch))["input_ids"].shape[1] - COUNTED
    return replace(workload, new_tokens=max(2, min(workload.new_tokens, room)))


def longest(student: VisionLanguageStudent, data: Any, workload: Workload) -> int:
    """Return the number of tokens of the first question, its image and the answer that is decoded."""
    return int(_asked(data, 1)["input_ids"].shape[1]) + workload.new_tokens


def inference(student: VisionLanguageStudent, models: Models, data: Any, workload: Workload, say: Say) -> Iterator[Row]:
    """Yield a row for prefill and a row for decoding at each batch size."""
    for size in workload.batch:
        inputs = _asked(data, size)
        say(f"prefill of {number_of(size, 'questions')} ...")
        yield prefill(models, inputs, workload.repeats)
        say(f"decoding {size} x {workload.new_tokens} tokens after the question ...")
        yield decode(models, inputs, workload.new_tokens, workload.repeats)


def _asked(data: Any, count: int) -> dict[str, torch.Tensor]:
    """Return the model's inputs for `count` questions, beginning again with the first if there are too few."""
    inputs: dict[str, torch.Tensor] = data.held_out.ask([n % len(data.held_out) for n in range(count)])
    return inputs


def training_batch(student: VisionLanguageStudent, data: Any, config: RunConfig) -> TrainingBatch:
    """Return a micro-batch of training questions with their answers, on the student's device."""
    numbers = [n % len(data.train) for n in range(config.train.batch)]
    prompts = data.train.load(numbers).to(student.model.device)
    return TrainingBatch(prompts, prompts.inputs, prompts.image.shape[1])


def input_sizes(model: Any, config: RunConfig, workload: Workload) -> InputSizes:
    """Return how many tokens the model reads at once; calibration reads CALIBRATED questions at a time."""
    tokens = image_tokens(model) + QUESTION + ANSWER
    calibrated = min(CALIBRATED, config.calibration.windows) * tokens
    return InputSizes(model.get_decoder(), tokens, tokens, tokens, calibrated, 0)


def step_sizes(student: VisionLanguageStudent, config: RunConfig) -> StepSizes:
    """Return the work of a training step for one image and a question of QUESTION tokens with an answer of ANSWER
    tokens. No gradient passes through a vision tower without routers, which counts as `frozen`."""
    tower, image = tower_of(student.model), image_tokens(student.model)
    student.count_vision({"pixel_values": student.model.lm_head.weight.new_empty(1, *image_shape(tower))})
    ones = torch.ones(1, image + QUESTION + ANSWER, dtype=torch.bool)
    blocks = student.compute.routed_blocks(Decisions(bypassed=True), ones, "prefill").double().sum()
    macs, vision = float(blocks) + ANSWER * student.compute.head, (student.vision_macs or 0.0) * image
    if student.vision is None:
        return StepSizes(ones.numel(), macs, frozen=vision, logits=ANSWER)
    return StepSizes(ones.numel(), macs + vision, logits=ANSWER, images=student.vision.tokens)


def image_tokens(model: Any) -> int:
    """Return the number of tokens of an image in the language model; ValueError if it depends on the image's size."""
    if model.config.model_type != "llava":
        raise ValueError(
            "how many tokens an image has is known beforehand of LLaVA alone, and not of this model "
            f"({model.config.model_type})"
        )
    tower = tower_of(model)
    left_out = model.config.vision_feature_select_strategy == "default"
    return tokens_of(tower) - (architecture_of(tower)[0].prefix or 0) * left_out


def tower_of(model: Any) -> Any:
    """Return the vision tower of a vision-language model."""
    return model.base_model.get_submodule(VISION_TOWERS[model.config.model_type])
