"""Memory of a model and its passes, estimated from its sizes before its weights are allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from students import Student
from students.architectures.lookup import architecture_of, matrices_of, record_in, shape_of, sizes_of
from students.architectures.record import Architecture
from students.execution.branch import RoutedBranch
from students.execution.wrapper import Wrapper

ADDED = 0.06
"""Size of routers and their previews, as a share of the weights."""
MERGED = 6
"""Values that a block which merges patches keeps for backward, per patch and channel of the residual stream: the
compared, weighted and scored patches, in part in float32."""
STATE = 5
"""Values that linear attention keeps for backward, over the inputs and outputs of its linear layers: 4.7 measured in
bfloat16, since its products with the state are in float32."""
SCANNED = 5, 12
"""Values that Mamba 2 keeps besides, for each of its heads: so many times the tokens of a chunk, which see each other,
and so many times the size of a channel's state. Measured as STATE."""
SLACK = 1.1
"""Factor for the overhead of allocators and libraries."""


@dataclass(frozen=True)
class Need:
    """Memory of a model in bytes, from which the memory of its passes is estimated."""

    weights: int
    """All parameters."""
    cache: int
    """Keys and values of one token in all blocks; 0 if the model is not causal."""
    kept: int
    """Inputs and outputs of all linear layers for one token, which a backward pass needs."""
    passing: int
    """Inputs and outputs of the linear layers for one token in the largest block."""
    head: int
    """The LM head's weight in float32; 0 for models without an LM head."""

    def copies(self, count: int) -> int:
        """Return the bytes of `count` copies of the weights, of which one has routers."""
        return round(self.weights * (count + ADDED))

    def inference(self, tokens: int) -> int:
        """Return the bytes of forward passes over `tokens` tokens, with the caches of one model kept while another
        model's are filled."""
        return round(SLACK * tokens * (1.5 * self.passing + 2 * self.cache))

    def recorded(self, tokens: int) -> int:
        """Return the bytes that the CUDA graphs of the student and a dense model hold for `tokens` tokens in all:
        static caches with up to 50 % spare slots (students/recording/decoding.py), or activations without a cache."""
        return round(SLACK * 2 * tokens * (1.5 * self.cache or self.passing))

    def calibration(self, tokens: int, sampled: int) -> int:
        """Return the bytes of calibration on batches of `tokens` tokens that keeps the linear layers' inputs and
        outputs for `sampled` tokens in all."""
        return self.backward(tokens) + round(SLACK * (sampled * self.kept + 1.5 * self.head))

    def backward(self, tokens: int) -> int:
        """Return the bytes of a forward and a backward pass over `tokens` tokens."""
        return round(SLACK * tokens * (self.kept + 2 * self.passing))


def need_of(model: Any, trunk: nn.Module) -> Need:
    """Return the memory of a model, which may be on the device "meta"; trunk: the part that holds its blocks."""
    size = next(model.parameters()).element_size()
    record, blocks = architecture_of(trunk)
    each = [size * _passed(block, record_in(record, block)) for block in blocks]
    head = model.get_output_embeddings() if record.causal else None
    whole = 0 if head is None else 4 * head.weight.numel()
    weights = size * sum(p.numel() for p in model.parameters())
    return Need(weights, cache_need(trunk, 1), sum(each), max(each), whole)


def cache_need(trunk: nn.Module, tokens: int) -> int:
    """Return the bytes of one sequence's keys and values in all blocks with attention, of no more tokens than a block's
    window has; 0 if the model is not causal."""
    record, blocks = architecture_of(trunk)
    if not record.causal:
        return 0
    attend = [(number, block) for number, block in enumerate(blocks) if record_in(record, block).attn_in]
    sizes = [sizes_of(trunk, record, number, block) for number, block in attend]
    held = sum(math.prod(part) * min(tokens, s.window or tokens) for s in sizes for part in s.cached)
    return next(trunk.parameters()).element_size() * held


