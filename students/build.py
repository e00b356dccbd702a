"""Build a student: freeze a model and attach the routers and corrections of a specification to it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from students.architectures.lookup import (
    architecture_of,
    can_be_read_in_part,
    kind_of,
    record_in,
    shape_of,
    sizes_of,
    trunk_of,
    windows_of,
)
from students.architectures.record import Architecture
from students.architectures.vision_language import BOTH_WAYS, VISION_TOWERS
from students.compute import BlockShape, ComputeModel
from students.execution.mixer import gate_mixers
from students.execution.runtime import Runtime
from students.execution.wrapper import Wrapper
from students.families.image import ImageStudent, call, image_shape
from students.families.language import LanguageStudent
from students.families.vision_language import VisionLanguageStudent
from students.kernels.norms import fuse_norms, let_round
from students.places import BlockPlace, HeadPlace, InputPlace
from students.selfcheck import SelfCheck, remember, some_tokens, unchecked_use
from students.shards import are_spread
from students.spec import StudentSpec
from students.student import Student


def elasticize(model: nn.Module, spec: StudentSpec) -> Student:
    """Freeze a model, attach routers to it in place, and return it as a student. All gates start open: the student is
    its teacher.

    model: a causal language model, vision transformer or vision-language model of transformers, or a vision transformer
    of timm. ValueError for an architecture or a combination of settings that is not supported, before routers are
    attached, and if the student's outputs differ from the model's with the installed libraries (students/selfcheck.py).
    """
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise ValueError("this model has routers already; load a fresh one")
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default type is {torch.get_default_dtype()}, and routers are in torch.float32: set it back with "
            "torch.set_default_dtype (the model's own type is chosen where it is loaded)"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("this model was made within torch.inference_mode, whose tensors never learn: make it outside")
    _check_place(model)
    with torch.inference_mode(False):
        use = unchecked_use(model, spec)
        check = _self_check(model) if use else None
        student = _elasticize(model, spec).train(False)
        if are_spread(model):
            student.runtime.execution = "mask"
        if use and check:
            check.compare(student)
            remember(use)
    return student


def _self_check(model: nn.Module) -> SelfCheck:
    language = kind_of(model) in VISION_TOWERS or architecture_of(model)[0].causal
    model.requires_grad_(False).eval()  # recording gradients can change the order in which torch sums
    if language:
        assert isinstance(model, PreTrainedModel), "records of language models are for transformers' own"
        return SelfCheck(model, model, some_tokens(model), language=True)
    parameter = next(model.parameters())
    images = torch.randn(2, *image_shape(model), generator=torch.Generator().manual_seed(0)).to(parameter)
    return SelfCheck(model, partial(call, model), images, language=False)


def _elasticize(model: nn.Module, spec: StudentSpec) -> Student:
    if kind_of(model) in VISION_TOWERS and isinstance(model, PreTrainedModel):
        return _elasticize_vision_language(model, spec)
    record, blocks = architecture_of(model)
    spec = _at_sites(spec, record)
    for router in spec.routers:
        if router.of_kind.place == "input" or router.part == "vision":
            raise ValueError("image routers and `part: vision` are for vision-language models, which this is not")
    _check(spec, record)
    _check_places(spec, record, blocks)
    if not record.side_by_side:
        _check_corrections(record, blocks[0], spec)
    if record.causal:
        _check_order(model, record, blocks)
    _freeze(model)
    if record.causal and isinstance(model, PreTrainedModel):
        return _elasticize_language(model, record, blocks, spec)
    return _elasticize_image(model, record, blocks, spec)


def _at_sites(spec: StudentSpec, record: Architecture) -> StudentSpec:
    """Return the specification without optional routers of experts if there are none, and without sites that blocks
    lack, except for routers whose sites are given."""
    if not record.mixes:
        spec = replace(spec, routers=tuple(router for router in spec.routers if not router.optional))
    if record.mlp_in:
        return spec
    routers = [replace(r, sites=record.sites) if r.of_kind.over_channels and not r.sites else r for r in spec.routers]
    corrected = tuple(site for site in spec.lora.sites if site in record.sites)
    return replace(spec, routers=tuple(routers), lora=replace(spec.lora, sites=corrected))


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False).eval()
    fuse_norms(model)


def _check(spec: StudentSpec, record: Architecture) -> None:
    """Raise ValueError if a model with this record cannot have these routers or corrections in its blocks."""
    for router in spec.routers:
        if record.causal and (router.selection == "quota" or router.dropped != "return" or router.multiple != 1):
            raise ValueError(
                f"a {router.kind} router of a language model decides without looking at later tokens: `selection: "
                "quota`, `dropped: stay`, `dropped: merge` and `multiple` are for images"
            )
        if record.side_by_side and (not router.of_kind.over_blocks or spec.lora.rank):
            raise ValueError(
                "the blocks of this model have several attentions and MLPs side by side: it takes layer routers, which "
                "skip whole blocks, and no low-rank corrections"
            )
        if not record.mlp and "mlp" in router.of_kind.touches(router):
            raise ValueError(
                f"the blocks of this model run the layers of their MLP themselves, which no {router.kind} router can "
                "let a token skip: give token routers `sites: [attn]`, or use channel routers"
            )
        router.of_kind.check_model(router, record, spec)


def _elasticize_vision_language(model: PreTrainedModel, spec: StudentSpec) -> VisionLanguageStudent:
    trunk, tower = model.get_decoder(), model.base_model.get_submodule(VISION_TOWERS[kind_of(model)])
    record, blocks = architecture_of(trunk)
    _check_head(model, spec)
    language, inside = _at_sites(spec.of("language"), record), spec.of("vision")
    if inside.routers:
        tower_record, tower_blocks = architecture_of(tower)
        for router in inside.routers:
            if not router.of_kind.in_vision_tower:
                raise ValueError(
                    f"a {router.kind} router cannot stand in the vision tower of a vision-language model, whose "
                    "language model reads the states after its blocks: use token, head or expert routers"
                )
        _check(inside, tower_record)
    _check(language, record)
    _check_places(language, record, blocks)
    drops = any(r.kv == "drop" and r.of_kind.touches(r) != ("mlp",) for r in language.routers)
    if drops and kind_of(model) in BOTH_WAYS:
        raise ValueError(
            f"{type(model).__name__} attends to its prompt in both directions, and tokens without keys are packed for "
            "causal attention: use `kv: keep`"
        )
    if drops and spec.at("input") and any(windows_of(trunk)):
        raise ValueError(
            f"{type(model).__name__} has sliding windows, and a cache without dropped tokens does not know how far "
            "back they reach over image tokens that stay outside: use `kv: keep`"
        )
    if spec.at("input") and any(router.prefix for router in language.routers):
        raise ValueError("`prefix` counts tokens, of which image routers leave some out: use one or the other")
    _freeze(model)
    runtime, compute = _language_parts(model, trunk, record, blocks, language)
    vision = _elasticize_image(tower, tower_record, tower_blocks, inside) if inside.routers else None
    for router in spec.at("input"):
        router.of_kind.attach(router, InputPlace(trunk, blocks[0], trunk.config.hidden_size, spec.gains))
        gate_mixers(record, blocks, runtime)
    return VisionLanguageStudent(model, record, blocks, language, runtime, compute, trunk=trunk, vision=vision)


def _elasticize_language(
    model: PreTrainedModel, record: Architecture, blocks: list[nn.Module], spec: StudentSpec
) -> LanguageStudent:
    _check_head(model, spec)
    trunk: Any = trunk_of(model)
    return LanguageStudent(
        model, record, blocks, spec, *_language_parts(model, trunk, record, blocks, spec), trunk=trunk
    )


def _language_parts(
    model: PreTrainedModel, trunk: nn.Module, record: Architecture, blocks: list[nn.Module], spec: StudentSpec
) -> tuple[Runtime, ComputeModel]:
    """Attach routers to the blocks of a language model and to its head; return the new runtime and the costs."""
    runtime = Runtime()
    shapes = _elasticize_blocks(trunk, record, blocks, spec, runtime)
    place = HeadPlace(model, runtime, spec.gains)
    macs = math.prod(shape_of(place.head))
    for router in spec.at("head"):
        router.of_kind.attach(router, place)
    let_round(trunk, runtime)
    return runtime, ComputeModel(spec, shapes, macs, place.macs)


def _elasticize_image(
    model: nn.Module, record: Architecture, blocks: list[nn.Module], spec: StudentSpec
) -> ImageStudent:
    prefix = record.prefix or 0
    runtime = Runtime(causal=False, prefix=prefix)
    shapes = _elasticize_blocks(model, record, blocks, spec, runtime)
    compute = ComputeModel(spec, shapes, 0, 0, image=True, prefix=prefix)
    return ImageStudent(model, record, blocks, spec, runtime, compute)


def _elasticize_blocks(
    model: nn.Module, record: Architecture, blocks: list[nn.Module], spec: StudentSpec, runtime: Runtime
) -> tuple[BlockShape, ...]:
    """Attach routers and corrections to all blocks, and return their costs. A block that gets a wrapper around it is
    replaced by the wrapper in the model and in the list `blocks`."""
    parent: Any = trunk_of(model).get_submodule(record.blocks)
    shapes = []
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        place = BlockPlace(spec, record, sizes_of(model, record, number, block), runtime, number, block, last)
        shapes.append(place.elasticize())
        if place.around is not None:
            parent[number] = blocks[number] = place.around
    return tuple(shapes)


def _check_place(model: nn.Module) -> None:
    """Raise ValueError if weights are on several devices, or are offloaded and present only while a layer runs."""
    devices = {parameter.device for parameter in model.parameters()}
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())  # set by accelerate
    if len(devices) > 1 or (hooked and any(device.type == "meta" for device in devices)):
        raise ValueError(
            "this model is spread over devices or offloaded (device_map): a student reads single rows of its weights, "
            "which must lie on one device; load it without device_map, in int8 or nf4 if it is too large"
        )


def _check_places(spec: StudentSpec, record: Architecture, blocks: list[nn.Module]) -> None:
    """Raise ValueError if a router of attention or whole blocks stands in no block of a hybrid model."""
    attends = [bool(record_in(record, block).attn_in) for block in blocks]
    for router in spec.at("block") if record.hybrid else ():
        if not any(StudentSpec((router,)).in_block(*block) for block in enumerate(attends)):
            raise ValueError(
                f"of the blocks of this model only some have attention, and no {router.kind} router with `blocks: "
                f"{router.blocks}` stands in one of them"
            )


def _check_order(model: nn.Module, record: Architecture, blocks: list[nn.Module]) -> None:
    """Raise ValueError if the tokens of a language model attend to later ones, as in embedding models."""
    attentions = (block.get_submodule(record_in(record, block).attn) for block in blocks)
    if not all(getattr(attention, "is_causal", True) for attention in attentions):
        raise ValueError(
            f"{type(model).__name__} is not supported with use_bidirectional_attention, as in embedding models: "
            "tokens attend to later ones, at which the routers of a language model do not look"
        )


def _check_head(model: PreTrainedModel, spec: StudentSpec) -> None:
    """Raise ValueError if a vocab router has to read single rows of an LM head that is quantized."""
    head = model.get_output_embeddings()
    if spec.at("head") and not can_be_read_in_part(head):
        raise ValueError("the LM head of this model is quantized, and no row of it is read alone: no vocab routers")


def _check_corrections(record: Architecture, block: nn.Module, spec: StudentSpec) -> None:
    """Raise ValueError if a linear layer that is never called should get a low-rank correction: some attention modules
    of timm multiply by the layer's weight themselves, with a bias that they concatenate."""
    if record.causal or not spec.lora.rank or "attn_in" not in spec.lora.sites:
        return
    attention = block.get_submodule(record.attn)
    if getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", False):
        raise ValueError(
            "the attention of this model reads the weights of its first layer itself: no low-rank corrections there, "
            "set lora.sites to some of attn_out, mlp_in, mlp_out"
        )
