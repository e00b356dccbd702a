"""What is expensive on a device: arithmetic, or launching kernels and waiting for their results."""

from __future__ import annotations

import torch


def runs_ahead(device: torch.device) -> bool:
    """Return whether the host queues work for this device and runs ahead of it. Launches and waits are then expensive,
    and computing values that nobody needs is often cheaper than finding out which ones are needed."""
    return device.type != "cpu"


class AnyLength:
    """Disables, between `begin` and `end`, attention kernels that torch has to prepare for each sequence length.

    On NVIDIA GPUs from Hopper on, torch prefers cuDNN's attention, which spends some 30 ms of host time on a plan for
    every new shape. Where the text decides in every block how many keys there are, most shapes are new.
    """

    def __init__(self) -> None:
        self._held = False

    def begin(self, varied: bool) -> None:
        """Disable cuDNN's attention if `varied`, that is if the number of keys depends on the text."""
        if varied and not torch.compiler.is_compiling() and torch.backends.cuda.cudnn_sdp_enabled():
            torch.backends.cuda.enable_cudnn_sdp(False)
            self._held = True

    def end(self) -> None:
        """Enable cuDNN's attention again if `begin` has disabled it."""
        if self._held:
            self._held = False
            torch.backends.cuda.enable_cudnn_sdp(True)
