"""What is dear on a device: arithmetic, or launching it and waiting for it."""

from __future__ import annotations

import torch


def runs_ahead(device: torch.device) -> bool:
    """Whether the host only tells this device what to do, and goes on: launches and waits are dear there, and to
    compute what nobody needs is often cheaper than to find out what is needed."""
    return device.type != "cpu"


class AnyLength:
    """Between `begin` and `end`, attention does without kernels that torch has to prepare for each length.

    On NVIDIA's GPUs from Hopper on it prefers cuDNN's, which plans for some 30 ms of the host whenever it meets a new
    shape. Where a text decides in every block how many keys there are, most shapes are new.
    """

    def __init__(self) -> None:
        self._held = False

    def begin(self, varied: bool) -> None:
        """varied: whether lengths are such."""
        if varied and not torch.compiler.is_compiling() and torch.backends.cuda.cudnn_sdp_enabled():
            torch.backends.cuda.enable_cudnn_sdp(False)
            self._held = True

    def end(self) -> None:
        """What was left out is there again."""
        if self._held:
            self._held = False
            torch.backends.cuda.enable_cudnn_sdp(True)
