"""Images from folders, parquet files and Fashion-MNIST's own files."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from teachers.data.images import class_numbers, load_all, load_images


def save_image(path: Path, value: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of ImageNet, 4 images to train on and 2 others in each; the red of an image says which it is."""
    for number, name in enumerate(("n01443537", "n01496331", "n02123045")):
        for place in range(4):
            save_image(tmp_path / "train" / name / f"{place}.png", 10 * number + place)
        for place in range(2):
            save_image(tmp_path / "val" / name / f"{place}.JPEG", 100)
    return tmp_path


def reds(pixels: torch.Tensor) -> list[int]:
    return pixels[:, 0, 0, 0].tolist()


def test_a_folder_with_imagenets_names_gets_imagenets_numbers(folder: Path) -> None:
    data = load_images(str(folder), pil_to_tensor, held_out=5, seed=0)
    assert (len(data.train), len(data.held_out)) == (12, 5)
    assert set(data.train.labels) == {1, 5, 281}
    pixels, labels = data.train.load(range(12))
    assert reds(pixels) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert labels.tolist() == [1] * 4 + [5] * 4 + [281] * 4
    assert len(load_all(str(folder), pil_to_tensor)) == 6


def test_other_names_are_numbered_in_order() -> None:
    assert class_numbers(["cat", "dog", "n01443537"]) == {"cat": 0, "dog": 1, "n01443537": 2}


def test_a_folder_without_parts_is_divided(folder: Path) -> None:
    data = load_images(str(folder / "train"), pil_to_tensor, held_out=4, seed=1)
    again = load_images(str(folder / "train"), pil_to_tensor, held_out=4, seed=1)
    train, other = (reds(part.load(range(len(part)))[0]) for part in (data.train, data.held_out))
    assert len(train) == 8 and not set(train) & set(other)
    assert reds(again.held_out.load(range(4))[0]) == other


def test_classes_and_numbers_of_images_can_be_chosen(folder: Path) -> None:
    data = load_images(str(folder), pil_to_tensor, held_out=9, seed=0, max_images=3, classes=[5, 281])
    assert len(data.train) == 3 and set(data.train.labels) <= {5, 281}
    assert set(data.held_out.labels) == {5, 281}
    with pytest.raises(ValueError, match=r"no image of the classes 7 \(data.classes\)"):
        load_images(str(folder), pil_to_tensor, held_out=1, seed=0, classes=[7])


def test_broken_images_are_left_out_and_counted(folder: Path) -> None:
    (folder / "train" / "n01443537" / "1.png").write_bytes(b"no image")
    data = load_images(str(folder), pil_to_tensor, held_out=1, seed=0)
    pixels, labels = data.train.load(range(4))
    assert reds(pixels) == [0, 2, 3] and len(labels) == 3
    assert data.train.broken == {1}
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        data.train.load([1])


def test_parquet_files_are_told_apart_by_name(tmp_path: Path) -> None:
    def table(values: list[int]) -> datasets.Dataset:
        encoded = []
        for value in values:
            file = io.BytesIO()
            Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "png")
            encoded.append({"bytes": file.getvalue(), "path": None})
        return datasets.Dataset.from_dict({"image": encoded, "label": [v % 2 for v in values]})

    table([1, 2, 3]).to_parquet(tmp_path / "x_train.parquet")
    table([4, 5]).to_parquet(tmp_path / "x_test.parquet")
    data = load_images(str(tmp_path), pil_to_tensor, held_out=2, seed=0)
    pixels, labels = data.train.load([2, 0])
    assert reds(pixels) == [3, 1] and labels.tolist() == [1, 1]
    assert reds(data.held_out.load([0, 1])[0]) == [4, 5]
    assert len(load_images(str(tmp_path / "x_train.parquet"), pil_to_tensor, held_out=1, seed=0).train) == 2


def test_fashion_mnist_from_its_four_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "files"
    source.mkdir()

    def write(name: str, values: np.ndarray) -> None:
        header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
        (source / f"{name}.gz").write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))

    for name, count in (("train", 3), ("t10k", 2)):
        write(f"{name}-images-idx3-ubyte", np.arange(count)[:, None, None] * np.ones((1, 28, 28)))
        write(f"{name}-labels-idx1-ubyte", np.arange(count))
    data = load_images(str(source), pil_to_tensor, held_out=2, seed=0)
    pixels, labels = data.train.load([0, 1, 2])
    assert pixels.shape == (3, 1, 28, 28)
    assert reds(pixels) == labels.tolist() == [0, 1, 2]
    assert len(data.held_out) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: p, "has no class sub-folders"),
        (lambda p: (p / "notes.txt").write_text("x") and p / "notes.txt", "unknown kind of file"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_images(str(make(tmp_path)), pil_to_tensor, held_out=1, seed=0)
    assert "\n" not in str(error.value)
