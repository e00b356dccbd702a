"""Students: frozen models with routers that decide which of their parts are computed for an input."""

from students.build import elasticize
from students.spec import LoraSpec, RouterSpec, StudentSpec
from students.student import Student

__all__ = ["LoraSpec", "RouterSpec", "Student", "StudentSpec", "elasticize"]
