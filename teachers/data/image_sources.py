"""Sources of labelled images: for each kind of source, a function that returns its training or held-out part."""

from __future__ import annotations

import glob
import gzip
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import hub
from teachers.cache import cache_folder, published
from teachers.data.classes import Classes, Labels, labels_of_column, labels_of_names
from teachers.data.image_set import ImageSet, Preprocess
from teachers.data.kinds import IMAGES
from teachers.data.left_out import LeftOut
from teachers.data.parts import HELD_OUT_NAMES, TRAIN_NAMES, folders_of_parts, is_held_out
from teachers.data.pictures import open_image, open_row
from teachers.data.records import visible
from teachers.quiet import first_line, one_line, quiet

if TYPE_CHECKING:
    from PIL.Image import Image

FASHION = "fashion-mnist"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Folder where Debian's package dataset-fashion-mnist puts the data set."""

ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".avif", ".heic", ".heif", ".jp2"),
    *(".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
)
"""Endings of image files; images that the installed Pillow cannot read are left out and reported."""


def from_folder(root: Path, train: bool, preprocess: Preprocess, model_classes: Classes | None) -> ImageSet | None:
    """Return the images of `root/train/CLASS/*.jpg` or `root/val/CLASS/*.jpg`; None if that part is missing.

    A folder without parts, `root/CLASS/*.jpg`, is all training part. Hidden folders and folders without an image are
    not classes.
    """
    root = _unpacked(root)
    parts = folders_of_parts(root)
    part = parts[0 if train else 1]
    if parts == (None, None):
        if not train:
            return None
        part = root
    if part is None:
        return None
    found = {one: _class_folders(one) for one in {part, *parts} if one is not None}
    if not any(child.is_dir() for child in part.iterdir()):
        raise ValueError(f"{part} has no class sub-folders; {IMAGES.accepted}")
    if not found[part]:
        raise ValueError(f"no images ({', '.join(ENDINGS)}) in the class sub-folders of {part}")
    names = sorted({name for classes in found.values() for name in classes})
    labels = labels_of_names(names, model_classes)
    number_of = dict(zip(names, labels.numbers, strict=True))
    files = [(file, number_of[name]) for name, inside in sorted(found[part].items()) for file in inside]
    return ImageSet(
        items=[file for file, _ in files],
        labels=[number for _, number in files],
        decode=_open_rgb,
        preprocess=preprocess,
        left_out=LeftOut(str(part), "images", len(files)),
        unlabelled=labels.missing,
        classes=labels.names,
    )


def _unpacked(root: Path) -> Path:
    """Return the only folder in `root` if it has train and val folders and `root` has none, as in unpacked archives;
    else `root`."""
    inside = [child for child in root.iterdir() if child.is_dir() and visible(child, root)]
    alone = len(inside) == 1 and folders_of_parts(root) == (None, None) != folders_of_parts(inside[0])
    return inside[0] if alone else root


def _class_folders(part: Path) -> dict[str, list[str]]:
    """Return the sorted image files of each class folder in a part, by the folder's name; folders without images are
    left out."""
    folders = [folder for folder in part.iterdir() if folder.is_dir() and visible(folder, part)]
    found = {folder.name: sorted(_images_below(folder)) for folder in folders}
    return {name: files for name, files in found.items() if files}


