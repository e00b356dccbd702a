"""transformers' `generate` through recorded decode steps, with its greedy search, sampling, stopping and streaming.

The prompt is read through a recorded pass (recording/text.py or, with images, prompt.py) or by the model itself. After
that every token is one replay of a step of fixed shape (recording/step.py). There is one recording for each batch size
and number of slots; when all slots are taken, a step with more slots continues. On GPUs, whose attention reads taken
slots only, there are slots for all tokens of a call from the start. Turning the dial keeps recordings of steps valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from students.architectures.lookup import is_hybrid, windows_of
from students.execution.kv_cache import keys_and_values, memory_of
from students.kernels import ops
from students.kernels.capture import Fetched, Recorder, Recordings, are_watched, check_types, recorder_for
from students.kernels.replay import Replay
from students.libraries import CACHE_NAMES, cache_in, cache_of
from students.recording.prompt import PromptPruning, Prompts, Read, following
from students.recording.step import DecodeStep, initialize
from students.recording.text import TextRouting, Texts

SMALLEST = 256
"""Number of slots of the smallest cache."""
AT_ONCE = 2048
"""Maximum number of slots that are made before tokens need them."""
OWN_WAY = (*CACHE_NAMES, "custom_generate", "assistant_model", "inputs_embeds", "position_ids", "assistant_tokenizer")
"""Arguments of `generate` with which the caller controls decoding; recorded steps are then not used."""
OF_A_TEXT = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}
"""Arguments of a model, besides the cache, that `generate` makes by itself for a text."""


def slots_for(tokens: int) -> int:
    """Return the number of slots for so many tokens: 256, 384, 512, 768, 1024, ..., in steps of a half or a third."""
    slots = SMALLEST
    while slots < tokens:
        slots += slots // 2 if slots & (slots - 1) == 0 else slots // 3
    return slots


def scored(ids: Tensor, logits: Tensor, processor: Any, config: Any, kept: dict[str, list[Tensor]]) -> Tensor:
    """Return the scores [B, V] that a call's processors make of logits [B, V] behind ids [B, T], and keep what the call
    wants returned."""
    scores: Tensor = processor(ids, logits.to(ids.device, copy=True))
    for name, tensor in (("scores", scores), ("logits", logits)):
        if config.return_dict_in_generate and getattr(config, f"output_{name}"):
            kept[name].append(tensor.clone())
    return scores


def drawn(scores: Tensor, sample: bool) -> Tensor:
    """Return tokens [B] of scores [B, V]: sampled, or the likeliest."""
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sample else scores.argmax(-1)


class Decoding:
    """A model whose tokens are decoded through recorded steps.

    trunk: the module that holds the blocks. state: returns what a recording for so many rows depends on besides shapes;
    raises ValueError where nothing can be recorded, in words that complete "decoding without recorded steps: ".
    settle: called with (batch, device) before replays; writes changed settings to the tensors that steps read.
    recorder: None for the device's default. pruning: how image tokens are pruned, and routing: how routers take part in
    reading a text; None: not at all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trunk: nn.Module,
        state: Callable[[int], Any] = lambda rows: None,
        settle: Callable[[int, torch.device], None] = lambda batch, device: None,
        recorder: Recorder | None = None,
        pruning: PromptPruning | None = None,
        routing: TextRouting | None = None,
    ) -> None:
        self.model: Any = model
        self.trunk = trunk
        self.recorder = recorder
        self._state = state
        self._settle = settle
        self._steps = Recordings[DecodeStep]("decoding without recorded steps")
        self._prompts: Prompts | None = None
        if hasattr(model.base_model, "get_image_features"):
            self._prompts = Prompts(model, pruning or PromptPruning(trunk), settle)
        self._routing = routing or TextRouting(model)
        self.hybrid = is_hybrid(trunk)
        """Whether blocks keep a state in place of keys and values: texts are read without recorded passes."""
        reads = self._prompts is None and not self.hybrid
        self._texts = Texts(model, self._routing, settle) if reads else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoding:
        model, trunk = copy.deepcopy(self.model, memo), copy.deepcopy(self.trunk, memo)
        state, settle = copy.deepcopy(self._state, memo), copy.deepcopy(self._settle, memo)
        pruning = None if self._prompts is None else copy.deepcopy(self._prompts.pruning, memo)
        routing = copy.deepcopy(self._routing, memo)
        return Decoding(model, trunk, state, settle, self.recorder, pruning, routing)  # no recording can be copied

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, through recorded steps where possible. Otherwise the model decodes by itself; unless
        the call asked for that, a warning gives the reason, once."""
        try:
            possible = self._possible(args, kwargs)
        except ValueError as reason:
            possible = False
            if not self.replays:
                self._steps.warn(str(reason))
        if possible:
            return self._through_steps(args, kwargs)
        with self._reading(kwargs):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _reading(self, asked: dict[str, Any]) -> Iterator[None]:
        """A context in which the model's own `generate`, called with the arguments `asked`, reads its prompt through
        recorded passes where that is possible."""
        own, reads = self.model._prefill, not (self.replays or self._texts is None or self._goes_own_way(asked))
        if not reads or are_watched(self.model.modules()):
            yield
            return
        self.model._prefill = partial(self._prefilled, own)
        try:
            yield
        finally:
            del self.model._prefill

    def _prefilled(self, own: Any, ids: Tensor, config: Any, kwargs: dict[str, Any], **options: Any) -> Any:
        """The model's own `_prefill`, `own`, of texts through recorded passes where that is possible."""
        plainly, cache = partial(own, ids, config, kwargs, **options), cache_in(kwargs)
        alone = {name for name, value in kwargs.items() if value is not None} <= {*CACHE_NAMES, *OF_A_TEXT}
        fresh = cache is None or (type(cache) is DynamicCache and not cache.get_seq_length())
        special = config.prefill_chunk_size, config.cache_implementation
        more, mask = config.output_attentions or config.output_hidden_states, kwargs.get("attention_mask")
        usual = alone and fresh and kwargs.get("use_cache") and special == (None, None) and not more
        if self._texts is None or not usual or not (mask is None or bool(mask.all())):
            return plainly()
        return self._texts.read(ids, self.recorder, plainly)

    def _through_steps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's `generate`, with `_decode` as its loop."""
        if self._prompts is not None:
            with torch.no_grad():
                kwargs = self._prompts.seen(kwargs, self.recorder)
        strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
        if strings is not None:
            mine = [StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), *mine]
        # transformers streams the prompt but passes no `streamer` to a custom callable: it gets another name
        return self.model.generate(*args, custom_generate=self._decode, words_to=kwargs.get("streamer"), **kwargs)

    def reader(self, **inputs: Any) -> Callable[[], Read]:
        """Return a function that reads this prompt as `generate` does before it decodes, at each call anew."""
        prepared: list[Any] = []

        def take(
            model: Any, ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **rest: Any
        ) -> Tensor:
            prepared.extend([ids, generation_config, {n: x for n, x in rest.items() if n not in CACHE_NAMES}])
            return ids

        self.model.generate(**inputs, custom_generate=take, max_new_tokens=1)
        ids, config, kwargs = prepared

        def read() -> Read:
            with torch.no_grad():
                seen = {} if self._prompts is None else self._prompts.seen(inputs, self.recorder)
                images = {name: seen[name] for name in ("mm_encoder_outputs",) if name in seen}
                return self._read(ids, config, {**kwargs, **images, "use_cache": True})

        return read

    def _read(self, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Read:
        """Read a prompt that `generate` has prepared."""
        read = positions = None
        if self._prompts is not None and config.prefill_chunk_size is None:
            inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
            read = self._prompts.read(inputs, self.recorder)
            if inputs.get("position_ids") is not None:
                positions = following(inputs["position_ids"])
        if read is None:
            out = self._prefilled(self.model._prefill, ids, config, kwargs)
            read = Read(out.logits[:, -1].float(), cache_of(out))
        return read._replace(positions=positions)

    @property
    def replays(self) -> bool:
        """Whether steps are recorded as lists of calls, on a CPU: only for few rows, and without warnings otherwise."""
        return self.recorder is None and recorder_for(self.model.device) is None

    def _goes_own_way(self, kwargs: dict[str, Any]) -> bool:
        """Return whether the caller of `generate` controls decoding."""
        return any(kwargs.get(name) is not None for name in OWN_WAY) or bool(kwargs.get("synced_gpus"))

    def _possible(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether this call decodes through recorded steps. ValueError where it cannot and a warning is due."""
        if self.replays and not ops.compiled(next(self.model.parameters())):
            return False
        if are_watched(self.model.modules()):
            return False
        if self._goes_own_way(kwargs):
            return False
        config = copy.deepcopy(kwargs.get("generation_config") or self.model.generation_config)
        config.update(**{name: value for name, value in kwargs.items() if value is not None})
        if config.use_cache is False or config.cache_implementation is not None or config.prompt_lookup_num_tokens:
            return False
        if config.stop_strings is not None and "stop_strings" not in kwargs:
            return False
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        rows = (1 if ids is None else len(ids)) * (config.num_return_sequences or 1)
        if self.replays and (ids is None or rows > ops.FEW_ROWS):
            return False
        if (config.num_beams or 1) > 1:
            raise ValueError("beam search moves rows of the cache")
        if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return False
        if config.output_attentions or config.output_hidden_states:
            raise ValueError("attentions and hidden states are not kept")
        check_types(self.model.device)
        if self.hybrid and config.return_dict_in_generate:  # a step is launched before the last token is known
            raise ValueError("the state of a cache that is returned cannot be taken back by a token")
        if self._prompts is not None and any(windows_of(self.trunk)):
            raise ValueError(f"{type(self.model).__name__} has layers with a window")
        self._state(rows)
        return True

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        words_to: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop, which the model's `generate` calls with the arguments that it has prepared."""
        config, prompt = generation_config, input_ids.shape[1]
        padding = config._pad_token_tensor
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        valid = model_kwargs.get("attention_mask")
        read = self._read(input_ids, config, model_kwargs)
        logits = read.logits
        step: DecodeStep | None = None
        replay: Callable[[], Tensor] | None = None
        unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        while True:
            scores = scored(input_ids, logits, logits_processor, config, kept)
            tokens = drawn(scores, config.do_sample)
            if ends:
                tokens = tokens * unfinished + padding.to(tokens.device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], 1)
            seen = tuple(kept["scores"]) if kept["scores"] else None
            unfinished = unfinished & ~stopping_criteria(input_ids, seen)
            fetched = Fetched(torch.stack([tokens, unfinished]))
            if input_ids.shape[1] < config.max_length:  # launched before the host knows whether it is needed
                if step is None or replay is None:
                    step, replay = self._begin(read, valid, 1 if self.replays else config.max_length - prompt)
                elif step.full:
                    step, replay = self._grow(step)
                step.advance(tokens)
                logits = replay()
            written, going = fetched.wait()
            if words_to is not None:
                words_to.put(written)
            if not bool(going.any()):
                break
        return self._returned(input_ids, prompt, config, kept, read, step, words_to)

    def _returned(
        self,
        input_ids: Tensor,
        prompt: int,
        config: Any,
        kept: dict[str, list[Tensor]],
        read: Read,
        step: DecodeStep | None,
        words_to: Any,
    ) -> Any:
        """End the stream, and return what `generate` returns: the tokens, or with them what the call asked for."""
        if words_to is not None:
            words_to.end()
        if not config.return_dict_in_generate:
            return input_ids
        made: dict[str, Any] = {n: tuple(x) for n, x in kept.items() if getattr(config, f"output_{n}")}
        name = next(field.name for field in fields(GenerateDecoderOnlyOutput) if field.name in CACHE_NAMES)
        made[name] = read.owned() if step is None else self._as_cache(step, read, input_ids.shape[1] - prompt - 1)
        made["sequences"] = input_ids
        return GenerateDecoderOnlyOutput(**made)

    def _begin(self, read: Read, valid: Tensor | None, new: int) -> tuple[DecodeStep, Callable[[], Tensor]]:
        """Return the step that continues behind a prompt, and its replay; valid [B, T]: the call's attention mask; new:
        number of tokens to make slots for."""
        cache, used = read.cache, read.used
        initialize(cache, self.trunk, torch.empty(0, dtype=self.model.dtype, device=self.model.device))
        memory, rows = memory_of(cache), len(keys_and_values(cache)[0][0])
        if memory.held is not None and memory.next is not None:  # only some tokens were kept
            valid, positions = memory.held[:, :used], following(memory.next - read.fill - 1).expand(rows)
        elif read.positions is not None:
            positions = read.positions.expand(rows)
        elif valid is None:
            positions = torch.full((rows,), used, device=self.model.device)
        else:
            positions = valid.sum(1)
        step, replay = self._step(cache, slots_for(max(used + 1, min(used + new, AT_ONCE))))
        step.load(cache, used, valid, positions)
        return step, replay

    def _grow(self, step: DecodeStep) -> tuple[DecodeStep, Callable[[], Tensor]]:
        larger, replay = self._step(step.cache, slots_for(step.length + 1))
        larger.take_over(step)
        return larger, replay

    def _step(self, like: Cache, slots: int) -> tuple[DecodeStep, Callable[[], Tensor]]:
        """Return a step for a batch of this cache's size and dtype, and its replay; both are kept."""
        keys, _ = keys_and_values(like)[0]
        self._settle(len(keys), keys.device)
        key = len(keys), slots, keys.device, keys.dtype, self._state(len(keys))

        def make() -> tuple[DecodeStep, Callable[[], Tensor]]:
            step = DecodeStep(self.model, self.trunk, like, slots)
            return step, step.run

        step, replay = self._steps.take(key, self.recorder or recorder_for(keys.device) or Replay, make)
        return step, replay or step.run

    def _as_cache(self, step: DecodeStep, read: Read, new: int) -> Cache:
        """Copy what a step holds, the prompt and `new` further tokens, into a dynamic cache."""
        used = read.used + new
        into = self._routing.cache() if self._routing.drops else DynamicCache()
        cache, memory = step.copied(used, into), replace(memory_of(read.cache))
        vars(cache).update(elastic=memory)
        if memory.held is not None and memory.next is not None:
            memory.held, memory.next = step.open[:, :used].clone(), memory.next - read.fill + new
        return cache
