"""Texts through recorded passes: one launch for all tokens of a prompt.

Texts are padded at the end, so that few lengths are recorded: no token sees padding, and no router lets it in.

How many tokens a router leaves open depends on the text, and only the device knows it, while a recorded pass has fixed
shapes. So it has room for as many open tokens as earlier texts of that length needed, rounded up (execution/room.py).
Behind the pass the host learns how many there were. A text that needs more room than there was is read again, as ever.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from students.execution.kv_cache import DroppedLayer
from students.execution.room import Room, room_for
from students.kernels.capture import Fetched, Recorder, Recordings, check_types, recorder_for
from students.libraries import CACHE_NAMES, cache_of, with_cache
from students.recording.prompt import ReadLayer, copied

MOST = 8192
"""Largest number of tokens of a recorded pass: over more a GPU computes for longer than the host takes to launch it."""
HELD = 16384
"""Number of tokens of the passes that are remembered, together; recorded ones keep the memory that they need."""
LENGTHS = 16
"""Texts are padded to a multiple of the next power of two over this, at least of SHORTEST."""
SHORTEST = 16


def padded_to(tokens: int) -> int:
    """Return the length of the recorded pass for texts of so many tokens: 16, 32, ..., 256, 288, ..., 512, 576, ..."""
    unit = max(SHORTEST, (1 << (tokens - 1).bit_length()) // LENGTHS)
    return -(-tokens // unit) * unit


class TextRouting:
    """How routers take part in reading a text: here not at all; subclasses say it for students."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def state(self, padded: bool) -> Hashable:
        """Return what a recorded pass over rows, which may be padded at their ends, depends on besides shapes;
        ValueError if none can be made."""
        return None

    def within(self, room: Room) -> AbstractContextManager[None]:
        """Return a context in which the model has this room for open tokens."""
        return nullcontext()

    @property
    def drops(self) -> bool:
        """Whether tokens may leave no keys."""
        return False

    def cache(self) -> Cache:
        """Return an empty cache, as the model itself makes it."""
        return DynamicCache(config=self._model.config)


class TextPass:
    """A pass over texts, on tensors that stay where they are, so that it can be recorded.

    ids [B, T]: texts, in which padding may follow; fill: number of padding tokens, if any then as many as `write` says;
    limits: room for open tokens, as in Room.
    """

    def __init__(self, model: Any, routing: TextRouting, ids: Tensor, fill: int, limits: list[int]) -> None:
        self.limits = limits
        self.kind: type[Any]
        """Class of the model's output."""
        self._model, self._routing, self._padded, self._like = model, routing, fill > 0, routing.cache()
        with torch.inference_mode(False):  # they are written with and without inference mode
            self._ids = ids.clone()
            self._places = torch.arange(ids.shape[1], device=ids.device)
            self._last = torch.full((1,), ids.shape[1] - fill - 1, device=ids.device)

    def write(self, ids: Tensor, fill: int) -> None:
        """Set the texts of the next run."""
        self._ids.copy_(ids)
        self._last.fill_(ids.shape[1] - fill - 1)

    def _cache(self) -> Cache:
        """Return an empty cache whose layers hold keys and values uncopied."""
        cache = copy.copy(self._like)
        layers = (DroppedLayer(x.window) if isinstance(x, DroppedLayer) else ReadLayer() for x in cache.layers)  # type: ignore[no-untyped-call]
        cache.layers = [*layers]
        return cache

    def run(self) -> tuple[Tensor, Cache, Tensor | None]:
        """Return (logits [B, V] of the token after each row's last one, float32, the cache, numbers); this is the part
        that is recorded. numbers (int32; None: there are none): of open tokens in each choice, and behind these of
        tokens in each layer of the cache where only the device knows how many there are."""
        valid = (self._places <= self._last).expand(self._ids.shape) if self._padded else None
        cache, room = self._cache(), Room(self.limits, valid)
        inputs: dict[str, Any] = {"input_ids": self._ids, "use_cache": True}
        inputs["logits_to_keep"] = self._last if self._padded else 1
        with self._routing.within(room):
            out = self._model(**with_cache(self._model, inputs, cache))
        self.kind = type(out)
        numbers = [*room.numbers, *_unread(cache).values()]
        return out.logits[:, -1].float(), cache_of(out), torch.cat(numbers) if numbers else None


