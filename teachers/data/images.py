"""Labelled images for vision models: folders, parquet files, hub data sets, Fashion-MNIST."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from teachers import hub
from teachers.cache import cache_folder, published
from teachers.quiet import first_line, quiet

if TYPE_CHECKING:
    from PIL.Image import Image

Preprocess = Callable[["Image"], torch.Tensor]
"""What turns one image into a model's input [C, H, W]."""

FASHION = "fashion-mnist"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""

HELD_OUT_NAMES = ("val", "validation", "valid", "test")
"""What the part that is not trained on may be called: sub-folders, file names, splits."""

_SYNSET = re.compile(r"n\d{8}")
_HUB_DATASET = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?")
_ACCEPTED = (
    "--data takes a folder with train/ and val/ or class sub-folders, a parquet file or folder of them, "
    f"{FASHION}, or a hub data set (name or org/name)"
)
_READERS = 4
"""Threads that read images."""


@dataclass
class ImageSet:
    """Labelled images, read when they are asked for. Those that cannot be read are left out and counted."""

    items: Sequence[Any]
    """Whatever `decode` takes: paths, encoded bytes, arrays."""
    labels: list[int]
    """-1 where there is none."""
    decode: Callable[[Any], Image]
    preprocess: Preprocess
    broken: set[int] = field(default_factory=set)
    """Those that turned out to be unreadable."""

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, chosen: Sequence[int]) -> ImageSet:
        """Only these images, in this order."""
        items, labels = [self.items[i] for i in chosen], [self.labels[i] for i in chosen]
        return ImageSet(items, labels, self.decode, self.preprocess)

    def load(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, C, H, W] and labels [B] of these images; fewer where some are broken.

        Raises ValueError where none of them can be read.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            pixels = list(pool.map(self._read, chosen))
        kept = [(x, self.labels[i]) for x, i in zip(pixels, chosen, strict=True) if x is not None]
        if not kept:
            raise ValueError(f"none of {len(chosen)} images can be read, such as {str(self.items[chosen[0]])[:80]}")
        return torch.stack([x for x, _ in kept]), torch.tensor([label for _, label in kept])

    def _read(self, number: int) -> torch.Tensor | None:
        try:
            return self.preprocess(self.decode(self.items[number]))
        except Exception:  # image libraries raise whatever they like for a damaged file
            self.broken.add(number)
            return None


@dataclass(frozen=True)
class ImageData:
    """Images to train on, and others to measure on."""

    train: ImageSet
    held_out: ImageSet
    description: str
    """What they are, for the user to read."""


def load_images(
    source: str,
    preprocess: Preprocess,
    *,
    held_out: int,
    seed: int,
    max_images: int | None = None,
    classes: Sequence[int] | None = None,
) -> ImageData:
    """Images to train on, and `held_out` others: of the source's own validation part where it has one.

    `seed` chooses both; at most `max_images` are trained on. classes: take only images of these.
    Raises ValueError with one line for a source that cannot be read or has too few images.
    """
    train = _open(source, True, preprocess, max_images)
    other = _open(source, False, preprocess, held_out)
    train, other = (part if part is None else _only(part, classes, source) for part in (train, other))
    if train is None:
        raise ValueError(f"{source} has no images to train on, only a {' or '.join(HELD_OUT_NAMES)} part")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    if other is None:
        if len(order) <= held_out:
            raise ValueError(f"{source} has {len(order)} images: too few to hold out {held_out} (data.held_out)")
        order, set_aside = order[held_out:], order[:held_out]
        other = train.subset(sorted(set_aside))
    elif len(other) > held_out:
        chosen = torch.randperm(len(other), generator=torch.Generator().manual_seed(seed))[:held_out]
        other = other.subset(sorted(chosen.tolist()))
    train = train.subset(sorted(order[:max_images]))
    return ImageData(train, other, f"{len(train):,} images of {source}")


def _only(images: ImageSet, classes: Sequence[int] | None, source: str) -> ImageSet:
    """The images of some classes; None: all."""
    if classes is None:
        return images
    chosen = [number for number, label in enumerate(images.labels) if label in classes]
    if not chosen:
        raise ValueError(f"{source} has no image of the classes {', '.join(map(str, classes))} (data.classes)")
    return images.subset(chosen)


def load_all(source: str, preprocess: Preprocess) -> ImageSet:
    """The validation part of a source, or all of it where it has no parts."""
    images = _open(source, False, preprocess, None)
    images = images if images is not None else _open(source, True, preprocess, None)
    assert images is not None  # one of the two
    return images


def _open(source: str, train: bool, preprocess: Preprocess, most: int | None) -> ImageSet | None:
    """One part of a source; None where it has no such part. most: how many are wanted, of what is only streamed."""
    path = Path(source).expanduser()
    if source == FASHION or (path.is_dir() and any(path.glob("*-ubyte*"))):
        return _fashion(path if path.is_dir() else None, train, preprocess)
    if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
        return _parquet(path, train, preprocess)
    if path.is_dir():
        return _folder(path, train, preprocess)
    match = _HUB_DATASET.fullmatch(source)
    if not match or source.startswith((".", "/")):
        raise ValueError(f"no such file or folder: {source}; {_ACCEPTED}")
    return _hub(source, match, train, preprocess, most)


