"""What a student's forward pass costs, in multiply-accumulates (MACs; a FLOP count is twice that), gate by gate.

For one token, with D the width, H heads and K key/value heads of size h, F the MLP's width, V the vocabulary, c the
number of keys the token attends to:

    q: D H h    k, v: 2 D K h    scores and values: 2 H h c    o: H h D    MLP: D F for each matrix    head: D V

A gate multiplies what it switches by its open share. Routers, substitutes and low-rank corrections are counted too.
Two phases:

- decode: one token at a time, c = keys so far; every kind of router saves.
- prefill: all tokens of a window at once, c = the whole window (as torch's FlopCounterMode counts attention). Choices
  that differ from token to token do not make a matrix product cheaper unless whole rows drop out of it, so only token
  and layer routers, and decisions that are the same for the whole sequence, save.

This is what budgets speak of, the same on every device. The FLOPs of prompts that are counted while they run, which
`elastic bench` predicts time from, differ: fused causal attention computes half of the scores, in student and frozen
model; and where the host runs ahead of the device (kernels/devices.py), tokens that attention skips and whose keys are
written attend all the same, 2 H h c more for each of them, and substitutes run on all tokens, as do corrections of q
and o.

Both are for a sequence that runs on its own. Heads and expert groups save where their linear layers can be narrowed:
not next to channel routers (channels are chosen there), nor where an architecture keeps q, k and v in one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from students.architectures import BRANCHES
from students.decisions import Decisions
from students.spec import RouterSpec, StudentSpec

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block, and what was added to it. All in MACs for one token unless said otherwise."""

    q: int
    kv: int
    o: int
    mlp_in: int
    mlp_out: int
    per_key: int
    """Scores and weighted values, for one key."""
    window: int | None
    """Keys that a sliding-window layer sees at most."""
    own_q: bool
    """Whether queries have a linear layer of their own: only then can a token that keeps its key go without one."""
    narrows: dict[str, bool]
    """Whether closed heads ("attn") and groups ("mlp") can be left out of the linear layers and of attention."""
    lora: dict[str, int]
    """Low-rank corrections: "q", "kv", "attn_out", "mlp_in", "mlp_out"; with "_open", the side that heads or groups
    narrow."""
    routers: dict[str, int]
    """Cost of a router that decides token by token, by the key of its decision."""
    substitutes: dict[str, int]
    opaque: frozenset[str] = frozenset()
    """Sites whose linear layers cannot be read in part: choices of channels save nothing there."""

    def only(self, branch: str) -> BlockShape:
        """One branch alone, "attn" or "mlp"; what belongs to neither, such as a router of the block, is attention's."""

        def mine(key: str) -> bool:
            return key.startswith("mlp") == (branch == "mlp")

        sizes: Any = {n: getattr(self, n) * mine(n) for n in ("q", "kv", "o", "per_key", "mlp_in", "mlp_out")}
        added: Any = {
            n: {k: c for k, c in getattr(self, n).items() if mine(k)} for n in ("lora", "routers", "substitutes")
        }
        return replace(self, **sizes, **added)