@dataclass
class Met:
    """What is known of texts whose recorded pass has one shape."""

    tokens: int
    """Number of tokens of the recorded pass."""
    numbers: list[int]
    """The most open tokens that a text had in each choice."""
    spare: int = 0
    """Units of room beyond these numbers: none at first; one, two, four ... after texts that found too little."""


class Texts:
    """Reads texts through recorded passes, of which there is one for each of a few lengths that texts are padded to; a
    length is recorded when it occurs for the second time.

    settle: as in Decoding.
    """

    def __init__(
        self, model: PreTrainedModel, routing: TextRouting, settle: Callable[[int, torch.device], None]
    ) -> None:
        self.model: Any = model
        self.routing = routing
        self.kept = Recordings[TextPass]("texts without recorded passes", most=None)
        self._met: OrderedDict[Hashable, Met] = OrderedDict()
        self._settle = settle

    def read(self, ids: Tensor, recorder: Recorder | None, plainly: Callable[[], Any]) -> Any:
        """Return the output of the model for texts ids [B, T] with an empty cache: logits [B, 1, V] of the next token,
        and the cache. plainly: reads the same texts by the model itself."""
        record = recorder or recorder_for(ids.device)
        (rows, length), tokens = ids.shape, padded_to(ids.shape[1])
        if record is None or length < 2 or rows * tokens > MOST or torch.is_grad_enabled():
            return plainly()
        self._settle(rows, ids.device)
        fill = tokens - length
        try:
            check_types(ids.device)
            state = self.routing.state(fill > 0)
        except ValueError:
            return plainly()
        key = rows, tokens, fill > 0, ids.device, self.model.dtype, state
        if key not in self._met:
            return self._meet(key, rows * tokens, plainly)
        self._met.move_to_end(key)
        met, filled = self._met[key], F.pad(ids, (0, fill))

        def make() -> tuple[TextPass, Callable[[], Any]]:
            made = TextPass(self.model, self.routing, filled, fill, room_for(met.numbers, met.tokens, met.spare))
            return made, made.run

        own, replay = self.kept.take(key, record, make)
        if replay is None:
            return plainly()
        own.write(filled, fill)
        logits, cache, numbers = replay()
        fetched = None if numbers is None else Fetched(numbers)
        logits, cache = logits.clone().unsqueeze(1), copied(cache, length, self.routing.cache())  # while the pass runs
        if fetched is not None:
            found, choices = fetched.wait().tolist(), len(own.limits)
            if any(number > limit for number, limit in zip(found[:choices], own.limits, strict=True)):
                self.kept.pop(key)
                return self._meet(key, met.tokens, plainly)
            for number, layer in enumerate(_unread(cache)):
                layer.cut(found[choices + number * rows : choices + (number + 1) * rows])
        return own.kind(logits=logits, **{next(name for name in CACHE_NAMES if name in _fields(own.kind)): cache})

    def _meet(self, key: Hashable, tokens: int, plainly: Callable[[], Any]) -> Any:
        """Read texts that need a pass which is not remembered, or had too little room, and note what they need."""
        room, before = Room(), self._met.get(key)
        with self.routing.within(room):
            out = plainly()
        numbers = Fetched(torch.cat(room.numbers)).wait().tolist() if room.numbers else []
        if before is not None:
            numbers = [max(pair) for pair in zip(numbers, before.numbers, strict=True)]
        self._met[key] = Met(tokens, numbers, 0 if before is None else max(1, 2 * before.spare))
        self._met.move_to_end(key)
        while sum(met.tokens for met in self._met.values()) > HELD:
            self.kept.pop(self._met.popitem(last=False)[0], None)
        return out


def _fields(kind: type[Any]) -> Any:
    return kind.__dataclass_fields__


def _unread(cache: Cache) -> dict[DroppedLayer, Tensor]:
    """Return the numbers [B] of tokens in those layers of a cache where only the device knows them."""
    layers = (layer for layer in cache.layers if isinstance(layer, DroppedLayer))
    return {layer: layer.numbers for layer in layers if layer.numbers is not None}
