"""Students: frozen models with routers that decide what an input needs."""

from students.spec import LoraSpec, RouterSpec, StudentSpec
from students.student import Student, elasticize

__all__ = ["LoraSpec", "RouterSpec", "Student", "StudentSpec", "elasticize"]
