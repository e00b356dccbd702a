"""Attention and MLP branches whose routers read their input."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.architectures.record import Architecture
from students.execution.attention import Packing, Plan
from students.execution.block_context import BlockContext, BranchContext, Exits, Gathered, Narrow, Rows
from students.execution.runtime import Runtime
from students.execution.tokens import Chosen, Listed, Rectangle, for_tokens, gather_open, place_tokens, take
from students.execution.wrapper import Named, Wrapper
from students.kernels import devices
from students.kernels.autograd import GateOfChannel
from students.kernels.choice import either
from students.kernels.merging import flat_index
from students.libraries import cache_in
from students.routers import Router, Substitute, selection
from students.sites import Branch


class RoutedBranch(Wrapper):
    """An attention or MLP branch whose routers read its input.

    block: index of the block. context: state of the block. record: the model's architecture. narrows: whether the
    linear layers can leave out closed heads or groups. window: width of the layer's sliding window.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        runtime: Runtime,
        block: int,
        branch: Branch,
        context: BlockContext,
        record: Architecture,
        *,
        narrows: bool,
        window: int | None,
    ) -> None:
        super().__init__(base_layer, runtime)
        self.mask = record.mask
        self.pair = branch == "attn" or record.mlp_pair
        """Whether the branch returns a tuple, of which the first is its output."""
        self.block = block
        self.branch = branch
        self.of_block = context
        self.context: BranchContext = context.attn if branch == "attn" else context.mlp
        self.prenorm = record.prenorm
        self.late_exit = getattr(record, f"{branch}_exit") is not None
        """Whether a RoutedExit behind a post-norm applies the gates instead of this module."""
        self.shares_exit = branch == "mlp" and record.beside is not None
        """Whether the RoutedExit also gets the output of experts, which are called with all tokens."""
        self.narrows = narrows
        self.window = window
        self.reads_positions = "position_ids" in signature(base_layer.forward).parameters
        """Whether attention takes the positions of tokens for itself, as where it scales queries by them."""
        self.routers = Named[Router]()
        self.substitutes = Named[Substitute]()
        self.decided: tuple[Router, ...] = ()
        """Routers of the whole block, whose gates attention decides and this MLP applies too."""
        self._static: tuple[Narrow, Tensor] | None = None
        """What a static router leaves open, as `_narrow` returns it; None: not decided at this position of the dial."""

    def lay_out(self) -> None:
        """Drop what routers have kept of their parameters, which may have changed."""
        for router in self.routers.values():
            router.separate()

    def set_dial(self) -> None:
        """Forget which parts a static router leaves open; the next call decides again."""
        self._static = None

    forget = set_dial

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.runtime
        if run.bypass:
            return self.base_layer(*args, **kwargs)
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if args and not run.causal:  # transformers' vision towers pass the mask by position
            kwargs[self.mask], args = args[0], args[1:]
        if self.of_block.gathered is not None:
            return self._run_gathered(self.of_block.gathered, x, args, kwargs)
        features = x if self.prenorm else F.rms_norm(x, x.shape[-1:])
        exits = self._decide(x, features)
        skip = run.skips(exits.specs)
        try:
            plan = self._pass_parts(features, skip)
            fixed = run.call.fixed and (exits.count is None or bool(exits.drops))
            if skip and exits.gates and not fixed:
                exits.valid, exits.room = run.call.valid, run.room
                if self.branch == "mlp":
                    return self._compute_some(exits, args, kwargs)
                if run.causal:
                    return self._attend_some(exits, plan, args, kwargs)
                return self._attend_patches(exits, plan, args, kwargs)
            if plan is not None and self.branch == "attn":
                kwargs["routed"] = plan
            if fixed:
                return self._run_fixed(exits, args, kwargs)
            if self.branch == "attn" and exits.drops:
                kwargs = self._without_closed_keys(exits, kwargs)
            return self._leave(self.base_layer(x, *args, **kwargs), exits)
        finally:
            self.context.release()

    def _run_fixed(self, exits: Exits, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the branch in a step of fixed shape. On a GPU gates are masks, but for a token that is alone linear
        layers read no weights of what it has closed (see RoutedLinear); on a CPU a closed token is left out."""
        x, context, drops = exits.x, self.context, exits.drops if self.branch == "attn" else []
        kept = exits.open(drops).view(1) if drops else None  # drops are recorded for one sequence only
        if kept is not None:
            layer = cache_in(kwargs).layers[self.base_layer.layer_idx]
            layer.kept = kept
            kwargs = {**kwargs, self.mask: None, "slot": layer.slots}
        if x.shape[:2].numel() == 1:
            if exits.gates and self.runtime.call.asks:
                return self._run_if_open(exits, args, kwargs)
            context.open = exits.open().view(1) if exits.gates else None
            context.open_keys = context.open if self.branch == "mlp" else kept
            if context.gate is not None:
                parts = (context.gate != 0).flatten()
                context.open_parts = parts if context.open is None else parts & context.open
        out, substituted = self.base_layer(x, *args, **kwargs), any(other for _, other in exits.gates)
        return self._leave(out, exits, all_open=context.zeroed and not (substituted or self.late_exit))

    def _run_if_open(self, exits: Exits, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the branch on the only token if that is open (see `either`)."""

        def run() -> Tensor:
            out = self.base_layer(exits.x, *args, **kwargs)
            out = out[0] if self.pair else out
            return out if self.late_exit else exits.of_open(out)

        def close() -> Tensor:
            if self.branch == "attn" and len(exits.drops) < len(exits.gates):
                self._write_keys(exits.x, args, kwargs)
            return torch.zeros_like(exits.x) if self.late_exit else exits.of_closed()

        out = self._as_returned(either(exits.open().view(1), run, close))
        if self.late_exit:
            self.context.exit = exits
        return out

    def _write_keys(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
        """Run attention without queries, so that the only token x [1, 1, D] just writes its keys and values."""
        nobody = Listed(torch.empty(0, dtype=torch.long, device=x.device))
        self.context.rows, self.context.queries = Rows(None, nobody, x.shape[:2]), nobody
        self.base_layer(x, *args, **{**kwargs, "routed": Plan(queries=nobody.rows)})
        self.context.rows = self.context.queries = None

    def _decide(self, x: Tensor, features: Tensor) -> Exits:
        """Decide the token and layer gates. Layer gates are decided in front of attention and passed on to the MLP."""
        exits = Exits(x)
        for name, router in self.routers.items():
            kind = router.spec.of_kind
            if kind.over_tokens:
                substitute = self.substitutes.get(name)
                beside = substitute if features is x else None
                gates = self.runtime.decide(kind.key(self.block, self.branch), router, features, beside)
                if kind.over_blocks:
                    self.of_block.gates = gates
                exits.gates.append((gates, substitute))
                exits.specs.append(router.spec)
        for router in self.decided:
            handed, self.of_block.gates = self.of_block.gates, None
            assert handed is not None, "attention decides first"
            exits.gates.append((handed, None))
            exits.specs.append(router.spec)
        return exits

    def _pass_parts(self, features: Tensor, skip: bool) -> Plan | None:
        """Decide head or expert gates and pass them to linear layers; return a plan if closed parts are left out."""
        router = next((router for router in self.routers.values() if router.spec.of_kind.over_parts), None)
        if router is None:
            return None
        run, key = self.runtime, router.spec.of_kind.key(self.block, self.branch)
        gate = run.decide(key, router, features).gate
        by_token = router.spec.granularity == "token" and router.spec.network != "static"
        shared = gate.numel() == gate.shape[-1] and (run.causal or not by_token)  # an image with one token left is rare
        fixed = run.call.fixed and by_token
        if fixed or not (skip and shared and self.narrows and run.skips([router.spec])):
            self.context.gate = GateOfChannel.apply(gate, router.of_channel)
            return None
        narrow, heads = self._narrow(key, router, gate.flatten())
        self.context.narrow = narrow
        return Plan(heads=heads)

    def _narrow(self, key: str, router: Router, gate: Tensor) -> tuple[Narrow, Tensor]:
        """Return (open channels, indices of open gates) of gates [N]; kept if they hold for later calls too."""
        run, static = self.runtime, router.spec.network == "static"
        memory = None if static else run.call.memory
        if static and run.call.skipping and self._static is not None:
            return self._static
        if memory is not None and key in memory.narrow:
            return memory.narrow[key]
        open_ = gate != 0
        members = router.of_channel
        channels = open_[members].nonzero().squeeze(1)
        weight = gate[members[channels]] if router.spec.weight == "score" else None
        keep = static or router.spec.granularity == "sequence"
        result = Narrow(channels, len(members), weight, keep), open_.nonzero().squeeze(1)
        if static:
            self._static = result if run.call.skipping else None
        elif keep and memory is not None:
            memory.narrow[key] = result
        return result

    def _compute_some(self, exits: Exits, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the MLP on the open tokens only."""
        chosen, packed = self._chosen(exits), None
        if isinstance(chosen, Chosen) and not chosen.known:
            chosen.begin()
            exits.begin()
            packed = chosen.cut(chosen.filled(exits.x))
        if chosen.every:
            return self._leave(self.base_layer(exits.x, *args, **kwargs), exits, all_open=True)
        exits.rows, rows = chosen.target, chosen.rows
        context, gate = self.context, self.context.gate
        packed = take(exits.x, exits.x, rows) if packed is None else packed
        if len(rows) == 0:
            return self._leave(self._as_returned(packed), exits)
        context.rows = Rows(rows, chosen, exits.x.shape[:2])
        if gate is not None:
            context.gate = take(gate, exits.x, rows)
        return self._leave(self.base_layer(packed, *args, **kwargs), exits)

    def _chosen(self, exits: Exits) -> Chosen | Listed:
        """Return the open tokens."""
        count, tokens = exits.count, exits.x.shape[1]
        if count is None:
            return exits.chosen(self.runtime.counted(exits.x))
        return Listed(flat_index(gather_open(exits.open(), count)[0], tokens), every=count == tokens)

    def _attend_some(self, exits: Exits, plan: Plan | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run attention from the open tokens as queries to all tokens that have keys."""
        x, context = exits.x, self.context
        chosen = exits.chosen(self.runtime.counted(x))
        if exits.drops:
            return self._attend_kept(exits, chosen, plan or Plan(), args, kwargs)
        for_all = devices.runs_ahead(x.device) and x.shape[1] > 1  # attention costs less there than a wait
        if for_all or chosen.every:
            if plan is not None:
                kwargs["routed"] = plan
        else:
            plan = kwargs["routed"] = plan or Plan()
            plan.queries, plan.counts = chosen.rows, tuple(chosen.counts) if x.shape[1] > 1 else ()
            plan.chosen = chosen
        if for_all or not chosen.every:
            context.rows, context.queries = Rows(None, chosen, x.shape[:2]), chosen
            if context.gate is not None and not chosen.every:
                context.gate = take(context.gate, x, chosen.rows)
        out = self.base_layer(x, *args, **kwargs)
        every = chosen.known and chosen.every
        exits.rows = None if every else chosen.target if chosen.known else chosen  # the host did not ask how many
        return self._leave(out, exits, all_open=every)

    def _attend_kept(self, exits: Exits, chosen: Chosen, plan: Plan, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run attention from the chosen tokens where some closed tokens have no keys."""
        x, context, kept = exits.x, self.context, chosen
        if len(exits.drops) < len(exits.gates):
            kept = exits.chosen(self.runtime.counted(x), exits.drops)
        kwargs["routed"] = plan
        kept.begin()
        filled = kept.filled(x)
        plan.packing = self._pack(x, kept, kwargs)
        exits.rows, seen = chosen.target, kept.cut(filled)
        if len(kept.rows) == 0:
            return self._leave(self._as_returned(seen), exits)
        if context.gate is not None:
            context.gate = take(context.gate, x, chosen.rows)
        context.rows = Rows(kept.rows, chosen, x.shape[:2])
        if len(kept.rows) > len(chosen.rows):
            plan.queries = torch.searchsorted(kept.rows, chosen.rows)
            plan.counts = tuple(chosen.counts)
            context.queries = Listed(plan.queries)
        return self._leave(self.base_layer(seen, *args, **kwargs), exits)

    def _run_gathered(self, gathered: Gathered, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the branch in a block that was called with the open tokens x [1, N, D] only (see BlockGather)."""
        attends = self.branch == "attn"
        if attends:
            kwargs["routed"] = Plan(packing=self._pack(gathered.x, gathered.chosen, kwargs, gathered.placed))
        rows = gathered.chosen.rows
        if len(rows) == 0:
            return self._leave(self._as_returned(x), gathered.exits, all_open=True)
        self.context.rows = Rows(rows, gathered.chosen, gathered.x.shape[:2])
        try:
            return self._leave(self.base_layer(x, *args, **kwargs), gathered.exits, all_open=True)
        finally:
            self.context.release()

    def _attend_patches(self, exits: Exits, plan: Plan | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run attention among the open tokens of each image; closed tokens are neither queries nor keys."""
        run, x = self.runtime, exits.x
        index, valid = gather_open(exits.open(), exits.count)
        if index.shape[1] == x.shape[1] and valid is None:
            if plan is not None:
                kwargs["routed"] = plan
            return self._leave(self.base_layer(x, *args, **kwargs), exits, all_open=True)
        flat = flat_index(index, x.shape[1])
        exits.rows = flat if valid is None else flat[valid.flatten()]
        context = self.context
        if context.gate is not None:
            gate = context.gate.expand(*x.shape[:2], -1)
            context.gate = gate.flatten(0, 1).index_select(0, flat).view(*index.shape, -1)
        context.rows = Rows(flat, Listed(flat), x.shape[:2])
        if plan is not None:
            kwargs["routed"] = plan
        kwargs = for_tokens(kwargs, index, run.prefix)
        if valid is not None:
            kwargs[self.mask] = selection.hide_closed_keys(None, valid, x.dtype, causal=False)
        some = x.flatten(0, 1).index_select(0, flat).view(*index.shape, x.shape[-1])
        out = self.base_layer(some, *args, **kwargs)
        packed, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        packed = (packed.flatten(0, 1) if valid is None else packed[valid]).unsqueeze(0)
        return self._leave(packed if rest is None else (packed, *rest), exits)

    def _pack(self, x: Tensor, kept: Chosen, kwargs: dict[str, Any], placed: bool = False) -> Packing:
        """Prepare the cache and attention's arguments for the tokens of x [B, T, D] that have keys, `kept`. placed:
        whether rotary embeddings already hold these tokens only."""
        tokens, layer, rectangle = x.shape[1], None, None
        kwargs["attention_mask"] = None
        if not placed:
            place_tokens(kept, kwargs, self.reads_positions)
        batch, index, cache = kept.batch, kept.index, cache_in(kwargs)
        if cache is not None:
            layer = cache.layers[self.base_layer.layer_idx]
            before = layer.get_seq_length()
            index = index + before if before else index
        if devices.runs_ahead(x.device) and tokens > 1 and (layer is None or not layer.is_initialized):
            rectangle = Rectangle(kept)
        if layer is not None:
            layer.expect(batch, index, kept.counts, tokens, rectangle)
            layer.numbers = None if kept.limit is None else kept.each
        return Packing(index, batch, kept.counts, layer, self.window, rectangle, tokens)

    def _as_returned(self, out: Tensor) -> Any:
        """Return an output as the branch returns it, so that the block can unpack it."""
        return (out, None) if self.pair else out

    def _leave(self, out: Any, exits: Exits, all_open: bool = False) -> Any:
        """Apply the exits to the branch's output (a tuple from attention), or pass them to the RoutedExit."""
        exits.all_open = all_open
        if self.late_exit:
            self.context.exit = exits
            return exits.spread(out) if self.shares_exit and exits.rows is not None else out
        return (exits.apply(out[0]), *out[1:]) if isinstance(out, tuple) else exits.apply(out)

    def _without_closed_keys(self, exits: Exits, kwargs: dict[str, Any]) -> dict[str, Any]:
        if cache_in(kwargs) is not None:
            raise ValueError("masks with the K/V policy `drop` see whole sequences: pass use_cache=False, or skip")
        kept = exits.open(exits.drops)
        mask = selection.hide_closed_keys(kwargs.get(self.mask), kept, exits.x.dtype, self.runtime.causal)
        return {**kwargs, self.mask: mask}


class RoutedExit(Wrapper):
    """The last module of a branch (a post-norm); applies the token and layer gates to the branch's output."""

    def __init__(self, base_layer: nn.Module, runtime: Runtime, context: BranchContext) -> None:
        super().__init__(base_layer, runtime)
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        if self.runtime.bypass:
            return out
        exits, self.context.exit = self.context.exit, None
        assert exits is not None, "its branch has run"
        return exits.apply(out)
