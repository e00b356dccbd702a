"""The operators on CPUs: C sources, what compiles them, and what calls them."""

from students.kernels.cpu.operators import OPERATORS, reads_few
from students.kernels.cpu.toolchain import build

__all__ = ["OPERATORS", "build", "reads_few"]
