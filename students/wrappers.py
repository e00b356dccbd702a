"""Modules that stand in front of a frozen model's own: they hold `base_layer` and never copy its forward.

Each executes in two ways (see Runtime.execution) that agree: as masks, and by leaving out what is closed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from students import fused, gates, kernels
from students.architecture import weight_of
from students.attention import Packing, Plan, scatter_rows
from students.libraries import cache_in
from students.packing import PackedProduct
from students.routers import ChannelRouter, Lora, Router, Substitute, VocabRouter
from students.runtime import Runtime
from students.spec import RouterSpec

FEW_ROWS = 4
"""Up to so many tokens at once, reading weights costs more than arithmetic: only what one of them needs is read. More
of them need nearly everything, which is then faster read as a whole."""

JOINT_ROWS = 2048
"""Up to so many tokens, layers that read the same channels are one product; for more its output would be too large."""


class Wrapper(nn.Module):
    """A module in place of another; unknown attributes are the other's."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.runtime = runtime

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


@dataclass
class Exits:
    """What token and layer gates do to the output of their branch."""

    x: Tensor
    """The branch's input [B, T, D], which substitutes read."""
    gates: list[tuple[Tensor, Tensor, Substitute | None]] = field(default_factory=list)
    """(gate, closed, substitute) in turn, the first two [B, T, 1] or [B, 1, 1]: out * gate + substitute * closed."""
    specs: list[RouterSpec] = field(default_factory=list)
    """Of the routers that decided them."""
    rows: Tensor | None = None
    """Flat indices of the tokens that the output [1, N, D] holds; None: all [B, T, D]."""
    valid: Tensor | None = None
    """[B, T] bool; padding is left out when rows are."""

    @property
    def weighted(self) -> bool:
        """Whether some gate multiplies what it lets through by something other than 1."""
        return any(spec.weight == "score" for spec in self.specs)

    @property
    def drops(self) -> list[int]:
        """The numbers of the gates whose closed tokens write no key."""
        return [number for number, spec in enumerate(self.specs) if spec.kv == "drop"]

    def open(self, only: list[int] | None = None) -> Tensor:
        """[B, T] bool: tokens that are not padding and that these gates (all, by default) let through."""
        kept = self.valid
        for number, (_, closed, _) in enumerate(self.gates):
            if only is None or number in only:
                this = closed.squeeze(-1).expand(self.x.shape[:2]) == 0
                kept = this if kept is None else kept & this
        return kept if kept is not None else self.x.new_ones(self.x.shape[:2], dtype=torch.bool)

    def apply(self, out: Tensor) -> Tensor:
        """The branch's output as the block gets it, [B, T, D]."""
        if self.rows is not None:
            return self._scatter(out)
        for gate, closed, substitute in self.gates:
            out = out * gate if substitute is None else torch.addcmul(substitute(self.x) * closed, out, gate)
        return out

    def pass_all(self, out: Tensor) -> Tensor:
        """As `apply`, where all gates turned out to be open."""
        for gate, _, _ in self.gates if self.weighted else ():
            out = out * gate
        return out

    def _scatter(self, out: Tensor) -> Tensor:
        x = self.x.flatten(0, 1)
        passing = self.valid
        weight = None
        substitutes = []
        for gate, closed, substitute in reversed(self.gates):
            closed = closed.squeeze(-1).expand(self.x.shape[:2]) != 0
            if substitute is not None:
                chosen = (closed if passing is None else closed & passing).flatten().nonzero().squeeze(1)
                substitutes.append((chosen, substitute, weight))
            passing = ~closed if passing is None else passing & ~closed
            if self.weighted:
                gate = gate.expand(*self.x.shape[:2], 1).flatten(0, 1)
                weight = gate if weight is None else weight * gate
        out = out.reshape(-1, x.shape[-1])
        out = out if weight is None else out * weight.index_select(0, self.rows)
        total = scatter_rows(out, self.rows, len(x))
        for chosen, substitute, later in substitutes:
            if len(chosen):
                stand_in = substitute(x.index_select(0, chosen))
                stand_in = stand_in if later is None else stand_in * later.index_select(0, chosen)
                total.index_copy_(0, chosen, stand_in)
        return total.view_as(self.x)


@dataclass
class Gathered:
    """The tokens that a block runs on, where a layer router lets only some through."""

    x: Tensor
    """The block's input [B, T, D]."""
    rows: Tensor
    """[N]: flat indices of the tokens that are let through."""
    counts: list[int]
    """How many of them each row of the batch has."""
    exits: Exits
    """What is left to do to the output [1, N, D] of a branch: weights."""


