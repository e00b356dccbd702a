"""Timing image models: classifying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic.accounting.counters import count
from elastic.accounting.memory import untouched
from elastic.baselines.image import merging
from elastic.config import RunConfig
from elastic.reporting.progress import Say
from elastic.timing.passes import Contender, Models, Row, medians, row_of
from elastic.timing.workload import InputSizes, StepSizes, TrainingBatch, Workload
from students.calibration.image import CALIBRATED
from students.execution.capture import Forward
from students.families.image import ImageStudent, call, tokens_of
from teachers.data.image_set import ImageSet
from teachers.data.images import ImageData

OPTIONS: tuple[str, ...] = ()
BATCHES: tuple[int, ...] = (1, 8, 64)
RANDOM: Mapping[str, int] = {"calibration__windows": 32}
IMAGES = 64
"""So many are timed, in batches, or one larger batch."""


def samples(config: RunConfig, batch: Sequence[int], tokens: Sequence[int]) -> int:
    """Images that the largest batch takes."""
    return max(*batch, IMAGES)


def fitted(student: ImageStudent, workload: Workload) -> Workload:
    """The workload as it is: images have the size that the model takes."""
    return workload


def contenders(student: ImageStudent, dense: nn.Module) -> dict[str, Contender]:
    """Both as they predict."""
    return {"student": Contender(student.model, student.predict), "dense": Contender(dense, partial(call, dense))}


def recorded(model: nn.Module) -> Contender:
    """A dense model that predicts as students do."""
    return Contender(model, Forward(partial(call, model)))


def inference(student: ImageStudent, models: Models, data: ImageData, workload: Workload, say: Say) -> Iterator[Row]:
    """Classifying of each batch."""
    merged: dict[float, dict[str, Contender]] = {}
    for size in workload.batch:
        say(f"{size} images at once ...")
        pixels = _images(data.held_out, size * max(1, IMAGES // size))
        tokens = student.at(pixels.shape[-2:])[0]
        pixels = pixels.to(next(models["dense"].model.parameters()).device)
        yield _classify(models, merged, tokens, pixels, size, workload.repeats)


def training_batch(student: ImageStudent, data: ImageData, config: RunConfig) -> TrainingBatch:
    """Training images."""
    pixels = _images(data.train, config.train.batch).to(next(student.parameters()).device)
    return TrainingBatch(pixels, {"pixel_values": pixels}, student.at(pixels.shape[-2:])[0])


def input_sizes(model: Any, config: RunConfig, workload: Workload) -> InputSizes:
    """Calibration reads some images at a time."""
    tokens = tokens_of(model)
    return InputSizes(model, tokens, tokens, min(CALIBRATED, config.calibration.windows) * tokens, 0)


def step_sizes(student: ImageStudent, config: RunConfig) -> StepSizes:
    """Of an image of the size that the model is configured for."""
    ones = torch.ones(1, student.tokens, dtype=torch.bool)
    macs = float(student.compute.dense(ones, "prefill").double().sum())
    frozen = macs * untouched(student) / len(student.blocks)
    return StepSizes(student.tokens, macs - frozen, frozen)


def _images(images: ImageSet, count: int) -> Tensor:
    """Pixels of `count` images, from the first again where there are too few."""
    return images.load([n % len(images) for n in range(count)])[0]


@torch.no_grad()
def _classify(
    models: Models,
    merged: dict[float, dict[str, Contender]],
    tokens: int,
    pixels: Tensor,
    batch: int,
    repeats: int,
) -> Row:
    """A forward pass of images [N, C, H, W], so many at a time: they may differ in what they cost, and the time of one
    is too short to be taken. merged: `_merging` by the share of FLOPs."""
    parts = pixels.split(batch)

    def forward(run: Callable[[Tensor], Any]) -> list[Any]:
        return [run(part) for part in parts]

    counted = [count(partial(forward, partial(call, models[name].model))) for name in ("student", "dense")]
    share = counted[0][0] / counted[1][0]
    if share not in merged:
        merged[share] = _merging(models["dense"].model, pixels[:1], share)
    models = {**models, **merged[share]}
    seconds, peaks = medians({n: partial(forward, m.run) for n, m in models.items()}, repeats, parts[0].device)
    seconds = {name: value / len(parts) for name, value in seconds.items()}
    row = row_of("classify", batch, tokens, counted, seconds, peaks)
    rates = {name: batch / value for name, value in seconds.items()}
    if "tome" in rates:
        row |= {"tome_speedup": seconds["tome"] / seconds["student"], "tome_seconds": seconds["tome"]}
    return {**row, "images_per_second": rates["student"], "dense_images_per_second": rates["dense"]}


def _merging(dense: nn.Module, pixels: Tensor, share: float) -> dict[str, Contender]:
    """The dense model with ToMe's merging in every block, at this share of its FLOPs, where there can be such a one."""
    try:
        return {} if share >= 1 else {"tome": recorded(merging(dense, pixels, share)[0])}
    except ValueError:  # for timm's ViTs alone, and no lower than it reaches
        return {}
