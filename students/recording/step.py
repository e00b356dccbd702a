"""A decoding step of fixed shape: the same operators on the same tensors for every token, so that it can be recorded.

Keys and values are written into a static cache, tensors of a fixed length, whose empty slots are masked. A step never
waits for the device, and values that differ from one step to the next are tensors on the device, not Python numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from students.architectures.lookup import windows_of
from students.execution.call import Memory
from students.execution.kv_cache import keys_and_values
from students.kernels import ops
from students.kernels.rotary import Rotations
from students.libraries import with_cache
from students.routers import selection


class FixedLayer(CacheLayerMixin):
    """Static cache of one layer: keys and values [B, H, L, d]; a step writes at index `slot` [1], in all rows alike."""

    is_sliding = False
    is_compileable = True
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        CacheLayerMixin.__init__(self)
        self.keys, self.values, self.slot = keys, values, slot
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: keys and values are allocated from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the key and value of one token; returns all slots, of which the mask hides the empty ones."""
        ops.write_slot(self.keys, self.values, key_states, value_states, self.slot)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of slots, 0): the mask covers all slots."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Return the number of tokens so far, as a tensor [] on the device."""
        return self.slot[0]

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.keys.shape[2]


class FixedCache(Cache):
    """The static cache of a step of fixed shape."""

    def __init__(self, layers: list[FixedLayer]) -> None:
        super().__init__(layers=[*layers])
        self.elastic = Memory()


class DecodeStep:
    """One more token for each row of a batch: `advance` takes the tokens [B], `run` returns logits [B, V] in float32.

    model: a causal language model or a vision-language model, routed or not; trunk: its module that holds the blocks;
    like: a cache of the model's own that holds a prompt of B rows; length: number of slots.
    """

    def __init__(self, model: PreTrainedModel, trunk: nn.Module, like: Cache, length: int) -> None:
        self.model = model
        self.length = length
        self.used = 0
        """Number of slots that are taken."""
        self._windows = windows_of(trunk)
        self._rotations = Rotations(trunk)
        self._kinds: Any = getattr(trunk.config, "layer_types", None)
        held = keys_and_values(like)
        batch, device, self._dtype = len(held[0][0]), held[0][0].device, model.dtype
        with torch.inference_mode(False):  # they are written with and without inference mode
            self.slot = torch.zeros(1, dtype=torch.long, device=device)
            self.ids, self.positions = (torch.zeros(batch, 1, dtype=torch.long, device=device) for _ in range(2))
            self.open = torch.zeros(batch, length, dtype=torch.bool, device=device)
            self._places = torch.arange(length, device=device)
            self.cache = FixedCache([self._layer(keys, values) for keys, values in held])

    def _layer(self, keys: Tensor, values: Tensor) -> FixedLayer:
        made_keys, made_values = (x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in (keys, values))
        return FixedLayer(made_keys, made_values, self.slot)

    @property
    def full(self) -> bool:
        """Whether no slot is left."""
        return self.used == self.length

    def load(self, cache: Cache, used: int, valid: Tensor | None, positions: Tensor) -> None:
        """Copy the first `used` tokens of each row from a cache and continue behind them. valid [B, used]: tokens that
        are not padding (None: all); positions [B]: those of the next tokens. Layers with a sliding window may hold the
        newest tokens only."""
        for mine, theirs in zip(keys_and_values(self.cache), keys_and_values(cache), strict=True):
            held = min(theirs[0].shape[2], used)
            for into, kept in zip(mine, theirs, strict=True):
                into[:, :, used - held : used] = kept[:, :, :held]
                into[:, :, used:] = 0
        self.open[:, :used] = True if valid is None else valid.bool()
        self.open[:, used:] = False
        self.slot.fill_(used)
        self.positions.copy_(positions.unsqueeze(1))
        self.used = used

    def take_over(self, other: DecodeStep) -> None:
        """Copy the state of a step with fewer slots and continue from there."""
        self.load(other.cache, other.used, other.open[:, : other.used], other.positions.squeeze(1))

    def advance(self, tokens: Tensor) -> None:
        """Set the input tokens [B] of the next run."""
        self.ids.copy_(tokens.unsqueeze(1))
        self.used += 1

    def run(self) -> Tensor:
        """Return the logits [B, V] of the next token, float32; this is the part that is recorded."""
        self.open.index_fill_(1, self.slot, True)
        inputs: dict[str, Any] = {"input_ids": self.ids, "position_ids": self.positions, "use_cache": True}
        inputs |= {"attention_mask": self._masks(), "slot": self.slot, "logits_to_keep": 1}  # see `routed_attention`
        inputs = with_cache(self.model, inputs, self.cache)
        self._rotations.begin()
        try:
            logits: Tensor = self.model(**inputs).logits[:, -1].float()
        finally:
            self._rotations.end()
        self.slot.add_(1)
        self.positions.add_(1)
        return logits

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """Return the additive mask [B, 1, 1, L] of each type of layer; one tensor if all layers share a window."""
        if len(set(self._windows)) == 1:
            return self._mask(self._windows[0])
        made = {window: self._mask(window) for window in set(self._windows)}
        return {kind: made[window] for kind, window in zip(self._kinds, self._windows, strict=True)}

    def _mask(self, window: int | None) -> Tensor:
        seen = self.open if window is None else self.open & (self._places > self.slot - window)
        return selection.additive(seen, self._dtype)[:, None, None]

    def dynamic(self, used: int) -> DynamicCache:
        """Copy the first `used` tokens into a dynamic cache."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(keys_and_values(self.cache)):
            cache.update(keys[:, :, :used].clone(), values[:, :, :used].clone(), number)
        return cache
