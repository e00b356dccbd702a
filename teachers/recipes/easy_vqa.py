"""What the images of easy-VQA show, and what is asked about them."""

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
"""What there is to say about an image of easy-VQA: its shape and its colour."""
Pair = tuple[str, str]
"""A question and its answer."""
Kind = tuple[int, int]
"""The numbers of the words for an image's shape and colour."""


def sort_by_image(questions: QuestionSet) -> tuple[Tensor, list[list[Pair]]]:
    """Images [N, 3, H, W] in -1 ... 1, and the questions and answers of each."""
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
    """Images by the shape and colour that they show, and the questions that were asked about such images."""

    images: dict[Kind, Tensor]
    """[N, 3, H, W] in -1 ... 1."""
    pairs: dict[Kind, tuple[list[Pair], list[Pair], list[Pair]]]
    """Questions of what is there, of what is not, and all others, each with its answer."""

    def draw(self, kind: Kind, counts: Sequence[int]) -> list[Pair]:
        """So many questions of each group."""
        groups = zip(self.pairs[kind], counts, strict=True)
        return [group[place] for group, count in groups for place in torch.randint(len(group), (count,)).tolist()]


def sort_by_kind(questions: QuestionSet) -> ImagesByKind:
    """Images whose questions give away what they show."""
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
    """Whether what the question names is in the image; None where that is not what it asks."""
    if answer not in ("yes", "no"):
        return None
    return (answer == "yes") != bool({"not", "no"} & set(re.findall("[a-z]+", question)))


def _kind_of(pairs: Sequence[Pair]) -> list[int | None]:
    """The numbers of the words for an image's shape and colour, None where no question gives it away."""
    found: list[int | None] = [None] * len(WORDS)
    for question, answer in pairs:
        named = set(re.findall("[a-z]+", question)) if _affirmed(question, answer) else {answer}
        for place, words in enumerate(WORDS):
            for number, word in enumerate(words):
                if word in named:
                    found[place] = number
    return found


def augmented(images: Tensor) -> Tensor:
    """Each of the images [B, C, H, W] mirrored or not, shifted, scaled by 0.75 to 1.35, and every other one turned."""
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
