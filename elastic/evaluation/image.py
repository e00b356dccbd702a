"""Evaluation of image students: accuracy, agreement with the teacher, and where compute goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from elastic import launch
from elastic.accounting.routing import routing_profile
from elastic.config import RunConfig
from elastic.data_parallel import LocalBatch, exchange_left_out, local_batches, sum_over_processes
from elastic.evaluation.rows import samples_of
from elastic.evaluation.teacher import TeacherOutputs
from elastic.reporting.pictures import data_uri
from elastic.reporting.progress import Watched
from losses import DIVERGENCES, cosine_distance
from students.families.image import Features, ImageStudent
from teachers import Teacher
from teachers.data.image_set import ImageSet
from teachers.wording import number_of

P = TypeVar("P")
T = TypeVar("T")
MEASURED = 256
"""Images per evaluation batch."""
EXAMPLES = 8
"""Number of images on which `routing` profiles the student, and which a report shows."""
METRICS = (
    ("top1", "top-1 accuracy", "higher"),
    ("kl", "KL to the teacher (nats per image)", "lower"),
    ("agreement", "top-1 agreement with the teacher", "higher"),
    ("cosine", "cosine of the features to the teacher's", "higher"),
)


@torch.no_grad()
def evaluate(
    student: ImageStudent, images: ImageSet, config: RunConfig, kept: TeacherOutputs | None = None
) -> dict[str, Any]:
    """Measure a student on images; all processes share the work and return the same numbers.

    Keys: `compute`, the student's FLOPs over the teacher's; `top1`, `teacher_top1`, `top5`, `teacher_top5`, if the
    images have labels and the model a classifier; `agreement`, the share of images with the same most likely class;
    `kl`, the divergence of the student from the teacher in nats per image; `cosine`, the mean cosine similarity of the
    features that the classifier reads; `images`, the number of images measured, `broken`, the number left out, and
    `labelled`, the number with a label; `unlabelled`, why the data's classes have no number in the model;
    `images_per_second` and `teacher_images_per_second`, summed over all processes (for the teacher, the speed when its
    outputs were first computed).
    """

    def run(pixels: Tensor) -> tuple[Features, float]:
        features, decisions = student.features(pixels)
        macs, dense = student.spent(pixels, decisions)
        return features, float(macs.sum() / dense.sum())

    return compare(student, images, run, kept)


@torch.no_grad()
def compare(
    student: ImageStudent,
    images: ImageSet,
    run: Callable[[Tensor], tuple[Features, float]],
    kept: TeacherOutputs | None = None,
) -> dict[str, Any]:
    """Like `evaluate`, for any function `run` from pixels to (features, share of the teacher's compute); kept: the
    teacher's outputs from an earlier evaluation on the same images, which are reused."""
    kept = kept or TeacherOutputs()
    own: list[dict[str, float]] = []
    spent = 0.0
    for number, (pixels, labels, counted) in enumerate(_batches(student, images)):
        target = kept.of(number, partial(_teacher_outputs, student, pixels), pixels.device)
        started = time.perf_counter()
        out, compute = run(pixels)
        spent += time.perf_counter() - started
        if counted:
            own.append(_sums(out, target, labels) | {"compute": len(pixels) * compute})
    found: defaultdict[str, float] = defaultdict(int)
    for batch in chain.from_iterable(launch.gather(own)):
        for key, value in batch.items():
            found[key] += value
    exchange_left_out([images.left_out])
    seen, known = found["images"], found["labelled"]
    if not seen:
        raise ValueError(f"none of {len(images):,} images to measure on can be used, {images.left_out.example}")
    row: dict[str, Any] = {"compute": found["compute"] / seen}
    if known:
        row |= {key: found[key] / known for key in (f"{whose}top{k}" for whose in ("", "teacher_") for k in (1, 5))}
    if "agreement" in found:
        row |= {"agreement": found["agreement"] / seen, "kl": found["kl"] / seen, "labelled": known}
        row |= {"unlabelled": images.unlabelled} if images.unlabelled else {}
    each_spent, each_asked = (seconds / launch.size() for seconds in sum_over_processes(spent, kept.seconds))
    row |= {"images_per_second": seen / each_spent, "teacher_images_per_second": seen / each_asked}
    return {**row, "cosine": found["cosine"] / seen, "images": seen, "broken": images.broken}


def _sums(out: Features, target: dict[str, Any], labels: Tensor) -> dict[str, float]:
    """Return the metrics of a batch as sums over its images; top-k counts only images with a label >= 0 (labels [B]).

    Models without a classifier have the keys `images` and `cosine` alone.
    """
    cosine = 1 - float(cosine_distance(out.pooled, target["pooled"]))
    found = {"images": len(labels), "cosine": len(labels) * cosine}
    if out.logits is None:
        return found
    found["kl"] = float(DIVERGENCES["forward_kl"](out.logits, target["logits"]).sum())
    found["agreement"] = int((out.logits.argmax(-1) == target["logits"].argmax(-1)).sum())
    known = labels >= 0
    found["labelled"] = int(known.sum())
    for whose, logits in (("", out.logits), ("teacher_", target["logits"])):
        for k in (1, 5):
            best = logits[known].float().topk(min(k, logits.shape[-1]), dim=-1).indices
            found[f"{whose}top{k}"] = int((best == labels[known].unsqueeze(1)).sum())
    return found


def _teacher_outputs(student: ImageStudent, pixels: Tensor) -> dict[str, Any]:
    with student.teacher():
        features = student.features(pixels)[0]
    return {"pooled": features.pooled, "logits": features.logits}


def _batches(student: ImageStudent, images: ImageSet) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield (pixels, labels, counts) for each of this process's batches, on the student's device.

    counts is False for a batch whose results are to be left out: padding, or none of its images can be read.
    """
    device = next(student.parameters()).device

    def read(local: LocalBatch) -> tuple[Tensor, Tensor, bool]:
        found = images.load_readable(local.samples) if local.counts else None
        return (*(found or images.load(local.samples[:1])), found is not None)

    for pixels, labels, counts in _ahead(read, local_batches(len(images), MEASURED)):
        yield pixels.to(device), labels.to(device), counts


def chosen_pixels(student: ImageStudent, images: ImageSet, chosen: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Yield the pixels of each batch of chosen image numbers, on the student's device; unusable images are replaced by
    others, so that every batch has as many images as numbers."""
    device = next(student.parameters()).device
    for pixels, _ in _ahead(images.load, chosen):
        yield pixels.to(device)


def _ahead(read: Callable[[P], T], parts: Sequence[P]) -> Iterator[T]:
    """Yield `read(part)` for each part; a thread reads the next part while the caller works on the current one.

    All processes have the same number of parts, and an error while reading in one process is raised in all of them.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, parts[0])
        for following in Watched("images", [*parts[1:], None]):
            found = launch.together(ahead.result)
            if following is not None:
                ahead = pool.submit(read, following)
            yield found


@torch.no_grad()
def score_correlations(first: ImageStudent, second: ImageStudent, images: ImageSet) -> dict[str, float]:
    """Return Spearman's rank correlation, by router key, of the scores of two students of one model on the same images.

    Both students run in mask mode as in training. ValueError if they have different routers.
    """
    from torchmetrics.functional import spearman_corrcoef

    seen: dict[str, list[list[Tensor]]] = {}
    for pixels, _, counts in _batches(first, images):
        if not counts:
            continue
        for place, student in enumerate((first, second)):
            student.runtime.execution, student.runtime.training = "mask", True  # so that every router scores
            _, decisions = student(pixels.to(next(student.parameters()).dtype))  # a run may have another precision
            for key in (placed.key for placed in student.routers()):
                seen.setdefault(key, [[], []])[place].append(decisions.score[key].flatten().float().cpu())
    odd = [key for key, (one, other) in seen.items() if len(one) != len(other)]
    if odd:
        raise ValueError(f"the two runs have different routers, such as {odd[0]}")
    return {key: float(spearman_corrcoef(*(torch.cat(part) for part in parts))) for key, parts in seen.items()}


@torch.no_grad()
def routing(student: ImageStudent, images: ImageSet, teacher: Teacher, config: RunConfig) -> dict[str, Any]:
    """Return the routing profile (see elastic/accounting/routing.py) of the student on EXAMPLES images.

    Adds the key `examples`, a dictionary per image: `original` and `image`, data URIs of the picture, where in `image`
    the opacity of a patch is the share of gates open to that patch; and `compute`, the share of the teacher's compute.
    The list is empty if the number of patches does not match a grid of square patches.
    """
    chosen = [len(images) * n // EXAMPLES for n in range(min(EXAMPLES, len(images)))]
    pixels = images.load(chosen)[0].to(next(student.parameters()).device)
    _, decisions = student.features(pixels)
    height, width = pixels.shape[-2:]
    valid = torch.ones(len(pixels), student.at((height, width))[0], dtype=torch.bool, device=pixels.device)
    found = routing_profile(student, decisions, pixels, valid, "prefill")
    spent, dense = student.spent(pixels, decisions)
    patches = torch.tensor(found["tokens"]).float().mean(0).div(1000).view(len(pixels), -1)
    rows = round((patches.shape[1] * height / width) ** 0.5)
    examples = []
    if patches.shape[1] % rows == 0:
        for picture, opaque, share in zip(pixels.cpu(), patches, (spent / dense).tolist(), strict=True):
            shown = {"original": data_uri(picture), "image": data_uri(picture, opaque.view(rows, -1))}
            examples.append({**shown, "compute": round(share, 3)})
    return {**found, "examples": examples}


def lines() -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Return (label, function from a row of results to text) for each line of the printed table."""

    def accuracy(k: int) -> Callable[[dict[str, Any]], str]:
        def show(row: dict[str, Any]) -> str:
            why = f": {row['unlabelled']}" if "unlabelled" in row else ""
            if f"top{k}" not in row:
                return (f"none{why}" if why else "no labels") if "agreement" in row else "no classifier"
            some = row.get("labelled", row["images"]) < row["images"]
            of = f", of {number_of(row['labelled'], 'images')}{why}" if some else ""
            return f"{row[f'top{k}']:.2%} (teacher {row[f'teacher_top{k}']:.2%}){of}"

        return show

    def part(key: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: format(row[key], form) if key in row else "no classifier"

    return [
        ("measured on", partial(samples_of, what="images")),
        ("compute asked", lambda r: f"{r['compute_target']:.3f}"),
        ("compute", lambda r: f"{r['compute']:.3f}"),
        ("top-1", accuracy(1)),
        ("top-5", accuracy(5)),
        ("top-1 agreement", part("agreement", ".2%")),
        ("KL to the teacher", part("kl", ".4f")),
        ("cosine of features", part("cosine", ".4f")),
        ("images/s", lambda r: f"{r['images_per_second']:.0f} (teacher {r['teacher_images_per_second']:.0f})"),
    ]