def _images_below(folder: Path) -> Iterator[str]:
    """Yield the paths of images in a folder and its sub-folders, visiting each folder once even if links lead back."""
    seen: set[str] = set()
    for place, inside, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(place)
        if real in seen or (place != str(folder) and folder.resolve().is_relative_to(real)):
            inside.clear()
            continue
        seen.add(real)
        inside[:] = [name for name in inside if visible(Path(name), Path())]
        yield from (os.path.join(place, n) for n in names if n.lower().endswith(ENDINGS) and not n.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _open_rgb(file: str) -> Image:
    return open_image(file).convert("RGB")


def from_parquet(path: Path, train: bool, preprocess: Preprocess, model_classes: Classes | None) -> ImageSet | None:
    """Return the images of a parquet file, which is all training part, or of a folder of parquet files, told apart by
    their names; None if the part is missing."""
    import datasets
    import pyarrow.parquet

    if path.is_file():
        every = files = [path] if train else []
    else:
        every = sorted(file for file in path.glob("*.parquet") if visible(file, path))
        files = [file for file in every if is_held_out(Path(file.name)) != train]
    if not files:
        return None
    with one_line(f"{path} cannot be read"):
        ends = list(accumulate(pyarrow.parquet.read_metadata(file).num_rows for file in files))
    if not ends[-1]:
        raise ValueError(f"{path} has no rows")
    datasets.disable_progress_bars()
    with one_line(f"{path} cannot be read"), quiet():
        rows = datasets.load_dataset(
            "parquet",
            data_files=[glob.escape(str(file.absolute())) for file in files],
            split="train",
            cache_dir=str(cache_folder() / "datasets"),
        )
    image, label = _columns(rows.column_names, str(path))
    names = _label_names(rows.features, label)
    values = rows[label][:] if label else [None] * len(rows)
    others = [file for file in every if file not in files] if any(isinstance(v, str) for v in values) else []
    known = [_column(file, label) for file in others if label]

    def name(number: int) -> str:
        place = bisect_right(ends, number)
        return f"{files[place]}, row {number - [0, *ends][place] + 1}"

    with one_line(f"{path} has no images in its column {image}"), quiet():
        rows = rows.cast_column(image, datasets.Image(decode=False))
    labels = labels_of_column(values, names, model_classes, list(chain.from_iterable(known)))
    return _table(str(path), partial(_decode_nth, rows, image), preprocess, labels, name)


def _column(file: Path, name: str) -> list[Any]:
    """Return the values of a column of a parquet file; an empty list if it has no such column."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, columns=[name])[name].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
    except KeyError:
        return []


def from_hub(
    source: str,
    repository: str,
    config: str | None,
    train: bool,
    preprocess: Preprocess,
    most: int | None,
    model_classes: Classes | None,
) -> ImageSet | None:
    """Return the images of a part of a hub data set, streamed: at most `most` images are fetched, as encoded bytes."""
    import datasets

    with hub.streamed(source, repository, config, TRAIN_NAMES if train else HELD_OUT_NAMES, IMAGES.accepted) as stream:
        if stream is None:
            return None
        if train:
            stream = stream.shuffle(seed=0, buffer_size=1000)
        image, label = _columns(stream.column_names or list(next(iter(stream))), source)
        names = _label_names(stream.features or {}, label)
        stream = stream.cast_column(image, datasets.Image(decode=False))
        rows = [(row[image], row[label] if label else None) for row in islice(stream, most)]
    labels = labels_of_column([value for _, value in rows], names, model_classes)
    decode = partial(_decode_nth, [{image: row} for row, _ in rows], image)
    return _table(source, decode, preprocess, labels, f"{source}, image {{}} as it is streamed".format)


def _table(
    source: str, decode: Callable[[int], Image], preprocess: Preprocess, labels: Labels, name: Callable[[int], str]
) -> ImageSet:
    """Return an image set whose items are the row numbers of a table."""
    count = len(labels.numbers)
    left_out = LeftOut(source, "images", count)
    return ImageSet(
        range(count), labels.numbers, decode, preprocess, left_out, name, labels.missing, classes=labels.names
    )


def _columns(names: Sequence[str], source: str) -> tuple[str, str | None]:
    """Return the names of the columns of images and of labels, the second None if there is no such column."""
    image = next((name for name in ("image", "img", "pixel_values") if name in names), None)
    if image is None:
        raise ValueError(f"{source} has the columns {', '.join(names)}; `image` is needed, and `label` for accuracy")
    return image, next((name for name in ("label", "labels", "fine_label") if name in names), None)


def _label_names(features: Any, label: str | None) -> list[str] | None:
    """Return the names of a hub data set's class numbers, or None if it has none."""
    import datasets

    feature = features.get(label)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _decode_nth(rows: Any, image: str, number: int) -> Image:
    return open_row(rows[number][image])


def from_fashion(folder: Path | None, train: bool, preprocess: Preprocess, model_classes: Classes | None) -> ImageSet:
    """Return a part of Fashion-MNIST (arXiv 1708.07747) from a folder with its four files; if `folder` is None, from
    Debian's package or else downloaded by torchvision."""
    from PIL import Image
    from torchvision.datasets import FashionMNIST

    folder = folder or (DEBIAN_FASHION if DEBIAN_FASHION.is_dir() else None)
    with quiet(stderr=True), tempfile.TemporaryDirectory() as unpacked:
        root = cache_folder() / FASHION if folder is None else Path(unpacked)
        raw = root / "FashionMNIST" / "raw"
        try:
            if folder is not None:
                raw.mkdir(parents=True)
                for file in folder.glob("*-ubyte*"):
                    opened = gzip.open if file.suffix == ".gz" else open
                    with opened(file, "rb") as source, (raw / file.stem).open("wb") as target:
                        shutil.copyfileobj(source, target)
            elif not (raw.is_dir() and any(raw.iterdir())):
                with published(raw) as workshop:
                    FashionMNIST(workshop, download=True)
                    (workshop / "FashionMNIST" / "raw").rename(workshop / raw.name)
            data = FashionMNIST(root, train=train)
        except Exception as error:
            reason = " ".join(str(error).split())  # torchvision's first line ends in front of the reason
            raise OSError(
                f"{FASHION} cannot be {'fetched' if folder is None else f'read from {folder}'} ({reason}): "
                "install Debian's dataset-fashion-mnist, or name a folder with its four files"
            ) from error
    labels = labels_of_column(data.targets.tolist(), list(data.classes), model_classes)
    pixels = data.data.numpy()
    return _table(
        FASHION, lambda number: Image.fromarray(pixels[number]), preprocess, labels, f"{FASHION}, image {{}}".format
    )
