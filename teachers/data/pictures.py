"""Decode images of any kind into the form that models read: upright, 8 bits a channel, grey or RGB."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 200
"""Largest ratio of an image's sides; images beyond it are refused, as in Qwen2-VL's processor: resized by its short
side, such an image would take gigabytes."""

_GREY = ("1", "L", "LA")
_RANGES = (1, 255, 65535)
"""Usual maxima of 32-bit pixel values (1 for floats only): the smallest that holds all values of an image is white."""


def open_image(file: str | Path | BinaryIO) -> Image:
    """Return the image in a file, fully decoded and converted by `standard`. Raises whatever Pillow raises, and
    ValueError for an image that is too long (see LONGEST)."""
    from PIL import Image

    with Image.open(file) as image:
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels: one side is over {LONGEST} times the other")
        return standard(image)


def open_row(row: Any) -> Image:
    """Return the image in a cell of a table, as `open_image` does; row: a dictionary with encoded bytes or a path, as
    `datasets` stores it, or the bytes alone. Raises ValueError if the cell holds neither."""
    data = row["bytes"] if isinstance(row, dict) else row
    if data is None and isinstance(row, dict):
        data = row["path"]
    if data is None:
        raise ValueError("there is no image")
    if not isinstance(data, bytes | str | Path):
        raise ValueError(f"its image is neither a path nor bytes but {str(data)[:60]!r}")
    return open_image(io.BytesIO(data) if isinstance(data, bytes) else data)


def standard(image: Image, mode: str | None = None) -> Image:
    """Return an image turned as its EXIF orientation says, with 8 bits a channel, as transformers' `load_image` does.

    mode: "L" or "RGB"; None chooses "L" for grey images, else "RGB". Grey levels of 16 bits are scaled by their whole
    range, those of 32 bits by the smallest usual range that holds them. Transparency is dropped.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("P", "PA"):  # a palette's colours may be transparent, which converting to RGB warns of
        image = image.convert("RGBA")
    return image.convert(mode or ("L" if image.mode in _GREY else "RGB"))


def _eight_bits(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no value of it is a finite number")
    values = np.nan_to_num(values, posinf=finite.max()).clip(min=0)
    if image.mode.startswith("I;16"):
        top = 65535
    else:
        ranges = _RANGES if image.mode == "F" else _RANGES[1:]
        top = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))
