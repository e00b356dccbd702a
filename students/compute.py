"""The cost of a student's forward pass in multiply-accumulates (MACs; one MAC is two FLOPs), given its open gates.

The cost of one token, with D the model's width, H heads and K key/value heads of size h, F the MLP's width, V the
vocabulary, c the number of keys that the token attends to:

    q: D H h    k, v: 2 D K h    scores and values: 2 H h c    o: H h D    MLP: D F for each matrix    head: D V

Where latents are cached in place of keys and values (execution/latent.py), so are the linear layers behind them, and in
decode a key costs more than in prefill (`BlockShape.per_latent`).

What hybrid models have in place of attention in some blocks costs the same for every token: linear layers, convolution
and, in linear attention with V heads, 3 V d_k d_v for reading and writing the state; in Mamba 2, with V heads of d
channels and s states each, 2 V d s. In prefill implementations compute the state of many tokens at once, with more
products; this is not counted.

The cost of what a gate switches is multiplied by the share of open gates. Routers, substitutes and low-rank corrections
are counted too. Costs depend on the phase:

- decode: one token at a time, c = keys so far; every kind of router saves.
- prefill: all tokens of a window at once, c = the whole window (as torch's FlopCounterMode counts attention). Choices
  that differ from token to token do not make a matrix product cheaper unless whole rows drop out of it, so only token
  and layer routers, and decisions that are the same for the whole sequence, save.

Both phases are counted for a sequence that is alone in its batch. Heads and expert groups save only where their linear
layers can be narrowed: not next to channel routers, which choose the channels there, and not in architectures that
compute q, k and v in one layer.

Budgets are ratios of these costs, which are the same on every device. The FLOPs of prompts that are counted while the
model runs, from which `elastic bench` predicts time, differ: fused causal attention computes half of the scores, in
the student and in the frozen model. And where the host runs ahead of the device (kernels/devices.py), tokens that skip
attention but write keys attend all the same, which costs 2 H h c more for each of them, and substitutes and the
corrections of q and o run on all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from students.decisions import Decisions
from students.sites import BRANCHES
from students.spec import RouterSpec, StudentSpec

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True)
class BlockShape:
    """Costs of one block and of the modules added to it, in MACs for one token unless stated otherwise.

    q, kv, o, mlp_in, mlp_out: the linear layers; kv: keys and values together. In a mixture of experts, mlp_in: the
    model's router, and experts that all tokens share.
    """

    q: int
    kv: int
    o: int
    mlp_in: int
    mlp_out: int
    per_key: int
    """Attention's score and weighted value for one key, all heads together."""
    window: int | None
    """Maximum number of keys that a token attends to, in sliding-window layers; None: no limit."""
    own_q: bool
    """Whether queries have a linear layer of their own: only then can a token write its key without paying for a
    query."""
    narrows: dict[str, bool]
    """Whether closed heads ("attn") and groups ("mlp") can be left out of linear layers and of attention."""
    lora: dict[str, int]
    """Low-rank corrections by place: "q", "kv", "attn_out", "mlp_in", "mlp_out"; with "_open" behind it, the one of a
    correction's two factors that gets cheaper where heads or groups are closed."""
    routers: dict[str, int]
    """Routers that decide token by token, by the key of their decisions without the block's number."""
    substitutes: dict[str, int]
    """Substitutes, for one closed token: "attn", "mlp", or "layer"."""
    attends: bool = True
    """Whether the block has attention. If not, `o` is the cost of what stands in its place, which always runs."""
    mlp_experts: int = 0
    """Experts, as many as the model's router chooses."""
    mlp_beside: int = 0
    """The model's router where the mixture stands beside a dense MLP."""
    follows: bool = False
    """Whether that router runs for the tokens of the MLP alone; if not, for all tokens in the block."""
    expand_q: int = 0
    """What makes queries from their latent."""
    expand_kv: int = 0
    """What makes keys and values from their latent in prefill. In decoding the same products, in another order, take a
    query to the latents and what it finds there back."""
    per_latent: int = 0
    """As `per_key`, in decoding, where keys and values are cached as latents; 0: they are not."""
    enters: bool = False
    """Whether only the tokens that a layer router lets through are in the block (see BlockGather)."""
    opaque: frozenset[str] = frozenset()
    """Sites whose linear layers cannot be read in part (quantized): closed channels save nothing there."""

    @property
    def products(self) -> int:
        """The cost of all products of a token but those with keys and values."""
        attn = self.q + self.kv + self.o + self.expand_q + self.expand_kv
        return attn + self.mlp_in + self.mlp_out + self.mlp_experts + self.mlp_beside

    def each_key(self, phase: Phase) -> int:
        """Return the cost of attention for one token and one key."""
        return self.per_latent if phase == "decode" and self.per_latent else self.per_key

    def only(self, branch: str) -> BlockShape:
        """Return the costs of one branch, "attn" or "mlp"; costs of the whole block, such as a layer router, are
        counted as attention's."""

        def mine(key: str) -> bool:
            return key.startswith("mlp") == (branch == "mlp")

        attn = "q", "kv", "o", "per_key", "per_latent", "expand_q", "expand_kv"
        mlp = "mlp_in", "mlp_out", "mlp_experts", "mlp_beside"
        sizes: Any = {n: getattr(self, n) * mine(n) for n in (*attn, *mlp)}
        added: Any = {
            n: {k: c for k, c in getattr(self, n).items() if mine(k)} for n in ("lora", "routers", "substitutes")
        }
        return replace(self, **sizes, **added)


