"""A set of labelled images that are read on access."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from teachers.data.left_out import LeftOut, Samples

if TYPE_CHECKING:
    from PIL.Image import Image

Preprocess = Callable[["Image"], torch.Tensor]
"""Converts one image to a model's input [C, H, W]."""

_READERS = 4
"""Threads that read images."""


@dataclass
class ImageSet(Samples):
    """Labelled images that are read on access; images that cannot be used are left out (see left_out.py)."""

    items: Sequence[Any]
    """Arguments of `decode`, one for each image and all different: paths, or row numbers of a table."""
    labels: list[int]
    """Class numbers; -1 for an image without one."""
    decode: Callable[[Any], Image]
    preprocess: Preprocess
    left_out: LeftOut
    name: Callable[[Any], str] = str
    """Returns the name of an item, for messages when it is left out."""
    unlabelled: str | None = None
    """Why classes of the data have no number, for the user to read; None if all have one."""
    classes: tuple[str, ...] | None = None
    """The data's class names, if labels are indices in this list (see Labels.names)."""
    whole: bool = False
    """Whether these are all images of a source without a validation part."""
    shape: tuple[int, ...] | None = None
    """Most frequent input shape [C, H, W] in the first batch that was read; images of other shapes are left out."""

    def __len__(self) -> int:
        return len(self.items)

    def key(self, number: int) -> Hashable:
        return self.items[number]

    def subset(self, chosen: Sequence[int]) -> ImageSet:
        """Return a set of only these images, in this order."""
        items, labels = [self.items[i] for i in chosen], [self.labels[i] for i in chosen]
        return replace(self, items=items, labels=labels)

    def load(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixels [B, C, H, W] and labels [B] of B = len(chosen) images; other images replace unusable ones."""
        return self._stacked(self.filled(chosen))

    def load_readable(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return pixels [B, C, H, W] and labels [B] of the chosen images that can be used; None if none can."""
        found = self.readable(chosen)
        return self._stacked(found) if found else None

    def _stacked(self, found: list[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([pixels for _, pixels in found]), torch.tensor([self.labels[number] for number, _ in found])

    def readable(self, chosen: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
        chosen = [number for number in chosen if self.key(number) not in self.left_out]
        with ThreadPoolExecutor(_READERS) as pool:
            read = list(zip(chosen, pool.map(self._read, chosen), strict=True))
        shapes = Counter(tuple(pixels.shape) for _, pixels in read if isinstance(pixels, torch.Tensor))
        if self.shape is None and shapes:
            self.shape = shapes.most_common(1)[0][0]
        found = []
        for number, pixels in read:
            if isinstance(pixels, torch.Tensor) and tuple(pixels.shape) == self.shape:
                found.append((number, pixels))
            else:
                odd = pixels if isinstance(pixels, Exception) else _other_shape(pixels.shape, self.shape)
                self.left_out.add(self.key(number), self.name(self.items[number]), odd)
        return found

    def _read(self, number: int) -> torch.Tensor | Exception:
        try:
            return self.preprocess(self.decode(self.items[number]))
        except Exception as error:  # image libraries raise whatever they like for a damaged file
            return error


def _other_shape(shape: Sequence[int], usual: Sequence[int] | None) -> str:
    one, other = (" x ".join(map(str, sizes)) for sizes in (shape, usual or ()))
    return f"as the model's input it is {one}, where the others are {other}"