@dataclass(frozen=True)
class ComputeModel:
    """Cost of a student as a differentiable function of its decisions."""

    spec: StudentSpec
    blocks: tuple[BlockShape, ...]
    head: int
    head_routed: int
    """Cost of the vocab router: features, preview and limit."""
    image: bool = False
    """Whether the tokens are an image's, of which a layer router hands the block only those that are open."""
    prefix: int = 0
    """Tokens in front of an image's patches, which are never closed."""
    outside: int = 0
    """Cost for one image of what is not in its blocks: patch embedding, pooling, classifier."""

    def dense(self, valid: Tensor, phase: Phase) -> Tensor:
        """Cost [B, T] of the frozen model for tokens valid [B, T] (bool; padding costs nothing)."""
        products = sum(block.q + block.kv + block.o + block.mlp_in + block.mlp_out for block in self.blocks)
        total = torch.full(valid.shape, float(self.head + products), device=valid.device)
        for window in {block.window for block in self.blocks}:
            per_key = sum(block.per_key for block in self.blocks if block.window == window)
            total = total + per_key * _keys(valid, phase, window)
        return (total + self.outside / valid.sum(1, keepdim=True)) * valid

    def routed_blocks(self, decisions: Decisions, valid: Tensor, phase: Phase) -> Tensor:
        """Cost [B, T] of all blocks under the decisions; the LM head is `routed_head`'s. valid [B, T]: which tokens are
        there, or how far (gates), where image tokens may be left out."""
        if decisions.bypassed:
            return self.dense(valid, phase) - self.head * valid
        total = self.outside / valid.sum(1, keepdim=True)
        for numbers in self._alike:
            cost = self._cost(numbers, self.blocks[numbers[0]], decisions, valid, phase)
            total = total + (cost.sum(0) if cost.ndim > valid.ndim else len(numbers) * cost)
        return total * valid

    @cached_property
    def _alike(self) -> list[tuple[int, ...]]:
        """The numbers of blocks that cost the same if the same is decided, together: for all of them it is a few
        operations then. In image models a block's cost depends on the one before."""
        if self.image:
            return [(number,) for number in range(len(self.blocks))]
        found: list[tuple[Any, list[int]]] = []
        for number, block in enumerate(self.blocks):
            kind = block, [router.of_kind.concerns(router, number) for router in self.spec.at("block")]
            same = next((numbers for other, numbers in found if other == kind), None)
            if same is None:
                found.append((kind, [number]))
            else:
                same.append(number)
        return [tuple(numbers) for _, numbers in found]

    def routed_head(self, share: Tensor | None, phase: Phase) -> Tensor | float:
        """Cost of the LM head for tokens whose exact rows have this share; None: no vocab router.

        In prefill all rows are computed, and the preview too, for it says which of them count.
        """
        if share is None:
            return float(self.head)
        return self.head_routed + self.head * (share if phase == "decode" else 1.0)

    def by_branch(self, decisions: Decisions, valid: Tensor, phase: Phase) -> tuple[Tensor, Tensor]:
        """(student's, frozen model's) cost [blocks, 2, B, T] of every block's attention and MLP for each token."""
        spent, dense = [], []
        for number, block in enumerate(self.blocks):
            for part in map(block.only, BRANCHES):
                products = part.q + part.kv + part.o + part.mlp_in + part.mlp_out
                whole = products + part.per_key * _keys(valid, phase, part.window)
                routed = whole if decisions.bypassed else self._cost((number,), part, decisions, valid, phase)
                dense.append(whole * valid)
                spent.append(routed * valid)
        one, other = (torch.stack(x).unflatten(0, (-1, len(BRANCHES))) for x in (spent, dense))
        return one, other

    def ratio(self, decisions: Decisions, valid: Tensor, phase: Phase) -> Tensor:
        """Student's cost over the frozen model's, over all valid tokens: a scalar, differentiable."""
        shares = [decisions.share.get(router.kind) for router in self.spec.at("head")]
        head = self.routed_head(shares[0] if shares else None, phase) * valid
        return (self.routed_blocks(decisions, valid, phase) + head).sum() / self.dense(valid, phase).sum()

    def uniform(self, share: float, tokens: int, phase: Phase) -> float:
        """The compute ratio of a window of `tokens` tokens if every router kept the same share of its gates."""
        valid = torch.ones(1, tokens, dtype=torch.bool)
        return float(self.ratio(self._evenly(share, tokens), valid, phase))

    def uniform_blocks(self, share: float, valid: Tensor, phase: Phase) -> Tensor:
        """As `routed_blocks`, if every router kept the same share of its gates."""
        return self.routed_blocks(self._evenly(share, valid.shape[1]), valid, phase)

    def _evenly(self, share: float, tokens: int) -> Decisions:
        shares = torch.tensor([[share]])
        if self.prefix:
            shares = torch.cat([torch.ones(1, self.prefix), shares.expand(1, tokens - self.prefix)], 1)
        return Decisions(share=_Uniform(shares))

    def _cost(
        self, numbers: tuple[int, ...], block: BlockShape, decisions: Decisions, valid: Tensor, phase: Phase
    ) -> Tensor:
        """Cost of blocks of one shape: [B, T], or [blocks, B, T] where it differs between them."""
        cost = BlockCost(numbers, block, decisions, valid, phase, self.image, self.prefix)
        for router in self.spec.at("block"):
            if router.of_kind.concerns(router, numbers[0]):
                router.of_kind.cost(router, cost)
        return cost.total()


