"""Supported architectures: records of module names, and functions that look up a model's modules and sizes."""

from students.architectures.lookup import (
    ARCHITECTURES,
    Linear,
    Sizes,
    architecture_of,
    can_be_read_in_part,
    kind_of,
    matrices_of,
    shape_of,
    sizes_of,
    trunk_of,
    values_of,
    weight_of,
    windows_of,
)
from students.architectures.record import BRANCHES, LINEAR_SITES, Architecture, Branch
from students.architectures.vision_language import BOTH_WAYS, VISION_TOWERS

__all__ = [
    "ARCHITECTURES",
    "BOTH_WAYS",
    "BRANCHES",
    "LINEAR_SITES",
    "VISION_TOWERS",
    "Architecture",
    "Branch",
    "Linear",
    "Sizes",
    "architecture_of",
    "can_be_read_in_part",
    "kind_of",
    "matrices_of",
    "shape_of",
    "sizes_of",
    "trunk_of",
    "values_of",
    "weight_of",
    "windows_of",
]
