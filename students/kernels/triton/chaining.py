"""Launches whose programs start while the launch before them still ends (programmatic dependent launch), on GPUs from
Hopper on: in a decode step, most launches are so short that starting them takes a third of their time."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Begin a program of a launch with the option `launch_pdl`: wait until all earlier launches have ended and what
    they wrote can be read. Nothing may be read or written before."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@cache
def chained(device: torch.device) -> bool:
    """Return whether launches on this device may start before the launch before them has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
