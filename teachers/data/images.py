"""Load training and held-out images from any source: folders, parquet files, hub data sets, Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teachers.data.classes import Classes
from teachers.data.image_set import ImageSet, Preprocess
from teachers.data.image_sources import FASHION, from_fashion, from_folder, from_hub, from_parquet
from teachers.data.kinds import IMAGES
from teachers.data.left_out import LeftOut
from teachers.data.parts import HELD_OUT_NAMES
from teachers.data.records import hub_data_set
from teachers.wording import number_of


@dataclass(frozen=True)
class ImageData:
    """Images to train on, and held-out images to measure on."""

    train: ImageSet
    held_out: ImageSet
    description: str
    """Number and source of the training images, for the user to read."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Unusable images of the training part and of the held-out part."""
        return self.train.left_out, self.held_out.left_out


def load_images(
    source: str,
    preprocess: Preprocess,
    *,
    held_out: int,
    seed: int,
    max_images: int | None = None,
    classes: Sequence[int] | None = None,
    model_classes: Classes | None = None,
) -> ImageData:
    """Return images to train on and `held_out` other images, from the source's own validation part if it has one.

    `seed` chooses both; at most `max_images` are trained on. classes: use only images with these class numbers.
    model_classes: the model's classes, to which the classes of the data are matched by name. Raises a one-line
    ValueError for a source that cannot be read, has too few images, or has mostly images that cannot be used.
    """
    train = _open(source, True, preprocess, max_images, model_classes)
    other = _open(source, False, preprocess, held_out, model_classes)
    train, other = (part if part is None else _only(part, classes, source) for part in (train, other))
    if train is None:
        raise ValueError(f"{source} has no images to train on, only a {' or '.join(HELD_OUT_NAMES)} part")
    for part in (train, other):
        if part is not None:
            part.probe()
    order = train.shuffled(seed)
    if other is None:
        if len(order) <= held_out:
            raise ValueError(f"{source} has {len(order)} images: too few to hold out {held_out} (data.held_out)")
        order, set_aside = order[held_out:], order[:held_out]
        other = train.subset(sorted(set_aside))
    elif len(other) > held_out:
        other = other.subset(sorted(other.shuffled(seed)[:held_out]))
    train = train.subset(sorted(order[:max_images]))
    return ImageData(train, other, f"{number_of(train.usable, 'images')} of {source}")


def _only(images: ImageSet, classes: Sequence[int] | None, source: str) -> ImageSet:
    """Return the images with these class numbers; all images if `classes` is None."""
    if classes is None:
        return images
    chosen = [number for number, label in enumerate(images.labels) if label in classes]
    if not chosen:
        why = f"; {images.unlabelled}" if images.unlabelled else ""
        raise ValueError(f"{source} has no image of the classes {', '.join(map(str, classes))} (data.classes){why}")
    return images.subset(chosen)


def load_all(source: str, preprocess: Preprocess, model_classes: Classes | None = None) -> ImageSet:
    """Return all images of a source's validation part, or of the whole source if it has no such part.

    model_classes: see `load_images`.
    """
    if (held_out := _open(source, False, preprocess, None, model_classes)) is not None:
        return held_out
    images = _open(source, True, preprocess, None, model_classes)
    assert images is not None  # every source has at least one of the two parts
    images.whole = True
    return images


def _open(
    source: str, train: bool, preprocess: Preprocess, most: int | None, model_classes: Classes | None
) -> ImageSet | None:
    """Return one part of a source; None if it has no such part. most: limit on images streamed from the hub."""
    path = Path(source).expanduser()
    if source != FASHION and path.exists():
        IMAGES.require(path)
    if source == FASHION or (path.is_dir() and any(path.glob("*-ubyte*"))):
        return from_fashion(path if path.is_dir() else None, train, preprocess, model_classes)
    if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
        return from_parquet(path, train, preprocess, model_classes)
    if path.is_dir():
        return from_folder(path, train, preprocess, model_classes)
    name, config = hub_data_set(source, IMAGES.accepted, bare=True)
    return from_hub(source, name, config, train, preprocess, most, model_classes)
