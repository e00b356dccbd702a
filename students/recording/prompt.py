"""Prompts with images through recorded passes: one launch for the vision tower, one for pruning and all tokens.

Where no image token is pruned, or a quota says how many are, the numbers of tokens determine every shape. The host asks
for these numbers once, before a pass, which then never waits. Prompts are padded at the end on GPUs, so that few
lengths are recorded.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from students.architectures.lookup import is_hybrid, windows_of
from students.execution.kv_cache import DroppedLayer, memory_of
from students.kernels.capture import KEPT_ON_CPU, Fetched, Forward, Recorder, Recordings, recorder_for
from students.kernels.replay import Replay
from students.libraries import with_cache
from students.routers import selection

MULTIPLE = 16
"""Prompts are padded to a multiple of so many tokens on GPUs; on CPUs, where padding takes time, to none."""
TEXT = ("input_ids", "position_ids", "token_type_ids")
"""Inputs with one entry for each token that a pass gives to the model."""


@dataclass(frozen=True)
class PromptSize:
    """Numbers of tokens that a batch of prompts takes in the language model."""

    tokens: int
    """Tokens of each row, padding included."""
    kept: int
    """Tokens of all rows together, without padding."""
    fewer: bool
    """Whether some tokens are pruned."""

    @classmethod
    def of(cls, kept: Sequence[int], valid: Sequence[int]) -> PromptSize:
        """Make the size of rows of which so many `kept` tokens pass out of so many `valid` ones."""
        return cls(max(kept), sum(kept), sum(kept) < sum(valid))


@dataclass
class Prompted:
    """The facts that pruning needs about a call of the model."""

    image: Tensor | None
    """[B, T] bool: places of image tokens; None: no image came with this call."""
    valid: Tensor
    """[B, T] bool: tokens of this call that are not padding."""
    asked: Tensor | None = None
    """[B, T] bool: tokens that may belong to the question; None: all."""
    size: PromptSize | None = None
    """Numbers of tokens after pruning, for a pass that needs these numbers beforehand."""
    counts: Fetched | None = None
    """Numbers [2, B] of image tokens and of all tokens in each row, if these are being copied to the host."""


class PromptPruning:
    """How image tokens are pruned in front of the language model: here not at all; subclasses do it for students."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk: Any = trunk

    def tower_state(self, pixels: Tensor) -> Hashable:
        """Return what a recorded pass through the vision tower depends on besides shapes; ValueError if that includes
        the images."""
        return None

    def state(self) -> Hashable:
        """Return what a recorded pass through all modules behind the vision tower depends on; as `tower_state`."""
        return None

    def size_of(self, image: Sequence[int], valid: Sequence[int], tokens: int) -> PromptSize:
        """Return the size of rows of length `tokens`, with so many image tokens and so many `valid` tokens each."""
        return PromptSize(tokens, sum(valid), fewer=False)

    @contextmanager
    def applied(self, prompted: Prompted) -> Iterator[None]:
        """A context in which the model is called with the embeddings that `prompted` describes."""
        valid = prompted.valid
        if prompted.size is None or prompted.size.kept == valid.numel():
            yield
            return

        def hide(trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            own, dtype = kwargs.get("attention_mask"), kwargs["inputs_embeds"].dtype
            mask = selection.additive(selection.hide_closed_keys(own, valid, dtype), dtype)
            return args, {**kwargs, "attention_mask": mask}

        with self.trunk.register_forward_pre_hook(hide, with_kwargs=True):
            yield


class ReadLayer(DynamicLayer):
    """Cache of one layer, filled by one pass: holds the keys and values [B, H, L, d] of that pass uncopied."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of the pass, and return both."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class ReadCache(DynamicCache):
    """The cache of one recorded pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = ReadLayer


def copied(cache: Cache, length: int, into: Cache) -> Cache:
    """Copy the first `length` tokens of a pass's cache into an empty one, and return this."""
    layer: Any
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, DroppedLayer):
            into.layers[number] = layer.copied(length)
        else:
            into.update(layer.keys[:, :, :length], layer.values[:, :, :length], number)
    vars(into).update(elastic=copy.copy(memory_of(cache)))
    return into


class Read(NamedTuple):
    """The result of reading a prompt. The next recorded pass overwrites the result of a recorded pass."""

    logits: Tensor
    """Logits [B, V] of the token after each row's last one, float32."""
    cache: Any
    positions: Tensor | None = None
    """Positions [B] of the next tokens, if the model was given position ids."""
    fill: int = 0
    """Number of padding tokens at the end of the cache."""

    @property
    def used(self) -> int:
        """Number of tokens in the cache, without the padding at its end."""
        return int(self.cache.get_seq_length()) - self.fill

    def owned(self) -> Cache:
        """Return the cache, copied where the next recorded pass would overwrite it."""
        if not isinstance(self.cache, ReadCache):
            own: Cache = self.cache
            return own
        cache = copied(self.cache, self.used, DynamicCache())
        memory = memory_of(cache)
        if memory.held is not None and memory.next is not None:
            memory.held, memory.next = memory.held[:, : self.used].clone(), memory.next - self.fill
        return cache


