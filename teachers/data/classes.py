"""Match the classes of a data set to a model's classes: by name, or by number where that is unambiguous."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5
"""Number of class names that an error message lists."""

_SYNSET = re.compile(r"n\d{8}")
_UNNAMED = re.compile(r"label_?\d+", re.IGNORECASE)
"""Placeholder names of transformers for classes without names, such as LABEL_0."""
_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True)
class Classes:
    """The classes that a model tells apart."""

    count: int
    names: Mapping[str, int] = field(default_factory=dict)
    """Class numbers by name, normalised by `plain`; empty if the model does not name its classes."""
    imagenet: Mapping[str, int] = field(default_factory=dict)
    """Class numbers of ImageNet by name, if the model names no classes but has as many as a version of ImageNet."""


@dataclass(frozen=True)
class Labels:
    """Class numbers of a list of classes or of a list of images."""

    numbers: list[int]
    """Class numbers; -1 for a class or image without one."""
    missing: str | None = None
    """Why classes of the data have no number, for the user to read; None if all have one."""
    names: tuple[str, ...] | None = None
    """The data's class names, if the numbers are indices in this list; otherwise None."""


def named(labels: Mapping[int, Iterable[str]]) -> Classes:
    """Return classes from the names of each class number; a name may be a list with commas: `tench, Tinca tinca`.

    If most names are those of ImageNet's classes, all of ImageNet's names and synsets (n01440764) are names too.
    """
    labels = {number: [name for name in names if not _UNNAMED.fullmatch(name)] for number, names in labels.items()}
    if not any(labels.values()):
        return unnamed(len(labels))
    found = _by_name(labels)
    known = _imagenet(len(labels))
    same = sum(any(known.get(plain(name)) == number for name in names) for number, names in labels.items())
    if 2 * same > len(labels):
        found = {**known, **found}
    return Classes(len(labels), found)


def unnamed(count: int) -> Classes:
    """Return `count` classes without names."""
    return Classes(count, imagenet=_imagenet(count))


def plain(name: str) -> str:
    """Return a name in lower case, with its words (letters and digits) separated by single spaces."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def labels_of_names(names: Sequence[str], model: Classes | None, *, ordered: bool = False) -> Labels:
    """Return the model's class number for each class name of the data.

    model: the model's classes; without them (None) numbers are those of ImageNet if all names are its synsets, else
    indices in `names`. ordered: `names` are in the data's own order, not sorted.
    """
    places = list(range(len(names)))
    if model is None:
        synsets = _imagenet(1000) if names and all(_SYNSET.fullmatch(name) for name in names) else {}
        if names and all(name in synsets for name in names):
            return Labels([synsets[name] for name in names])
        return Labels(places, names=tuple(names))
    found = [_number(name, model.names) for name in names]
    if not any(number >= 0 for number in found):
        guess = [_number(name, model.imagenet) for name in names]
        if 2 * sum(number >= 0 for number in guess) >= len(names):
            found = guess
        elif numbers := _by_number(names, model.count):
            found = numbers
        elif not model.names and len(names) == model.count and (ordered or _one_order(names)):
            found = places
    return Labels(found, _missing(names, found, model))


def labels_of_column(
    values: Sequence[Any], names: Sequence[str] | None, model: Classes | None, others: Sequence[Any] = ()
) -> Labels:
    """Return the model's class number for each value of a column, which may hold numbers, names or nulls.

    names: class names that belong to the numbers in the column, if known. others: the same column of the data's other
    part, so that both parts number their names alike.
    """
    texts = sorted({value for value in (*values, *others) if isinstance(value, str)})
    if names is None and texts:
        classes = labels_of_names(texts, model)
        places = [texts.index(value) if isinstance(value, str) else -1 for value in values]
    else:
        places = [_whole(value) for value in values]
        if names is None:
            return _as_they_are(values, places, model)
        classes = labels_of_names(names, model, ordered=True)
    numbers = [classes.numbers[place] if 0 <= place < len(classes.numbers) else -1 for place in places]
    return Labels(numbers, classes.missing, classes.names)


def _as_they_are(values: Sequence[Any], numbers: list[int], model: Classes | None) -> Labels:
    """Return the numbers of a column without class names as they are; all -1, with the reason, if a value is neither a
    number nor null, or if the model has fewer classes."""
    nothing = [-1] * len(numbers)
    for value, number in zip(values, numbers, strict=True):
        null = value is None or value != value or (isinstance(value, int) and value < 0)
        if number < 0 and not null:
            return Labels(nothing, f"a label is a number or a name, and here one is {str(value)[:60]!r}")
    if model is not None and max(numbers, default=-1) >= model.count:
        return Labels(nothing, f"the data has a class number {max(numbers)}, but the model tells {model.count} apart")
    return Labels(numbers)


def _whole(value: Any) -> int:
    """Return a value as a class number; -1 if it is not a whole number of at least 0."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and value >= 0 else -1


def _missing(names: Sequence[str], found: Sequence[int], model: Classes) -> str | None:
    missing = [name for name, number in zip(names, found, strict=True) if number < 0]
    if not missing:
        return None
    shown = ", ".join(missing[:SHOWN]) + ", ..." * (len(missing) > SHOWN)
    of = f"{len(missing)} of {len(names)} classes of the data ({shown})"
    unnamed = f", whose {model.count} have no names (id2label, or timm's label_names)"
    return f"{of} are none of the model's" + ("" if model.names else unnamed)


def _number(name: str, known: Mapping[str, int]) -> int:
    """Return the class number of a name, looked up whole, then without a leading number (001.Black_footed_Albatross);
    -1 if it is not known."""
    words = plain(name)
    return known.get(words, known.get(words.lstrip("0123456789 "), -1))


def _by_number(names: Sequence[str], count: int) -> list[int] | None:
    """Return the numbers at the end of all names if they are distinct, below `count` and follow the same prefix (0, 1;
    class0, class1); else None."""
    parts = [_NUMBERED.fullmatch(name) for name in names]
    if not all(parts) or len({part[1] for part in parts if part}) > 1:
        return None
    numbers = [int(part[2]) for part in parts if part]
    return numbers if len(set(numbers)) == len(numbers) and max(numbers) < count else None


def _one_order(names: Sequence[str]) -> bool:
    """Return whether sorting names by letters, as torchvision does, and by numbers, as timm does, gives the same order
    (not so for 1, 2, 10)."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name.lower())]

    return sorted(names) == sorted(names, key=natural)


def _by_name(labels: Mapping[int, Iterable[str]]) -> dict[str, int]:
    """Return class numbers by whole name and by part of a name (between commas or semicolons), leaving out names that
    two classes share."""
    listed = [(name, number) for number, names in labels.items() for name in names]
    parts = [(plain(part), number) for name, number in listed for part in re.split(r"[,;]", name)]
    found: dict[str, int] = {}
    for pairs in (parts, [(plain(name), number) for name, number in listed]):
        counts = Counter(name for name, _ in set(pairs))
        found |= {name: number for name, number in pairs if name and counts[name] == 1}
        found = {name: number for name, number in found.items() if counts[name] < 2}
    return found


def _imagenet(count: int) -> dict[str, int]:
    """Return the class numbers, by synset and by name, of the version of ImageNet with `count` classes; empty if there
    is none."""
    from timm.data import ImageNetInfo
    from timm.data.imagenet_info import infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return {}
    info = ImageNetInfo(subset)
    return _by_name({n: [info.index_to_label_name(n), info.index_to_description(n)] for n in range(count)})
