"""Models larger than one device: frozen weights spread over the processes, as accelerate's `fsdp_version: 2` asks for.

Every process keeps a part of each block and gathers the rest when the block runs (students/shards.py). Only the frozen
weights are spread; teacher and student share them, and they are nearly all of the parameters. Routers are whole in
every process, so that one process can write checkpoints.
"""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from elastic import launch
from students.architectures.lookup import ARCHITECTURES, architecture_of, kind_of
from students.architectures.vision_language import VISION_TOWERS
from students.shards import Shards, part_of, unit_of


def require() -> None:
    """Raise ValueError if accelerate's FSDP settings ask for anything that is not implemented here."""
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


def refuse_timing() -> None:
    """Raise ValueError if weights are spread, since timing runs a whole student in one process."""
    if launch.spreads():
        raise launch.everyones(ValueError("students are timed whole, which FSDP leaves nowhere: say --no-bench"))


def units(model: Any) -> list[list[nn.Module]]:
    """Return the groups of modules whose weights are gathered together: each block of each tower, the token embedding
    and the LM head (one group if tied). Modules in no group, such as the patch embedding and vision towers without a
    record, are always whole."""
    towers = [model]
    if kind_of(model) in VISION_TOWERS:
        vision = model.base_model.get_submodule(VISION_TOWERS[kind_of(model)])
        towers = [*([vision] if kind_of(vision) in ARCHITECTURES else []), model.get_decoder()]
    found = [architecture_of(tower) for tower in towers]
    blocks = [[block] for _, blocks in found for block in blocks]
    if not any(record.causal for record, _ in found):
        return blocks
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return blocks + ([[embedding, head]] if head.weight is embedding.weight else [[embedding], [head]])


def spread(model: Any) -> dict[str, Tensor]:
    """Keep only this process's part of a frozen model's weights, and return that part of each parameter by name.

    The weights may be on the host. Parameters and buffers in no unit stay whole and move to this process's device.
    """
    rank, size, device = launch.part()
    kept_on = torch.device("cpu") if launch.asks("FSDP_OFFLOAD_PARAMS") else device
    shards = Shards(rank, size, launch.fill, device, kept_on)
    for modules in units(model):
        shards.spread(modules)
    for tensor in chain(model.parameters(), model.buffers()):
        if unit_of(tensor) is None:
            tensor.data = tensor.to(device)
    return {name: part_of(weight) for name, weight in model.named_parameters()}
