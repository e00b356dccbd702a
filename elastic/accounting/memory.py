"""How much memory a model and its work take, estimated from its sizes before it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from students import Student
from students.architectures import architecture_of, shape_of, sizes_of, weight_of
from students.architectures.record import LINEAR_SITES, Architecture
from students.execution.branch import RoutedBranch
from students.execution.wrapper import Wrapper

ADDED = 0.06
"""What routers and their previews add to the weights."""
MERGED = 6
"""Patches' widths that a block keeps where patches merge: what is compared, weighted and scored, in part in float32."""
SLACK = 1.1
"""What allocators and libraries add to everything else."""


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes."""

    weights: int
    cache: int
    """Keys and values of a token."""
    kept: int
    """Inputs and outputs of a token in all linear layers, as a backward pass needs them."""
    passing: int
    """Of these, those in the largest block."""
    head: int
    """The LM head in float32; 0 where there is none."""

    def copies(self, count: int) -> int:
        """So many copies of the weights, one of them with routers."""
        return round(self.weights * (count + ADDED))

    def inference(self, tokens: int) -> int:
        """Forward passes of so many tokens, the caches of one model while another's is filled."""
        return round(SLACK * tokens * (2 * self.passing + 3 * self.cache))

    def recorded(self, tokens: int) -> int:
        """What recordings of student and dense model hold of so many tokens in all: caches with up to half as many
        slots again (students/execution/decoding.py), or what passes through where there are none."""
        return round(SLACK * 2 * tokens * (1.5 * self.cache or self.passing))

    def calibration(self, tokens: int, sampled: int) -> int:
        """A closed-form start from so many tokens at a time, of which so many are kept in all."""
        return self.backward(tokens) + round(SLACK * (sampled * self.kept + 1.5 * self.head))

    def backward(self, tokens: int) -> int:
        """A forward pass of so many tokens and the one back."""
        return round(SLACK * tokens * (self.kept + 2 * self.passing))


def need_of(model: Any, trunk: nn.Module) -> Need:
    """What a model takes, which may be on the device "meta"; trunk: the part that holds its blocks."""
    size = next(model.parameters()).element_size()
    record, blocks = architecture_of(trunk)
    each, cache = [], 0
    for number, block in enumerate(blocks):
        names = [name for site in LINEAR_SITES for name in record.linears(site)]
        each.append(size * sum(sum(weight_of(block.get_submodule(name)).shape) for name in names))
        if record.causal:
            sizes = sizes_of(trunk, record, number, block)
            cache += 2 * size * sizes.groups * sizes.size
    head = model.get_output_embeddings() if record.causal else None
    whole = 0 if head is None else 4 * head.weight.numel()
    return Need(size * sum(p.numel() for p in model.parameters()), cache, sum(each), max(each), whole)


def kept_bytes(student: Student) -> tuple[int, int]:
    """Bytes of a token that a training step of a student keeps for its way back, and those that come on top on the way,
    all of them in the frozen weights' type.

    Of each block behind the first that learns: its input and what attention has added to it, which norms read; queries,
    keys and values, and what comes of them; what the first layers of the MLP put out; what linear layers read, where
    routers or corrections are in front of them; what gates of tokens multiply, branches' outputs and what stands in for
    them; what merging patches takes; and, where the MLP has a gate and what it is multiplied with, the activation
    between, unless it is made again with the product (students/execution/product.py). With `train.checkpointing`
    blocks' inputs are kept, and the rest is there for one block at a time, with gradients of what is in its MLP.
    """
    blocks, record = student.blocks[untouched(student) :], student.record
    size = next(p for p in student.model.parameters() if not p.requires_grad).element_size()
    each, back, streams, merged = [], [], 0, 0
    for block in blocks:
        sizes = {site: [shape_of(block.get_submodule(name)) for name in record.linears(site)] for site in LINEAR_SITES}
        read = {site: shapes[0][1] for site, shapes in sizes.items()}
        width, neurons = read["attn_in"], read["mlp_out"]
        kept = sum(read[site] for site in LINEAR_SITES if site == "attn_out" or _is_routed(block, record, site))
        written = sum(outputs for site in ("attn_in", "mlp_in") for outputs, _ in sizes[site])
        joined = getattr(block.get_submodule(record.linears("mlp_out")[0]), "activation", None) is not None
        gated = sum(outputs for outputs, _ in sizes["mlp_in"]) == 2 * neurons
        gates = width * sum(_gate_factors(block, name) for name in (record.attn, record.mlp))
        each.append(2 * width + kept + written + gates + neurons * gated - 2 * neurons * joined)
        back.append((2 + gated) * neurons)
        streams += width
        merged += MERGED * width * bool(getattr(block, "merges", False) and block.routers)
    if student.recomputes:
        return size * (streams + merged), size * max(map(sum, zip(each, back, strict=True)))
    return size * (sum(each) + merged), 0


def untouched(student: Any) -> int:
    """How many blocks are in front of all that learns, so that no gradient passes through them."""
    if getattr(student, "image_router", None) is not None:
        return 0
    return next((n for n, block in enumerate(student.blocks) if any(p.requires_grad for p in block.parameters())), 0)


def _is_routed(block: nn.Module, record: Architecture, site: str) -> bool:
    """Whether something that learns reads what the linear layers of a site do: theirs or their branch's."""
    branch = block.get_submodule(record.attn if site.startswith("attn") else record.mlp)
    return any(isinstance(m, Wrapper) for m in (branch, block.get_submodule(record.linears(site)[0])))


def _gate_factors(block: nn.Module, branch: str) -> int:
    """How many tensors of the stream's width the gates of a branch's tokens multiply."""
    routed = block.get_submodule(branch)
    if not isinstance(routed, RoutedBranch):
        return 0
    gates = [router for router in routed.routers.values() if router.spec.of_kind.over_tokens]
    return len(gates) + len(routed.decided) + len(routed.substitutes)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
