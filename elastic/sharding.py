"""Models larger than one device: frozen weights spread over the processes, as accelerate's `fsdp_version: 2` asks for.

Every process keeps a part of each block and gathers the rest when the block runs (students/shards.py). Only the frozen
weights are spread: they are teacher and student at once, and nearly all there is. Routers are whole everywhere, so that
checkpoints are what one process writes.
"""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from elastic import launch
from elastic.traits import TRAITS
from students.architectures import architecture_of
from students.shards import Shards, part_of, unit_of


def require(family: str) -> None:
    """ValueError where accelerate's configuration, or the family of the model, is not one that can be spread."""
    version, wrap = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_AUTO_WRAP_POLICY", "")
    if version != "2":
        raise ValueError(f"accelerate's configuration asks for FSDP of version {version}: say fsdp_version: 2")
    if not launch.asks("FSDP_RESHARD_AFTER_FORWARD", "true"):
        raise ValueError(
            "fsdp_reshard_after_forward: false keeps all weights in every process: leave it away, or use MULTI_GPU"
        )
    if wrap == "SIZE_BASED_WRAP":
        raise ValueError("fsdp_auto_wrap_policy: SIZE_BASED_WRAP has no effect, blocks are gathered one by one")
    if launch.asks("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError("fsdp_activation_checkpointing has no effect: say --set train.checkpointing=true")
    if not TRAITS[family].spreads:
        raise ValueError("accelerate's configuration asks for FSDP, which spreads language models alone: use MULTI_GPU")


def refuse_timing() -> None:
    """ValueError where weights are spread: no process can time a student on its own."""
    if launch.spreads():
        raise launch.everyones(ValueError("students are timed whole, which FSDP leaves nowhere: say --no-bench"))


def units(model: Any) -> list[list[nn.Module]]:
    """Modules of a language model that are whole at the same time: a block, the embedding, the LM head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [[embedding, head]] if head.weight is embedding.weight else [[embedding], [head]]
    return [[block] for block in architecture_of(model)[1]] + ends


def spread(model: Any) -> dict[str, Tensor]:
    """Leave this process its part of a frozen language model's weights, which may be on the host; returns that part."""
    rank, size, device = launch.part()
    kept_on = torch.device("cpu") if launch.asks("FSDP_OFFLOAD_PARAMS") else device
    shards = Shards(rank, size, launch.fill, device, kept_on)
    for modules in units(model):
        shards.spread(modules)
    for tensor in chain(model.parameters(), model.buffers()):
        if unit_of(tensor) is None:
            tensor.data = tensor.to(device)
    return {name: part_of(weight) for name, weight in model.named_parameters()}
