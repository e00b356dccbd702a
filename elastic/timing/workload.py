"""What is to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

PROMPT = 128
"""Tokens in front of those that decoding is timed on."""


@dataclass(frozen=True)
class Workload:
    """What is to be timed, of a student wherever its dial is turned to."""

    compute: Sequence[float | None]
    """Budgets; None: as the dial is."""
    batch: Sequence[int]
    tokens: Sequence[int]
    """Lengths of prompts of text."""
    new_tokens: int
    repeats: int
    samples: int
    """Windows, images or questions that the largest of it takes."""
    prompt: int = PROMPT
    """Tokens in front of those that decoding is timed on."""


class TrainingBatch(NamedTuple):
    """A micro-batch that a training step is timed on."""

    sample: Any
    """What the objective takes."""
    inputs: dict[str, Tensor]
    """What the model is called with."""
    tokens: int
    """Tokens of a row."""


class StepSizes(NamedTuple):
    """What a training step does with a sample, on paper."""

    tokens: int
    """That the routed blocks read."""
    macs: float
    """Multiply-accumulates of a forward pass, through what gradients pass."""
    frozen: float = 0.0
    """Those in front of all that learns."""
    logits: int = 0
    """Rows of logits of the LM head."""
    images: int = 0
    """Tokens that a routed vision tower reads."""


class InputSizes(NamedTuple):
    """How much a model with random weights reads at once."""

    trunk: nn.Module
    """The part that holds its blocks."""
    longest: int
    """Tokens of a row in inference."""
    trained: int
    """Tokens of a row in training."""
    calibrated: int
    """Tokens that calibration reads at once."""
    sampled: int
    """Tokens of which calibration keeps what linear layers read."""
