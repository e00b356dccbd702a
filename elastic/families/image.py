"""The family of image models: their data, what a batch of it costs, and what a student is worth."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn

import teachers
from elastic.accounting.routing import where
from elastic.accounting.sums import Sums, divergence_of, routing_loss
from elastic.baselines import image as baselines
from elastic.config import BudgetConfig, DataConfig, LossConfig, RunConfig
from elastic.distillation.budgets import trained
from elastic.distillation.dial import SPREAD, Meter, exact_start, lowest
from elastic.distillation.prefetch import Prefetched
from elastic.reporting.progress import Watched
from losses import DIVERGENCES, HIDDEN_DISTANCES, cosine_distance, per_layer
from students.build import image_shape
from students.calibration.image import calibrate_images
from students.calibration.price import Start
from students.families.image import Features, ImageStudent, features_of
from teachers import Teacher
from teachers.data.image_set import ImageSet
from teachers.data.images import ImageData, load_images
from teachers.data.images import load_all as load_all_images
from teachers.families.image import classes_of

T = TypeVar("T")

UNIT = "images"
"""What data consists of, for the user to read."""
MEASURED = 256
"""Images that are measured together."""
CALIBRATED = 64
"""Images that are looked at together in calibration."""
DIAL_IMAGES = 2048
"""Training images that quotas and the dial are set on."""
EXAMPLES = 8
"""Images that routing is looked at on, and that are shown."""
SHOWN = 112
"""About how many pixels wide they are shown."""
METRICS = (
    ("top1", "top-1 accuracy", "higher"),
    ("kl", "KL to the teacher (nats per image)", "lower"),
    ("agreement", "top-1 agreement with the teacher", "higher"),
    ("cosine", "cosine of the features to the teacher's", "higher"),
)
"""What a report plots against compute: key, label, and which direction is better."""
BASELINES = ("random", "uniform", "tome")
"""What `baseline` makes; see elastic/baselines/image.py."""


def load(config: RunConfig, teacher: Teacher) -> ImageData:
    """The run's training and held-out images; the same every time."""
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


class Noise:
    """Images [N, C, H, W] that are in memory already, as an `ImageSet` has them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, chosen: Sequence[int]) -> Noise:
        """Only these images, in this order."""
        return Noise(self.pixels[torch.as_tensor(chosen)])

    def load(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pixels [B, C, H, W] and labels [B], all the same, of these images."""
        return self.pixels[torch.as_tensor(chosen)], torch.zeros(len(chosen), dtype=torch.long)


def random_tokens(model: nn.Module) -> int:
    """Tokens of an image, for a model of timm."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def random_data(config: RunConfig, model: nn.Module) -> ImageData:
    """Images of normal noise: as many to train on as are calibrated on."""
    draw = torch.Generator().manual_seed(config.train.seed)
    counts = max(1, config.calibration.windows), config.data.held_out
    pixels = torch.randn(sum(counts), *image_shape(model), generator=draw).to(next(model.parameters()).dtype)
    return ImageData(*(Noise(part) for part in pixels.split(counts)), "random images")


def load_all(source: str, config: RunConfig, teacher: Teacher) -> ImageSet:
    """The validation part of a source, or all of it."""
    return load_all_images(source, teacher.processor, classes_of(teacher.model))


def summary(data: ImageData, config: RunConfig) -> str:
    """What there is to train on, for the user to read."""
    why = f"; no accuracy: {data.held_out.unlabelled}" if data.held_out.unlabelled else ""
    return f"{data.description} to train on, {data.held_out.usable:,} held out{why}"


def tokens(student: ImageStudent, data: ImageData, config: RunConfig) -> tuple[int, int]:
    """Height and width of an image as the processor makes it."""
    height, width = data.train.load(range(min(4, len(data.train))))[0].shape[-2:]
    return height, width


class Batches(Prefetched):
    """Training images [B, C, H, W] by number."""

    def __init__(self, data: ImageData, config: RunConfig, device: torch.device) -> None:
        super().__init__(data.train, device)

    def _read(self, chosen: Sequence[int]) -> Tensor:
        return self.samples.load(chosen)[0]


@dataclass
class Measured(Sums):
    """Sums over the images of a batch, on the device; add them up and divide by `tokens`."""

    tokens: Tensor
    """Images."""
    kl: Tensor
    """Divergence of the class distributions, in nats; 0 where the model has no classifier."""
    macs: dict[str, Tensor]
    """Student's compute."""
    dense: dict[str, Tensor]
    """Teacher's compute."""
    rows: dict[str, Tensor]
    """For each image its "kl", in nats, and its "compute", as a share of the teacher's."""


