"""Images of any kind come upright, in 8 bits, grey or RGB, as transformers' own loader has them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from teachers.data.pictures import open_image, open_row, standard

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def colours(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(orientation: int, tmp_path: Path) -> None:
    image = colours().resize((10, 6))
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    found = open_image(tmp_path / "photo.png")
    assert np.array_equal(np.asarray(found), np.asarray(load_image(str(tmp_path / "photo.png"))))
    assert found.size == ((6, 10) if orientation > 4 else (10, 6))
    assert np.array_equal(np.asarray(standard(found)), np.asarray(found))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1"])
@pytest.mark.filterwarnings("error")
def test_modes_become_grey_or_rgb_as_transformers_has_them(mode: str) -> None:
    image = colours("RGB").convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5)))
    file, options = io.BytesIO(), {"transparency": bytes(range(200))} if mode == "P" else {}
    image.save(file, "TIFF" if mode == "CMYK" else "PNG", **options)
    found = open_row({"bytes": file.getvalue(), "path": None})
    assert found.mode == ("L" if mode in ("L", "LA", "1") else "RGB")
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "pixels",
    [
        GREY.astype(np.uint16) * 257,
        GREY.astype(np.int32) * 257,
        GREY.astype(np.int32),
        GREY.astype(np.float32),
        GREY.astype(np.float32) / 255,
    ],
)
def test_deep_grey_is_scaled(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "grey.tiff")
    found = open_image(tmp_path / "grey.tiff")
    assert found.mode == "L" and np.array_equal(np.asarray(found), GREY)
    assert np.array_equal(np.asarray(standard(Image.fromarray(pixels), "RGB"))[..., 1], GREY)


def test_16_bits_of_png_are_scaled_by_their_whole_range(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "dark.png")  # at most 255 of 65,535
    assert int(np.asarray(open_image(tmp_path / "dark.png")).max()) == 1


@pytest.mark.parametrize(("size", "good"), [((1, 200), True), ((201, 1), False), ((2, 403), False)])
def test_images_that_would_burst_when_resized_are_refused(size: tuple[int, int], good: bool, tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "long.png")
    if good:
        assert open_image(tmp_path / "long.png").size == size
    else:
        with pytest.raises(ValueError, match="one side is over 200 times the other"):
            open_image(tmp_path / "long.png")


def test_rows_are_bytes_or_paths(tmp_path: Path) -> None:
    colours().save(tmp_path / "a.png")
    rows = [{"bytes": None, "path": str(tmp_path / "a.png")}, (tmp_path / "a.png").read_bytes()]
    assert all(np.array_equal(np.asarray(open_row(row)), np.asarray(colours())) for row in rows)
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="there is no image"):
            open_row(nothing)
    with pytest.raises(ValueError, match="neither a path nor bytes but '3'"):
        open_row(3)


def test_values_that_are_no_numbers_count_for_nothing() -> None:
    values = np.array([[np.nan, 200.0], [np.inf, -np.inf]], np.float32)
    assert np.asarray(standard(Image.fromarray(values))).tolist() == [[0, 200], [200, 0]]
    with pytest.raises(ValueError, match="no value of it is a finite number"):
        standard(Image.fromarray(np.full_like(values, np.nan)))
