"""The operators on CPUs: C sources, what compiles them, and what calls them."""

from students.kernels.cpu.operators import OPERATORS, attends_to_cache, reads_few
from students.kernels.cpu.toolchain import build

__all__ = ["OPERATORS", "attends_to_cache", "build", "reads_few"]
