"""The student: a frozen model with routers in front of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from students.architecture import Architecture, architecture_of, weight_of
from students.attention import route_attention
from students.cache import RoutedCache
from students.checkpoint import read_tensors, write_tensors
from students.compute import BlockShape, ComputeModel
from students.routers import ChannelRouter, Lora, Router, Substitute, VocabRouter
from students.runtime import Decisions, Runtime
from students.spec import BRANCHES, LINEAR_SITES, RouterSpec, StudentSpec
from students.wrappers import RoutedBranch, RoutedExit, RoutedHead, RoutedLinear, Site, Wrapper

ADDED = {"routers", "substitutes", "lora"}
"""Names under which a wrapper holds what was added; nothing else in the model is trainable or saved."""


class Student(nn.Module):
    """A frozen causal language model and its routers; the same weights are the teacher (see `teacher`)."""

    def __init__(
        self,
        model: PreTrainedModel,
        record: Architecture,
        blocks: list[nn.Module],
        spec: StudentSpec,
        runtime: Runtime,
        compute: ComputeModel,
    ) -> None:
        super().__init__()
        self.model = model
        self.record = record
        self.blocks = tuple(blocks)
        self.spec = spec
        self.runtime = runtime
        self.compute = compute
        self.recompute = False
        self._prompt: Tensor | None = None
        self._state: Any = None
        self._added = list(self.added_parameters().values())
        self._frozen = next(p for p in model.parameters() if not p.requires_grad)
        self._dropping = {
            n for n in range(len(blocks)) for r in spec.routers if r.kv == "drop" and r.on(n) and "attn" in r.touches
        }
        model.base_model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.dial: tuple[tuple[float, float], ...] = ()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Decisions]:
        """The model's own output object, and what was decided.

        input_ids [B, T]; attention_mask [B, T], 0 at padding; prompt [B, T] bool, the tokens that sequence-level
        decisions may look at (default: all that are not padding); kwargs go to the model, use_cache False by default.
        """
        kwargs.setdefault("use_cache", False)
        with self._deciding(prompt) as decisions:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs), decisions

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own `generate` of the routed model. `student.model` is what a pipeline takes."""
        return self.model.generate(*args, **kwargs)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Decisions]:
        """As `forward`, up to the LM head: the base model's output, whose last_hidden_state `logits` takes."""
        with self._deciding(prompt) as decisions:
            out = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
            return out, decisions

    def head_tensors(self) -> tuple[Tensor, ...]:
        """What `logits` needs besides the rows, as plain tensors: gradients reach the vocab router through them."""
        head = self.model.get_output_embeddings()
        return head.tensors() if isinstance(head, RoutedHead) and not self.runtime.bypass else ()

    def logits(self, hidden: Tensor, *head_tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of final hidden rows [N, D] -> [N, V], and the share of exact rows [N] (None: no vocab router).

        head_tensors: those of `head_tensors()`; without them the head is the frozen one.
        """
        head = self.model.get_output_embeddings()
        share = None
        if head_tensors:
            logits, share = head.routed_logits(hidden, *head_tensors)
        else:
            logits = (head.base_layer if isinstance(head, RoutedHead) else head)(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2, arXiv 2408.00118
        return logits if cap is None else cap * torch.tanh(logits / cap), share

    @contextmanager
    def teacher(self) -> Iterator[Student]:
        """Within this context the student is the frozen model it was made from."""
        before, self.runtime.bypass = self.runtime.bypass, True
        try:
            yield self
        finally:
            self.runtime.bypass = before

    @contextmanager
    def _deciding(self, prompt: Tensor | None) -> Iterator[Decisions]:
        """Record what the model decides; prompt as in `forward`."""
        run = self.runtime
        self._prompt, run.decisions = prompt, Decisions(bypassed=run.bypass)
        try:
            yield run.decisions
        finally:
            self._prompt = run.decisions = None

    def _before(self, base_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What routers need to know of a forward pass, whoever called the model: padding, prompt and cache."""
        run = self.runtime
        run.passed.clear()
        if run.bypass:
            return None
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        mask = kwargs.get("attention_mask")
        run.valid, run.padded, run.tokens = None, 0, tokens.numel()
        run.skipping = run.execution == "skip" and not torch.is_grad_enabled()
        run.alone = run.skipping and run.tokens == 1
        if run.skipping:
            state = run.offset, run.capacity, sum(p._version for p in self._added), self._frozen.data_ptr()
            if state != self._state:
                self._state, run.epoch = state, run.epoch + 1
        if isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask[:, -tokens.shape[1] :].bool()
            padded = valid.numel() - int(valid.sum())  # waits for the device, once a forward pass
            if padded:
                run.valid, run.padded = valid, padded
        run.prompt = self._prompt
        if run.prompt is None:
            run.prompt = torch.ones_like(tokens, dtype=torch.bool) if run.valid is None else run.valid
        kwargs = {**kwargs, **self._cache_for(kwargs)}
        cache = kwargs.get("past_key_values")
        run.memory = None if cache is None else cache.__dict__.setdefault("elastic", {})
        return args, kwargs

    def _cache_for(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A cache that fits: one that leaves out what the policy `drop` leaves out, where a router has it."""
        cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
        use = self.model.config.use_cache if use is None else use
        if cache is None and not use:
            return {}
        windows = {n: b.window for n, b in enumerate(self.compute.blocks) if n in self._dropping}
        if not windows or self.runtime.execution == "mask":
            return {"past_key_values": DynamicCache(config=self.model.config)} if cache is None else {}
        if isinstance(cache, RoutedCache):
            return {}
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            raise ValueError(
                f"a {type(cache).__name__} holds a key of every token; routers with the K/V policy `drop` need a "
                "dynamic cache that is empty at the start"
            )
        return {"past_key_values": RoutedCache(self.model.config, windows)}

    def train(self, mode: bool = True) -> Student:
        """Switch what differs between training and inference: only routing does, the frozen model stays in eval()."""
        self.training = mode
        self.runtime.training = mode
        self.model.eval()
        for block in self.blocks:
            # transformers recomputes a block only where block.training is set; its dropouts are children, still in eval
            block.training = mode and self.recompute
        return self

    def checkpoint_blocks(self) -> None:
        """Recompute each block's activations in backward instead of keeping them (non-reentrant)."""
        self.recompute = True
        for block in self.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.train(self.training)

    def router_spec(self, key: str) -> RouterSpec:
        """The specification of the router that records its decisions under this key (see Decisions)."""
        parts = key.split(".")
        kind = parts[-1]
        return self.spec.find(kind, int(parts[0]) if len(parts) > 1 else None, parts[1] if len(parts) > 2 else "")

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """All trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if ADDED & set(n.split("."))}

    def added_state(self) -> dict[str, Tensor]:
        """Everything that was added and nothing of the base: what a checkpoint holds."""
        buffers = {n: b for n, b in self.model.named_buffers() if ADDED & set(n.split("."))}
        return {n: p.detach() for n, p in self.added_parameters().items()} | buffers

    def load_added_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `added_state`; ValueError where names or shapes differ."""
        own = self.added_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ValueError(f"the checkpoint does not fit this student: {len(odd)} names differ, such as {odd[0]}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"the checkpoint does not fit this student: {name} is {list(state[name].shape)}, "
                    f"this student needs {list(tensor.shape)}"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def save(self, path: str | Path) -> None:
        """Write what was added to the model, and the dial, to one safetensors file."""
        about = {"offset": self.runtime.offset, "capacity": self.runtime.capacity, "dial": self.dial}
        write_tensors(Path(path), self.added_state(), about)

    def restore(self, path: str | Path) -> None:
        """Read what `save` wrote; ValueError where the file is damaged or belongs to another student."""
        tensors, about = read_tensors(Path(path))
        self.load_added_state(tensors)
        self.dial = tuple((compute, offset) for compute, offset in about["dial"])
        self.runtime.offset, self.runtime.capacity = about["offset"], about["capacity"]
        self.runtime.bypass = False

    def set_compute(self, compute: float) -> None:
        """Turn the dial: from here on the student spends this share of the teacher's compute; at 1.0 it is the teacher.

        Interpolates between the measured points of `dial`. ValueError outside of them.
        """
        self.runtime.bypass = compute == 1.0
        if self.runtime.bypass:
            return
        points = sorted(self.dial)
        if not points or not points[0][0] <= compute <= points[-1][0]:
            reach = f"{points[0][0]:.3f} to {points[-1][0]:.3f}" if points else "no"
            raise ValueError(f"compute {compute} is outside what this student can be set to: {reach} and 1.0")
        for (low, low_offset), (high, high_offset) in pairwise(points):
            if low <= compute <= high:
                along = (compute - low) / (high - low) if high > low else 0.0
                self.runtime.offset = low_offset + along * (high_offset - low_offset)
                return


def elasticize(model: PreTrainedModel, spec: StudentSpec) -> Student:
    """Put routers in front of a frozen model's parts, in place. All gates start open: the student is the teacher.

    Raises ValueError for an architecture that is not supported, before anything is changed.
    """
    record, blocks = architecture_of(model)
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise ValueError("this model has routers already; load a fresh one")
    model.requires_grad_(False).eval()
    runtime = Runtime()
    shapes = tuple(_elasticize_block(model, record, spec, runtime, number, b) for number, b in enumerate(blocks))
    head = model.get_output_embeddings()
    vocabulary, width = head.weight.shape
    head_routed = 0
    if spec.find("vocab") is not None:
        rank = spec.find("vocab").rank or width // 4
        head_routed = rank * (width + vocabulary + 1)
        model.set_output_embeddings(_like(head, RoutedHead(head, runtime, VocabRouter(width, rank))))
    student = Student(model, record, blocks, spec, runtime, ComputeModel(spec, shapes, vocabulary * width, head_routed))
    return student.train(False)


def _elasticize_block(
    model: PreTrainedModel, record: Architecture, spec: StudentSpec, runtime: Runtime, number: int, block: nn.Module
) -> BlockShape:
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = config.hidden_size
    macs = {s: sum(block.get_submodule(n).weight.numel() for n in record.linears(s)) for s in LINEAR_SITES}
    neurons = weight_of(block.get_submodule(record.linears("mlp_out")[0])).shape[1]
    lora: dict[str, int] = {}
    routers: dict[str, int] = {}
    substitutes: dict[str, int] = {}

    def add_router(wrapper: RoutedBranch, kind: str, key: str, gates: int, members: Tensor | None = None) -> None:
        router_spec = spec.find(kind, number)
        router = Router(router_spec, width, gates, members)
        wrapper.routers[kind] = _like(wrapper.base_layer, router)
        if router_spec.granularity == "token":
            routers[key] = router.macs(width)

    def add_substitute(wrapper: RoutedBranch, kind: str, key: str) -> None:
        if spec.find(kind, number).substitute:
            substitute = Substitute(width, min(width, spec.find(kind, number).substitute))
            wrapper.substitutes[kind] = _like(wrapper.base_layer, substitute)
            substitutes[key] = substitute.macs()

    window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[number] == "sliding_attention":
        window = config.sliding_window
    elif kinds is None:
        window = getattr(config, "sliding_window", None)
    own_q = len(record.attn_in) == 3
    channels = {site.split("_")[0] for site in LINEAR_SITES if spec.find("channel", number, site)}
    narrows = {
        "head": own_q and not record.norms_all_heads and "attn" not in channels,
        "expert": "mlp" not in channels,
    }

    for branch in BRANCHES:
        path = getattr(record, branch)
        late = getattr(record, f"{branch}_exit")
        kind = "head" if branch == "attn" else "expert"
        wrapper = RoutedBranch(
            block.get_submodule(path),
            runtime,
            number,
            branch,
            prenorm=record.prenorm,
            late_exit=late is not None,
            narrows=narrows[kind],
            window=window,
        )
        if spec.find("token", number, branch):
            add_router(wrapper, "token", f"{branch}.token", 1)
            add_substitute(wrapper, "token", branch)
        if spec.find("layer", number):
            if branch == "attn":
                add_router(wrapper, "layer", "layer", 1)
                add_substitute(wrapper, "layer", "layer")
                layer_router = wrapper.routers["layer"]
            else:
                wrapper.block_router = (layer_router,)
        gated = spec.find(kind, number) is not None
        if gated:
            count = heads if branch == "attn" else min(spec.find("expert", number).groups, neurons)
            channel_count = heads * size if branch == "attn" else neurons
            add_router(wrapper, kind, kind, count, torch.arange(channel_count) * count // channel_count)
        asks = branch == "attn" and ({"token", "layer"} & set(wrapper.routers))

        for end in ("in", "out"):
            site = f"{branch}_{end}"
            channel_spec = spec.find("channel", number, site)
            names = record.linears(site)
            linears = [block.get_submodule(name) for name in names]
            inputs = weight_of(linears[0]).shape[1]
            channel = _like(linears[0], ChannelRouter(channel_spec, inputs)) if channel_spec else None
            corrected = spec.lora.rank > 0 and site in spec.lora.sites
            shared = Site(f"{number}.{site}")
            for name, linear in zip(names, linears, strict=True):
                first = linear is linears[0]
                per_query = bool(asks) and (end == "out" or (own_q and first))
                narrowed = gated and narrows[kind] and (branch == "mlp" or first)
                part = "inputs" if gated and end == "out" else "outputs" if narrowed and end == "in" else ""
                if channel is None and not corrected and not part and not per_query:
                    continue
                routed = RoutedLinear(
                    linear,
                    runtime,
                    shared,
                    f"{number}.{branch}",
                    gated_by=f"{number}.{branch}.{kind}" if part == "inputs" else None,
                    part=part,
                    per_query=per_query,
                )
                if channel is not None:
                    routed.add_channels(channel)
                if corrected:
                    outputs = weight_of(linear).shape[0]
                    routed.lora = _like(linear, Lora(inputs, outputs, spec.lora.rank))
                    cost = site if site != "attn_in" else "q" if first and own_q else "kv"
                    always, gated_side = (inputs, outputs) if end == "in" else (outputs, inputs)
                    if cost == "kv":
                        always, gated_side = inputs + outputs, 0
                    lora[cost] = lora.get(cost, 0) + spec.lora.rank * always
                    lora[f"{cost}_open"] = lora.get(f"{cost}_open", 0) + spec.lora.rank * gated_side
                block.set_submodule(name, routed)
        if wrapper.routers or wrapper.block_router:
            if branch == "attn":
                route_attention(wrapper.base_layer)
            block.set_submodule(path, wrapper)
            if late is not None:
                block.set_submodule(late, RoutedExit(block.get_submodule(late), runtime, number, branch))

    kv_share = 2 * groups / (heads + 2 * groups)
    return BlockShape(
        q=round(macs["attn_in"] * (1 - kv_share)),
        kv=round(macs["attn_in"] * kv_share),
        o=macs["attn_out"],
        mlp_in=macs["mlp_in"],
        mlp_out=macs["mlp_out"],
        per_key=2 * heads * size,
        window=window,
        own_q=own_q,
        narrows=narrows,
        lora=lora,
        routers=routers,
        substitutes=substitutes,
    )


def _like(place: nn.Module, added: nn.Module) -> nn.Module:
    """Put a new module on the device of the module it serves (its parameters stay float32)."""
    return added.to(next(place.parameters()).device)
