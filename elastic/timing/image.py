"""Timing of image models: forward passes over batches of images ("classify")."""

from __future__ import annotations

import math
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
from students.families.image import ImageStudent, call, recorded_pass, tokens_of
from teachers.data.image_set import ImageSet
from teachers.data.images import ImageData
from teachers.wording import number_of

OPTIONS: tuple[str, ...] = ()
BATCHES: tuple[int, ...] = (1, 8, 64)
RANDOM: Mapping[str, int] = {"calibration__windows": 32}
IMAGES = 64
"""Number of images per timed pass, in batches of the requested size; a larger batch is timed on its own."""
LONG_ENOUGH = 0.5
"""Seconds that a timed pass takes at least, where all batches take the same time and fewer than IMAGES are enough."""


def samples(config: RunConfig, batch: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many images the largest timed pass takes."""
    return max(*batch, IMAGES)


def fitted(student: ImageStudent, data: ImageData, workload: Workload) -> Workload:
    """Return the workload unchanged: images have the size that the model takes."""
    return workload


def longest(student: ImageStudent, data: ImageData, workload: Workload) -> int:
    """Return the number of tokens of an image."""
    return tokens_of(student.model)


def contenders(student: ImageStudent, dense: nn.Module) -> dict[str, Contender]:
    """Return the student and the dense model, run by forward passes from pixels."""
    return {"student": Contender(student.model, student.predict), "dense": Contender(dense, partial(call, dense))}


def recorded(model: nn.Module) -> Contender:
    """Return a dense model whose forward pass runs through recordings, as a student's does."""
    return Contender(model, recorded_pass(model, tokens_of(model)))


def inference(student: ImageStudent, models: Models, data: ImageData, workload: Workload, say: Say) -> Iterator[Row]:
    """Yield a row of timings for each batch size."""
    merged: dict[float, dict[str, Contender]] = {}
    for size in workload.batch:
        say(f"{number_of(size, 'images')} at once ...")
        pixels = _images(data.held_out, size * max(1, IMAGES // size))
        tokens = student.at(pixels.shape[-2:])[0]
        pixels = pixels.to(next(models["dense"].model.parameters()).device)
        yield _classify(models, merged, tokens, pixels, size, workload.repeats, student.stepwise)


def training_batch(student: ImageStudent, data: ImageData, config: RunConfig) -> TrainingBatch:
    """Return a micro-batch of training images on the student's device."""
    pixels = _images(data.train, config.train.batch).to(next(student.parameters()).device)
    return TrainingBatch(pixels, {"pixel_values": pixels}, student.at(pixels.shape[-2:])[0])


def input_sizes(model: Any, config: RunConfig, workload: Workload) -> InputSizes:
    """Return how many tokens the model reads at once; calibration reads CALIBRATED images at a time."""
    tokens = tokens_of(model)
    return InputSizes(model, tokens, tokens, tokens, min(CALIBRATED, config.calibration.windows) * tokens, 0)


def step_sizes(student: ImageStudent, config: RunConfig) -> StepSizes:
    """Return the work of a training step for an image of the size that the model is configured for."""
    ones = torch.ones(1, student.tokens, dtype=torch.bool)
    macs = float(student.compute.dense(ones, "prefill").double().sum())
    frozen = macs * untouched(student) / len(student.blocks)
    return StepSizes(student.tokens, macs - frozen, frozen)


def _images(images: ImageSet, count: int) -> Tensor:
    """Return the pixels of `count` images, starting again with the first if there are too few."""
    return images.load([n % len(images) for n in range(count)])[0]


@torch.no_grad()
def _classify(
    models: Models,
    merged: dict[float, dict[str, Contender]],
    tokens: int,
    pixels: Tensor,
    batch: int,
    repeats: int | None,
    alike: bool,
) -> Row:
    """Time forward passes over images [N, C, H, W] in batches of `batch` and return a row with the mean time per batch.

    Several batches are timed together, because images may differ in their compute, and one pass is too short to be
    timed. merged: the results of `_merging` so far, by share of FLOPs. alike: whether all images have the same compute,
    so that FLOPs are counted on one batch, and no more batches are timed than last LONG_ENOUGH.
    """
    parts, device = pixels.split(batch), pixels.device

    def forward(run: Callable[[Tensor], Any], parts: Sequence[Tensor]) -> list[Any]:
        return [run(part) for part in parts]

    some = parts[:1] if alike else parts  # a counted pass takes the host ten times as long
    counted = [count(partial(forward, partial(call, models[name].model), some)) for name in ("student", "dense")]
    share = counted[0][0] / counted[1][0]
    if share not in merged:
        merged[share] = _merging(models["dense"].model, pixels[:1], share)
    models = {**models, **merged[share]}
    if alike:
        one = medians({"student": partial(forward, models["student"].run, some)}, 1, device)[0]["student"]
        parts = parts[: math.ceil(LONG_ENOUGH / one)]
    seconds, peaks = medians({n: partial(forward, m.run, parts) for n, m in models.items()}, repeats, device)
    seconds = {name: value / len(parts) for name, value in seconds.items()}
    row = row_of("classify", batch, tokens, counted, seconds, peaks)
    rates = {name: batch / value for name, value in seconds.items()}
    if "tome" in rates:
        row |= {"tome_speedup": seconds["tome"] / seconds["student"], "tome_seconds": seconds["tome"]}
    return {**row, "images_per_second": rates["student"], "dense_images_per_second": rates["dense"]}


def _merging(dense: nn.Module, pixels: Tensor, share: float) -> dict[str, Contender]:
    """Return {"tome": dense model with ToMe's merging (arXiv 2210.09461) at this share of its FLOPs}; empty for models
    that cannot merge or not reach the share."""
    try:
        merged = None if share >= 1 else merging(dense, pixels, share)[0]
    except ValueError:  # not a timm ViT, or the share is below what merging reaches
        return {}
    if merged is None:
        return {}
    return {"tome": Contender(merged, recorded_pass(merged, tokens_of(dense), has_hooks=True))}