class Distillation(nn.Module):
    """Student and loss in one module, so that accelerate can wrap it whole."""

    def __init__(self, student: ImageStudent, loss: LossConfig, budget: BudgetConfig, data: DataConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.budget = budget
        self.divergence = divergence_of(loss)

    def forward(self, pixels: Tensor, price: Tensor | float = 0.0) -> tuple[Tensor, Measured]:
        """pixels [B, C, H, W]; price: loss per unit of compute, for all rows or each [B]. Returns the loss and what was
        measured."""
        student, loss = self.student, self.loss
        layers = loss.hidden_weight > 0 and loss.hidden_layers == "all"
        with student.teacher(), torch.no_grad():
            teacher, _ = student.features(pixels, layers)
        out, decisions = student.features(pixels, layers)
        macs, dense = student.spent(pixels, decisions)
        total = (price * macs / dense).mean() + routing_loss(student, decisions, loss, self.budget)
        kl = pixels.new_zeros(len(pixels), dtype=torch.float32)
        if out.logits is not None:
            kl = self.divergence(out.logits, teacher.logits)
            total = total + loss.logits_weight * kl.mean()
        if loss.hidden_weight:
            total = total + loss.hidden_weight * self._hidden_loss(out, teacher)
        macs, kl = macs.detach(), kl.detach()
        phases = {"prefill": macs.sum()}, {"prefill": dense.sum()}
        rows = {"kl": kl, "compute": macs / dense}
        return total, Measured(torch.tensor(len(pixels), device=pixels.device), kl.sum(), *phases, rows)

    def _hidden_loss(self, out: Features, teacher: Features) -> Tensor:
        """Distance of what the classifier reads, or after every block of the tokens that are always there."""
        distance = HIDDEN_DISTANCES[self.loss.hidden]
        if self.loss.hidden_layers == "final":
            return distance(out.pooled, teacher.pooled)
        prefix = self.student.record.prefix or None
        pairs = ([x[:, :prefix] for x in features.layers] for features in (out, teacher))
        return per_layer(distance, *pairs)


def start(student: ImageStudent, data: ImageData, order: Tensor, config: RunConfig) -> Start:
    """Calibrate; order: the training images, shuffled."""
    batches = _chosen(student, data.train, order[: config.calibration.windows].tolist())
    flat = [part for pixels in batches for part in pixels.split(CALIBRATED)]
    targets = trained(config.budget)
    start = calibrate_images(student, Watched(flat), targets, config.train.seed)
    merging = [placed.router for placed in student.routers() if placed.router.spec.dropped == "merge"]
    if not merging:
        return start
    student.runtime.training, student.runtime.execution = True, "mask"  # half of the patches at a time, as it trains
    try:
        return exact_start(start, student, merging, targets, lambda _: measured_compute(student, flat[:1]))
    finally:
        student.runtime.training, student.runtime.execution = False, "skip"


@torch.no_grad()
def compute_meter(student: ImageStudent, data: ImageData, order: Tensor, config: RunConfig) -> Meter:
    """What measures the compute that the dial is set by; sets the quotas first. order: training images, shuffled."""
    batches = list(_chosen(student, data.train, order[:DIAL_IMAGES].tolist()))
    student.at(batches[0].shape[-2:])  # a size that the model cannot take is to be refused before it is tried
    student.set_quotas(batches)
    target = config.budget.span[0]
    if student.shortens and any(router.selection == "quota" for router in student.spec.routers):
        # patches that had nobody to merge with keep their place in a quota, however far the dial is turned
        offset = -0.25
        while offset > -SPREAD and lowest(student, lambda _: measured_compute(student, batches[:1])) > target:
            student.set_quotas(batches, offset)
            offset *= 2
    if student.stepwise:
        batches = [batches[0][:1]]  # by quota every image costs the same

    def meter(share: float) -> float:
        return measured_compute(student, batches[: math.ceil(share * len(batches))])

    return meter


@torch.no_grad()
def measured_compute(student: ImageStudent, batches: Sequence[Tensor]) -> float:
    """The compute ratio on batches of pixels."""
    sums = [student.spent(pixels, student(pixels)[1]) for pixels in batches]
    return float(sum(macs.sum() for macs, _ in sums) / sum(dense.sum() for _, dense in sums))


def _batches(student: ImageStudent, images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels of all images that can be used, in order, on the student's device."""
    device = next(student.parameters()).device
    for found in _ahead(images.load_readable, range(len(images))):
        if found is not None:
            yield found[0].to(device), found[1].to(device)


def _chosen(student: ImageStudent, images: ImageSet, chosen: Sequence[int]) -> Iterator[Tensor]:
    """Pixels of as many images as are chosen, on the student's device."""
    device = next(student.parameters()).device
    for pixels, _ in _ahead(images.load, chosen):
        yield pixels.to(device)


def _ahead(read: Callable[[Sequence[int]], T], numbers: Sequence[int]) -> Iterator[T]:
    """What is read of so many images at a time, the next ones while these are worked on."""
    parts = [numbers[first : first + MEASURED] for first in range(0, len(numbers), MEASURED)]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, parts[0])
        for following in Watched([*parts[1:], None]):
            found = ahead.result()
            if following is not None:
                ahead = pool.submit(read, following)
            yield found


class Taught:
    """What a teacher makes of images, batch by batch: once for all that is measured of its student on them."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.batches: list[Features] = []
        self.seconds = 0.0

    def features(self, number: int, student: ImageStudent, pixels: Tensor) -> Features:
        """Of this batch, which is the next one or was there before."""
        if number == len(self.batches):
            started = time.perf_counter()
            with student.teacher():
                self.batches.append(student.features(pixels)[0])
            self.seconds += time.perf_counter() - started
        return self.batches[number]


_TAUGHT: WeakKeyDictionary[ImageStudent, Taught] = WeakKeyDictionary()


@torch.no_grad()
def evaluate(student: ImageStudent, images: ImageSet, config: RunConfig) -> dict[str, Any]:
    """Measure a student on images.

    Keys: compute, as a share of the teacher's; top1, teacher_top1, top5, teacher_top5, where there are labels and a
    classifier; agreement of the most likely class; kl, in nats per image, of the student to the teacher; cosine
    similarity of the features that the classifier reads; images, how many more were broken, and how many are labelled;
    unlabelled, why classes of the data have no number; images_per_second and teacher_images_per_second, which is of the
    first time that a student was measured on these images.
    """

    def run(pixels: Tensor) -> tuple[Features, float]:
        features, decisions = student.features(pixels)
        macs, dense = student.spent(pixels, decisions)
        return features, float(macs.sum() / dense.sum())

    return compare(student, images, run)


@torch.no_grad()
def compare(student: ImageStudent, images: ImageSet, run: Callable[[Tensor], tuple[Features, float]]) -> dict[str, Any]:
    """As `evaluate`, for anything that makes features of pixels, at a share of the teacher's compute."""
    from torchmetrics.classification import MulticlassAccuracy

    sums = dict.fromkeys(("compute", "kl", "agreement", "cosine"), 0.0)
    taught = _TAUGHT.get(student)
    if taught is None or taught.images is not images:
        taught = _TAUGHT[student] = Taught(images)
    seen, labelled, spent, metrics, classifies = 0, 0, 0.0, {}, False
    for number, (pixels, labels) in enumerate(_batches(student, images)):
        teacher = taught.features(number, student, pixels)
        started = time.perf_counter()
        out, compute = run(pixels)
        spent += time.perf_counter() - started
        seen += len(pixels)
        sums["compute"] += len(pixels) * compute
        sums["cosine"] += len(pixels) * (1 - float(cosine_distance(out.pooled, teacher.pooled)))
        if out.logits is None:
            continue
        classifies = True
        sums["kl"] += float(DIVERGENCES["forward_kl"](out.logits, teacher.logits).sum())
        sums["agreement"] += float((out.logits.argmax(-1) == teacher.logits.argmax(-1)).sum())
        known = labels >= 0
        labelled += int(known.sum())
        if not known.any():
            continue
        classes = out.logits.shape[-1]
        for name, logits in (("", out.logits), ("teacher_", teacher.logits)):
            for k in (1, 5):
                key = f"{name}top{k}"
                if key not in metrics:
                    metrics[key] = MulticlassAccuracy(classes, top_k=min(k, classes), average="micro").to(pixels.device)
                metrics[key].update(logits[known].float(), labels[known])
    if not seen:
        raise ValueError(f"none of {len(images):,} images to measure on can be used, {images.left_out.example}")
    row: dict[str, Any] = {"compute": sums["compute"] / seen}
    row |= {name: float(metric.compute()) for name, metric in metrics.items()}
    if classifies:
        row |= {"agreement": sums["agreement"] / seen, "kl": sums["kl"] / seen, "labelled": labelled}
        row |= {"unlabelled": images.unlabelled} if images.unlabelled else {}
    row |= {"images_per_second": seen / spent, "teacher_images_per_second": seen / taught.seconds}
    return {**row, "cosine": sums["cosine"] / seen, "images": seen, "broken": images.broken}


def baseline(name: str, student: ImageStudent, images: ImageSet, config: RunConfig, compute: float) -> dict[str, Any]:
    """As `evaluate`, for a baseline at the student's compute. `random` and `uniform` change the student for good."""
    if name == "tome":
        teacher = teachers.load(config.model, dtype=next(student.model.parameters()).dtype).model
        model, share = baselines.merging(teacher, images.load([0])[0], compute)
        return compare(student, images, lambda pixels: (features_of(model, pixels), share))
    some = range(min(DIAL_IMAGES, len(images)))
    baselines.drop_blindly(student, name, list(_chosen(student, images, some)), config.train.seed)
    return evaluate(student, images, config)


@torch.no_grad()
def alike(first: ImageStudent, second: ImageStudent, images: ImageSet) -> dict[str, float]:
    """How alike two students of one model decide: Spearman's rank correlation of their scores on the same images, by
    router, each student routing as it does in training."""
    from torchmetrics.functional import spearman_corrcoef

    seen: dict[str, list[list[Tensor]]] = {}
    for pixels, _ in _batches(first, images):
        for place, student in enumerate((first, second)):
            student.runtime.execution, student.runtime.training = "mask", True  # where all routers have a say
            _, decisions = student(pixels)
            for key in (placed.key for placed in student.routers()):
                seen.setdefault(key, [[], []])[place].append(decisions.score[key].flatten().float().cpu())
    odd = [key for key, (one, other) in seen.items() if len(one) != len(other)]
    if odd:
        raise ValueError(f"the two runs have different routers, such as {odd[0]}")
    return {key: float(spearman_corrcoef(*(torch.cat(part) for part in parts))) for key, parts in seen.items()}


@torch.no_grad()
def routing(student: ImageStudent, images: ImageSet, teacher: Teacher, config: RunConfig) -> dict[str, Any]:
    """Where compute goes in a few of the images (see elastic/accounting/routing.py), and how they look then.

    Adds the key examples: for each, original and image, a data URI each, the second with patches as opaque as the
    share of gates is that are open to them, and compute, as a share of the teacher's. None where the patches are no
    squares.
    """
    chosen = [len(images) * n // EXAMPLES for n in range(min(EXAMPLES, len(images)))]
    pixels = images.load(chosen)[0].to(next(student.parameters()).device)
    _, decisions = student.features(pixels)
    height, width = pixels.shape[-2:]
    valid = torch.ones(len(pixels), student.at((height, width))[0], dtype=torch.bool, device=pixels.device)
    found = where(student, decisions, pixels, valid, "prefill")
    spent, dense = student.spent(pixels, decisions)
    patches = torch.tensor(found["tokens"]).float().mean(0).div(1000).view(len(pixels), -1)
    rows = round((patches.shape[1] * height / width) ** 0.5)
    examples = []
    if patches.shape[1] % rows == 0:
        for picture, opaque, share in zip(pixels.cpu(), patches, (spent / dense).tolist(), strict=True):
            shown = {"original": data_uri(picture), "image": data_uri(picture, opaque.view(rows, -1))}
            examples.append({**shown, "compute": round(share, 3)})
    return {**found, "examples": examples}


def data_uri(pixels: Tensor, opaque: Tensor | None = None) -> str:
    """A picture of pixels [C, H, W] of any range, in WebP; opaque [h, w]: of each patch, 0 to 1."""
    from PIL import Image

    size = max(1, round(SHOWN / pixels.shape[-1])) * pixels.shape[-1] if pixels.shape[-1] < SHOWN else SHOWN
    mode = "nearest" if size > pixels.shape[-1] else "area"
    pixels = (pixels.float() - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
    picture = nn.functional.interpolate(pixels.expand(3, -1, -1)[None], size=size, mode=mode)[0]
    if opaque is not None:
        alpha = nn.functional.interpolate(opaque.clamp(0, 1)[None, None], size=size, mode="nearest")[0]
        picture = torch.cat([picture, alpha])
    file = io.BytesIO()
    shades = rearrange((255 * picture).round().byte(), "colour height width -> height width colour")
    Image.fromarray(shades.numpy()).save(file, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def lines() -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """What a table of results says of an image model, line by line."""

    def accuracy(k: int) -> Callable[[dict[str, Any]], str]:
        def show(row: dict[str, Any]) -> str:
            why = f": {row['unlabelled']}" if "unlabelled" in row else ""
            if f"top{k}" not in row:
                return (f"none{why}" if why else "no labels") if "agreement" in row else "no classifier"
            of = f", of {row['labelled']:,} images{why}" if row.get("labelled", row["images"]) < row["images"] else ""
            return f"{row[f'top{k}']:.2%} (teacher {row[f'teacher_top{k}']:.2%}){of}"

        return show

    def part(key: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: format(row[key], form) if key in row else "no classifier"

    return [
        (
            "measured on",
            lambda r: f"{r['data']}, {r['images']:,} images" + f", {r['broken']} broken" * (r["broken"] > 0),
        ),
        ("compute asked", lambda r: f"{r['compute_target']:.3f}"),
        ("compute", lambda r: f"{r['compute']:.3f}"),
        ("top-1", accuracy(1)),
        ("top-5", accuracy(5)),
        ("top-1 agreement", part("agreement", ".2%")),
        ("KL to the teacher", part("kl", ".4f")),
        ("cosine of features", part("cosine", ".4f")),
        ("images/s", lambda r: f"{r['images_per_second']:.0f} (teacher {r['teacher_images_per_second']:.0f})"),
    ]