def following(positions: Tensor) -> Tensor:
    """Return the next position [B] after tokens at positions [B, T] or, as in M-RoPE, [3 or 4, B, T]; the first of 4
    holds positions in the text, and is left out."""
    last = positions.amax(-1)
    return (last if last.ndim == 1 else last[-3:].amax(0)) + 1


def in_rows(image: Tensor, parts: Sequence[Tensor]) -> dict[str, Any]:
    """Return DeepStack's arguments (arXiv 2406.04334) of a trunk that adds the features parts [n, D] to image tokens at
    image [B, T] bool, as features [B, T, D] of whole rows: their indices take no wait, as the mask does."""
    wide = image.unsqueeze(-1)
    laid = [part.new_zeros(*image.shape, part.shape[-1]).masked_scatter(wide, part) for part in parts]
    return {"visual_pos_masks": torch.arange(len(image), device=image.device), "deepstack_visual_embeds": laid}


@contextmanager
def _deep_features(trunk: nn.Module, image: Tensor, parts: Sequence[Tensor]) -> Iterator[None]:
    """A context in which a trunk is given DeepStack's features for its image tokens, as in `in_rows`; none: nothing."""
    if not parts:
        yield
        return
    given = in_rows(image, parts)

    def add(trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **given}

    with trunk.register_forward_pre_hook(add, with_kwargs=True, prepend=True):
        yield