@dataclass
class BlockCost:
    """What is open of a block: shares [B, T], [B, 1] or numbers, to which each kind of router adds its own; of several
    blocks, [blocks, B, T] and so on where it differs between them."""

    numbers: tuple[int, ...]
    shape: BlockShape
    decisions: Decisions
    valid: Tensor
    phase: Phase
    image: bool
    prefix: int
    inside: Tensor | float = 1.0
    """Tokens that go through the block."""
    open: dict[str, Tensor | float] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 1.0))
    """Of those, the tokens that go through each branch."""
    written: Tensor | float = 1.0
    """Tokens that have a key."""
    parts: dict[str, Tensor | float] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 1.0))
    """Heads, and groups of neurons, by branch."""
    read: dict[str, Tensor | float] = field(default_factory=dict)
    """Channels that are read at each site, where a router chooses them."""
    left: dict[str, Tensor | float] = field(default_factory=dict)
    """What is left of a site's weights, where some are left out that are neither heads, groups nor channels read."""
    scored: dict[str, Tensor | float] = field(default_factory=dict)
    """Tokens that pay for a router, by its key, where they are not those that go through the block."""

    def share(self, spec: RouterSpec, key: str, missing: float | None = None) -> Tensor | float:
        """The open share of a router's gates, 1 where closing them saves nothing in this phase; key: of its decisions,
        after the block's number; missing: what to take where it decided nothing."""
        if not spec.of_kind.saves(spec, self.phase):
            return 1.0
        shares, keys = self.decisions.share, [f"{number}.{key}" for number in self.numbers]
        if missing is None:
            found = [shares[key] for key in keys]
        else:
            some = next((shares[key] for key in keys if key in shares), None)
            if some is None:
                return missing
            found = [shares[key] if key in shares else torch.full_like(some, missing) for key in keys]
        return found[0] if len(found) == 1 else torch.stack(found)

    def total(self) -> Tensor:
        """Cost [B, T] of the block, or [blocks, B, T]."""
        block, lora, read = self.shape, self.shape.lora, self.read
        attn, mlp = (self.inside * self.open[branch] for branch in BRANCHES)
        head, neurons = (self.parts[branch] for branch in BRANCHES)
        keys = _keys(self.valid, self.phase, block.window, self.written)
        asked = attn if block.own_q else torch.maximum(torch.as_tensor(self.written), torch.as_tensor(attn))

        def corrections(site: str, gates: Tensor | float) -> Tensor | float:
            return lora.get(site, 0) + lora.get(f"{site}_open", 0) * gates * self.left.get(site, 1.0)

        def linear(site: str, macs: int, inputs: Tensor | float = 1.0) -> Tensor | float:
            return macs * self.left.get(site, 1.0) * read.get(site, inputs)

        total = asked * (linear("attn_in", block.q) * head + corrections("q", head))
        total = total + self.written * (linear("attn_in", block.kv) + corrections("kv", 1.0))
        attended = block.per_key * keys * head + linear("attn_out", block.o, head) + corrections("attn_out", head)
        total = total + attn * attended
        total = total + mlp * (linear("mlp_in", block.mlp_in) * neurons + corrections("mlp_in", neurons))
        total = total + mlp * (linear("mlp_out", block.mlp_out, neurons) + corrections("mlp_out", neurons))
        for key, cost in block.routers.items():
            total = total + cost * self.scored.get(key, self.inside if self.image else 1.0)
        for key, cost in block.substitutes.items():
            closed = self.inside * (1 - self.open[key]) if key in self.open else 1 - self.inside
            total = total + cost * closed
        return total


class _Uniform(dict[str, Tensor]):
    """A dictionary that has the same value under every key."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, key: str) -> Tensor:
        return self.value

    def __contains__(self, key: object) -> bool:
        return True

    def get(self, key: str, default: object = None) -> Tensor:
        return self.value


def _keys(valid: Tensor, phase: Phase, window: int | None, written: Tensor | float = 1.0) -> Tensor:
    """How many keys each token attends to, [..., B, T], if a share `written` of each token's keys exists."""
    present = valid.float() * written
    if phase == "prefill":
        return present.sum(-1, keepdim=True).expand(present.shape)
    keys = present.cumsum(-1)
    if window is None or window >= keys.shape[-1]:
        return keys
    return keys - F.pad(keys[..., :-window], (window, 0))