@dataclass(frozen=True)
class ComputeModel:
    """Cost of a student as a differentiable function of its decisions, in MACs."""

    spec: StudentSpec
    blocks: tuple[BlockShape, ...]
    head: int
    """Cost of the LM head for one token, all rows computed."""
    head_routed: int
    """Cost of the vocab router for one token: features, preview and limit."""
    image: bool = False
    """Whether this is an image model, whose layer routers hand a block the open tokens only."""
    prefix: int = 0
    """Number of tokens in front of an image's patches (class and register tokens), which are never closed."""
    outside: int = 0
    """Cost for one image outside of the blocks: patch embedding, pooling, classifier."""

    def dense(self, valid: Tensor, phase: Phase) -> Tensor:
        """Return the cost [B, T] of the frozen model; valid [B, T] bool: which tokens are not padding (cost 0)."""
        products = sum(block.products for block in self.blocks)
        total = torch.full(valid.shape, float(self.head + products), device=valid.device)
        for window in {block.window for block in self.blocks}:
            per_key = sum(block.each_key(phase) for block in self.blocks if block.window == window)
            total = total + per_key * _keys(valid, phase, window)
        return (total + self.outside / valid.sum(1, keepdim=True)) * valid

    def routed_blocks(self, decisions: Decisions, valid: Tensor, phase: Phase) -> Tensor:
        """Return the cost [B, T] of all blocks given the decisions, without the LM head (see `routed_head`).

        valid [B, T]: tokens that are not padding, bool; or gates between 0 and 1, if image tokens are masked.
        """
        if decisions.bypassed:
            return self.dense(valid, phase) - self.head * valid
        total = self.outside / valid.sum(1, keepdim=True)
        for numbers in self._alike:
            cost = self._cost(numbers, self.blocks[numbers[0]], decisions, valid, phase)
            total = total + (cost.sum(0) if cost.ndim > valid.ndim else len(numbers) * cost)
        return total * valid

    @cached_property
    def _alike(self) -> list[tuple[int, ...]]:
        """Groups of block numbers whose blocks cost the same for the same decisions, so that the cost of a group takes
        a few tensor operations, however many blocks it has. In image models, where a block's cost depends on the block
        before, every block is a group of its own."""
        if self.image:
            return [(number,) for number in range(len(self.blocks))]
        found: list[tuple[Any, list[int]]] = []
        for number, block in enumerate(self.blocks):
            kind = block, self.spec.in_block(number, block.attends)
            same = next((numbers for other, numbers in found if other == kind), None)
            if same is None:
                found.append((kind, [number]))
            else:
                same.append(number)
        return [tuple(numbers) for _, numbers in found]

    def routed_head(self, share: Tensor | None, phase: Phase) -> Tensor | float:
        """Return the cost of the LM head for tokens with this share of exact rows; None: there is no vocab router.

        In prefill all rows are computed exactly, and the preview as well, since it decides which exact rows are used.
        """
        if share is None:
            return float(self.head)
        return self.head_routed + self.head * (share if phase == "decode" else 1.0)

    def by_branch(self, decisions: Decisions, valid: Tensor, phase: Phase) -> tuple[Tensor, Tensor]:
        """Return (student's, frozen model's) costs [blocks, 2, B, T] of attention and MLP in every block."""
        spent, dense = [], []
        for number, block in enumerate(self.blocks):
            for part in map(block.only, BRANCHES):
                whole = part.products + part.each_key(phase) * _keys(valid, phase, part.window)
                routed = whole if decisions.bypassed else self._cost((number,), part, decisions, valid, phase)
                dense.append(whole * valid)
                spent.append(routed * valid)
        one, other = (torch.stack(x).unflatten(0, (-1, len(BRANCHES))) for x in (spent, dense))
        return one, other

    def ratio(self, decisions: Decisions, valid: Tensor, phase: Phase) -> Tensor:
        """Return the compute ratio, student's over frozen model's cost of all valid tokens: a differentiable scalar."""
        shares = [decisions.share.get(router.kind) for router in self.spec.at("head")]
        head = self.routed_head(shares[0] if shares else None, phase) * valid
        return (self.routed_blocks(decisions, valid, phase) + head).sum() / self.dense(valid, phase).sum()

    def uniform(self, share: float, tokens: int, phase: Phase) -> float:
        """Return the compute ratio of a window of `tokens` tokens if every router kept the same share of its gates."""
        valid = torch.ones(1, tokens, dtype=torch.bool)
        return float(self.ratio(self._evenly(share, tokens), valid, phase))

    def uniform_blocks(self, share: float, valid: Tensor, phase: Phase) -> Tensor:
        """Return the cost of all blocks as `routed_blocks` does, if every router kept the same share of its gates."""
        return self.routed_blocks(self._evenly(share, valid.shape[1]), valid, phase)

    def _evenly(self, share: float, tokens: int) -> Decisions:
        shares = torch.tensor([[share]])
        if self.prefix:
            shares = torch.cat([torch.ones(1, self.prefix), shares.expand(1, tokens - self.prefix)], 1)
        return Decisions(share=_Uniform(shares))

    def _cost(
        self, numbers: tuple[int, ...], block: BlockShape, decisions: Decisions, valid: Tensor, phase: Phase
    ) -> Tensor:
        """Return the cost [B, T] of each of these blocks of one shape, or [blocks, B, T] if decisions differ."""
        cost = BlockCost(numbers, block, decisions, valid, phase, self.image, self.prefix)
        for router in self.spec.in_block(numbers[0], block.attends):
            router.of_kind.cost(router, cost)
        return cost.total()


