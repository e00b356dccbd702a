"""Teachers: which models there are, how to load one frozen, and the data to distill it on."""

from teachers.load import Teacher, load
from teachers.registry import models

__all__ = ["Teacher", "load", "models"]
