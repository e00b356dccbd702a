"""The operators on CPUs: C sources, what compiles them, and what calls them."""

from students.kernels.cpu.operators import OPERATORS, reads_few

__all__ = ["OPERATORS", "reads_few"]
