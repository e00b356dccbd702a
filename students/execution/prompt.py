"""Prompts with images through recorded passes: the vision tower is one launch, pruning and all tokens another.

Where no image token stays outside, or as many as a quota says, numbers settle every shape. They are asked for once, in
front of a pass, which then waits for nothing. Prompts are filled up behind, so that few lengths are recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from students.execution.capture import Fetched, Forward, Recorder, Recordings, first_line, recorder_for
from students.execution.fixed import windows_of
from students.execution.kv_cache import keys_and_values, memory_of
from students.libraries import with_cache
from students.routers import selection

MULTIPLE = 16
"""Prompts are filled up to a multiple of so many tokens."""
TEXT = ("input_ids", "position_ids", "token_type_ids")
"""Inputs with a place for each token that a pass hands on."""


@dataclass(frozen=True)
class Room:
    """What a batch of prompts takes in the language model."""

    tokens: int
    """Of each row, what fills it up included."""
    kept: int
    """Of all rows, without that."""
    fewer: bool
    """Whether some tokens stay outside."""

    @classmethod
    def of(cls, kept: Sequence[int], valid: Sequence[int]) -> Room:
        """For rows of which so many tokens pass, out of so many."""
        return cls(max(kept), sum(kept), sum(kept) < sum(valid))


@dataclass
class Prompted:
    """What the model was called with, as far as pruning has to know."""

    image: Tensor | None
    """[B, T] bool: places of image tokens; None: no image came with this call."""
    valid: Tensor
    """[B, T] bool: tokens of this call that are not padding."""
    asked: Tensor | None = None
    """[B, T] bool: tokens that may belong to the question; None: all."""
    room: Room | None = None
    """What they take behind the pruning point, in a pass that has to know beforehand."""
    counts: Fetched | None = None
    """[2, B]: how many image tokens and how many tokens each row has, where that is on its way to the host."""


class PromptPruning:
    """How image tokens are pruned in front of the language model: here not at all. Students override it."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk: Any = trunk

    def tower_state(self, pixels: Tensor) -> Hashable:
        """What a recorded pass through the vision tower depends on besides shapes; ValueError where it would depend on
        the images."""
        return None

    def state(self) -> Hashable:
        """The same of what is behind it."""
        return None

    def room(self, image: Sequence[int], valid: Sequence[int], tokens: int) -> Room:
        """For rows of `tokens` tokens with so many image tokens and so many tokens in all."""
        return Room(tokens, sum(valid), fewer=False)

    @contextmanager
    def told(self, prompted: Prompted) -> Iterator[None]:
        """Within it the model is called with embeddings, and this is what they are."""
        valid = prompted.valid
        if prompted.room is None or prompted.room.kept == valid.numel():
            yield
            return

        def hide(trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            own = kwargs.get("attention_mask")
            return args, {**kwargs, "attention_mask": masked(own, valid, kwargs["inputs_embeds"].dtype)}

        hook = self.trunk.register_forward_pre_hook(hide, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def masked(mask: Tensor | None, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores [B, 1, T, T], so that only valid [B, T] tokens are attended to; mask: the model's own,
    None where it is causal."""
    allowed = selection.hide_closed_keys(mask, valid, dtype)
    if allowed.dtype != torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill(~allowed, torch.finfo(dtype).min)


class ReadLayer(CacheLayerMixin):
    """Keys and values [B, H, L, d] of one layer, as the only pass that fills it brings them."""

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is copied."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep them."""
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of the pass alone."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """How many there are."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class ReadCache(DynamicCache):
    """The cache of one recorded pass."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = [ReadLayer() for _ in range(layers)]


class Read(NamedTuple):
    """What reading a prompt leaves. What a recorded pass leaves is overwritten by the next one."""

    logits: Tensor
    """[B, V] float32, behind each row's last token."""
    cache: Any
    positions: Tensor | None = None
    """[B]: of the next tokens, where that was asked."""
    fill: int = 0
    """Tokens at the end of the cache that only fill it up."""

    @property
    def used(self) -> int:
        """Tokens of the cache that count."""
        return int(self.cache.get_seq_length()) - self.fill

    def owned(self) -> DynamicCache:
        """The cache, which nothing overwrites."""
        if not isinstance(self.cache, ReadCache):
            own: DynamicCache = self.cache
            return own
        cache, memory = DynamicCache(), replace(memory_of(self.cache))
        for number, (keys, values) in enumerate(keys_and_values(self.cache)):
            cache.update(keys[:, :, : self.used].clone(), values[:, :, : self.used].clone(), number)
        if memory.held is not None and memory.next is not None:
            memory.held, memory.next = memory.held[:, : self.used].clone(), memory.next - self.fill
        vars(cache).update(elastic=memory)
        return cache


def following(positions: Tensor) -> Tensor:
    """[B]: the positions behind tokens at positions [B, T] or, in several dimensions, of which the first may be another
    count, [3 or 4, B, T]."""
    last = positions.amax(-1)
    return (last if last.ndim == 1 else last[-3:].amax(0)) + 1


class PromptPass:
    """A pass over prompts of one shape, on tensors that stay where they are: what is recorded.

    text: inputs with a place for each token, of which valid [B, T] are no padding; images: what the model made of them
    [n, D].
    """

    def __init__(
        self, model: Any, pruning: PromptPruning, text: dict[str, Tensor], valid: Tensor, images: Tensor, room: Room
    ) -> None:
        self._model, self._pruning, self._room = model, pruning, room
        with torch.inference_mode(False):  # they are written in calls of either kind
            self._text = {name: tensor.clone() for name, tensor in text.items()}
            self._valid, self._images = valid.clone(), images.clone()
            self._places = torch.arange(valid.shape[1], device=valid.device)
            self._length = torch.zeros((), dtype=torch.long, device=valid.device)
            self._last = torch.zeros(1, dtype=torch.long, device=valid.device)

    def write(self, text: dict[str, Tensor], valid: Tensor, images: Tensor, fill: int) -> None:
        """Note what the next run is for; fill: how many tokens at the end fill it up."""
        for name, tensor in text.items():
            self._text[name].copy_(tensor)
        self._valid.copy_(valid)
        self._images.copy_(images)
        self._length.fill_(valid.shape[1] - fill)
        self._last.fill_(self._room.tokens - fill - 1)

    def run(self) -> tuple[Tensor, ReadCache]:
        """The part that is recorded: (logits [B, V], cache)."""
        text = dict(self._text)
        ids = text.pop("input_ids")
        image = ids == self._model.config.image_token_id
        embeds = self._model.base_model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(image.unsqueeze(-1), self._images.to(embeds.dtype))
        cache = ReadCache(self._pruning.trunk.config.num_hidden_layers)
        inputs = with_cache(self._model, {**text, "inputs_embeds": embeds, "use_cache": True}, cache)
        asked = (self._places < self._length).expand(ids.shape)
        with self._pruning.told(Prompted(image, self._valid, asked, self._room)):
            logits = self._model(**inputs, logits_to_keep=self._last).logits
        return logits[:, -1].float(), cache


class Prompts:
    """Reads prompts through recorded passes, of which there is one for each shape.

    pruning: what stands in front of the model's language model. settle: as of Decoding.
    """

    def __init__(
        self, model: PreTrainedModel, pruning: PromptPruning, settle: Callable[[int, torch.device], None]
    ) -> None:
        self.model: Any = model
        self.pruning = pruning
        self.kept = Recordings[tuple[PromptPass, Callable[[], tuple[Tensor, ReadCache]] | None]]()
        self.tower = Forward(self._look, pruning.tower_state)
        """Images that come as pixels and nothing else, all of one shape, to what the model makes of them."""
        self._settle = settle

    def _look(self, pixels: Tensor) -> Any:
        return self.model.base_model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output

    def seen(self, kwargs: dict[str, Any], recorder: Recorder | None) -> dict[str, Any]:
        """What `generate` is called with, for what it was called with: images are looked at."""
        look = self.model.base_model.get_image_features
        takes = {name for name in inspect.signature(look).parameters if kwargs.get(name) is not None}
        if not isinstance(kwargs.get("pixel_values"), Tensor) or kwargs.get("mm_encoder_outputs") is not None:
            return kwargs
        pixels, self.tower.recorder = kwargs["pixel_values"].to(self.model.device), recorder
        if takes == {"pixel_values"} and pixels.ndim == 4:
            made = BaseModelOutputWithPooling(pooler_output=self.tower(pixels))
        else:
            made = look(**{name: kwargs[name] for name in takes}, return_dict=True)
        kept = {name: x for name, x in kwargs.items() if name != "pixel_values"}  # positions follow from sizes
        return kept | {"mm_encoder_outputs": {"image": made}}

    def read(self, inputs: dict[str, Any], recorder: Recorder | None, say: Callable[[str], None]) -> Read | None:
        """What reading leaves; inputs: what the model would be called with. None: there is nothing to record, or it
        cannot be, and then `say` hears why."""
        ids, made = inputs["input_ids"], (inputs.get("mm_encoder_outputs") or {}).get("image")
        record = recorder or recorder_for(ids.device)
        if record is None or made is None:
            return None
        try:
            self._settle(len(ids), ids.device)
            state = self._state()
        except ValueError as reason:
            say(str(reason))
            return None
        images = made.pooler_output
        images = (images if isinstance(images, Tensor) else torch.cat(list(images))).flatten(0, -2)
        mask, fill = inputs.get("attention_mask"), -ids.shape[1] % MULTIPLE
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        valid = F.pad(valid, (0, fill), value=True)
        image = ids == self.model.config.image_token_id
        of_rows, in_all = Fetched(torch.stack([image.sum(1), valid.sum(1)])).wait().tolist()
        if sum(of_rows) != len(images):
            return None  # what is wrong the model says
        room = self.pruning.room(of_rows, in_all, valid.shape[1])
        text = self._filled(inputs, fill)
        padded = room.kept < len(ids) * room.tokens
        key = valid.shape, images.shape, images.dtype, ids.device, room.tokens, room.fewer, padded, *text, state

        def make() -> tuple[PromptPass, Callable[[], tuple[Tensor, ReadCache]] | None]:
            made = PromptPass(self.model, self.pruning, text, valid, images, room)
            made.write(text, valid, images, fill)
            try:
                return made, record(made.run)
            except RuntimeError as error:
                say(f"{type(self.model).__name__} could not be recorded ({first_line(error)})")
                return made, None

        own, replay = self.kept.take(key, make)
        if replay is None:
            return None
        own.write(text, valid, images, fill)
        logits, cache = replay()
        return Read(logits, cache, fill=fill)

    def _state(self) -> Hashable:
        """What a recorded pass depends on besides shapes; ValueError where there can be none."""
        if any(windows_of(self.pruning.trunk)):
            raise ValueError(f"{type(self.model).__name__} has layers with a window")
        return self.pruning.state()

    def _filled(self, inputs: dict[str, Any], fill: int) -> dict[str, Tensor]:
        """What there is for each token, for so many more behind."""
        text = {name: inputs[name] for name in TEXT if inputs.get(name) is not None}
        for name, tensor in text.items() if fill else ():
            if name == "position_ids":
                more = tensor[..., -1:] + torch.arange(1, fill + 1, device=tensor.device)
                text[name] = torch.cat([tensor, more], -1)
            else:
                # no image token, and none that PaliGemma's prompts look at
                no_image = int(self.model.config.image_token_id == 0)
                text[name] = F.pad(tensor, (0, fill), value=no_image if name == "input_ids" else 1)
        return text