def kept_bytes(student: Student) -> tuple[int, int]:
    """Return (bytes per token that a student's training step keeps for backward, further bytes per token during
    backward), all in the frozen weights' type.

    Counted in every block from the first with trained parameters on: its input, and the input plus attention's output,
    which norms read; queries, keys, values and attention's output; the outputs of the MLP's first layers; the inputs of
    linear layers with routers or corrections; what is kept within linear attention, short convolutions and mixtures of
    experts; the factors of token gates, that is, the branches' outputs and their substitutes; the tensors of patch
    merging; and, in a gated MLP, the activation between gate and product, unless backward recomputes it together with
    the product (students/execution/linear.py). With `train.checkpointing` the blocks' inputs are kept, and all else
    exists for one block at a time, with the gradients within its MLP.
    """
    blocks, record = student.blocks[untouched(student) :], student.record
    trunk: Any = getattr(student, "trunk", student.model)
    size = next(p for p in student.model.parameters() if not p.requires_grad).element_size()
    each, back, streams, merged = [], [], 0, 0
    for block in blocks:
        own = record_in(record, block)
        sizes = {site: [shape_of(block.get_submodule(name)) for name in own.linears(site)] for site in own.sites}
        read = {site: shapes[0][1] for site, shapes in sizes.items()}
        width = next(iter(read.values())) if read else trunk.config.hidden_size
        neurons, inner = read.get("mlp_out", 0), _in_mixer(block, own) + _in_experts(block, own)
        kept = sum(read[site] for site in own.sites if site == "attn_out" or _is_routed(block, own, site))
        written = sum(outputs for site in ("attn_in", "mlp_in") for outputs, _ in sizes.get(site, ()))
        written += sum(sum(shape_of(block.get_submodule(name))) for name in own.linears("expand"))
        ends = [block.get_submodule(name) for name in own.linears("mlp_out")]
        joined = any(getattr(end, "activation", None) is not None for end in ends)
        gated = sum(outputs for outputs, _ in sizes.get("mlp_in", ())) == 2 * neurons
        gates = width * sum(_gate_factors(block, name) for name in (own.attn, own.mlp))
        each.append(2 * width + kept + written + gates + neurons * gated - 2 * neurons * joined + inner)
        back.append((2 + gated) * neurons + inner)
        streams += width
        merged += MERGED * width * bool(getattr(block, "merges", False) and block.routers)
    if student.runtime.recompute:
        return size * (streams + merged), size * max(map(sum, zip(each, back, strict=True)))
    return size * (sum(each) + merged), 0


def _passed(block: nn.Module, record: Architecture) -> int:
    """Return the inputs and outputs of all linear layers of a block, for one token."""
    names = [name for site in (*record.sites, "expand") for name in record.linears(site)]
    plain = sum(sum(shape_of(block.get_submodule(name))) for name in names)
    return plain + _in_mixer(block, record) + _in_experts(block, record)


def _in_mixer(block: nn.Module, record: Architecture) -> int:
    """Return how many values what stands in place of attention keeps for backward, for one token; 0: attention does."""
    if record.attn_in:
        return 0
    mixer: Any = block.get_submodule(record.attn)
    read = sum(sum(shape_of(module)) for module in mixer.modules() if hasattr(module, "in_features"))
    if hasattr(mixer, "ssm_state_size"):
        scanned = SCANNED[0] * mixer.chunk_size + SCANNED[1] * mixer.ssm_state_size
        return STATE * read + mixer.num_heads * scanned
    return (STATE if hasattr(mixer, "num_v_heads") else 1) * read


def _in_experts(block: nn.Module, record: Architecture) -> int:
    """Return the inputs and outputs of the matrices of a mixture of experts, for one token; 0: there is none."""
    return sum(sum(shape) for shapes in matrices_of(block, record) for shape in shapes) if record.mixes else 0


def untouched(student: Any) -> int:
    """Return how many blocks come before all trained parameters, so that no gradient passes through these blocks."""
    if getattr(student, "image_router", None) is not None:
        return 0
    return next((n for n, block in enumerate(student.blocks) if any(p.requires_grad for p in block.parameters())), 0)


def _is_routed(block: nn.Module, record: Architecture, site: str) -> bool:
    """Whether a router or correction, of a site's linear layers or of their branch, reads the layers' input."""
    branch = block.get_submodule(record.attn if site.startswith("attn") else record.mlp)
    return any(isinstance(m, Wrapper) for m in (branch, block.get_submodule(record.linears(site)[0])))


def _gate_factors(block: nn.Module, branch: str) -> int:
    """Return how many tensors of the residual stream's width the token gates of a branch multiply."""
    routed = block.get_submodule(branch)
    if not isinstance(routed, RoutedBranch):
        return 0
    gates = [router for router in routed.routers.values() if router.spec.of_kind.over_tokens]
    return len(gates) + len(routed.decided) + len(routed.substitutes)


def free_memory(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes (after torch's cache is emptied), or of the host."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