@dataclass
class BlockCost:
    """Open shares of a block, which each kind of router lowers by what it closes (Kind.cost), and the resulting cost.

    Shares are numbers or tensors [B, T] or [B, 1]; for several blocks of one shape, [blocks, B, T] or [blocks, B, 1].
    """

    numbers: tuple[int, ...]
    shape: BlockShape
    decisions: Decisions
    valid: Tensor
    phase: Phase
    image: bool
    prefix: int
    inside: Tensor | float = 1.0
    """Share of tokens that go through the block."""
    open: dict[str, Tensor | float] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 1.0))
    """Share of the tokens inside the block that go through each branch."""
    written: Tensor | float = 1.0
    """Share of tokens whose keys and values are written."""
    parts: dict[str, Tensor | float] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 1.0))
    """Share of heads ("attn") and of groups of neurons ("mlp")."""
    read: dict[str, Tensor | float] = field(default_factory=dict)
    """Share of channels that are read, by site with a channel router."""
    left: dict[str, Tensor | float] = field(default_factory=dict)
    """Share of a site's weights that are read, where a router leaves out other weights than those of heads, groups or
    channels (neuron and mixture routers)."""
    scored: dict[str, Tensor | float] = field(default_factory=dict)
    """How often a router's cost is paid per token, by its key in BlockShape.routers, where the default of `total` (all
    tokens; in image models those inside the block) does not hold."""

    def share(self, spec: RouterSpec, key: str, missing: float | None = None) -> Tensor | float:
        """Return the share of a router's gates that are open, or 1 if closing them saves nothing in this phase.

        key: key of the router's decisions without the block's number; missing: the share if it has decided nothing.
        """
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
        """Return the cost [B, T] of the block, or [blocks, B, T]."""
        block, lora, read = self.shape, self.shape.lora, self.read
        attn, mlp = (self.inside * self.open[branch] for branch in BRANCHES)
        head, neurons = (self.parts[branch] for branch in BRANCHES)
        keys = _keys(self.valid, self.phase, block.window, self.written)
        asked = attn if block.own_q else torch.maximum(torch.as_tensor(self.written), torch.as_tensor(attn))

        def corrections(site: str, gates: Tensor | float) -> Tensor | float:
            """Return the cost of low-rank corrections with these open shares of heads or groups."""
            return lora.get(site, 0) + lora.get(f"{site}_open", 0) * gates * self.left.get(site, 1.0)

        def linear(site: str, macs: int, inputs: Tensor | float = 1.0) -> Tensor | float:
            """Return the cost of linear layers; inputs: share of channels read where no router chooses channels."""
            return macs * self.left.get(site, 1.0) * read.get(site, inputs)

        total = asked * (linear("attn_in", block.q) * head + corrections("q", head))
        total = total + self.written * (linear("attn_in", block.kv) + corrections("kv", 1.0))
        total = total + asked * block.expand_q
        total = total + (attn if self.phase == "decode" else self.written) * block.expand_kv
        attended = linear("attn_out", block.o, head) + corrections("attn_out", head)
        attended = attended + block.each_key(self.phase) * keys * head
        total = total + attn * attended
        total = total + mlp * (linear("mlp_in", block.mlp_in) * neurons + corrections("mlp_in", neurons))
        total = total + mlp * (linear("mlp_out", block.mlp_out, neurons) + corrections("mlp_out", neurons))
        total = total + mlp * block.mlp_experts * self.left.get("mlp_experts", 1.0)
        total = total + block.mlp_beside * (mlp if block.follows else self.inside if block.enters else 1.0)
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
    """Return the number of keys [..., B, T] that each token attends to, if a share `written` of all keys is written."""
    present = valid.float() * written
    if phase == "prefill":
        return present.sum(-1, keepdim=True).expand(present.shape)
    keys = present.cumsum(-1)
    if window is None or window >= keys.shape[-1]:
        return keys
    return keys - F.pad(keys[..., :-window], (window, 0))
