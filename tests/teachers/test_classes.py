"""Matching the classes of data to a model's classes: a class is never matched wrongly without a message."""

from __future__ import annotations

import pytest
import timm
import transformers

from teachers.data.classes import Classes, labels_of_column, labels_of_names, named, unnamed
from teachers.families.image import classes_of

PETS = named({0: ["Egyptian cat"], 1: ["dog, hound"], 2: ["bird"], 3: ["crane"], 4: ["crane"]})
IMAGENET = unnamed(1000)


@pytest.mark.parametrize(
    ("names", "model", "numbers"),
    [
        (["bird", "dog", "egyptian_cat"], PETS, [2, 1, 0]),
        (["001.Bird", "Hound"], PETS, [2, 1]),
        (["bird", "fish"], PETS, [2, -1]),
        (["crane", "bird"], PETS, [-1, 2]),  # two classes of the model have the name crane
        (["a", "b", "c", "d", "e"], PETS, [-1] * 5),  # as many as the model's, but other names
        (["0", "1", "4"], PETS, [0, 1, 4]),
        (["n01440764", "n02123045"], IMAGENET, [0, 281]),
        (["goldfish", "tabby", "tench"], IMAGENET, [1, 281, 0]),
        (["cat", "dog"], IMAGENET, [-1, -1]),
        (["a", "b", "c"], unnamed(3), [0, 1, 2]),
        (["a", "b"], unnamed(3), [-1, -1]),
        (["class0", "class10", "class2"], unnamed(12), [0, 10, 2]),
        (["000", "007"], unnamed(12), [0, 7]),
        (["class3", "other4"], unnamed(12), [-1, -1]),
        ([str(n) for n in range(1, 13)], unnamed(12), [-1] * 12),  # the order is unclear: as text or as numbers
        ([f"{n:02}" for n in range(1, 13)], unnamed(12), list(range(12))),
        ([f"n0{n}" for n in range(1440764, 1440767)], unnamed(3), [0, 1, 2]),
        (["a", "b"], None, [0, 1]),
        (["n01440764", "n02123045"], None, [0, 281]),
        (["cat", "n01440764"], None, [0, 1]),
    ],
)
def test_classes_are_matched_by_name(names: list[str], model: Classes | None, numbers: list[int]) -> None:
    found = labels_of_names(names, model)
    assert found.numbers == numbers
    assert (found.missing is None) == (-1 not in numbers)


def test_what_is_missing_is_said() -> None:
    assert labels_of_names(["bird", "fish"], PETS).missing == (
        "1 of 2 classes of the data (fish) are none of the model's"
    )
    assert "(a, b, c, d, e, ...) are none of the model's, whose 4 have no names" in (
        labels_of_names(list("abcdefg"), unnamed(4)).missing or ""
    )


def test_models_of_imagenet_by_name_know_its_synsets() -> None:
    info = timm.data.ImageNetInfo()
    model = named({number: [info.index_to_description(number)] for number in range(1000)})
    assert labels_of_names(["n01440764", "n02123045"], model).numbers == [0, 281]
    other = named({number: [f"thing {number}"] for number in range(1000)})
    assert labels_of_names(["n01440764", "thing 7"], other).numbers == [-1, 7]


@pytest.mark.parametrize(
    ("values", "names", "model", "numbers"),
    [
        ([0, 2, None, 1.0, float("nan"), -1], None, PETS, [0, 2, -1, 1, -1, -1]),
        (["bird", None, "dog"], None, PETS, [2, -1, 1]),
        (["cat", "dog", "cat"], None, None, [0, 1, 0]),
        ([1, 0, 1], ["bird", "dog"], PETS, [1, 2, 1]),
        ([1, 0, None], ["b", "a"], unnamed(2), [1, 0, -1]),  # the only order known is the data's
        ([0, 7], None, PETS, [-1, -1]),
        ([[0], [1]], None, PETS, [-1, -1]),
        ([0.5, 1], None, PETS, [-1, -1]),
        ([None, None], None, PETS, [-1, -1]),
        ([True, False], None, unnamed(2), [1, 0]),
    ],
)
def test_labels_may_be_numbers_names_or_nothing(
    values: list, names: list[str] | None, model: Classes | None, numbers: list[int]
) -> None:
    assert labels_of_column(values, names, model).numbers == numbers


def test_labels_that_are_none_are_explained() -> None:
    assert "a class number 7, but the model tells 5 apart" in (labels_of_column([0, 7], None, PETS).missing or "")
    assert "here one is '[0]'" in (labels_of_column([[0]], None, PETS).missing or "")
    assert labels_of_column([None, 0], None, PETS).missing is None


def test_the_parts_of_a_table_share_their_classes() -> None:
    assert labels_of_column(["b", "c"], None, None, others=["a", "b"]).numbers == [1, 2]


def test_models_say_what_they_tell_apart() -> None:
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    names = {0: "cat", 1: "dog"}
    config = transformers.ViTConfig(**sizes, patch_size=4, id2label=names, label2id={"cat": 0, "dog": 1, "hound": 1})
    model = classes_of(transformers.ViTForImageClassification(config))
    assert model is not None and (model.count, model.names) == (2, {"cat": 0, "dog": 1, "hound": 1})
    config = transformers.ViTConfig(**sizes, patch_size=4, num_labels=3)
    assert classes_of(transformers.ViTForImageClassification(config)) == unnamed(3)
    assert classes_of(transformers.ViTModel(config)) is None
    arguments = dict(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments)
    assert classes_of(model) == unnamed(2)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "label_names": ["n1", "n2"],
        "label_descriptions": {"n2": "dog, pet"},
    }
    found = classes_of(model)
    assert found is not None and found.names == {"n1": 0, "n2": 1, "dog pet": 1, "dog": 1, "pet": 1}
    assert classes_of(timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)) is None
