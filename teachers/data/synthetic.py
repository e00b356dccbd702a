"""Random text, images and questions for models with random weights; counts: of training and of held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from teachers.data.prompts import Prompts, masked
from teachers.data.text import TextData

QUESTION, ANSWER = 56, 8
"""Numbers of tokens of a random question and of its answer."""


@dataclass(frozen=True)
class RandomImages:
    """Images of noise [N, C, H, W], loaded like an `ImageSet`."""

    pixels: torch.Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixels [B, C, H, W] and labels [B], all 0, of these images."""
        return self.pixels[torch.as_tensor(chosen)], torch.zeros(len(chosen), dtype=torch.long)


@dataclass(frozen=True)
class RandomQuestions:
    """Questions of random tokens [N, T] about images of noise [N, C, H, W], loaded like a `PromptSet`; the last ANSWER
    tokens are the answer."""

    tokens: torch.Tensor
    pixels: torch.Tensor
    image_token: int

    def __len__(self) -> int:
        return len(self.tokens)

    def _inputs(self, chosen: Sequence[int], end: int | None) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(chosen)
        ids = self.tokens[rows, :end]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels[rows]}

    def load(self, chosen: Sequence[int]) -> Prompts:
        """Return the prompts of these questions."""
        return masked(self._inputs(chosen, None), [ANSWER] * len(chosen), self.image_token)

    def ask(self, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for generating the answers to these questions."""
        return self._inputs(chosen, -ANSWER)


@dataclass(frozen=True)
class SyntheticData:
    """Random samples to train on, and held-out samples to measure on."""

    train: RandomImages | RandomQuestions
    held_out: RandomImages | RandomQuestions
    description: str


def random_text(vocabulary: int, window: int, counts: tuple[int, int], seed: int) -> TextData:
    """Return windows [N, window] of random token ids below `vocabulary`."""
    draw = torch.Generator().manual_seed(seed)
    train, held_out = torch.randint(vocabulary, (sum(counts), window), generator=draw).split(counts)
    return TextData(train, held_out, "random tokens", sum(counts) * window)


def random_images(shape: tuple[int, int, int], counts: tuple[int, int], seed: int, dtype: torch.dtype) -> SyntheticData:
    """Return images of normal noise; shape: channels, height, width."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(sum(counts), *shape, generator=draw).to(dtype)
    train, held_out = map(RandomImages, pixels.split(counts))
    return SyntheticData(train, held_out, "random images")


def random_questions(
    image_token: int,
    image_tokens: int,
    shape: tuple[int, int, int],
    counts: tuple[int, int],
    seed: int,
    dtype: torch.dtype,
) -> SyntheticData:
    """Return questions of QUESTION random tokens with an answer of ANSWER, behind `image_tokens` image tokens.

    image_token: id of an image token; ids of all other tokens are below it. shape: an image's channels, height, width.
    """
    draw, total = torch.Generator().manual_seed(seed), sum(counts)
    words = torch.randint(image_token, (total, QUESTION + ANSWER), generator=draw)
    tokens = torch.cat([torch.full((total, image_tokens), image_token), words], 1)
    pixels = torch.randn(total, *shape, generator=draw).to(dtype)
    parts = zip(tokens.split(counts), pixels.split(counts), strict=True)
    train, held_out = (RandomQuestions(*part, image_token) for part in parts)
    return SyntheticData(train, held_out, "random questions")
