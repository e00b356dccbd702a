"""Every use of internals of torch, transformers or timm: an adapter for some, and a check of the assumption for all.

`ASSUMPTIONS` lists the checks. tests/students/test_libraries.py runs all of them, and so does `students.selfcheck` when
a student differs from its teacher, to name the assumptions that no longer hold. Module names that differ between
architectures are not here but in the records of students/architectures; they are looked up when a student is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, masking_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""Keywords by which forward passes of transformers take a key/value cache: the first since version 5.24, the second
before, the third in the blocks of GPT-NeoX."""


def cache_name(module: nn.Module) -> str:
    """Return the keyword by which a module's forward takes a key/value cache; ValueError if there is none."""
    names = inspect.signature(type(module).forward).parameters
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise ValueError(f"{type(module).__name__}.forward takes no cache (looked for {', '.join(CACHE_NAMES)})")


def cache_in(kwargs: MutableMapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a forward pass, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(module: nn.Module, kwargs: MutableMapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return the keyword arguments with this cache, by the keyword of the module's forward, and no other cache."""
    others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, cache_name(module): cache}


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a model or of `generate`, or None."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


@contextmanager
def fresh_positions(model: nn.Module) -> Iterator[None]:
    """Context in which a model has no state of earlier prompts: Qwen2-VL models keep the last prompt's position shift
    (`rope_deltas`)."""
    base = getattr(model, "base_model", model)
    if not hasattr(base, "rope_deltas"):
        yield
        return
    before, base.rope_deltas = base.rope_deltas, None
    try:
        yield
    finally:
        base.rope_deltas = before


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Context in which transformers takes every row of a batch for one sequence, if the caller passes no positions.
    Else it looks for packed sequences in the positions that it has just made, and the host waits for the device."""
    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


@dataclass(frozen=True)
class Assumption:
    """A behaviour of a library that code relies on although the library does not document it."""

    library: str
    what: str
    """The assumption, as the end of the sentence "LIBRARY no longer ..."."""
    where: str
    """The code that relies on the assumption and has to be changed if it no longer holds."""
    holds: Callable[[], bool]

    def broken(self) -> str | None:
        """Return a sentence that says what no longer holds, or None if the assumption holds."""
        try:
            holds = self.holds()
        except Exception as error:  # whatever a changed library raises is a broken assumption
            return f"{self.library} no longer {self.what} ({type(error).__name__}: {error}); see {self.where}"
        return None if holds else f"{self.library} no longer {self.what}; see {self.where}"


ASSUMPTIONS: list[Assumption] = []


def broken_assumptions() -> list[str]:
    """Return a sentence for each assumption that does not hold for the installed libraries."""
    return [sentence for assumption in ASSUMPTIONS if (sentence := assumption.broken()) is not None]


def _assumed(library: str, what: str, where: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """Return a decorator that adds an assumption to ASSUMPTIONS; the decorated function returns whether it holds."""

    def listed(holds: Callable[[], bool]) -> Callable[[], bool]:
        ASSUMPTIONS.append(Assumption(library, what, where, holds))
        return holds

    return listed


def _llama(device: str = "cpu") -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


@_assumed("transformers", "calls the cache of a forward pass by a name we know", "cache_name")
def _names_caches() -> bool:
    model = _llama()
    block = model.model.layers[0]
    return len({cache_name(module) for module in (model, model.model, block, block.self_attn)}) == 1


@_assumed("transformers", "returns the cache under the name it takes it by", "cache_of")
@torch.no_grad()
def _returns_caches() -> bool:
    model = _llama()
    out = model(torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    generated = inspect.signature(GenerateDecoderOnlyOutput).parameters
    return type(cache_of(out)) is DynamicCache and cache_name(model) in generated


@_assumed(
    "transformers",
    "hands decoding over to a `custom_generate` function with all that is prepared, and has `_prefill`",
    "students/execution/decoding.py (Decoding)",
)
@torch.no_grad()
def _hands_decoding_over() -> bool:
    seen: list[Any] = []

    def decode(
        model: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        words_to: Any,
        **rest: Any,
    ) -> Any:
        prompt = model._prefill(input_ids, generation_config, rest)
        seen.extend([cache_of(prompt), words_to, generation_config.max_length, logits_processor])
        return input_ids

    _llama().generate(torch.ones(1, 2, dtype=torch.long), custom_generate=decode, words_to=1, max_new_tokens=3)
    return type(seen[0]) is DynamicCache and seen[1:3] == [1, 5] and callable(seen[3])


@_assumed(
    "transformers",
    "keeps caches as a list of layers with the methods that ours has",
    "students/execution/kv_cache.py (DroppedLayer)",
)
def _has_cache_layers() -> bool:
    layer = DynamicCache(config=_llama().config).layers[0]
    calls = {
        "lazy_initialization": ("key_states", "value_states"),
        "update": ("key_states", "value_states"),
        "get_mask_sizes": ("query_length",),
        "get_seq_length": (),
        "crop": ("tokens_to_remove",),
        "reset": (),
        "reorder_cache": ("beam_idx",),
        "batch_repeat_interleave": ("repeats",),
        "batch_select_indices": ("indices",),
    }
    known = {*calls, "get_max_length", "offload", "prefetch", "early_initialization"}
    asked = CacheLayerMixin.__abstractmethods__ <= known
    named = all(set(names) <= set(inspect.signature(getattr(layer, call)).parameters) for call, names in calls.items())
    return type(layer) is DynamicLayer and asked and named


@_assumed(
    "transformers",
    "takes a mask's length from the first layer of the cache",
    "students/execution/kv_cache.py (DroppedLayer.get_mask_sizes)",
)
@torch.no_grad()
def _masks_by_first_layer() -> bool:
    model, cache = _llama(), DynamicCache(config=_llama().config)
    asked = []
    layer: Any = cache.layers[0]
    sizes = layer.get_mask_sizes

    def ask(query_length: int) -> Any:
        asked.append(query_length)
        return sizes(query_length)

    layer.get_mask_sizes = ask
    tokens, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 1, 1]])
    model(tokens, attention_mask=mask, **with_cache(model, {}, cache))
    return asked == [3]


@_assumed("transformers", "looks for several sequences in a row in one place", "one_sequence_a_row")
@torch.no_grad()
def _looks_for_packed_rows() -> bool:
    tokens = torch.zeros(1, 3, dtype=torch.long, device="meta")  # reading values of which raises an error
    with one_sequence_a_row():
        return bool(_llama("meta").model(tokens, use_cache=False).last_hidden_state.shape == (1, 3, 8))


@_assumed(
    "transformers",
    "finds attention functions by the name in a module's config, and hands further keywords on to them",
    "students/execution/attention.py (route_attention)",
)
@torch.no_grad()
def _dispatches_attention() -> bool:
    model, seen = _llama(), []
    functions: Any = ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *, routed: Any = None, **rest: Any
    ) -> Any:
        seen.append((routed, query.shape, key.shape))
        return functions.get_interface("sdpa", None)(module, query, key, value, mask, **rest)

    attention = model.model.layers[0].self_attn
    ALL_ATTENTION_FUNCTIONS.register("elastic_assumption", attend)
    attention.config._attn_implementation = "elastic_assumption"
    x = torch.ones(1, 3, 8)
    places = (torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
    out = attention(x, position_embeddings=places, attention_mask=None, routed="plan")
    returned = isinstance(out, tuple) and len(out) == 2
    model(torch.zeros(1, 3, dtype=torch.long), routed="further")
    return returned and seen == [(word, (1, 2, 3, 4), (1, 2, 3, 4)) for word in ("plan", "further")]


@_assumed(
    "transformers",
    "has eager attention beside each attention module",
    "students/execution/attention.py (routed_attention)",
)
def _has_eager_attention() -> bool:
    return callable(getattr(inspect.getmodule(_llama().model.layers[0].self_attn), "eager_attention_forward", None))


@_assumed(
    "transformers",
    "rotates queries and keys by a function of each model's module",
    "students/kernels/rotary.py (Rotations)",
)
def _rotates_by_a_function() -> bool:
    return callable(getattr(inspect.getmodule(LlamaForCausalLM), "apply_rotary_pos_emb", None))


@_assumed(
    "transformers",
    "calls attention by keywords and MLPs by place, and passes hidden states from block to block",
    "students/execution (RoutedBranch, BlockGather)",
)
@torch.no_grad()
def _calls_branches() -> bool:
    """Blocks take hidden states as the first argument and return them; attention takes arguments by keyword, an MLP its
    input by position."""
    model, calls = _llama(), {}
    block = model.model.layers[0]

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[type(module)] = len(args), set(kwargs)

    for branch in (block.self_attn, block.mlp):
        branch.register_forward_pre_hook(note, with_kwargs=True)
    hidden = []
    block.register_forward_hook(lambda module, args, out: hidden.append((len(args), out)))
    model(torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    attention = {"position_embeddings", "attention_mask", cache_name(block)} <= calls[type(block.self_attn)][1]
    return (
        attention
        and calls[type(block.mlp)] == (1, set())
        and hidden[0][0] == 1
        and isinstance(hidden[0][1], torch.Tensor)
    )


@_assumed(
    "transformers",
    "recomputes a block whose `gradient_checkpointing` is set",
    "students/student.py (Student.checkpoint_blocks)",
)
def _recomputes_blocks() -> bool:
    block: Any = _llama().model.layers[0].train()
    ran = []

    def recompute(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return x

    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = recompute
    block(torch.ones(1, 2, 8))
    return ran == [1]


@_assumed("transformers", "names RMS norms and their epsilon", "students/kernels/norms.py (fuse_norms)")
def _names_norms() -> bool:
    norm = _llama().model.norm
    return type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon") and norm.weight.ndim == 1


@_assumed(
    "transformers",
    "has a decoder and image features in vision-language models",
    "students/families/vision_language.py (VisionLanguageStudent)",
)
def _has_two_towers() -> bool:
    from transformers import LlavaForConditionalGeneration, LlavaModel

    takes = inspect.signature(LlavaModel.get_image_features).parameters
    return callable(LlavaForConditionalGeneration.get_decoder) and "pixel_values" in takes


@_assumed(
    "timm", "has the attributes and arguments of blocks", "students/architectures, students/execution/image_block.py"
)
def _has_timm_blocks() -> bool:
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=2)
    attention: Any = model.blocks[0].attn
    sizes = attention.num_heads, attention.head_dim, model.num_prefix_tokens, tuple(model.patch_embed.img_size)
    masks = all("attn_mask" in inspect.signature(block.forward).parameters for block in (Block, EvaBlock))
    return sizes == (2, 4, 1, (8, 8)) and masks and "rope" in inspect.signature(EvaBlock.forward).parameters


@_assumed("torch", "counts FLOPs of products and attention", "students/flops.py, students/kernels")
def _counts_flops() -> bool:
    with FlopCounterMode(display=False) as counter:
        observed = is_in_torch_dispatch_mode()
        torch.ones(2, 3) @ torch.ones(3, 4)
    attention = sdpa_flop_count((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    return observed and counter.get_total_flops() == 48 and attention == 2 * 2 * 2 * 3 * 5 * 4


@_assumed(
    "torch",
    "packs bfloat16 weights for oneDNN with the bits of F.linear",
    "students/kernels/packing.py (PackedProduct)",
)
def _packs_linears() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=draw).bfloat16() for rows in (3, 48))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
    out = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    return torch.equal(out, F.linear(x, weight))
