"""Descriptions of what `elastic bench` times, and of the sizes that `elastic plan` estimates from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

PROMPT = 128
"""Default length in tokens of the prompt before the timed decode steps."""


@dataclass(frozen=True)
class Workload:
    """The passes that are timed, for each of several budgets of a student."""

    compute: Sequence[float | None]
    """Budgets to which the dial is turned; None leaves the dial where it is."""
    batch: Sequence[int]
    """Batch sizes."""
    tokens: Sequence[int]
    """Lengths in tokens of the texts whose prefill is timed."""
    new_tokens: int
    """Number of tokens that are decoded."""
    repeats: int | None
    """Number of timed calls, of which the median is taken; None: as `medians` says."""
    samples: int
    """Number of windows, images or questions that the largest timed pass takes."""
    prompt: int = PROMPT
    """Length in tokens of the prompt before the timed decode steps."""
    lossless: bool = False
    """Whether lossless decoding is timed too, at batch size 1."""
    default: frozenset[str] = frozenset()
    """Which of `tokens` and `new_tokens` nobody asked for, so that they may be shortened for models with few
    positions."""


class TrainingBatch(NamedTuple):
    """A micro-batch on which a training step is timed."""

    sample: Any
    """The batch as the objective takes it."""
    inputs: dict[str, Tensor]
    """The batch as keyword arguments of the model."""
    tokens: int
    """Tokens per row."""


class StepSizes(NamedTuple):
    """The work of a training step per sample, derived from the model's sizes."""

    tokens: int
    """Tokens that the routed blocks read."""
    macs: float
    """Multiply-accumulates of a forward pass through the part of the model that gradients pass through."""
    frozen: float = 0.0
    """Multiply-accumulates of a forward pass through the part before all trained parameters, without gradients."""
    logits: int = 0
    """Rows of logits that the LM head computes."""
    images: int = 0
    """Tokens that a vision tower with routers reads."""


class InputSizes(NamedTuple):
    """How many tokens a model with random weights reads at once, from which its memory is estimated."""

    trunk: nn.Module
    """The part of the model that holds its blocks."""
    longest: int
    """Tokens per row in inference."""
    recorded: int
    """Tokens per row in recorded passes."""
    trained: int
    """Tokens per row in training."""
    calibrated: int
    """Tokens per calibration batch."""
    sampled: int
    """Tokens for which calibration keeps the inputs of linear layers, in all."""
