"""Images to train on and to measure on, of any source: folders, parquet files, hub data sets, Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teachers.data.classes import Classes
from teachers.data.image_set import ImageSet, Preprocess
from teachers.data.image_sources import ACCEPTED, FASHION, from_fashion, from_folder, from_hub, from_parquet
from teachers.data.left_out import LeftOut
from teachers.data.parts import HELD_OUT_NAMES
from teachers.data.records import hub_data_set


@dataclass(frozen=True)
class ImageData:
    """Images to train on, and others to measure on."""

    train: ImageSet
    held_out: ImageSet
    description: str
    """What they are, for the user to read."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Images that cannot be used, of one part and of the other."""
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
    """Images to train on, and `held_out` others: of the source's own validation part where it has one.

    `seed` chooses both; at most `max_images` are trained on. classes: take only images of these. model_classes: the
    model's own classes, to which those of the data are matched by name. Raises ValueError with one line for a source
    that cannot be read, has too few images, or has mostly images that cannot be used.
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
    return ImageData(train, other, f"{train.usable:,} images of {source}")


def _only(images: ImageSet, classes: Sequence[int] | None, source: str) -> ImageSet:
    """The images of some classes; None: all."""
    if classes is None:
        return images
    chosen = [number for number, label in enumerate(images.labels) if label in classes]
    if not chosen:
        why = f"; {images.unlabelled}" if images.unlabelled else ""
        raise ValueError(f"{source} has no image of the classes {', '.join(map(str, classes))} (data.classes){why}")
    return images.subset(chosen)


def load_all(source: str, preprocess: Preprocess, model_classes: Classes | None = None) -> ImageSet:
    """The validation part of a source, or all of it where it has no parts; model_classes: as `load_images` has it."""
    images = _open(source, False, preprocess, None, model_classes)
    images = images if images is not None else _open(source, True, preprocess, None, model_classes)
    assert images is not None  # one of the two
    return images


def _open(
    source: str, train: bool, preprocess: Preprocess, most: int | None, model_classes: Classes | None
) -> ImageSet | None:
    """One part of a source; None where it has no such part. most: how many are wanted, of what is only streamed."""
    path = Path(source).expanduser()
    if source == FASHION or (path.is_dir() and any(path.glob("*-ubyte*"))):
        return from_fashion(path if path.is_dir() else None, train, preprocess, model_classes)
    if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
        return from_parquet(path, train, preprocess, model_classes)
    if path.is_dir():
        return from_folder(path, train, preprocess, model_classes)
    name, config = hub_data_set(source, ACCEPTED, bare=True)
    return from_hub(source, name, config, train, preprocess, most, model_classes)
