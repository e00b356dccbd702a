"""Students: frozen models with routers that decide which of their parts are computed for an input."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from students.spec import LoraSpec, RouterSpec, StudentSpec

if TYPE_CHECKING:
    from students.build import elasticize
    from students.student import Student

__all__ = ["LoraSpec", "RouterSpec", "Student", "StudentSpec", "elasticize"]


def __getattr__(name: str) -> Any:
    """Import what needs torch at its first use, so that specifications are read and checked without it."""
    if name in ("Student", "elasticize"):
        return getattr(import_module("students.student" if name == "Student" else "students.build"), name)
    raise AttributeError(f"module 'students' has no attribute {name!r}")
