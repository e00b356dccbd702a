"""A key/value cache that holds only the tokens whose keys were written: what the K/V policy `drop` saves in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from students.execution.call import Memory
from students.execution.tokens import Rectangle


class DroppedLayer(CacheLayerMixin):
    """Keys and values [B, H, L, d] of one layer, packed to the left: row b has lengths[b] of them.

    `index` [B, L] says which token of the sequence a slot holds, -1 where it holds none; `seen` counts the tokens of
    the sequence, kept or not. With a window, keys that no later token can see are removed.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    keys: Tensor
    values: Tensor
    lengths: list[int]
    index: Tensor
    incoming: tuple[Tensor, Tensor, list[int], Rectangle | None] | None
    numbers: Tensor | None
    """In a pass of fixed shape: how many slots of each row [B] hold tokens, int32, on the device."""

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make keys, values and indices without slots, for as many rows as `expect` was given."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = len(self.lengths)
        self.keys = key_states.new_zeros(rows, key_states.shape[1], 0, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, value_states.shape[1], 0, value_states.shape[-1])
        self.index = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        self.is_initialized = True

    def expect(
        self, batch: Tensor, index: Tensor, counts: list[int], tokens: int, rectangle: Rectangle | None = None
    ) -> None:
        """Announce `tokens` tokens of each row, of which those at rows `batch` [N] and indices `index` [N], in order,
        are kept. counts: kept tokens of each row; rectangle: layout in which an empty cache stores these tokens. If
        N > 0, the next `update` brings their keys and values."""
        if self.window is not None and self.is_initialized:
            self._forget(self.window)
        self.incoming = batch, index, counts, rectangle
        self.seen += tokens
        if not self.lengths:
            self.lengths = [0] * len(counts)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [1, H, N, d] of the tokens that `expect` announced; returns them as they came."""
        if self.incoming is None:
            raise ValueError("this cache belongs to a student: it cannot be continued by the frozen model")
        (batch, index, counts, rectangle), self.incoming = self.incoming, None
        if not self.is_initialized and rectangle is None:
            self.lazy_initialization(key_states, value_states)
        if rectangle is not None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = map(rectangle.lay_heads, (key_states, value_states))
            self.index, self.lengths = rectangle.lay(index, fill=-1), counts
        elif len(self.lengths) == 1:
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
            self.index = torch.cat([self.index, index.unsqueeze(0)], 1)
            self.lengths = [self.keys.shape[2]]
        else:
            old = torch.tensor(self.lengths, device=self.device)
            before = torch.tensor([0, *counts[:-1]], device=self.device).cumsum(0)
            slots = old[batch] + torch.arange(len(batch), device=self.device) - before[batch]
            self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
            grow = max(self.lengths) - self.keys.shape[2]
            if grow > 0:
                self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, grow)) for x in (self.keys, self.values))
                self.index = torch.nn.functional.pad(self.index, (0, grow), value=-1)
            self.keys[batch, :, slots] = key_states[0].transpose(0, 1)
            self.values[batch, :, slots] = value_states[0].transpose(0, 1)
            self.index[batch, slots] = index
        return key_states, value_states

    def _forget(self, window: int) -> None:
        """Drop the leading slots that have left the window in every row."""
        gone = min(((self.index >= 0) & (self.index <= self.seen - window)).sum(1).tolist())
        if gone:
            self._select(lambda x, dim: x.narrow(dim, gone, x.shape[dim] - gone))
            self.lengths = [length - gone for length in self.lengths]

    def _select(self, choose: Any) -> None:
        """Apply choose(tensor, dimension of slots) to all three tensors."""
        self.keys, self.values, self.index = choose(self.keys, 2), choose(self.values, 2), choose(self.index, 1)

    def fill(self, keys: Tensor, values: Tensor, index: Tensor, seen: int) -> None:
        """Set keys and values [1, H, n, d] of the only row, and the indices [n] of their tokens, of `seen` tokens."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.index, self.seen = keys, values, index[None], seen
        self.lengths = [len(index)]

    def copied(self, seen: int) -> DroppedLayer:
        """Return a copy, as of a sequence of so many tokens."""
        own = copy.copy(self)
        own.keys, own.values, own.index, own.seen = self.keys.clone(), self.values.clone(), self.index.clone(), seen
        return own

    def cut(self, lengths: list[int]) -> None:
        """Keep so many slots of each row."""
        self._select(lambda x, dim: x.narrow(dim, 0, max(lengths)))
        self.lengths, self.numbers = lengths, None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a cache that holds every token: the model's masks cover the whole sequence."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens of the sequence so far, kept or not."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: the length is not limited."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens of the sequence (the argument is negative)."""
        self.seen += tokens_to_remove
        if self.is_initialized:
            self.lengths = ((self.index >= 0) & (self.index < self.seen)).sum(1).tolist()
            longest = max(self.lengths)
            self._select(lambda x, dim: x.narrow(dim, 0, longest))
            self.index = self.index.masked_fill(self.index >= self.seen, -1)

    def reset(self) -> None:
        """Remove all tokens and rows."""
        CacheLayerMixin.__init__(self)
        self.seen = 0
        self.lengths = []
        self.index = torch.zeros(0, 0, dtype=torch.long)
        self.incoming = self.numbers = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace each row b by row beam_idx[b]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        rows = torch.arange(len(self.lengths)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.lengths = [self.lengths[i] for i in indices.tolist()]
        if self.is_initialized:
            indices = indices.to(self.device)
            self.keys, self.values, self.index = self.keys[indices], self.values[indices], self.index[indices]


class RoutedCache(DynamicCache):
    """The model's own dynamic cache, with a DroppedLayer where a router drops keys.

    windows: for each such layer's number, the width of its sliding window or None.
    """

    def __init__(self, config: PretrainedConfig, windows: dict[int, int | None]) -> None:
        super().__init__(config=config)
        for number, window in windows.items():
            self.layers[number] = DroppedLayer(window)


def memory_of(cache: Any) -> Memory:
    """Return the Memory of any cache, made if missing. It is an attribute of the cache, and copied with the cache."""
    if not hasattr(cache, "elastic"):
        cache.elastic = Memory()
    memory: Memory = cache.elastic
    return memory


def keeps_state(layer: Any) -> bool:
    """Return whether a layer of a cache is of a block without attention: it holds no keys and values."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def keys_and_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Return (keys, values) [B, H, L, d] of every layer with attention, of a cache that holds a prompt."""
    layers: list[Any] = [layer for layer in cache.layers if not keeps_state(layer)]
    return [(layer.keys, layer.values) for layer in layers]


def states_of(layer: LinearAttentionCacheLayerMixin) -> list[tuple[dict[int, Tensor | None], int, Tensor]]:
    """Return the states [B, ...] of a layer that holds a prompt, which every token changes: where each is kept, under
    which key, and the tensor."""
    kept = layer.conv_states, layer.recurrent_states
    return [(place, key, state) for place in kept for key, state in place.items() if state is not None]


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's keys and values, of the indices of kept tokens, and of the states that blocks
    without attention keep."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "index")]
    held += [state for layer in cache.layers if keeps_state(layer) for *_, state in states_of(layer)]
    return sum(x.numel() * x.element_size() for x in held if x is not None)
