"""The family of image models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic.accounting.image import measured_compute
from elastic.baselines import image as baselines
from elastic.config import RunConfig
from elastic.data_parallel import scatter, split
from elastic.distillation.budgets import trained_budgets
from elastic.distillation.dial import Meter, exact_start, lowest
from elastic.distillation.teacher_cache import digest
from elastic.evaluation.image import MEASURED, chosen_pixels, compare
from elastic.evaluation.image import METRICS as METRICS
from elastic.evaluation.image import evaluate as evaluate
from elastic.evaluation.image import lines as lines
from elastic.evaluation.image import routing as routing
from elastic.evaluation.image import score_correlations as score_correlations
from elastic.evaluation.session import Session
from elastic.families import Generation, Timing
from elastic.objectives.image import Distillation as Distillation
from elastic.reporting.progress import Say, Watched
from elastic.timing import image as timing_image
from students.calibration.image import CALIBRATED, calibrate_images, observe_images
from students.calibration.price import Start
from students.families.image import ImageStudent, features_of, image_shape
from teachers import Teacher
from teachers.data.image_set import ImageSet
from teachers.data.images import ImageData, load_images
from teachers.data.images import load_all as load_all_images
from teachers.data.synthetic import SyntheticData, random_images
from teachers.families.image import classes_of

generation: Generation | None = None
"""None: image models generate no text."""
timing: Timing = timing_image
UNIT = "images"
LEAST_OFFSET = -32.0
"""Offset at which the search for quotas that reach the budget is given up."""
DIAL_IMAGES = 2048
"""Number of training images on which quotas and the dial are set."""
BASELINES = ("random", "uniform", "tome")
"""Names that `baseline` accepts; see elastic/baselines/image.py."""


def load(config: RunConfig, teacher: Teacher) -> ImageData:
    """Load the run's training and held-out images, the same at every call."""
    data = config.data
    return load_images(
        data.source,
        teacher.processor,
        held_out=data.held_out,
        seed=config.train.seed,
        max_images=data.max_images,
        classes=data.classes,
        model_classes=classes_of(teacher.model),
    )


def random_data(config: RunConfig, model: Any) -> SyntheticData:
    """Make images of normal noise, with as many training images as calibration reads."""
    counts = max(1, config.calibration.windows), config.data.held_out
    return random_images(image_shape(model), counts, config.train.seed, next(model.parameters()).dtype)


def load_all(source: str, config: RunConfig, teacher: Teacher) -> tuple[ImageSet, bool]:
    """Load the validation images of a source, or all of its images if it has no such part (True)."""
    images = load_all_images(source, teacher.processor, classes_of(teacher.model))
    return images, images.whole


def summary(data: ImageData, config: RunConfig) -> str:
    why = f"; no accuracy: {data.held_out.unlabelled}" if data.held_out.unlabelled else ""
    return f"{data.description} to train on, {data.held_out.usable:,} held out{why}"


def tokens(student: ImageStudent, data: ImageData, config: RunConfig) -> tuple[int, int]:
    """Return height and width of a preprocessed image."""
    height, width = data.train.load(range(min(4, len(data.train))))[0].shape[-2:]
    return height, width


class Batches:
    """Training images by number."""

    def __init__(self, data: ImageData, config: RunConfig) -> None:
        self.images = data.train

    def __len__(self) -> int:
        return len(self.images)

    def read(self, chosen: Sequence[int]) -> Tensor:
        """Return the images [B, C, H, W] with these numbers."""
        return self.images.load(chosen)[0]

    def keyed(self, chosen: Sequence[int]) -> tuple[Tensor, list[bytes]]:
        """Like `read`, with a digest of each image's pixels."""
        pixels = self.read(chosen)
        return pixels, [digest(image) for image in pixels]


def start(
    student: ImageStudent, data: ImageData, order: Tensor, config: RunConfig, session: Session, say: Say
) -> Start:
    """Calibrate the student; order: shuffled numbers of the training images; session: holds the calibration statistics
    of runs with the same routers."""
    batches = [part.tolist() for part in order[: config.calibration.windows].split(CALIBRATED)]
    own, shard = scatter(batches)
    looked_at = list(chosen_pixels(student, data.train, own))
    targets, seed = trained_budgets(config.budget), config.train.seed
    observe = partial(observe_images, student, Watched("calibrating", looked_at), seed, shard)
    of, routers = (config.data, seed, config.calibration.windows), frozenset([config.student.routers])
    seen = session.observed(of, routers, observe)
    start = calibrate_images(student, seen, looked_at[0].shape[-2:], targets)
    merging = [placed.router for placed in student.routers() if placed.router.spec.dropped == "merge"]
    if not merging:
        return start
    first = list(chosen_pixels(student, data.train, batches[:1]))  # the same in every process
    before = student.runtime.execution
    student.runtime.training, student.runtime.execution = True, "mask"  # as in training: a block merges at most half
    try:
        return exact_start(start, student, merging, targets, lambda _: measured_compute(student, first), say)
    finally:
        student.runtime.training, student.runtime.execution = False, before


@torch.no_grad()
def compute_meter(student: ImageStudent, data: ImageData, order: Tensor, config: RunConfig) -> Meter:
    """Set the student's quotas, and return the function that measures compute while the dial is set; order: shuffled
    numbers of the training images."""
    chosen = [part.tolist() for part in order[:DIAL_IMAGES].split(MEASURED)]
    own, shard = split(chosen)
    batches = list(chosen_pixels(student, data.train, own))
    student.at(batches[0].shape[-2:])  # raises ValueError if the model cannot take images of this size
    student.set_quotas(batches, shard=shard)

    def meter(share: float) -> float:
        some = max(1, math.ceil(share * len(batches)))
        return measured_compute(student, batches[:some], shard.first(some))

    target = config.budget.span[0]
    if student.shortens and any(router.selection == "quota" for router in student.spec.routers):
        # patches that found no partner to merge with stay in the quotas however far the dial is turned; measured at a
        # lower offset, the quotas are smaller
        offset = -0.25
        while offset > LEAST_OFFSET and lowest(student, lambda _: meter(0.0)) > target:
            student.set_quotas(batches, offset, shard)
            offset *= 2
    if student.stepwise:
        batches = [batches[0][:1]]  # with quotas every image costs the same
    if not student.by_count:
        return meter
    size, known = batches[0].shape[-2:], dict[tuple[Any, ...], float]()

    def by_count(share: float) -> float:
        counts = student.passing(size)
        if counts not in known:
            known[counts] = meter(share)
        return known[counts]

    return by_count


def baselines_of(config: RunConfig) -> tuple[str, ...]:
    """Return those of BASELINES that can stand beside a run's routers."""
    layer = config.student.over_blocks
    return BASELINES if layer is not None and layer.selection != "topk" else ("tome",)


def baseline(
    name: str, student: ImageStudent, images: ImageSet, config: RunConfig, compute: float, session: Session
) -> dict[str, Any]:
    """Like `evaluate`, for a baseline at the student's compute."""
    kept = session.kept(images)
    if name == "tome":
        pixels = images.load([0])[0].to(next(student.parameters()).device)
        merged, share = baselines.merging(session.teacher(config).model, pixels, compute)
        return compare(student, images, lambda pixels: (features_of(merged, pixels), share), kept)
    some = [part.tolist() for part in torch.arange(min(DIAL_IMAGES, len(images))).split(MEASURED)]
    with baselines.dropping_patches(student, name, chosen_pixels(student, images, some), config.train.seed):
        return evaluate(student, images, config, kept)
