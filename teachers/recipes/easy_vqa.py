"""The images of easy-VQA, sorted by the shape and colour they show, and the questions about them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.data.questions import QuestionSet

WORDS = (
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)
"""Names of the shapes and of the colours in easy-VQA; an image shows one of each."""
Pair = tuple[str, str]
"""A question and its answer."""
Kind = tuple[int, int]
"""Indices in WORDS of an image's shape and colour."""


def sort_by_image(questions: QuestionSet) -> tuple[Tensor, list[list[Pair]]]:
    """Return all images [N, 3, H, W] in -1 ... 1, and the list of questions and answers about each."""
    from torchvision.transforms.functional import pil_to_tensor

    numbers: dict[str, int] = {}
    about: list[list[Pair]] = []
    for sample in questions.samples:
        if sample.image not in numbers:
            numbers[sample.image] = len(numbers)
            about.append([])
        about[numbers[sample.image]].append((sample.question, sample.answer))
    pixels = torch.stack([pil_to_tensor(questions.decode(image).convert("RGB")) for image in numbers])
    return pixels.float() / 127.5 - 1, about


@dataclass(frozen=True)
class ImagesByKind:
    """Images by kind (shape and colour), and the questions that were asked about images of each kind."""

    images: dict[Kind, Tensor]
    """Images [N, 3, H, W] of each kind, values in -1 ... 1."""
    pairs: dict[Kind, tuple[list[Pair], list[Pair], list[Pair]]]
    """Questions with their answers, in three groups: yes/no questions about something that the image shows, yes/no
    questions about something that it does not show, and all others."""

    def draw(self, kind: Kind, counts: Sequence[int]) -> list[Pair]:
        """Return `counts[i]` random questions of group i, with replacement."""
        groups = zip(self.pairs[kind], counts, strict=True)
        return [group[place] for group, count in groups for place in torch.randint(len(group), (count,)).tolist()]


def sort_by_kind(questions: QuestionSet) -> ImagesByKind:
    """Return the images whose shape and colour both follow from their questions and answers, by kind."""
    pixels, about = sort_by_image(questions)
    rows: dict[Kind, list[int]] = {}
    for row, pairs in enumerate(about):
        shape, color = _kind_of(pairs)
        if shape is not None and color is not None:
            rows.setdefault((shape, color), []).append(row)
    sorted_pairs = {}
    for kind, members in sorted(rows.items()):
        groups: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
        for pair in (pair for row in members for pair in about[row]):
            groups[(True, False, None).index(_affirmed(*pair))].append(pair)
        sorted_pairs[kind] = groups
    return ImagesByKind({kind: pixels[members] for kind, members in sorted(rows.items())}, sorted_pairs)


def _affirmed(question: str, answer: str) -> bool | None:
    """Return whether the image shows what a yes/no question names; None for other questions."""
    if answer not in ("yes", "no"):
        return None
    return (answer == "yes") != bool({"not", "no"} & set(re.findall("[a-z]+", question)))


def _kind_of(pairs: Sequence[Pair]) -> list[int | None]:
    """Return the indices in WORDS of an image's shape and colour, None for one that no question and answer tells."""
    found: list[int | None] = [None] * len(WORDS)
    for question, answer in pairs:
        named = set(re.findall("[a-z]+", question)) if _affirmed(question, answer) else {answer}
        for place, words in enumerate(WORDS):
            for number, word in enumerate(words):
                if word in named:
                    found[place] = number
    return found


def augmented(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] randomly mirrored, shifted and scaled by 0.75 to 1.35, half of them also rotated."""
    count = len(images)
    angle = 2 * math.pi * torch.rand(count) * (torch.rand(count) < 0.5)
    scale = 1 / (0.75 + 0.6 * torch.rand(count))
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = 0.3 * (torch.rand(2, count) - 0.5)
    rows = [
        torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), shift[0]], 1),
        torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), shift[1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
