"""Architectures that are supported: records of names, and what they say of a model."""

from students.architectures.lookup import (
    ARCHITECTURES,
    Sizes,
    architecture_of,
    kind_of,
    sizes_of,
    trunk_of,
    weight_of,
)
from students.architectures.record import Architecture
from students.architectures.vision_language import VISION_TOWERS

__all__ = [
    "ARCHITECTURES",
    "VISION_TOWERS",
    "Architecture",
    "Sizes",
    "architecture_of",
    "kind_of",
    "sizes_of",
    "trunk_of",
    "weight_of",
]
