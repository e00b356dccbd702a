"""The operators on CPUs: C sources, their compilation (toolchain.py), and their calls (operators.py)."""

from students.kernels.cpu.operators import OPERATORS, attends_to_cache, reads_few
from students.kernels.cpu.toolchain import build

__all__ = ["OPERATORS", "attends_to_cache", "build", "reads_few"]
