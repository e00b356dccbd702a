"""Images of any kind as models read them: upright, in 8 bits, grey or RGB."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 200
"""An image whose one side is more than so many times the other is refused, as Qwen2-VL's processor does: resized by its
short side it would take gigabytes."""

_GREY = ("1", "L", "LA")
_RANGES = (1, 255, 65535)
"""What values of 32 bits may go up to: the smallest that holds an image's values is taken."""


def open_image(file: str | Path | BinaryIO) -> Image:
    """The image in a file, read to its end, as `standard` has it. Raises whatever Pillow raises, and ValueError for an
    image that is too long."""
    from PIL import Image

    with Image.open(file) as image:
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels: one side is over {LONGEST} times the other")
        return standard(image)


def open_row(row: Any) -> Image:
    """As `open_image`, of an image as `datasets` stores it (encoded bytes, or a path), or of the bytes alone."""
    data = row["bytes"] if isinstance(row, dict) else row
    if data is None and isinstance(row, dict):
        data = row["path"]
    if data is None:
        raise ValueError("there is no image")
    return open_image(io.BytesIO(data) if isinstance(data, bytes) else data)


def standard(image: Image, mode: str | None = None) -> Image:
    """An image turned as its EXIF orientation says, with 8 bits a channel, as transformers' `load_image` has it.

    mode: "L" or "RGB"; None: what fits the image. Grey levels of 16 bits are scaled by their whole range, those of 32
    bits by the smallest usual range that holds them. Transparency is dropped.
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