def _folder(root: Path, train: bool, preprocess: Preprocess) -> ImageSet | None:
    """`root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`, or `root/CLASS/*.jpg`, which has no parts."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader

    held_out = next((root / name for name in HELD_OUT_NAMES if (root / name).is_dir()), None)
    parts = [part for part in (root / "train", held_out) if part is not None and part.is_dir()]
    if not parts:
        if not train:
            return None
        parts = [root]
    part = (root / "train" if train else held_out) if parts != [root] else root
    if part is None or not part.is_dir():
        return None
    names = sorted({child.name for one in parts for child in one.iterdir() if child.is_dir()})
    if not names:
        raise ValueError(f"{part} has no class sub-folders; {_ACCEPTED}")
    samples = make_dataset(str(part), class_numbers(names), IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise ValueError(f"no images ({', '.join(IMG_EXTENSIONS)}) in the class sub-folders of {part}")
    return ImageSet([path for path, _ in samples], [label for _, label in samples], pil_loader, preprocess)


def class_numbers(names: Sequence[str]) -> dict[str, int]:
    """Class indices of sorted class names; ImageNet's synsets (n01440764) get ImageNet's own, however few there are."""
    if all(_SYNSET.fullmatch(name) for name in names):
        from timm.data import ImageNetInfo

        order = {name: number for number, name in enumerate(ImageNetInfo().label_names())}
        if all(name in order for name in names):
            return {name: order[name] for name in names}
    return {name: number for number, name in enumerate(names)}


def _parquet(path: Path, train: bool, preprocess: Preprocess) -> ImageSet | None:
    """A parquet file, which has no parts, or a folder of them, told apart by their names."""
    import datasets

    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"unknown kind of file: {path}; {_ACCEPTED}")
        files = [path] if train else []
    else:
        every = sorted(path.glob("*.parquet"))
        held_out = [f for f in every if any(name in f.name for name in HELD_OUT_NAMES)]
        files = [f for f in every if f not in held_out] if train else held_out
    if not files:
        return None
    datasets.disable_progress_bars()
    try:
        with quiet():
            rows = datasets.load_dataset(
                "parquet", data_files=[str(f) for f in files], split="train", cache_dir=str(cache_folder() / "datasets")
            )
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    return _rows(rows, str(path), preprocess)


def _hub(source: str, match: re.Match, train: bool, preprocess: Preprocess, most: int | None) -> ImageSet | None:
    """A hub data set, streamed: at most `most` of its images are fetched, in encoded form."""
    import datasets

    with hub.streamed(source, *match.groups(), ("train",) if train else HELD_OUT_NAMES, _ACCEPTED) as stream:
        if stream is None:
            return None
        if train:
            stream = stream.shuffle(seed=0, buffer_size=1000)
        image, label = _columns(stream.column_names or list(next(iter(stream))), source)
        stream = stream.cast_column(image, datasets.Image(decode=False))
        rows = [(row[image], row[label] if label else -1) for row in islice(stream, most)]
    return ImageSet([r for r, _ in rows], [int(r) for _, r in rows], decode_row, preprocess)


def _rows(rows: Any, source: str, preprocess: Preprocess) -> ImageSet:
    import datasets

    image, label = _columns(rows.column_names, source)
    rows = rows.cast_column(image, datasets.Image(decode=False))
    labels = [int(value) for value in rows[label]] if label else [-1] * len(rows)
    return ImageSet(range(len(rows)), labels, partial(_decode_nth, rows, image), preprocess)


def _columns(names: Sequence[str], source: str) -> tuple[str, str | None]:
    """The names of the columns of images and of labels, the second None where there is none."""
    image = next((name for name in ("image", "img", "pixel_values") if name in names), None)
    if image is None:
        raise ValueError(f"{source} has the columns {', '.join(names)}; `image` is needed, and `label` for accuracy")
    return image, next((name for name in ("label", "labels", "fine_label") if name in names), None)


def _decode_nth(rows: Any, image: str, number: int) -> Image:
    return decode_row(rows[number][image])


def decode_row(row: dict[str, Any]) -> Image:
    """An image as `datasets` stores it: encoded bytes, or a path."""
    from PIL import Image

    return Image.open(io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"])


def _fashion(folder: Path | None, train: bool, preprocess: Preprocess) -> ImageSet:
    """Fashion-MNIST (arXiv 1708.07747) from a folder of its four files, Debian's, or as torchvision fetches it."""
    from PIL import Image
    from torchvision.datasets import FashionMNIST

    folder = folder or (DEBIAN_FASHION if DEBIAN_FASHION.is_dir() else None)
    root = cache_folder() / FASHION
    raw = root / "FashionMNIST" / "raw"
    if folder is not None and not raw.is_dir():
        with published(raw) as workshop:
            (workshop / raw.name).mkdir()
            for file in folder.glob("*-ubyte*"):
                opened = gzip.open if file.suffix == ".gz" else open
                with opened(file, "rb") as source, (workshop / raw.name / file.stem).open("wb") as target:
                    shutil.copyfileobj(source, target)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            data = FashionMNIST(root, train=train, download=not raw.is_dir())
    except Exception as error:
        raise OSError(
            f"{FASHION} cannot be fetched ({first_line(error)}): install Debian's dataset-fashion-mnist, or name a "
            "folder with its four files"
        ) from error
    return ImageSet(data.data.numpy(), data.targets.tolist(), Image.fromarray, preprocess)
