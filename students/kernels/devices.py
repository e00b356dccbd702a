"""What is dear on a device: arithmetic, or launching it and waiting for it."""

from __future__ import annotations

import torch


def runs_ahead(device: torch.device) -> bool:
    """Whether the host only tells this device what to do, and goes on: launches and waits are dear there, and to
    compute what nobody needs is often cheaper than to find out what is needed."""
    return device.type != "cpu"
