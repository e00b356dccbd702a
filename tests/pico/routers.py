"""Students whose routers are neither all open nor all closed."""

from __future__ import annotations

import torch

from students import Student


@torch.no_grad()
def draw_parameters(student: Student, scale: float, seed: int = 3) -> None:
    """Draw all added parameters of a student from a normal distribution."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in student.added_parameters().values():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
