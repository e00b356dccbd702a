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
from torchvision.datasets import FashionMNIST
from torchvision.transforms.functional import pil_to_tensor

from teachers.data import image_sources
from teachers.data.classes import named
from teachers.data.images import load_all, load_images
from teachers.data.parts import is_held_out


def save_image(path: Path, value: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three ImageNet classes, each with 4 images to train on, told apart by their red, and 2 others."""
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


def test_broken_images_are_left_out_counted_and_named_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = folder / "train" / "n01443537" / "1.png"
    broken.write_bytes(b"no image")
    data = load_images(str(folder), pil_to_tensor, held_out=1, seed=0)
    part = data.train
    assert caplog.messages == [f"left out: {broken}: no image, or of a kind that cannot be read"]
    assert [number for number, _ in part.readable(range(4))] == [0, 2, 3]
    pixels, labels = part.load_readable(range(4))
    assert reds(pixels) == [0, 2, 3] and len(labels) == 3
    assert part.load_readable([1]) is None
    assert part.broken == 1 and part.subset([0, 1]).broken == 1 and part.subset([0]).broken == 0
    assert [str(one) for one in data.left_out if len(one)] == [
        f"1 of 12 images of {folder / 'train'} are left out: broken, or of no use",
    ]
    assert len(caplog.messages) == 1


def test_others_stand_in_for_broken_images(folder: Path) -> None:
    for name in ("1", "2"):
        (folder / "train" / "n01443537" / f"{name}.png").write_bytes(b"")
    part = load_images(str(folder), pil_to_tensor, held_out=1, seed=0).train
    shown = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]  # red of each image
    for chosen, found in (([1], [3]), ([0, 1], [0, 3]), ([11, 2], [11, 3]), ([2, 11], [11, 0]), ([0, 3, 1], [0, 3, 4])):
        pixels, labels = part.load(chosen)
        assert reds(pixels) == [shown[number] for number in found]
        assert labels.tolist() == [part.labels[number] for number in found]
    few = part.subset([1, 0, 2])
    assert reds(few.load([0, 1, 2])[0]) == [0, 0, 0]
    with pytest.raises(ValueError, match=r"none of 2 images can be read, such as .*1\.png: "):
        part.subset([1, 2]).load([0])


def test_half_may_be_broken_and_more_may_not(folder: Path) -> None:
    files = sorted((folder / "train").rglob("*.png"))
    for file in files[:6]:
        file.write_bytes(b"")
    assert load_images(str(folder), pil_to_tensor, held_out=1, seed=0).train.broken == 6
    files[6].write_bytes(b"")
    with pytest.raises(ValueError, match=r"7 of 12 images of .*train cannot be used, such as .*0\.png: no image"):
        load_images(str(folder), pil_to_tensor, held_out=1, seed=0)


def test_images_of_many_kinds_are_refused_for_a_reason(folder: Path) -> None:
    cut = folder / "train" / "n01443537" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-60])
    save_image(folder / "train" / "n01443537" / "1.png", 0, size=9)
    Image.new("RGB", (1, 201)).save(folder / "train" / "n01443537" / "2.png")
    reasons = load_images(str(folder), pil_to_tensor, held_out=1, seed=0).train.left_out.reasons
    told = [reasons[str(folder / "train" / "n01443537" / f"{n}.png")] for n in range(3)]
    assert "truncated" in told[0].lower()
    assert told[1] == "as the model's input it is 3 x 9 x 9, where the others are 3 x 8 x 8"
    assert told[2] == "1 x 201 pixels: one side is over 200 times the other"


def test_what_is_hidden_or_empty_is_no_class(folder: Path) -> None:
    before = load_images(str(folder), pil_to_tensor, held_out=4, seed=0)
    for name in ("train/.ipynb_checkpoints", "train/0 empty", "val/__MACOSX", "train/@eaDir"):
        (folder / name).mkdir()
    save_image(folder / "train" / ".ipynb_checkpoints" / "0-checkpoint.png", 1)
    (folder / "val" / "n01443537" / "._0.JPEG").write_bytes(b"Mac OS X")
    (folder / "val" / "__MACOSX" / "0.png").write_bytes(b"Mac OS X")
    (folder / "train" / "0 empty" / "notes.txt").write_text("none yet")
    after = load_images(str(folder), pil_to_tensor, held_out=4, seed=0)
    assert (after.train.items, after.train.labels) == (before.train.items, before.train.labels)
    assert after.held_out.items == before.held_out.items


@pytest.mark.parametrize(
    "names", [("Train", "Val"), ("TRAIN", "Test"), ("training", "validation"), ("train2017", "val2017")]
)
def test_parts_are_found_whatever_the_case(folder: Path, names: tuple[str, str]) -> None:
    (folder / "train").rename(folder / names[0])
    (folder / "val").rename(folder / names[1])
    data = load_images(str(folder), pil_to_tensor, held_out=6, seed=0)
    assert (len(data.train), len(data.held_out), set(data.train.labels)) == (12, 6, {1, 5, 281})


def test_classes_are_matched_to_the_models(folder: Path) -> None:
    names = {"n01443537": "goldfish", "n01496331": "ray", "n02123045": "tabby"}
    for part in ("train", "val"):
        for old, new in names.items():
            (folder / part / old).rename(folder / part / new)
    model = named({0: ["Tabby cat", "tabby"], 1: ["Gold-Fish", "goldfish"]})
    data = load_images(str(folder), pil_to_tensor, held_out=6, seed=0, model_classes=model)
    assert data.train.labels == [1] * 4 + [-1] * 4 + [0] * 4
    assert data.held_out.unlabelled == "1 of 3 classes of the data (ray) are none of the model's"
    with pytest.raises(ValueError, match=r"no image of the classes 7 .*; 1 of 3 classes of the data \(ray\)"):
        load_images(str(folder), pil_to_tensor, held_out=1, seed=0, classes=[7], model_classes=model)


def parquet(path: Path, values: list[int], labels: list | None = None) -> None:
    encoded = []
    for value in values:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "png")
        encoded.append({"bytes": file.getvalue() if value >= 0 else b"torn", "path": None})
    columns = {"image": encoded} | ({} if labels is None else {"label": labels})
    datasets.Dataset.from_dict(columns).to_parquet(path)


def table(path: Path, images: list[int]) -> Path:
    """Write a parquet file with this column `image`, and return its path."""
    datasets.Dataset.from_dict({"image": images}).to_parquet(path)
    return path


def test_labels_of_parquet_may_be_names_or_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tables [1]"  # characters with a meaning in glob patterns
    folder.mkdir()
    parquet(folder / "train.parquet", [1, 2, 3], ["dog", None, "cat"])
    parquet(folder / "test.parquet", [4, 5], ["dog", "bird"])
    data = load_images(str(folder), pil_to_tensor, held_out=2, seed=0)
    assert (data.train.labels, data.held_out.labels) == ([2, -1, 1], [2, 0])
    assert data.train.classes == ("bird", "cat", "dog")
    parquet(tmp_path / "null.parquet", [1, 2, 3], [None, 1, None])
    assert load_all(str(tmp_path / "null.parquet"), pil_to_tensor).labels == [-1, 1, -1]


def test_a_broken_row_is_named_by_file_and_row(tmp_path: Path) -> None:
    parquet(tmp_path / "a-train.parquet", [1, 2], [0, 1])
    parquet(tmp_path / "b-train.parquet", [3, -1, 4], [0, 1, 0])
    parquet(tmp_path / "latest.parquet", [5], [0])  # "test" only within a word
    data = load_images(str(tmp_path), pil_to_tensor, held_out=1, seed=0)
    assert len(data.train) == 5
    assert list(data.train.left_out.reasons) == [f"{tmp_path / 'b-train.parquet'}, row 2"]


@pytest.mark.parametrize(
    ("stem", "held_out"),
    [
        *((stem, True) for stem in ("val", "x_test", "validation-00000-of-00001", "Valid", "data.dev", "val2017")),
        *((stem, False) for stem in ("train", "latest", "interval", "contest", "evaluation", "medieval", "testament")),
        *((stem, False) for stem in ("test_set-train-00", "valentine", "devices", "data")),
        ("train-images-test", True),
    ],
)
def test_names_of_parts_are_whole_words(stem: str, held_out: bool) -> None:
    assert is_held_out(Path(f"{stem}.parquet")) == held_out


def test_parquet_files_are_told_apart_by_name(tmp_path: Path) -> None:
    parquet(tmp_path / "x_train.parquet", [1, 2, 3], [1, 0, 1])
    parquet(tmp_path / "x_test.parquet", [4, 5], [0, 1])
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
    write("train-labels-idx1-ubyte", np.array([2, 1, 0]))  # changed files are read anew
    assert load_images(str(source), pil_to_tensor, held_out=2, seed=0).train.load([0, 1, 2])[1].tolist() == [2, 1, 0]


def test_fashion_mnist_after_a_download_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path))
    monkeypatch.setattr(image_sources, "DEBIAN_FASHION", tmp_path / "none")
    monkeypatch.setattr(FashionMNIST, "mirrors", [(tmp_path / "none").as_uri() + "/"])
    for _ in range(2):  # leftovers of the first are not taken for the files
        with pytest.raises(OSError, match=r"fashion-mnist cannot be fetched \(Error downloading .*No such file"):
            load_images("fashion-mnist", pil_to_tensor, held_out=2, seed=0)


def test_a_folder_is_walked_once_however_links_lead_there(folder: Path) -> None:
    (folder / "train" / "n01443537" / "loop").symlink_to(folder / "train")
    (folder / "train" / "n01496331" / "twice").symlink_to(folder / "train" / "n01496331")
    assert len(load_images(str(folder), pil_to_tensor, held_out=5, seed=0).train) == 12


def test_parts_are_found_in_the_one_folder_of_an_archive(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    for part in ("train", "val"):
        (tmp_path / part).rename(tmp_path / "pets" / part)
    (tmp_path / "__MACOSX").mkdir()
    data = load_images(str(tmp_path), pil_to_tensor, held_out=5, seed=0)
    assert (len(data.train), set(data.train.labels)) == (12, {1, 5, 281})


@pytest.mark.parametrize("ending", [".gif", ".jfif", ".WEBP", ".avif"])
def test_files_of_every_usual_ending_are_images(ending: str, folder: Path) -> None:
    image = Image.open(folder / "train" / "n01443537" / "0.png")
    image.save(folder / "train" / "n01443537" / f"5{ending}", format="JPEG" if ending == ".jfif" else None)
    train = load_images(str(folder), pil_to_tensor, held_out=5, seed=0).train
    assert len(train) == 13 and len(train.load(range(13))[0]) == 13 and not train.left_out


def test_images_of_a_kind_that_cannot_be_read_are_named(folder: Path) -> None:
    (folder / "train" / "n01443537" / "IMG_1.HEIC").write_bytes(b"....ftypheic")
    train = load_images(str(folder), pil_to_tensor, held_out=5, seed=0).train
    assert list(train.left_out.reasons.values()) == ["no image, or of a kind that cannot be read"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "a.parquet").write_text("x") and p / "a.parquet", r"a\.parquet cannot be read"),
        (lambda p: table(p / "a.parquet", [1, 2]), r"a\.parquet has no images in its column image"),
        (lambda p: table(p / "a.parquet", []), r"a\.parquet has no rows"),
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: p, "has no class sub-folders"),
        (lambda p: (p / "notes.txt").write_text("x") and p / "notes.txt", "unknown kind of file"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_images(str(make(tmp_path)), pil_to_tensor, held_out=1, seed=0)
    assert "\n" not in str(error.value)