class BlockGather:
    """Hooks that let a language model's block run on the tokens that its layer router lets through, and on no others.

    For routers whose closed tokens write no key and get no substitute: then norms and additions to the residual stream
    shrink with the rest. attn: the branch that has the router; norm: the one in front of it.
    """

    def __init__(self, block: nn.Module, attn: RoutedBranch, norm: nn.Module | None) -> None:
        self._attn = attn
        self._norm = norm
        block.register_forward_pre_hook(self._gather, with_kwargs=True)
        block.register_forward_hook(self._scatter)

    def _gather(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attn, run = self._attn, self._attn.runtime
        router = attn.routers["layer"]
        if run.bypass or not run.skips([router.spec]):
            return None
        x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        features = F.rms_norm(x, x.shape[-1:]) if self._norm is None else self._norm(x)
        gate, closed = run.decide(f"{attn.block}.layer", router, features)
        open_ = Exits(x, [(gate, closed, None)], valid=run.valid).open()
        rows = open_.flatten().nonzero().squeeze(1)  # waits for the device
        exits = Exits(x, [(_take(gate, x, rows), closed, None)], [router.spec])
        run.passed[f"{attn.block}.gathered"] = Gathered(x, rows, open_.sum(1).tolist(), exits)
        return (_take(x, x, rows), *rest), {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def _scatter(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        gathered = self._attn.runtime.passed.pop(f"{self._attn.block}.gathered", None)
        if gathered is None:
            return None
        some = out[0] if isinstance(out, tuple) else out
        full = gathered.x.flatten(0, 1).index_copy(0, gathered.rows, some.squeeze(0)).view_as(gathered.x)
        return (full, *out[1:]) if isinstance(out, tuple) else full


@dataclass
class Narrow:
    """The channels in front of a branch's last linear layer that are open, for all tokens of this call alike."""

    channels: Tensor
    """[n], ascending."""
    size: int
    """How many there are, open or not."""
    weight: Tensor | None
    """[n]: what they are multiplied by; None: 1."""
    keep: bool
    """The choice stands for more calls (sequence-level, static): weights may be sliced and kept."""


class RoutedBranch(Wrapper):
    """An attention or MLP branch whose routers read its input.

    block: the block's number. branch: "attn" or "mlp". prenorm: whether the input is normalised already.
    late_exit: gates are applied by a RoutedExit further on (post-norm architectures) instead of here. narrows: whether
    closed heads or groups can be left out of the linear layers. window: the layer's sliding window. mask: the keyword
    under which attention takes one.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        runtime: Runtime,
        block: int,
        branch: str,
        *,
        prenorm: bool,
        late_exit: bool,
        narrows: bool,
        window: int | None,
        mask: str = "attention_mask",
    ) -> None:
        super().__init__(base_layer, runtime)
        self.mask = mask
        self.block = block
        self.branch = branch
        self.prenorm = prenorm
        self.late_exit = late_exit
        self.narrows = narrows
        self.window = window
        self.routers = nn.ModuleDict()
        self.substitutes = nn.ModuleDict()
        self.block_router: tuple[Router, ...] = ()
        self._standing: tuple[Any, Any] = (None, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.runtime
        if run.bypass:
            return self.base_layer(*args, **kwargs)
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if args and not run.causal:  # vision towers of transformers hand the mask on by its place
            kwargs[self.mask], args = args[0], args[1:]
        gathered = run.passed.get(f"{self.block}.gathered")
        if gathered is not None:
            return self._run_gathered(gathered, x, args, kwargs)
        features = x if self.prenorm else F.rms_norm(x, x.shape[-1:])
        exits = self._decide(x, features)
        skip = run.skips(exits.specs)
        try:
            plan = self._pass_parts(features, skip)
            if skip and exits.gates:
                exits.valid = run.valid
                if self.branch == "mlp":
                    return self._compute_some(exits, args, kwargs)
                if run.causal:
                    return self._attend_some(exits, plan, args, kwargs)
                return self._attend_patches(exits, plan, args, kwargs)
            if plan is not None and self.branch == "attn":
                kwargs["routed"] = plan
            if self.branch == "attn" and exits.drops:
                kwargs = self._without_closed_keys(exits, kwargs)
            return self._leave(self.base_layer(x, *args, **kwargs), exits)
        finally:
            for what in ("narrow", "rows", "queries"):
                run.passed.pop(f"{self.block}.{self.branch}.{what}", None)

    def _decide(self, x: Tensor, features: Tensor) -> Exits:
        """Token and layer gates. A layer gate is decided in front of attention and handed on to the MLP."""
        exits = Exits(x)
        for kind in ("token", "layer"):
            key = f"{self.block}.layer" if kind == "layer" else f"{self.block}.{self.branch}.{kind}"
            if kind in self.routers:
                router = self.routers[kind]
                decided = self.runtime.decide(key, router, features)
                if kind == "layer":
                    self.runtime.passed[key] = decided
            elif kind == "layer" and self.block_router:
                router = self.block_router[0]
                decided = self.runtime.passed.pop(key)
            else:
                continue
            exits.gates.append((*decided, self.substitutes[kind] if kind in self.substitutes else None))  # noqa: SIM401
            exits.specs.append(router.spec)
        return exits

    def _pass_parts(self, features: Tensor, skip: bool) -> Plan | None:
        """Decide heads or expert groups and hand them to the linear layers; the plan for attention, if it shrinks."""
        kind = "head" if self.branch == "attn" else "expert"
        if kind not in self.routers:
            return None
        run, router, key = self.runtime, self.routers[kind], f"{self.block}.{self.branch}.{kind}"
        gate, _ = run.decide(key, router, features)
        alike = gate.numel() == gate.shape[-1]
        if not (skip and alike and self.narrows and run.skips([router.spec])):
            run.passed[key] = gate.index_select(-1, router.members)
            return None
        narrow, heads = self._narrow(key, router, gate.flatten())
        run.passed[f"{self.block}.{self.branch}.narrow"] = narrow
        return Plan(heads=heads)

    def _narrow(self, key: str, router: Router, gate: Tensor) -> tuple[Narrow, Tensor]:
        """(open channels, open gates) of gates [N]; remembered where they stand for more than this call."""
        run, static = self.runtime, router.spec.network == "static"
        if static:
            state = router.score._version, router.members._version, run.offset, run.capacity
            if self._standing[0] == state:
                return self._standing[1]
        elif run.memory is not None and f"{key}.narrow" in run.memory:
            return run.memory[f"{key}.narrow"]
        open_ = gate != 0
        channels = open_[router.members].nonzero().squeeze(1)
        weight = gate[router.members[channels]] if router.spec.weight == "score" else None
        keep = static or router.spec.granularity == "sequence"
        result = Narrow(channels, len(router.members), weight, keep), open_.nonzero().squeeze(1)
        if static:
            self._standing = state, result
        elif keep and run.memory is not None:
            run.memory[f"{key}.narrow"] = result
        return result

    def _compute_some(self, exits: Exits, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """An MLP on the tokens that need it."""
        rows = exits.open().flatten().nonzero().squeeze(1)
        if len(rows) == self.runtime.counted(exits.x):
            return self._leave(self.base_layer(exits.x, *args, **kwargs), exits, all_open=True)
        exits.rows = rows
        gate = self.runtime.passed.pop(f"{self.block}.mlp.expert", None)
        packed = _take(exits.x, exits.x, rows)
        if len(rows) == 0:
            return self._leave(packed, exits)
        self.runtime.passed[f"{self.block}.mlp.rows"] = rows, rows, exits.x.shape[:2]
        if gate is not None:
            self.runtime.passed[f"{self.block}.mlp.expert"] = _take(gate, exits.x, rows)
        return self._leave(self.base_layer(packed, *args, **kwargs), exits)

    def _attend_some(self, exits: Exits, plan: Plan | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Attention of the tokens that need it, to the tokens that have a key."""
        run, x = self.runtime, exits.x
        tokens = x.shape[1]
        open_ = exits.open()
        rows = open_.flatten().nonzero().squeeze(1)
        drops = exits.drops
        if not drops and len(rows) == run.counted(x):
            if plan is not None:
                kwargs["routed"] = plan
            return self._leave(self.base_layer(x, *args, **kwargs), exits, all_open=True)

        exits.rows = rows
        plan = plan or Plan()
        kwargs["routed"] = plan
        heads = f"{self.block}.attn.head"
        gate = run.passed.pop(heads, None)
        if drops:
            kept = exits.open(drops)
            seen = rows if len(drops) == len(exits.gates) else kept.flatten().nonzero().squeeze(1)
            plan.packing = self._pack(x, seen, kept.sum(1).tolist(), kwargs)
            if len(seen) == 0:
                return self._leave((_take(x, x, seen), None), exits)  # late exit: the block still unpacks a tuple
            if len(seen) > len(rows):
                plan.queries = torch.searchsorted(seen, rows)
        else:
            plan.queries = rows
        if gate is not None:
            run.passed[heads] = _take(gate, x, rows)
        if drops:
            x = _take(x, x, seen)
        run.passed[f"{self.block}.attn.rows"] = seen if drops else None, rows, exits.x.shape[:2]
        if plan.queries is not None:
            plan.counts = tuple(open_.sum(1).tolist()) if tokens > 1 or drops else ()
            run.passed[f"{self.block}.attn.queries"] = plan.queries
        return self._leave(self.base_layer(x, *args, **kwargs), exits)

    def _run_gathered(self, gathered: Gathered, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """The branch of a block that runs on the tokens x [1, N, D] (see BlockGather)."""
        attends, place = self.branch == "attn", f"{self.block}.{self.branch}.rows"
        if attends:
            kwargs["routed"] = Plan(packing=self._pack(gathered.x, gathered.rows, gathered.counts, kwargs))
        if len(gathered.rows) == 0:
            return self._leave((x, None) if attends else x, gathered.exits, all_open=True)
        self.runtime.passed[place] = gathered.rows, gathered.rows, gathered.x.shape[:2]
        try:
            return self._leave(self.base_layer(x, *args, **kwargs), gathered.exits, all_open=True)
        finally:
            del self.runtime.passed[place]

    def _attend_patches(self, exits: Exits, plan: Plan | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Attention among the tokens of an image that need it."""
        run, x = self.runtime, exits.x
        index, valid = gather_open(exits.open())
        if index.shape[1] == x.shape[1] and valid is None:
            if plan is not None:
                kwargs["routed"] = plan
            return self._leave(self.base_layer(x, *args, **kwargs), exits, all_open=True)
        flat = flat_index(index, x.shape[1])
        exits.rows = flat if valid is None else flat[valid.flatten()]
        heads = f"{self.block}.attn.head"
        if heads in run.passed:
            gate = run.passed[heads].expand(*x.shape[:2], -1)
            run.passed[heads] = gate.flatten(0, 1).index_select(0, flat).view(*index.shape, -1)
        run.passed[f"{self.block}.attn.rows"] = flat, flat, x.shape[:2]
        if plan is not None:
            kwargs["routed"] = plan
        kwargs = for_tokens(kwargs, index, run.prefix)
        if valid is not None:
            kwargs[self.mask] = gates.hide_closed_keys(None, valid, x.dtype, causal=False)
        some = x.flatten(0, 1).index_select(0, flat).view(*index.shape, x.shape[-1])
        out = self.base_layer(some, *args, **kwargs)
        packed, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        packed = (packed.flatten(0, 1) if valid is None else packed[valid]).unsqueeze(0)
        return self._leave(packed if rest is None else (packed, *rest), exits)

    def _pack(self, x: Tensor, rows: Tensor, counts: list[int], kwargs: dict[str, Any]) -> Packing:
        """Prepare the cache and the arguments of attention for tokens x [B, T, D], of which the flat rows are kept."""
        tokens = x.shape[1]
        batch, index, layer = rows // tokens, rows % tokens, None
        cache = cache_in(kwargs)
        if cache is not None:
            layer = cache.layers[self.base_layer.layer_idx]
            index = index + layer.get_seq_length()
            layer.expect(batch, index, counts, tokens)
        kwargs["attention_mask"] = None
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(_take(e, x, rows) for e in kwargs["position_embeddings"])
        return Packing(index, batch, counts, layer, self.window)

    def _leave(self, out: Any, exits: Exits, all_open: bool = False) -> Any:
        """Apply the exits to the branch's output (an attention branch returns a tuple), here or later."""
        if self.late_exit:
            self.runtime.passed[f"{self.block}.{self.branch}.exit"] = exits, all_open
            return out
        apply = exits.pass_all if all_open else exits.apply
        return (apply(out[0]), *out[1:]) if isinstance(out, tuple) else apply(out)

    def _without_closed_keys(self, exits: Exits, kwargs: dict[str, Any]) -> dict[str, Any]:
        if cache_in(kwargs) is not None:
            raise ValueError("masks with the K/V policy `drop` see whole sequences: pass use_cache=False, or skip")
        kept = exits.open(exits.drops)
        mask = gates.hide_closed_keys(kwargs.get(self.mask), kept, exits.x.dtype, self.runtime.causal)
        return {**kwargs, self.mask: mask}


def _take(values: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Values [B or 1, T or 1, N] of the tokens x [B, T, D], for the flat rows only: [1, n, N]."""
    return values.expand(*x.shape[:2], -1).flatten(0, 1).index_select(0, rows).unsqueeze(0)


def gather_open(open_: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the open tokens of open_ [B, T] are: index [B, k], k the most that any row has (at least 1), the open ones
    first; and which of them are open [B, k], None where all are."""
    counts = open_.sum(1)
    most = max(1, int(counts.max()))  # waits for the device
    index = open_.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    valid = torch.arange(most, device=open_.device) < counts[:, None]
    return index, None if bool(valid.all()) else valid


def flat_index(index: Tensor, tokens: int) -> Tensor:
    """[B * k]: where the tokens at index [B, k] are once batch and tokens [B, tokens] are one dimension."""
    if len(index) == 1:
        return index.flatten()
    return (index + tokens * torch.arange(len(index), device=index.device)[:, None]).flatten()


def for_tokens(kwargs: dict[str, Any], index: Tensor, prefix: int) -> dict[str, Any]:
    """What a block of an image model is called with, for the tokens at index [B, k] only, which begins with the prefix.

    Rotary embeddings (timm's `rope`) hold patches alone, [..., N, C]; they become [B, 1 or heads, k - prefix, C].
    """
    rope = kwargs.get("rope")
    if rope is None:
        return kwargs
    rope = rope if rope.ndim > 2 else rope.unsqueeze(0)
    return {**kwargs, "rope": rope[:, index[:, prefix:] - prefix].transpose(0, 1)}


class RoutedExit(Wrapper):
    """The last module of a branch (a post-norm): what the branch decided is applied to its output."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime, block: int, branch: str) -> None:
        super().__init__(base_layer, runtime)
        self.key = f"{block}.{branch}.exit"

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if self.runtime.bypass:
            return out
        exits, all_open = self.runtime.passed.pop(self.key)
        return exits.pass_all(out) if all_open else exits.apply(out)


class Site:
    """The linear layers of a block that read one input through one selection of channels, without gradients.

    Their weights are put together when the first token comes by: [inputs, outputs side by side], of which the layers'
    own become views, so that there is one copy.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.layers: list[RoutedLinear] = []
        self.waiting: list[Tensor | None] = []
        self._whole: Tensor | None = None
        self._made_for = -1

    def take(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """The layer's output [..., O] for x [..., I]; the layer that comes first has all of them computed."""
        if not self.waiting or self.waiting[layer.place] is None:
            self.waiting = self.outputs(x)
        out, self.waiting[layer.place] = self.waiting[layer.place], None
        return out

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Outputs of all layers for x [..., I]."""
        self._prepare(x.dtype)
        run = self.layers[0].runtime
        if run.alone:  # read only what the token selects
            out, count = self._reader(x)
            self._note(lambda: torch.as_tensor(count / x.shape[-1]).expand(x.shape[:-1]))
        elif run.rows is None and run.tokens <= FEW_ROWS and kernels.reads_few(self._whole, self._ends):
            self._note(lambda: (x.abs() >= self._limit).float().mean(-1))
            flat = x.flatten(0, -2)
            out, _ = kernels.few_channels(flat, self._limit, self._whole, self._bias, self._down, self._up, self._ends)
        else:
            return self._many(x)
        out = out.view(*x.shape[:-1], -1)
        return [out] if len(self.layers) == 1 else list(out.split(self._sizes, -1))

    def _many(self, x: Tensor) -> list[Tensor]:
        """Many tokens: nothing is saved by leaving channels out, so they are masked."""
        first, run = self.layers[0], self.layers[0].runtime
        if run.rows is None and run.decisions is None:
            masked = self._mask(x)
        else:
            limit = self._limit if run.rows is None else first.routers["channel"].limit(first.turn(x), x.dtype)
            masked, share = fused.channel_gate(x, limit)
            self._note(lambda: share)
        masked = masked.flatten(0, -2)
        if len(masked) <= JOINT_ROWS:
            outs = self._product(masked, self._whole.T, self._bias).split(self._sizes, 1)
        else:
            outs = [layer.base_layer(masked) for layer in self.layers]
        if self._down is not None:
            low = F.linear(x.flatten(0, -2), self._down)
            corrected = first.corrected(x)
            if corrected is not None:
                low = (low.view(*x.shape[:-1], -1) * corrected).flatten(0, -2)
            parts = zip(outs, low.chunk(len(outs), 1), self._up.split(self._sizes, 1), strict=True)
            for out, part, up in parts:
                torch.addmm(out, part, up, out=out)
        return [out.view(*x.shape[:-1], -1) for out in outs]

    def one(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """The output of one layer only, for a token x [1, 1, I] on its own."""
        self._prepare(x.dtype)
        part = slice(self._ends[layer.place] - layer.outputs, self._ends[layer.place])
        down, up = self._down, self._up
        if down is not None:
            down, up = down.chunk(len(self.layers))[layer.place], up[:, part].contiguous()
        bias = None if self._bias is None else self._bias[part]
        out, count = kernels.read_channels(
            x.flatten(), self._limit, self._whole[:, part], bias, down, up, [layer.outputs]
        )
        layer.note(torch.as_tensor(count / layer.inputs).expand(x.shape[:-1]))
        return out.view(*x.shape[:-1], -1)

    def open_channels(self, x: Tensor, channels: Tensor) -> Tensor:
        """From x [1, 1, n], the open channels of a token on its own, the only layer's output without corrections."""
        self._prepare(x.dtype)
        layer = self.layers[0]
        full = x.new_zeros(layer.inputs).index_copy_(0, channels, x.flatten())
        limit = torch.full_like(full, torch.inf, dtype=torch.float32).index_fill(0, channels, 0.0)
        out, _ = kernels.read_channels(full, limit, self._whole, layer.base_layer.bias, None, None, self._ends)
        return out.view(*x.shape[:-1], -1)

    def _note(self, share: Callable[[], Tensor]) -> None:
        if self.layers[0].runtime.decisions is not None:
            self.layers[0].note(share())

    def _prepare(self, dtype: torch.dtype) -> None:
        """Bring what is kept up to date with weights, corrections, limits and the dial."""
        first = self.layers[0]
        run = first.runtime
        if self._made_for == run.epoch:
            return
        self._made_for = run.epoch
        self._sizes = [layer.outputs for layer in self.layers]
        self._ends = list(itertools.accumulate(self._sizes))
        lora = [layer.lora for layer in self.layers if layer.lora is not None]
        bases = [layer.base_layer for layer in self.layers]
        if self._whole is None or self._whole.data_ptr() != bases[0].weight.data_ptr():
            columns = [base.weight if isinstance(base, Conv1D) else base.weight.T for base in bases]
            self._whole = torch.cat([part.detach() for part in columns], 1)
            for base, part in zip(bases, self._whole.split(self._sizes, 1), strict=True):
                base.weight.data = part if isinstance(base, Conv1D) else part.T
            self._product = PackedProduct(like=bases[0])
        self._bias = self._down = self._up = self._limit = None
        if any(base.bias is not None for base in bases):
            biases = [base.bias for base in bases]
            zeros = [self._whole.new_zeros(size) for size in self._sizes]
            self._bias = torch.cat([z if b is None else b.detach() for b, z in zip(biases, zeros, strict=True)])
        if lora:
            self._down = torch.cat([part.down.detach() for part in lora]).to(dtype)
            self._up = torch.cat([part.up.detach() for part in lora]).T.to(dtype).contiguous()
        if "channel" in first.routers and run.rows is None:
            self._limit = first.routers["channel"].limit(run.offset, dtype)
            self._mask = fused.masker(self._limit, dtype)
            self._reader = kernels.reader(self._limit, self._whole, self._bias, self._down, self._up, self._ends)


class RoutedLinear(Wrapper):
    """A linear layer of which only a part is computed, with an optional low-rank correction.

    site: the layers that share its input and one selection of channels, which the first of them to run makes. branch:
    the name ("3.attn") under which the branch hands over what is open. part: which of a branch's heads or groups this
    layer touches: the "inputs" it reads (o, down), the "outputs" it writes (q, gate, up), or none. per_query: its
    output is wanted only for tokens that attend (q, o).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        runtime: Runtime,
        site: Site,
        branch: str,
        *,
        gated_by: str | None,
        part: Literal["inputs", "outputs", ""],
        per_query: bool,
    ) -> None:
        super().__init__(base_layer, runtime)
        self.site = site
        self.branch = branch
        self.gated_by = gated_by
        self.part = part
        self.per_query = per_query
        self.outputs, self.inputs = weight_of(base_layer).shape
        self.routers = nn.ModuleDict()
        self.lora: Lora | None = None
        self.place = len(site.layers)
        self.selects = False  # set by add_channels
        self._slice: tuple[Any, Any] = (None, None)
        self._low: tuple[Tensor, ...] = ()
        self._lora_for = -1
        site.layers.append(self)

    def add_channels(self, router: ChannelRouter) -> None:
        """Choose the channels that are read with this router, which all layers of the site share."""
        self.routers["channel"] = router
        for layer in self.site.layers:  # one runs for all where all run on the same tokens, and whole
            layer.selects = router.spec.network != "static" and not any(x.part or x.per_query for x in self.site.layers)

    def forward(self, x: Tensor) -> Tensor:
        run = self.runtime
        if run.bypass:
            return self.base_layer(x)
        if run.skipping and self.selects:
            return self.site.take(self, x)
        queries = run.passed.get(f"{self.branch}.queries")
        if queries is None or not self.per_query:
            return self._compute(x, together=queries is None)
        out = self._compute(x.flatten(0, 1).index_select(0, queries).unsqueeze(0), together=False)
        if self.site.name.endswith("out"):
            return out  # the branch ends here and goes on with these tokens
        return scatter_rows(out.squeeze(0), queries, x.shape[:-1].numel()).view(*x.shape[:-1], -1)

    def _compute(self, x: Tensor, together: bool) -> Tensor:
        narrow = self.runtime.passed.get(f"{self.branch}.narrow") if self.part else None
        if narrow is not None:
            return self._read_open(x, narrow) if self.part == "inputs" else self._write_open(x, narrow)
        if self.part == "inputs":
            x = x * self.runtime.passed.pop(self.gated_by)
        if "channel" not in self.routers:
            return self._correct(self.base_layer(x), x)
        router = self.routers["channel"]
        if self._alone(x):
            return self.site.take(self, x) if together else self.site.one(self, x)
        if self.runtime.skipping and router.spec.network == "static" and self.runtime.rows is None:
            return self._read_static(router, x)
        return self._correct(self.base_layer(self._mask(router, x, together)), x)

    def _owner(self) -> Tensor | None:
        """The row of the batch that each of this call's tokens belongs to, where they are packed."""
        passed = self.runtime.passed
        if f"{self.branch}.rows" not in passed:
            return None
        everyone, some, (_, tokens) = passed[f"{self.branch}.rows"]
        few = self.site.name.endswith("out") or (self.per_query and f"{self.branch}.queries" in passed)
        index = some if few else everyone
        return None if index is None else index // tokens

    def turn(self, x: Tensor) -> float | Tensor:
        """The dial for x [..., I] (see Runtime.turn)."""
        return self.runtime.turn(x, None if self.runtime.rows is None else self._owner())

    def corrected(self, x: Tensor) -> Tensor | None:
        """Which tokens of x [..., I] are corrected (see Runtime.corrected)."""
        return None if self.runtime.rows is None else self.runtime.corrected(x, self._owner())

    def _alone(self, x: Tensor) -> bool:
        """Whether this is one token, decoded on its own: then reading less is faster."""
        return self.runtime.alone and x.shape[:-1].numel() == 1

    def note(self, share: Tensor) -> None:
        """Record the share of channels that was read; 0 for tokens that are not here."""
        run, place = self.runtime, self.runtime.passed.get(f"{self.branch}.rows")
        asked = self.per_query and f"{self.branch}.queries" in run.passed
        if run.decisions is None or (asked and self.site.name.endswith("in")):  # keys and values read for more tokens
            return
        rows = None if place is None else place[1] if self.site.name.endswith("out") else place[0]
        if rows is not None:
            full = share.new_zeros(place[2].numel())
            share = full.index_copy_(0, rows, share.flatten()).view(place[2])
        run.note(f"{self.site.name}.channel", share)

    def _correct(self, out: Tensor, x: Tensor) -> Tensor:
        """out [..., O] of our own making plus the low-rank correction from x [..., I]."""
        if self.lora is None:
            return out
        if not self.runtime.skipping or self.runtime.rows is not None:
            return out + self._only_corrected(self.lora(x), x)
        if self._lora_for != self.runtime.epoch:
            self._lora_for = self.runtime.epoch
            self._low = self.lora.down.detach().to(x.dtype), self.lora.up.detach().T.to(x.dtype).contiguous()
        flat = out.view(-1, self.outputs)
        torch.addmm(flat, F.linear(x.reshape(-1, self.inputs), self._low[0]), self._low[1], out=flat)
        return out

    def _only_corrected(self, low: Tensor, x: Tensor) -> Tensor:
        """The low-rank correction [..., O] from x [..., I], but for rows that are the teacher's."""
        corrected = self.corrected(x)
        return low if corrected is None else low * corrected

    def _mask(self, router: ChannelRouter, x: Tensor, together: bool) -> Tensor:
        """x without the channels that stay closed; the first layer of a site chooses for all."""
        run, name = self.runtime, self.site.name
        masked, left = run.passed.pop(name, (None, len(self.site.layers))) if together else (None, 1)
        if masked is None:
            masked, share = read_channels(router, x, self.turn(x))
            self.note(share)
        if left > 1:
            run.passed[name] = masked, left - 1
        return masked

    def _read_static(self, router: ChannelRouter, x: Tensor) -> Tensor:
        """The same channels for every token: a smaller matrix product."""
        run = self.runtime
        state = run.offset, router.log_limit._version
        if self._slice[0] != state:
            channels = (router.limit(run.offset, x.dtype) == 0).nonzero().squeeze(1)
            self._slice = state, (channels, weight_of(self.base_layer)[:, channels].contiguous())
        channels, weight = self._slice[1]
        self.note(x.new_full(x.shape[:-1], len(channels) / self.inputs, dtype=torch.float32))
        return self._correct(F.linear(x[..., channels], weight, self.base_layer.bias), x)

    def _write_open(self, x: Tensor, narrow: Narrow) -> Tensor:
        """Outputs of open heads or groups only: [..., n], or [..., 2 n] where a layer holds gate and up."""
        copies = self.outputs // narrow.size
        rows = torch.cat([narrow.channels + copy * narrow.size for copy in range(copies)])
        base = self.base_layer
        if self._alone(x) and not narrow.keep:
            if not weight_of(base).is_contiguous():
                base.weight.data = base.weight.data.T.contiguous().T
            out = kernels.dot_rows(x.flatten(), weight_of(base), base.bias, rows).view(*x.shape[:-1], -1)
        else:
            weight, bias = self._sliced(
                narrow.channels, lambda: (weight_of(base)[rows], None if base.bias is None else base.bias[rows])
            )
            out = F.linear(x, weight, bias)
        if self.lora is None:
            return out
        low = F.linear(F.linear(x, self.lora.down.to(x.dtype)), self.lora.up[rows].to(x.dtype))
        return out + self._only_corrected(low, x)

    def _read_open(self, x: Tensor, narrow: Narrow) -> Tensor:
        """From x [..., n], the channels of open heads or groups only."""
        channels = narrow.channels
        if narrow.weight is not None:
            x = x * narrow.weight
        if self._alone(x) and not narrow.keep:
            out = self.site.open_channels(x, channels)
        else:
            weight = self._sliced(channels, lambda: weight_of(self.base_layer)[:, channels].contiguous())
            out = F.linear(x, weight, self.base_layer.bias)
        if self.lora is None:
            return out
        low = F.linear(F.linear(x, self.lora.down[:, channels].to(x.dtype)), self.lora.up.to(x.dtype))
        return out + self._only_corrected(low, x)

    def _sliced(self, choice: Tensor, make: Callable[[], Any]) -> Any:
        """Parts of the weight for a choice that stands, made once while the same tensor says so."""
        if self._slice[0] is not choice:
            self._slice = choice, make()
        return self._slice[1]


def read_channels(router: ChannelRouter, x: Tensor, turn: float | Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] without the channels that stay closed, and the share that is read [...]; turn: the dial for x."""
    turned = router.turned(turn)
    if router.spec.network == "static":
        gate = gates.threshold(-turned)
        return x * gate.to(x.dtype), gate.mean(-1).expand(x.shape[:-1])
    return gates.channel(x, turned)


class RoutedHead(Wrapper):
    """The LM head, exact for the rows a token needs and previewed for the rest."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime, router: VocabRouter) -> None:
        super().__init__(base_layer, runtime)
        self.routers = nn.ModuleDict({"vocab": router})
        self._preview: tuple[Any, Tensor | None] = (None, None)
        self._product = PackedProduct(like=base_layer)

    def tensors(self) -> tuple[Tensor, ...]:
        """What `routed_logits` needs of the router: its parameters, and what is worth computing once for many rows."""
        router = self.routers["vocab"]
        gain = torch.zeros_like(router.spread) if router.log_gain is None else router.log_gain
        return router.spread, router.tail, self._preview_weight(), gain

    def _preview_weight(self) -> Tensor:
        """The router's preview of the head [V, r], computed when its maps or the head's weight change."""
        router, weight = self.routers["vocab"], self.base_layer.weight
        state = id(router.up), router.up._version, weight.data_ptr(), weight._version
        if self._preview[0] != state:
            self._preview = state, router.preview_weight(weight.detach())
        return self._preview[1]

    def forward(self, hidden: Tensor) -> Tensor:
        run = self.runtime
        if run.bypass:
            return self.base_layer(hidden)
        if run.skipping and hidden.shape[:-1].numel() <= FEW_ROWS:
            turn = run.turn(hidden)
            if isinstance(turn, Tensor):
                turn = turn.expand(*hidden.shape[:-1], 1).flatten(0, -2)
            logits, share = self._some_rows(hidden.flatten(0, -2), turn)
            logits, share = logits.view(*hidden.shape[:-1], -1), share.view(hidden.shape[:-1])
        else:
            logits, share = self.routed_logits(hidden, *self.tensors())
        run.note("vocab", share)
        return logits

    def _some_rows(self, hidden: Tensor, turn: float | Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, D] -> logits [n, V] and the share of exact rows [n]; no other row of the head is read. turn: the
        dial, for all or each [n, 1]."""
        router, base, up = self.routers["vocab"], self.base_layer, self._preview_weight()
        features = router.features(hidden)
        gain = 1.0 if router.log_gain is None else router.log_gain.exp()
        limit = router.limit(features, router.spread, gain, turn).squeeze(-1)
        if len(hidden) == 1:
            preview = kernels.dot_rows(features[0], up, None, None).unsqueeze(0)
        else:
            preview = self._product(features, up)
        tail = router.tail.to(hidden.dtype)
        logits, count = kernels.exact_rows(hidden, base.weight, base.bias, preview, limit.to(hidden.dtype), tail)
        return logits, count / len(base.weight)

    def routed_logits(
        self,
        hidden: Tensor,
        spread: Tensor,
        tail: Tensor,
        preview_weight: Tensor,
        log_gain: Tensor,
        owner: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden [..., D] -> logits [..., V], exact where the preview reaches the limit and preview + tail elsewhere,
        and the share of exact rows [...]. owner: as in Runtime.turn, where hidden [N, D] is flat."""
        router = self.routers["vocab"]
        features = router.features(hidden)
        limit = router.limit(features, spread, log_gain.exp(), self.runtime.turn(features, owner))
        return gates.rows(self.base_layer(hidden), self._product(features, preview_weight), limit, tail)
