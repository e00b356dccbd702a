"""A decoding step of fixed shape: the same operators on the same tensors for every token, so that it can be recorded.

Keys and values are written into a static cache, tensors of a fixed length, whose empty slots are masked. A step never
waits for the device, and values that differ from one step to the next are tensors on the device, not Python numbers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from students.architectures.lookup import architecture_of, sizes_of, windows_of
from students.execution.call import Memory
from students.execution.kv_cache import DroppedLayer, keeps_state, keys_and_values, states_of
from students.kernels import ops
from students.kernels.rotary import Rotations
from students.libraries import with_cache
from students.routers import selection


class FixedLayer(CacheLayerMixin):
    """Static cache of one layer: keys and values [B, H, L, d]; a step writes at indices `slots` [T], in all rows
    alike.

    index: where tokens may leave no keys, the token [L] of the only row that each slot holds; `slots` [1] is then the
    layer's own, and stays in place for a token whose `kept` [1] is false.
    """

    is_sliding = False
    is_compileable = True
    keys: Tensor
    values: Tensor
    index: Tensor | None
    kept: Tensor

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        CacheLayerMixin.__init__(self)
        self.keys, self.values, self.slots, self.index = keys, values, slots, None
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: keys and values are allocated from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the tokens; returns all slots, of which the mask hides those that are empty."""
        if len(self.slots) == 1:
            ops.write_slot(self.keys, self.values, key_states, value_states, self.slots)
        else:
            self.keys.index_copy_(2, self.slots, key_states)
            self.values.index_copy_(2, self.slots, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of slots, 0): the mask covers all slots."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Return the number of tokens so far, as a tensor [] on the device."""
        return self.slots[0]

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.keys.shape[2]


def _own_state(layer: Any) -> Any:
    """Return a copy of a layer of a block without attention, whose states are its own, empty, and stay in place."""
    own = copy.copy(layer)
    vars(own).update({name: dict(kept) for name, kept in vars(layer).items() if isinstance(kept, dict)})
    for place, key, state in states_of(own):
        place[key] = torch.zeros_like(state)
    return own


def _drops(layer: Any) -> bool:
    return layer.index is not None if isinstance(layer, FixedLayer) else isinstance(layer, DroppedLayer)


def initialize(cache: Cache, trunk: nn.Module, like: Tensor) -> None:
    """Give layers of a cache that no token of the only row has written to empty keys and values, of the type and on the
    device of `like`."""
    record, blocks = architecture_of(trunk)
    layer: Any
    for number, (layer, block) in enumerate(zip(cache.layers, blocks, strict=True)):
        if not (keeps_state(layer) or layer.is_initialized):
            held = sizes_of(trunk, record, number, block).cached
            layer.lazy_initialization(*(like.new_zeros(1, heads, 0, channels) for heads, channels in held))