def _joined(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """Return features [n, D] of all images, whether they come together or apart."""
    return (parts if isinstance(parts, Tensor) else torch.cat(list(parts))).flatten(0, -2)


class PromptPass:
    """A pass over prompts of one shape, on tensors that stay where they are, so that it can be recorded.

    text: inputs with one entry for each token; valid [B, T]: tokens that are not padding; images: embeddings [n, D] of
    the image tokens, followed in D by what DeepStack adds to them behind the first layers.
    """

    def __init__(
        self,
        model: Any,
        pruning: PromptPruning,
        text: dict[str, Tensor],
        valid: Tensor,
        images: Tensor,
        size: PromptSize,
    ) -> None:
        self._model, self._pruning, self._size = model, pruning, size
        with torch.inference_mode(False):  # they are written with and without inference mode
            self._text = {name: tensor.clone() for name, tensor in text.items()}
            self._valid, self._images = valid.clone(), images.clone()
            self._places = torch.arange(valid.shape[1], device=valid.device)
            self._length = torch.zeros((), dtype=torch.long, device=valid.device)
            self._last = torch.zeros(1, dtype=torch.long, device=valid.device)

    def write(self, text: dict[str, Tensor], valid: Tensor, images: Tensor, fill: int) -> None:
        """Set the inputs of the next run; fill: number of padding tokens at the end."""
        for name, tensor in text.items():
            self._text[name].copy_(tensor)
        self._valid.copy_(valid)
        self._images.copy_(images)
        self._length.fill_(valid.shape[1] - fill)
        self._last.fill_(self._size.tokens - fill - 1)

    def run(self) -> tuple[Tensor, ReadCache]:
        """Return (logits [B, V], cache); this is the part that is recorded."""
        text = dict(self._text)
        ids = text.pop("input_ids")
        image = ids == self._model.config.image_token_id
        embeds = self._model.base_model.get_input_embeddings()(ids)
        images, *deep = self._images.to(embeds.dtype).split(embeds.shape[-1], -1)
        embeds = embeds.masked_scatter(image.unsqueeze(-1), images)
        cache = ReadCache()
        inputs = with_cache(self._model, {**text, "inputs_embeds": embeds, "use_cache": True}, cache)
        asked = (self._places < self._length).expand(ids.shape)
        applied = self._pruning.applied(Prompted(image, self._valid, asked, self._size))
        with applied, _deep_features(self._pruning.trunk, image, deep):
            logits = self._model(**inputs, logits_to_keep=self._last).logits
        return logits[:, -1].float(), cache


class Prompts:
    """Reads prompts through recorded passes, one for each shape.

    pruning: how image tokens are pruned in front of the language model. settle: as in Decoding.
    """

    def __init__(
        self, model: PreTrainedModel, pruning: PromptPruning, settle: Callable[[int, torch.device], None]
    ) -> None:
        self.model: Any = model
        self.pruning = pruning
        self.kept = Recordings[PromptPass]("prompts without recorded passes", on_cpu=KEPT_ON_CPU)
        self.tower = Forward(self._look, pruning.tower_state, tokens=self._patches)
        """Recorded passes from pixels to embeddings of image tokens, where images come as pixels alone."""
        self._settle = settle

    def _look(self, pixels: Tensor) -> Any:
        return self.model.base_model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output

    def _patches(self, pixels: Tensor) -> float:
        """Return the number of patches of images [B, C, H, W]."""
        size = self.model.config.vision_config.patch_size
        return pixels[:, 0].numel() / (size**2 if isinstance(size, int) else math.prod(size))

    def seen(self, kwargs: dict[str, Any], recorder: Recorder | None) -> dict[str, Any]:
        """Return the arguments of `generate` with the images' pixels replaced by the vision tower's output."""
        look = self.model.base_model.get_image_features
        takes = {name for name in inspect.signature(look).parameters if kwargs.get(name) is not None}
        if not isinstance(kwargs.get("pixel_values"), Tensor) or kwargs.get("mm_encoder_outputs") is not None:
            return kwargs
        pixels, self.tower.recorder = kwargs["pixel_values"].to(self.model.device), recorder
        if takes == {"pixel_values"} and pixels.ndim == 4:
            made = BaseModelOutputWithPooling(pooler_output=self.tower(pixels))
        else:
            made = look(**{name: kwargs[name] for name in takes}, return_dict=True)
        kept = {name: x for name, x in kwargs.items() if name != "pixel_values"}  # sizes stay, for positions
        return kept | {"mm_encoder_outputs": {"image": made}}

    def read(self, inputs: dict[str, Any], recorder: Recorder | None) -> Read | None:
        """Read a prompt through a recorded pass; inputs: those of the model. None if there is nothing to record, or if
        recording is impossible, of which a warning gives the reason."""
        ids, made = inputs["input_ids"], (inputs.get("mm_encoder_outputs") or {}).get("image")
        record = recorder or recorder_for(ids.device, ids.numel())
        if record is None or made is None:
            return None
        try:
            self._settle(len(ids), ids.device)
            state = self._state()
        except ValueError as reason:
            if record is not Replay:
                self.kept.warn(str(reason))
            return None
        images = torch.cat(
            [_joined(part) for part in (made.pooler_output, *(made.get("deepstack_features") or ()))], -1
        )
        mask, fill = inputs.get("attention_mask"), 0 if record is Replay else -ids.shape[1] % MULTIPLE
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        valid = F.pad(valid, (0, fill), value=True)
        image = ids == self.model.config.image_token_id
        of_rows, in_all = Fetched(torch.stack([image.sum(1), valid.sum(1)])).wait().tolist()
        if sum(of_rows) != len(images):
            return None  # the model raises the error
        size = self.pruning.size_of(of_rows, in_all, valid.shape[1])
        text = self._filled(inputs, fill)
        padded = size.kept < len(ids) * size.tokens
        key = valid.shape, images.shape, images.dtype, ids.device, size.tokens, size.fewer, padded, *text, state

        def make() -> tuple[PromptPass, Callable[[], tuple[Tensor, ReadCache]]]:
            made = PromptPass(self.model, self.pruning, text, valid, images, size)
            made.write(text, valid, images, fill)
            return made, made.run

        own, replay = self.kept.take(key, record, make)
        if replay is None:
            return None
        own.write(text, valid, images, fill)
        logits, cache = replay()
        return Read(logits, cache, fill=fill)

    def _state(self) -> Hashable:
        """Return what a recorded pass depends on besides shapes; ValueError if no pass can be recorded."""
        if any(windows_of(self.pruning.trunk)):
            raise ValueError(f"{type(self.model).__name__} has layers with a window")
        if is_hybrid(self.pruning.trunk):
            raise ValueError(f"{type(self.model).__name__} has blocks with a state in place of keys and values")
        return self.pruning.state()

    def _filled(self, inputs: dict[str, Any], fill: int) -> dict[str, Tensor]:
        """Return the inputs with one entry for each token, padded at the end by `fill` tokens."""
        text = {name: inputs[name] for name in TEXT if inputs.get(name) is not None}
        for name, tensor in text.items() if fill else ():
            if name == "position_ids":
                more = tensor[..., -1:] + torch.arange(1, fill + 1, device=tensor.device)
                text[name] = torch.cat([tensor, more], -1)
            else:
                # no image token, nor (by its type) one that PaliGemma's prompts attend to
                no_image = int(self.model.config.image_token_id == 0)
                text[name] = F.pad(tensor, (0, fill), value=no_image if name == "input_ids" else 1)
        return text
