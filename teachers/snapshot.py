"""A training loop's state on disk, so that a stopped run resumes and ends with the result it would have had."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.cache import published


class Snapshot:
    """A safetensors file of the optimizers' parameters, their state and the state of torch's random generator."""

    def __init__(self, path: Path, optimizers: Sequence[torch.optim.Optimizer], about: dict[str, Any]) -> None:
        """about: settings, as JSON values, that must equal those of the loop that wrote the file."""
        self.path = path
        self.optimizers = optimizers
        self.about = about

    def _parameters(self) -> list[tuple[str, torch.optim.Optimizer, Tensor]]:
        return [
            (f"{number}.{place}", optimizer, parameter)
            for number, optimizer in enumerate(self.optimizers)
            for place, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
        ]

    @torch.no_grad()
    def restore(self) -> int:
        """Restore the saved state and return the number of steps done; 0 if there is no file.

        Raises ValueError if the file is of a loop with other settings or damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it, and training starts again") from None
        before = json.loads(metadata.get("about", "{}"))
        if before != self.about:
            raise ValueError(f"{self.path} is of a run with {listed(before)}, this is {listed(self.about)}: delete it")
        torch.set_rng_state(state["generator"])
        for name, optimizer, parameter in self._parameters():
            parameter.copy_(state[name])
            start = f"{name}."
            optimizer.state[parameter] = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        return int(metadata["step"])

    def save(self, step: int) -> None:
        """Replace the file by the present state, after `step` steps."""
        from safetensors.torch import save_file

        state = {"generator": torch.get_rng_state()}
        for name, optimizer, parameter in self._parameters():
            state[name] = parameter.detach().contiguous()
            state |= {f"{name}.{key}": value.contiguous() for key, value in optimizer.state[parameter].items()}
        with published(self.path) as workshop:
            save_file(state, workshop / self.path.name, {"about": json.dumps(self.about), "step": str(step)})


def listed(about: dict[str, Any]) -> str:
    """Return the settings as a list of names and values, for the user to read."""
    return ", ".join(f"{name} {value}" for name, value in about.items())
