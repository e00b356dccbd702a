"""Students of causal language models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from students.decisions import Decisions
from students.execution.head import RoutedHead
from students.execution.kv_cache import RoutedCache, memory_of
from students.execution.room import Room
from students.execution.tokens import Order
from students.families.language_inputs import require_inputs
from students.kernels import devices, ops
from students.kernels.autograd import forward_kl
from students.kernels.capture import Forward
from students.kernels.rotary import Rotations
from students.libraries import cache_in, one_sequence_a_row, with_cache
from students.recording.decoding import Decoding
from students.recording.lossless import Lossless
from students.recording.prompt import PromptPruning, Read
from students.recording.step import FixedCache
from students.recording.text import TextRouting
from students.student import Student

IN_PARTS = "assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"
"""Arguments of `generate` with which a prompt is read in parts, or together with guessed continuations."""


class LanguageStudent(Student):
    """A frozen causal language model and its routers."""

    model: PreTrainedModel
    trunk: PreTrainedModel

    def __init__(self, *parts: Any, trunk: PreTrainedModel) -> None:
        super().__init__(*parts)
        self.__dict__["trunk"] = trunk  # the module that holds the blocks; not registered again, as it is in the model
        self._prompt: Tensor | None = None
        self._dropping = {
            n
            for n in range(len(self.blocks))
            for r in self.spec.routers
            if r.kv == "drop" and r.on(n) and "attn" in r.of_kind.touches(r) and self.compute.blocks[n].attends
        }
        self._rotations = Rotations(trunk)
        trunk.register_forward_pre_hook(self._before, with_kwargs=True)
        trunk.register_forward_hook(self._leave, always_call=True)
        self._decoding = Decoding(
            self.model, trunk, self._recorded_step, self._settle, pruning=self._pruning(), routing=StudentTexts(self)
        )
        about = "a teacher without recorded passes"
        self._teacher_passes = {n: Forward(partial(self._states, n), self._taught, what=about) for n in (False, True)}
        self.lossless = Lossless(self.model, trunk, self._recorded_for, self._settle, self.teacher)

    def _pruning(self) -> PromptPruning | None:
        """Return how image tokens are pruned in front of the trunk; None: there are no image tokens."""
        return None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Decisions]:
        """Return the model's own output object and the routers' decisions.

        input_ids [B, T]; attention_mask [B, T], 0 at padding; prompt [B, T] bool, the tokens that sequence-level
        decisions may read (default: all that are not padding); kwargs go to the model, with use_cache False by default.
        """
        kwargs.setdefault("use_cache", False)
        require_inputs(self.model, input_ids, {"attention_mask": attention_mask, "prompt": prompt, **kwargs})
        kwargs = with_cache(self.model, kwargs, cache_in(kwargs))
        with self._deciding_from(prompt) as decisions:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs), decisions

    def generate(self, *args: Any, lossless: bool = False, **kwargs: Any) -> Any:
        """Run transformers' `generate` on the routed model, on GPUs through recorded steps (recording/decoding.py).

        lossless: the student only drafts, and the text is the dense model's (recording/lossless.py); one sequence at a
        time, greedy or sampled. `student.lossless.counts` then says what it took. At compute 1.0 nothing is drafted.
        Calls from several threads take turns.

        Pipelines take `student.model`. Raises ValueError where nothing can be drafted, or if there are routers of
        sequence granularity and an argument would have the prompt read in parts or with guessed tokens, since these
        routers decide from the whole prompt.
        """
        parts = [name for name in IN_PARTS if kwargs.get(name) is not None]
        if parts and not self.runtime.bypass and any(router.granularity == "sequence" for router in self.spec.routers):
            raise ValueError(
                "routers with `granularity: sequence` decide from the whole prompt, and from nothing else: generate "
                f"without {', '.join(parts)}"
            )
        require_inputs(self.model, args[0] if args else kwargs.get("input_ids", kwargs.get("inputs")), kwargs)
        kwargs = with_cache(self.model, kwargs, cache_in(kwargs))
        with self._turn:
            if lossless and not self.runtime.bypass:
                return self.lossless.generate(*args, **kwargs)
            return self._decoding.generate(*args, **kwargs)

    def _recorded_step(self, rows: int) -> Any:
        """Return the state that a recorded decode step for so many rows depends on besides shapes. Raises ValueError if
        none can be recorded. Gates that differ from token to token are masks there, but for a token that is alone
        (RoutedBranch._run_fixed)."""
        state = self._recorded_for(by_token=True)
        if self.runtime.bypass:
            return state
        if self._dropping and rows > 1:
            raise ValueError("rows differ in which tokens have keys")
        if any(self.compute.blocks[number].window for number in self._dropping):
            raise ValueError("how far back a sliding window reaches depends on which tokens have keys")
        return state

    def _recorded_for(self, rows: int = 1, by_token: bool = False) -> Any:
        """Return the state that a recorded pass of any number of rows depends on besides shapes; by_token: whether what
        is left in may differ from token to token, on CPUs only which tokens are. Raises ValueError if the pass cannot
        be recorded, as when shapes inside depend on the data."""
        run = self.runtime
        if run.execution != "skip":
            raise ValueError("masks are for reference")
        if run.bypass:
            if self._decoding.replays:
                raise ValueError("at compute 1.0 CPUs keep the model's bits")
            return "teacher", self._frozen.data_ptr(), self._layouts
        for router in self.spec.routers:
            chooses = by_token and router.granularity == "token"
            chooses &= router.of_kind.over_tokens or not self._decoding.replays
            if not (chooses or router.of_kind.fixes_shapes(router)):
                raise ValueError(f"what {router.kind} routers leave in depends on the text")
            if router.of_kind.over_tokens and isinstance(run.offset, tuple):
                raise ValueError(f"what {router.kind} routers leave in differs between rows")
        counted = any(router.selection == "topk" and router.of_kind.over_parts for router in self.spec.routers)
        shares = (run.offset, run.capacity) if counted else None  # how many parts of a token are open
        return self._layouts, self._choices, isinstance(run.offset, tuple), shares

    def reader(self, **inputs: Any) -> Callable[[], Read]:
        """Return a function, for timing, that reads a prompt as `generate` does, on GPUs through recorded passes."""
        return self._decoding.reader(**inputs)

    def _settle(self, batch: int, device: torch.device) -> None:
        """Write the dial's setting to the tensors from which recorded steps read it."""
        if not self.runtime.bypass:
            self._enter(batch, batch, device)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Decisions]:
        """Run `forward` without the LM head: return the base model's output, whose last_hidden_state `logits` takes,
        and the routers' decisions."""
        require_inputs(self.model, input_ids, {"attention_mask": attention_mask, "prompt": prompt, **kwargs})
        alone = attention_mask is None and kwargs.get("position_ids") is None
        with self._deciding_from(prompt) as decisions, one_sequence_a_row() if alone else nullcontext():
            out = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
            return out, decisions

    def teacher_states(self, ids: Tensor, layers: bool) -> list[Tensor]:
        """Return the frozen model's final states [B, T, D] for token ids [B, T] without padding, and in front of them,
        if `layers`, the states after each block. In training on a GPU through a recorded pass, one for each shape."""
        with torch.no_grad(), self.teacher():
            if not self.training or ops.observed():
                return self._states(layers, ids)
            return [state.clone() for state in self._teacher_passes[layers](ids)]

    def _states(self, layers: bool, ids: Tensor) -> list[Tensor]:
        out, _ = self.features(ids, output_hidden_states=layers)
        return [*(out.hidden_states[1:] if layers else ()), out.last_hidden_state]

    def _taught(self, ids: Tensor) -> Hashable:
        """Return what a recorded pass of the teacher depends on besides shapes; ValueError if none can be made."""
        if self._spread:
            raise ValueError("its weights are spread over processes")
        if self._decoding.hybrid:
            raise ValueError("how its blocks compute their state has not been recorded yet")
        return self._frozen.data_ptr(), self._layouts

    def head_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that `logits` takes besides hidden states, through which gradients reach the vocab router;
        none if there is no vocab router or routers are bypassed."""
        head = self.model.get_output_embeddings()
        return head.tensors() if isinstance(head, RoutedHead) and not self.runtime.bypass else ()

    def logits(
        self, hidden: Tensor, *head_tensors: Tensor, owner: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits [N, V] of final hidden states [N, D], and the share [N] of the LM head's rows that were
        computed exactly (None: no vocab router).

        head_tensors: the result of `head_tensors()`; without them the frozen head is used. owner [N]: the row of the
        last batch that each hidden state belongs to, needed if rows have budgets of their own.
        """
        head = self.model.get_output_embeddings()
        share = None
        if head_tensors:
            logits, share = head.routed_logits(hidden, *head_tensors, owner=owner)
        else:
            logits = (head.base_layer if isinstance(head, RoutedHead) else head)(hidden)
        return self._scaled(logits), share

    def head_share(self, hidden: Tensor, *head_tensors: Tensor, owner: Tensor | None = None) -> Tensor:
        """Return the share of exact rows [N] alone; arguments as in `logits`, head_tensors not empty."""
        share: Tensor = self.model.get_output_embeddings().open_share(hidden, *head_tensors, owner=owner)
        return share

    def forward_kl(
        self, hidden: Tensor, teacher: Tensor, *head_tensors: Tensor, owner: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return KL(teacher || student) [N] of the student's logits, given the teacher's logits [N, V], and the share
        of exact rows; other arguments as in `logits`. Backward can run only once."""
        head, record = self.model.get_output_embeddings(), self.record
        if head_tensors and not any(map(self._quirk, (record.logit_scale, record.logit_divisor, record.logit_cap))):
            kl: tuple[Tensor, Tensor] = head.routed_kl(hidden, teacher, *head_tensors, owner=owner)
            return kl
        logits, share = self.logits(hidden, *head_tensors, owner=owner)
        return forward_kl(logits, teacher), share

    @property
    def logit_scale(self) -> float:
        """The factor by which the model multiplies its head's outputs, before it caps them if it does."""
        return (self._quirk(self.record.logit_scale) or 1.0) / (self._quirk(self.record.logit_divisor) or 1.0)

    @property
    def residual_scale(self) -> float:
        """The factor by which the model multiplies a branch's output before adding it to the residual stream."""
        return self._quirk(self.record.residual_scale) or 1.0

    def _scaled(self, logits: Tensor) -> Tensor:
        """Scale and cap the head's outputs as the model does, in its own order of operations."""
        scale, divisor = self._quirk(self.record.logit_scale), self._quirk(self.record.logit_divisor)
        logits = logits if scale is None else logits * scale
        logits = logits if divisor is None else logits / divisor
        cap = self._quirk(self.record.logit_cap)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _quirk(self, name: str | None) -> float | None:
        """Return the number called `name` in the model's config; None if `name` is None."""
        return None if name is None else getattr(self.trunk.config, name)

    @contextmanager
    def _deciding_from(self, prompt: Tensor | None) -> Iterator[Decisions]:
        """Record the routers' decisions within the block; prompt as in `forward`."""
        with self._turn:
            self._prompt = prompt
            try:
                with self._deciding() as decisions:
                    yield decisions
            finally:
                self._prompt = None

    def _before(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Start a forward pass (a hook, so that it works whoever calls the model): find padding, prompt and cache."""
        run, tokens = self.runtime, args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        self._rotations.begin()
        settled = isinstance(cache_in(kwargs), FixedCache)  # a step of fixed shape, for which `_settle` has prepared
        if run.bypass:
            run.recorded = tokens.numel() if settled else 0
            self._pack_for(tokens.numel())
            return None
        mask = kwargs.get("attention_mask")
        self._enter(tokens.numel(), len(tokens), tokens.device, settled)
        call = run.call
        call.fixed = settled
        call.asks = settled and self._decoding.replays and not torch.compiler.is_compiling()
        self._lengths.begin(call.skipping and not settled and (bool(self._dropping) or tokens.shape[1] == 1))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask[:, -tokens.shape[1] :].bool()
            padded = valid.numel() - int(valid.sum())  # waits for the device, once in a forward pass
            if padded:
                call.valid, call.padded = valid, padded
                if call.skipping and devices.runs_ahead(mask.device) and mask.shape == tokens.shape:
                    call.order = Order(valid)
        if run.room is not None and run.room.valid is not None:
            call.valid = run.room.valid
        call.position = self._positions(tokens, kwargs)
        call.prompt = self._prompt
        if call.prompt is None:
            call.prompt = torch.ones_like(tokens, dtype=torch.bool) if call.valid is None else call.valid
        cache = self._cache_for(kwargs)
        kwargs = with_cache(trunk, kwargs, cache)
        call.memory = None if cache is None else memory_of(cache)
        return args, kwargs

    def _positions(self, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the position [1 or B, T] of tokens [B, T] in their sequences, padding not counted, if a router asks
        for it. Without a mask, position_ids say where each of several sequences in one row begins."""
        if not any(router.prefix for router in self.spec.routers):
            return None
        count, mask, ids = tokens.shape[1], kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.cumsum(1)[:, -count:] - 1
        if isinstance(ids, Tensor):
            return ids if ids.ndim == 2 else ids[0]  # the first axis of M-RoPE
        cache = cache_in(kwargs)
        before = 0 if cache is None else int(cache.get_seq_length())
        return torch.arange(before, before + count, device=tokens.device)[None]

    def _leave(self, trunk: nn.Module, args: Any, out: Any) -> None:
        super()._leave(trunk, args, out)
        self._rotations.end()

    def _recomputing(self) -> Any:
        first, again = super()._recomputing()
        return first, self._rotating(again)

    @contextmanager
    def _rotating(self, within: AbstractContextManager[Any]) -> Iterator[None]:
        """Context for recomputing activations in backward, with the same rotary embeddings as in the first pass."""
        self._rotations.begin()
        try:
            with within:
                yield
        finally:
            self._rotations.end()

    def _routed_cache(self) -> RoutedCache:
        """Return an empty cache that leaves out the keys and values of dropped tokens."""
        windows = {n: b.window for n, b in enumerate(self.compute.blocks) if n in self._dropping}
        return RoutedCache(self.trunk.config, windows)

    def _cache_for(self, kwargs: dict[str, Any]) -> Cache | None:
        """Return the cache for this pass (None without one): if a router's K/V policy is `drop` and execution skips, a
        cache that leaves out the keys and values of dropped tokens."""
        cache, use = cache_in(kwargs), kwargs.get("use_cache")
        use = self.trunk.config.use_cache if use is None else use
        if cache is None and not use:
            return None
        if not self._dropping or self.runtime.execution == "mask":
            return DynamicCache(config=self.trunk.config) if cache is None else cache
        if isinstance(cache, RoutedCache | FixedCache):
            return cache
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            raise ValueError(
                f"a {type(cache).__name__} holds a key of every token; routers with the K/V policy `drop` need a "
                "dynamic cache that is empty at the start"
            )
        routed: Any = self._routed_cache()
        if cache is not None and any(map(cache.is_recording_past, range(len(cache.layers)))):
            routed.activate_past_recording()  # assisted decoding takes guessed tokens back
        return cast(Cache, routed)


class StudentTexts(TextRouting):
    """How a student's routers take part in reading a text: they leave open as many tokens as there is room for."""

    def __init__(self, student: LanguageStudent) -> None:
        super().__init__(student.model)
        self._student = student

    def state(self, padded: bool) -> Hashable:
        """Return the state of routers and dial that a recorded pass depends on besides shapes. Raises ValueError if it
        cannot be recorded."""
        student, run = self._student, self._student.runtime
        state: Hashable = student._recorded_for(by_token=True)
        if run.bypass:
            return state
        choosing = [router for router in student.spec.routers if router.of_kind.over_tokens]
        if padded and any(router.network == "static" for router in choosing):
            raise ValueError("a static router that leaves all tokens in would take padding in, too")
        if student._dropping and any(router.kv == "keep" for router in choosing):
            raise ValueError("routers differ in which tokens have keys")
        return state, (run.offset, run.capacity) if choosing else None  # how much room it takes

    @contextmanager
    def within(self, room: Room) -> Iterator[None]:
        """A context in which the model has this room for open tokens."""
        self._student.runtime.room = room
        try:
            yield
        finally:
            self._student.runtime.room = None

    @property
    def drops(self) -> bool:
        """Whether routers let tokens leave no keys."""
        return bool(self._student._dropping) and not self._student.runtime.bypass

    def cache(self) -> Cache:
        """Return an empty cache, which leaves out what routers drop."""
        return self._student._routed_cache() if self.drops else super().cache()