class FixedCache(Cache):
    """The static cache of a step of fixed shape: a FixedLayer for attention, else a state, which a step changes."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=[*layers])
        self.elastic = Memory()


class DecodeStep:
    """The next T tokens of each row of a batch, `ids` [B, T]: `run` returns float32 logits [B, T, V], or [B, V] if
    T is 1. Then `advance` takes the tokens [B], and a run moves on; several tokens need `go_to` before each run.

    model: a causal language model or a vision-language model, routed or not; trunk: its module that holds the blocks;
    like: a cache of the model's own that holds a prompt of B rows; length: number of slots; tokens: T; beside: a step
    whose cache this one reads and writes too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trunk: nn.Module,
        like: Cache,
        length: int,
        tokens: int = 1,
        beside: DecodeStep | None = None,
    ) -> None:
        self.model = model
        self.length = length
        self.cache: FixedCache
        self.used = 0
        """Number of slots that are taken."""
        self._windows = windows_of(trunk)
        self._rotations = Rotations(trunk)
        self._kinds: Any = getattr(trunk.config, "layer_types", None)
        held = keys_and_values(like)
        batch, device, self._dtype = len(held[0][0]), held[0][0].device, model.dtype
        with torch.inference_mode(False):  # they are written with and without inference mode
            self.slots = torch.arange(tokens, device=device)
            self.slot = self.slots[-1:]
            self.ids, self.positions = (torch.zeros(batch, tokens, dtype=torch.long, device=device) for _ in range(2))
            self.shift = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self._places = torch.arange(length, device=device)
            if beside is None:
                held = [(self._empty(keys), self._empty(values)) for keys, values in held]
                self.open = torch.zeros(batch, length, dtype=torch.bool, device=device)
            else:
                held, self.open, self.shift = keys_and_values(beside.cache), beside.open, beside.shift
            fixed = (FixedLayer(keys, values, self.slots) for keys, values in held)
            layers = [_own_state(layer) if keeps_state(layer) else next(fixed) for layer in like.layers]
            self._dropping = [layer for layer, other in zip(layers, like.layers, strict=True) if _drops(other)]
            self._own = torch.zeros(len(self._dropping), dtype=torch.long, device=device)
            self._index = torch.zeros(len(self._dropping), length, dtype=torch.long, device=device)
            for number, layer in enumerate(self._dropping):
                layer.slots, layer.index = self._own[number : number + 1], self._index[number]
            self.cache = FixedCache(layers)

    def _empty(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.length, x.shape[3])

    @property
    def full(self) -> bool:
        """Whether fewer slots are left than a run writes."""
        return self.used + len(self.slots) > self.length

    def load(self, cache: Cache, used: int, valid: Tensor | None, positions: Tensor) -> None:
        """Copy the first `used` tokens of each row from a cache and continue behind them. valid [B, used]: tokens that
        are not padding (None: all); positions [B]: those of the next tokens. Layers with a sliding window may hold the
        newest tokens only."""
        mine: Any
        theirs: Any
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            if keeps_state(mine):
                for (*_, into), (*_, state) in zip(states_of(mine), states_of(theirs), strict=True):
                    into.copy_(state)
                continue
            held = min(theirs.keys.shape[2], used)
            start = used - held if mine.index is None else 0
            for into, kept in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                into[:, :, start : start + held] = kept[:, :, :held]
                into[:, :, start + held :] = 0
            if mine.index is not None:
                mine.index[:held] = theirs.index.flatten()[:held]
                mine.slots.copy_(theirs.slots if isinstance(theirs, FixedLayer) else torch.full_like(mine.slots, held))
        self.open[:, :used] = True if valid is None else valid.bool()
        self.open[:, used:] = True
        self.shift.copy_(positions.unsqueeze(1) - used)
        self.go_to(used)

    def go_to(self, used: int) -> None:
        """Continue behind the first `used` slots, whatever the others hold."""
        torch.arange(used, used + len(self.slots), out=self.slots)
        self.positions.copy_(self.slots + self.shift)
        self.used = used

    def take_over(self, other: DecodeStep) -> None:
        """Copy the state of a step with fewer slots and continue from there."""
        self.load(other.cache, other.used, other.open[:, : other.used], other.positions.squeeze(1))

    def advance(self, tokens: Tensor) -> None:
        """Set the input tokens [B] of the next run."""
        self.ids.copy_(tokens.unsqueeze(1))
        self.used += 1

    def run(self) -> Tensor:
        """Return the logits of the tokens that follow, float32; this is the part that is recorded."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "position_ids": self.positions, "use_cache": True}
        inputs |= {"attention_mask": self._masks(), "slot": self.slot}  # see `routed_attention`
        inputs["logits_to_keep"] = len(self.slots)
        inputs = with_cache(self.model, inputs, self.cache)
        self._rotations.begin()
        try:
            logits: Tensor = self.model(**inputs).logits.float()
        finally:
            self._rotations.end()
        if self._dropping:
            self._index.scatter_(1, self._own[:, None], self.slots.expand(len(self._own), 1))
            self._own.add_(torch.cat([layer.kept for layer in self._dropping]))
        if len(self.slots) == 1:  # how far several tokens go is for the caller to say
            self.slots.add_(1)
            self.positions.add_(1)
        return logits.squeeze(1)

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """Return the additive mask [B, 1, T, L] of each type of layer; one tensor if all layers share a window."""
        if len(set(self._windows)) == 1:
            return self._mask(self._windows[0])
        made = {window: self._mask(window) for window in set(self._windows)}
        return {kind: made[window] for kind, window in zip(self._kinds, self._windows, strict=True)}

    def _mask(self, window: int | None) -> Tensor:
        newest = self.slots[:, None]
        seen = self.open[:, None] & (self._places <= newest)
        if window is not None:
            seen &= self._places > newest - window
        return selection.additive(seen, self._dtype)[:, None]

    def copied(self, used: int, into: Cache) -> Cache:
        """Copy the first `used` tokens into an empty cache of the model's, and return this. No layer may keep a state,
        which cannot be taken back to an earlier token."""
        mine: Any
        for number, mine in enumerate(self.cache.layers):
            end = used if mine.index is None else int(mine.slots)
            keys, values = mine.keys[:, :, :end].clone(), mine.values[:, :, :end].clone()
            if mine.index is None:
                into.update(keys, values, number)
            else:
                dropped: Any = into.layers[number]
                dropped.fill(keys, values, mine.index[:end].clone(), used)
        return into
